#pragma once
// Random numbers in pieces that stay in the L1 cache, for the loops that use them up.

#include <cstdint>

#include <sami_fast/random.h>

namespace sami_fast {

constexpr int64_t DRAW = 256;  // elements of a piece, a multiple of the 64 that are made at a time

// The first `count` elements of the quads from `first` on; up to DRAW elements of `out` may be written.
void draw_normals(const RandomStream& stream, uint64_t first, int64_t count, float* out);
void draw_uniforms(const RandomStream& stream, uint64_t first, int64_t count, float* out);

}  // namespace sami_fast
