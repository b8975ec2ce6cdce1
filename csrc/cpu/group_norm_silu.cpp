// Group normalisation with SiLU on the CPU: the twins of sami_fast/reference/group_norm_silu.py.
//
// A piece of work is one group of one image, or with channels innermost a few neighbouring groups. It is swept two or three times, first
// for sums and then for results, and stays in a cache after the first sweep. Two sweeps would do for the second backward too, with twelve
// sums; a first one for the means of t leaves five of them, and evaluates the sigmoid once only.
//
// A sweep walks over strips: all positions of one channel, or with channels innermost of as many channels as a register has lanes. Either
// is a row of registers with one value of a parameter per lane. Where the last register would not be full, it begins earlier and overlaps
// the one before; the lanes they share count once. So a register must not be wider than the row.

#include <sami_fast/group_norm.h>

#include <array>
#include <cmath>
#include <vector>

#include "../layout.h"
#include "common.h"
#include "pack.h"

#define INLINE __attribute__((always_inline))

namespace sami_fast {
namespace {

constexpr int64_t BLOCK = 32;            // registers that are summed in T before their sum is added to one in double precision
constexpr int64_t CHANNELS = 16;         // of a piece with channels innermost, at least, where there are as many
constexpr int64_t ELEMENTS = 1 << 13;    // that are worth a thread
constexpr int64_t VALUES = 7, SUMS = 5;  // per channel of a piece, at most
constexpr int64_t WIDEST = 64;           // bytes of a register, at most

// How x lies in memory, and how it is cut.
struct Plan {
  int64_t batch, channels, positions, groups, group_size, groups_per_piece;
  bool channels_last;
};

// Some groups of one image. The offset of their first element, their first channel, and the first group as a row of mean and rstd.
struct Piece {
  int64_t first, image, channel, row, groups, channels;
};

// A tensor that is swept. An absent one does not move: it is read as zeros, or written, always at the same register's worth of memory.
template <class T>
struct Stream {
  T* data;
  bool moves;

  SAMI_FAST_HD T* at(int64_t offset) const { return data + (moves ? offset : 0); }
};

// The arguments of all four functions, each of which uses its own. Tensors lie as the plan says, parameters have one value per channel.
template <class T>
struct Call {
  Plan plan;
  bool silu;
  double norm_eps;
  Stream<const T> x, grad_y, t, y_bar;
  const T *weight, *bias, *ggweight, *ggbias;
  const T *mean, *rstd;             // [B, G]
  T *new_mean, *new_rstd;           // [B, G]
  Stream<T> y, grad_x;              // or the tangent of y, gg_y; x_bar
  double *grad_weight, *grad_bias;  // [B, C]
};

// A row of `count` registers, `stride` elements apart. With channels innermost, lane l belongs to channel `channel` + l of the piece, and
// the first `skip` lanes of every register have been done by the strip before. Else the row holds the positions of `channel`; where `skip`
// is not 0, one more register ends where the row ends, and its first `skip` lanes have been done by the register before.
struct Strip {
  int64_t offset, stride, count, skip, channel;
};

// How a piece is swept.
template <class P, bool CHANNELS_LAST, class T>
struct Walk {
  const Plan& plan;
  const Piece& piece;

  template <class F>
  SAMI_FAST_HD void strips(const F& f) const {
    constexpr int64_t N = P::lanes;
    if constexpr (CHANNELS_LAST) {
      for (int64_t c = 0; c < piece.channels; c += N) {
        const int64_t start = std::min(c, piece.channels - N);
        f(Strip{piece.first + start, plan.channels, plan.positions, c - start, start});
      }
    } else {
      const int64_t count = plan.positions / N, rest = plan.positions - count * N;
      for (int64_t c = 0; c < piece.channels; ++c) f(Strip{piece.first + c * plan.positions, N, count, rest > 0 ? N - rest : 0, c});
    }
  }

  // One value per lane, from one per channel of the piece.
  SAMI_FAST_HD P lanes(const Strip& strip, const T* values) const {
    if constexpr (CHANNELS_LAST) {
      return P::load(values + strip.channel);
    } else {
      return P(values[strip.channel]);
    }
  }

  // body(in, out, sums) for every register of a strip, with a pack for each stream and each sum. Sum k goes to row k of `totals`.
  template <size_t SUMS, size_t INPUTS, size_t OUTPUTS, class Body>
  SAMI_FAST_HD void sweep(
      const Strip& strip,
      const std::array<Stream<const T>, INPUTS>& inputs,
      const std::array<Stream<T>, OUTPUTS>& outputs,
      double* totals,
      const Body& body) const {
    std::array<P, INPUTS> in;
    std::array<P, OUTPUTS> out;
    std::array<P, SUMS> sums;
    const auto step = [&](int64_t offset) INLINE {
      for (size_t k = 0; k < INPUTS; ++k) in[k] = P::load(inputs[k].at(offset));
      body(in, out, sums);
      for (size_t k = 0; k < OUTPUTS; ++k) out[k].store(outputs[k].at(offset));
    };
    // The same for a register whose first `skip` lanes have been done: their results and sums stay.
    const auto overlapping_step = [&](int64_t offset) INLINE {
      const std::array<P, SUMS> before = sums;
      for (size_t k = 0; k < INPUTS; ++k) in[k] = P::load(inputs[k].at(offset));
      body(in, out, sums);
      for (size_t k = 0; k < OUTPUTS; ++k) P::join(strip.skip, P::load(outputs[k].at(offset)), out[k]).store(outputs[k].at(offset));
      for (size_t k = 0; k < SUMS; ++k) sums[k] = P::join(strip.skip, before[k], sums[k]);
    };

    int64_t done = 0, offset = strip.offset;
    do {
      const int64_t end = std::min(done + BLOCK, strip.count);
      for (size_t k = 0; k < SUMS; ++k) sums[k] = P(T(0));
      if (CHANNELS_LAST && strip.skip > 0) {
        for (; done < end; ++done, offset += strip.stride) overlapping_step(offset);
      } else {
        for (; done < end; ++done, offset += strip.stride) step(offset);
        if (strip.skip > 0 && done == strip.count) overlapping_step(offset - strip.skip);
      }
      for (size_t k = 0; k < SUMS; ++k) add(sums[k], totals + k * piece.channels + strip.channel);
    } while (done < strip.count);
  }

 private:
  static SAMI_FAST_HD void add(const P& sum, double* total) {
    if constexpr (CHANNELS_LAST) {
      T each[P::lanes];
      sum.store(each);
      for (int64_t l = 0; l < P::lanes; ++l) total[l] += static_cast<double>(each[l]);
    } else {
      *total += static_cast<double>(sum.sum());
    }
  }
};

// Scratch memory of a piece: rows of one value per channel.
template <class T>
struct Rows {
  int64_t channels;
  T* data;

  SAMI_FAST_HD T* operator[](int64_t k) const { return data + k * channels; }
};

// The mean over a group, from sum(c), the sum over channel c.
template <class F>
SAMI_FAST_HD double group_mean(const Plan& plan, int64_t group, const F& sum) {
  double total = 0;
  for (int64_t c = group * plan.group_size; c < (group + 1) * plan.group_size; ++c) total += sum(c);
  const int64_t count = plan.group_size * plan.positions;
  return count > 0 ? total / static_cast<double>(count) : 0.0;
}

template <class T>
SAMI_FAST_HD void fill_group(const Plan& plan, int64_t group, T* row, double value) {
  for (int64_t c = group * plan.group_size; c < (group + 1) * plan.group_size; ++c) row[c] = static_cast<T>(value);
}

template <class T>
SAMI_FAST_HD void fill_statistics(const Call<T>& call, const Piece& piece, T* mean, T* rstd) {
  for (int64_t g = 0; g < piece.groups; ++g) {
    fill_group(call.plan, g, mean, call.mean[piece.row + g]);
    fill_group(call.plan, g, rstd, call.rstd[piece.row + g]);
  }
}

// Calls f with the flag as a type, so that sweeps do not branch on it.
template <class F>
SAMI_FAST_HD void with_flag(bool flag, const F& f) {
  flag ? f(std::true_type{}) : f(std::false_type{});
}

template <class P, bool CHANNELS_LAST, class T>
SAMI_FAST_HD void forward(const Call<T>& call, const Piece& piece, const Rows<T>& rows, const Rows<double>& totals) {
  const Plan& plan = call.plan;
  const Walk<P, CHANNELS_LAST, T> walk{plan, piece};
  const std::array inputs{call.x};
  const std::array<Stream<T>, 0> nothing{};
  T *mean = rows[0], *rstd = rows[1];
  const T *weight = call.weight + piece.channel, *bias = call.bias + piece.channel;

  walk.strips([&](const Strip& strip) INLINE {
    walk.template sweep<1>(strip, inputs, nothing, totals[0], [](auto& in, auto&, auto& sums) INLINE { sums[0] += in[0]; });
  });
  for (int64_t g = 0; g < piece.groups; ++g) fill_group(plan, g, mean, group_mean(plan, g, [&](int64_t c) INLINE { return totals[0][c]; }));

  // The variance takes a second sweep: E[x^2] - mean^2 would cancel. The mean deviation corrects for the rounding of the mean.
  walk.strips([&](const Strip& strip) INLINE {
    const P m = walk.lanes(strip, mean);
    walk.template sweep<2>(strip, inputs, nothing, totals[1], [&](auto& in, auto&, auto& sums) INLINE {
      const P d = in[0] - m;
      sums[0] += d;
      sums[1] += d * d;
    });
  });
  for (int64_t g = 0; g < piece.groups; ++g) {
    const double d = group_mean(plan, g, [&](int64_t c) INLINE { return totals[1][c]; });
    const double variance = group_mean(plan, g, [&](int64_t c) INLINE { return totals[2][c]; }) - d * d;
    // 0 where squares overflow T, as in torch.
    fill_group(plan, g, rstd, 1.0 / std::sqrt(std::max(variance, 0.0) + call.norm_eps));
    call.new_mean[piece.row + g] = mean[g * plan.group_size];
    call.new_rstd[piece.row + g] = rstd[g * plan.group_size];
  }

  with_flag(call.silu, [&](auto silu) INLINE {
    walk.strips([&](const Strip& strip) INLINE {
      const P m = walk.lanes(strip, mean), rho = walk.lanes(strip, rstd);
      const P gamma = walk.lanes(strip, weight), beta = walk.lanes(strip, bias);
      walk.template sweep<0>(strip, inputs, std::array{call.y}, totals[0], [&](auto& in, auto& out, auto&) INLINE {
        out[0] = activation<silu.value>(gamma * normalise(in[0], m, rho) + beta);
      });
    });
  });
}

template <class P, bool CHANNELS_LAST, class T>
SAMI_FAST_HD void backward(const Call<T>& call, const Piece& piece, const Rows<T>& rows, const Rows<double>& totals) {
  const Plan& plan = call.plan;
  const Walk<P, CHANNELS_LAST, T> walk{plan, piece};
  T *mean = rows[0], *rstd = rows[1], *a = rows[2], *b = rows[3];
  const T *weight = call.weight + piece.channel, *bias = call.bias + piece.channel;
  fill_statistics(call, piece, mean, rstd);

  // Between the sweeps, grad_x holds w.
  const Stream<const T> w{call.grad_x.data, call.grad_x.moves};
  const std::array inputs{call.x, call.grad_y}, later_inputs{call.x, w};
  const std::array outputs{call.grad_x};
  with_flag(call.silu, [&](auto silu) INLINE {
    walk.strips([&](const Strip& strip) INLINE {
      const P m = walk.lanes(strip, mean), rho = walk.lanes(strip, rstd);
      const P gamma = walk.lanes(strip, weight), beta = walk.lanes(strip, bias);
      walk.template sweep<2>(strip, inputs, outputs, totals[0], [&](auto& in, auto& out, auto& sums) INLINE {
        const P x_hat = normalise(in[0], m, rho);
        out[0] = in[1] * activation_slope<silu.value>(gamma * x_hat + beta);
        sums[0] += out[0];
        sums[1] += out[0] * x_hat;
      });
    });
  });

  const int64_t place = piece.image * plan.channels + piece.channel;
  for (int64_t c = 0; c < piece.channels; ++c) {
    call.grad_bias[place + c] = totals[0][c];
    call.grad_weight[place + c] = totals[1][c];
  }
  for (int64_t g = 0; g < piece.groups; ++g) {
    fill_group(plan, g, a, group_mean(plan, g, [&](int64_t c) INLINE { return weight[c] * totals[0][c]; }));
    fill_group(plan, g, b, group_mean(plan, g, [&](int64_t c) INLINE { return weight[c] * totals[1][c]; }));
  }

  walk.strips([&](const Strip& strip) INLINE {
    const P m = walk.lanes(strip, mean), rho = walk.lanes(strip, rstd), gamma = walk.lanes(strip, weight);
    const P mean_u = walk.lanes(strip, a), mean_ux = walk.lanes(strip, b);
    walk.template sweep<0>(strip, later_inputs, outputs, totals[0], [&](auto& in, auto& out, auto&) INLINE {
      out[0] = norm_backward(gamma * in[1], normalise(in[0], m, rho), rho, mean_u, mean_ux);
    });
  });
}

// c = M[t] and e = M[t x_hat]
template <class P, bool CHANNELS_LAST, class T>
SAMI_FAST_HD void tangent_means(
    const Call<T>& call, const Piece& piece, const T* mean, const T* rstd, T* c, T* e, const Rows<double>& totals) {
  const Walk<P, CHANNELS_LAST, T> walk{call.plan, piece};
  const std::array inputs{call.x, call.t};
  const std::array<Stream<T>, 0> nothing{};
  walk.strips([&](const Strip& strip) INLINE {
    const P m = walk.lanes(strip, mean), rho = walk.lanes(strip, rstd);
    walk.template sweep<2>(strip, inputs, nothing, totals[0], [&](auto& in, auto&, auto& sums) INLINE {
      sums[0] += in[1];
      sums[1] += in[1] * normalise(in[0], m, rho);
    });
  });
  for (int64_t g = 0; g < piece.groups; ++g) {
    fill_group(call.plan, g, c, group_mean(call.plan, g, [&](int64_t k) INLINE { return totals[0][k]; }));
    fill_group(call.plan, g, e, group_mean(call.plan, g, [&](int64_t k) INLINE { return totals[1][k]; }));
  }
}

template <class P, bool CHANNELS_LAST, class T>
SAMI_FAST_HD void tangent(const Call<T>& call, const Piece& piece, const Rows<T>& rows, const Rows<double>& totals) {
  const Walk<P, CHANNELS_LAST, T> walk{call.plan, piece};
  T *mean = rows[0], *rstd = rows[1], *c = rows[2], *e = rows[3];
  const T *weight = call.weight + piece.channel, *bias = call.bias + piece.channel;
  const std::array inputs{call.x, call.t};
  const std::array outputs{call.y};
  fill_statistics(call, piece, mean, rstd);
  tangent_means<P, CHANNELS_LAST>(call, piece, mean, rstd, c, e, totals);

  with_flag(call.silu, [&](auto silu) INLINE {
    walk.strips([&](const Strip& strip) INLINE {
      const P m = walk.lanes(strip, mean), rho = walk.lanes(strip, rstd), mean_t = walk.lanes(strip, c), mean_tx = walk.lanes(strip, e);
      const P gamma = walk.lanes(strip, weight), beta = walk.lanes(strip, bias);
      walk.template sweep<0>(strip, inputs, outputs, totals[0], [&](auto& in, auto& out, auto&) INLINE {
        const P x_hat = normalise(in[0], m, rho);
        out[0] = activation_slope<silu.value>(gamma * x_hat + beta) * (gamma * norm_tangent(in[1], x_hat, rho, mean_t, mean_tx));
      });
    });
  });
}

template <class P, bool CHANNELS_LAST, class T>
SAMI_FAST_HD void second_backward(const Call<T>& call, const Piece& piece, const Rows<T>& rows, const Rows<double>& totals) {
  const Plan& plan = call.plan;
  const Walk<P, CHANNELS_LAST, T> walk{plan, piece};
  T *mean = rows[0], *rstd = rows[1], *c = rows[2], *e = rows[3];
  const T *weight = call.weight + piece.channel, *bias = call.bias + piece.channel;
  const T *ggweight = call.ggweight + piece.channel, *ggbias = call.ggbias + piece.channel;
  fill_statistics(call, piece, mean, rstd);
  tangent_means<P, CHANNELS_LAST>(call, piece, mean, rstd, c, e, totals);
  for (int64_t k = 0; k < SUMS * piece.channels; ++k) totals[0][k] = 0;

  // Between the sweeps, grad_x holds the core of x_bar.
  const Stream<const T> core{call.grad_x.data, call.grad_x.moves};
  const std::array inputs{call.x, call.t, call.grad_y, call.y_bar};
  const std::array later_inputs{call.x, call.t, core};
  const std::array outputs{call.y, call.grad_x}, later_outputs{call.grad_x};
  with_flag(call.silu, [&](auto silu) INLINE {
    walk.strips([&](const Strip& strip) INLINE {
      const P m = walk.lanes(strip, mean), rho = walk.lanes(strip, rstd), mean_t = walk.lanes(strip, c), mean_tx = walk.lanes(strip, e);
      const P gamma = walk.lanes(strip, weight), beta = walk.lanes(strip, bias);
      const P dd_gamma = walk.lanes(strip, ggweight), dd_beta = walk.lanes(strip, ggbias);
      walk.template sweep<SUMS>(strip, inputs, outputs, totals[0], [&](auto& in, auto& out, auto& sums) INLINE {
        const P x_hat = normalise(in[0], m, rho), x_dot = norm_tangent(in[1], x_hat, rho, mean_t, mean_tx);
        const auto at = SecondBackward<P>::template make<silu.value>(x_hat, x_dot, in[2], in[3], gamma, beta, dd_gamma, dd_beta);
        out[0] = at.gg_y;
        out[1] = at.core(gamma, dd_gamma, rho, mean_tx);
        sums[0] += at.w;
        sums[1] += at.w * x_hat;
        sums[2] += at.w * x_dot;
        sums[3] += at.h_bar;
        sums[4] += at.h_bar * x_hat;
      });
    });
  });

  const int64_t place = piece.image * plan.channels + piece.channel;
  for (int64_t k = 0; k < piece.channels; ++k) {
    call.grad_bias[place + k] = totals[3][k];
    call.grad_weight[place + k] = totals[2][k] + totals[4][k];
  }
  T *constant = rows[4], *t_factor = rows[5], *x_factor = rows[6];
  for (int64_t g = 0; g < piece.groups; ++g) {
    const int64_t first = g * plan.group_size;
    const auto mean_of = [&](const T* factor, const double* sum) INLINE {
      return group_mean(plan, g, [&](int64_t k) INLINE { return factor[k] * sum[k]; });
    };
    const double a = mean_of(weight, totals[0]), b = mean_of(weight, totals[1]), r = mean_of(weight, totals[2]);
    const double p0 = mean_of(weight, totals[3]) + mean_of(ggweight, totals[0]);
    const double p1 = mean_of(weight, totals[4]) + mean_of(ggweight, totals[1]);
    const auto group = SecondBackwardGroup<double>::make(rstd[first], a, b, c[first], e[first], r, p0, p1);
    fill_group(plan, g, constant, group.constant);
    fill_group(plan, g, t_factor, group.t_factor);
    fill_group(plan, g, x_factor, group.x_factor);
  }

  walk.strips([&](const Strip& strip) INLINE {
    const P m = walk.lanes(strip, mean), rho = walk.lanes(strip, rstd), mean_t = walk.lanes(strip, c);
    const SecondBackwardGroup<P> group{
        rho, mean_t, walk.lanes(strip, constant), walk.lanes(strip, t_factor), walk.lanes(strip, x_factor)};
    walk.template sweep<0>(strip, later_inputs, later_outputs, totals[0], [&](auto& in, auto& out, auto&) INLINE {
      out[0] = group.x_bar(in[2], normalise(in[0], m, rho), in[1]);
    });
  });
}

// The four functions for one number type, layout and width of registers
template <class T>
struct Functions {
  using Function = void (*)(const Call<T>&, const Piece&, const Rows<T>&, const Rows<double>&);
  Function forward, backward, tangent, second_backward;
};

#define FUNCTIONS(NAME, TARGET)                                                                                                           \
  template <class T, int BYTES, bool CHANNELS_LAST>                                                                                       \
  struct NAME {                                                                                                                           \
    using P = Pack<T, BYTES>;                                                                                                             \
    TARGET static void fwd(const Call<T>& call, const Piece& piece, const Rows<T>& rows, const Rows<double>& totals) {                    \
      forward<P, CHANNELS_LAST>(call, piece, rows, totals);                                                                               \
    }                                                                                                                                     \
    TARGET static void bwd(const Call<T>& call, const Piece& piece, const Rows<T>& rows, const Rows<double>& totals) {                    \
      backward<P, CHANNELS_LAST>(call, piece, rows, totals);                                                                              \
    }                                                                                                                                     \
    TARGET static void tan(const Call<T>& call, const Piece& piece, const Rows<T>& rows, const Rows<double>& totals) {                    \
      tangent<P, CHANNELS_LAST>(call, piece, rows, totals);                                                                               \
    }                                                                                                                                     \
    TARGET static void bwd_bwd(const Call<T>& call, const Piece& piece, const Rows<T>& rows, const Rows<double>& totals) {                \
      second_backward<P, CHANNELS_LAST>(call, piece, rows, totals);                                                                       \
    }                                                                                                                                     \
    static constexpr Functions<T> functions{fwd, bwd, tan, bwd_bwd};                                                                      \
  };

FUNCTIONS(Plain, SAMI_FAST_PLAIN)
#if defined(SAMI_FAST_X86_SETS)
FUNCTIONS(Avx2, SAMI_FAST_AVX2)
FUNCTIONS(Avx512, SAMI_FAST_AVX512)
#endif

// Those for the widest registers that the machine has and a row fills.
template <class T, bool CHANNELS_LAST>
const Functions<T>& widest(int64_t row) {
  const int64_t bytes = row * static_cast<int64_t>(sizeof(T));
#if defined(SAMI_FAST_X86_SETS)
  static const int machine = __builtin_cpu_supports("x86-64-v4") ? 64 : __builtin_cpu_supports("x86-64-v3") ? 32 : 16;
  if (machine >= 64 && bytes >= 64) return Avx512<T, 64, CHANNELS_LAST>::functions;
  if (machine >= 32 && bytes >= 32) return Avx2<T, 32, CHANNELS_LAST>::functions;
#endif
  return bytes >= 16 ? Plain<T, 16, CHANNELS_LAST>::functions : Plain<T, sizeof(T), CHANNELS_LAST>::functions;
}

template <class T>
const Functions<T>& functions(const Plan& plan) {
  if (plan.channels_last) return widest<T, true>(plan.groups_per_piece * plan.group_size);
  return widest<T, false>(plan.positions);
}

// Runs a function over all pieces. They do not depend on the number of threads, and each writes to places of its own.
template <class T>
void run(const Call<T>& call, typename Functions<T>::Function function) {
  const Plan& plan = call.plan;
  if (plan.channels == 0) return;
  // The last piece of an image takes the groups that are left over.
  const int64_t pieces = plan.groups / plan.groups_per_piece;
  const int64_t most = (plan.groups_per_piece + plan.groups % plan.groups_per_piece) * plan.group_size;
  parallel(plan.batch * pieces, ELEMENTS / (1 + most * plan.positions), [&](int64_t begin, int64_t end) {
    std::vector<T> values(VALUES * most), zeros(WIDEST / sizeof(T)), dropped(WIDEST / sizeof(T));
    std::vector<double> totals(SUMS * most);
    Call<T> here = call;
    if (here.y_bar.data == nullptr) here.y_bar = {zeros.data(), false};
    if (here.y.data == nullptr) here.y = {dropped.data(), false};
    for (int64_t k = begin; k < end; ++k) {
      const int64_t image = k / pieces, group = k % pieces * plan.groups_per_piece, channel = group * plan.group_size;
      const int64_t groups = (k + 1) % pieces == 0 ? plan.groups - group : plan.groups_per_piece;
      const int64_t first = image * plan.channels * plan.positions + channel * (plan.channels_last ? 1 : plan.positions);
      const Piece piece{first, image, channel, image * plan.groups + group, groups, groups * plan.group_size};
      std::fill(totals.begin(), totals.end(), 0.0);
      function(here, piece, {piece.channels, values.data()}, {piece.channels, totals.data()});
    }
  });
}

// Checks and tensors around it

Tensor as_type(const Tensor& value, ScalarType type) { return value.scalar_type() == type ? value : torch::stable::to(value, type); }

// x in the type of the arithmetic, and in a layout that is swept in place.
Tensor dense(const Tensor& x) {
  const ScalarType type = x.scalar_type();
  const Tensor wide = as_type(x, type == ScalarType::Double ? type : ScalarType::Float);
  return wide.is_contiguous() || is_channels_last(wide) ? wide : torch::stable::contiguous(wide);
}

// value in the type and layout of x, which is dense.
Tensor like(const char* name, const Tensor& value, const Tensor& x) {
  STD_TORCH_CHECK(value.dim() == x.dim(), name, ": not the shape of x");
  for (int64_t d = 0; d < x.dim(); ++d) STD_TORCH_CHECK(value.size(d) == x.size(d), name, ": not the shape of x");
  if (value.scalar_type() == x.scalar_type() && (x.is_contiguous() ? value.is_contiguous() : is_channels_last(value))) return value;
  Tensor copy = torch::stable::empty_like(x);
  return torch::stable::copy_(copy, value), copy;
}

// A parameter, or statistics, in the type of x.
Tensor row(const char* name, const Tensor& value, const Tensor& x, int64_t size) {
  STD_TORCH_CHECK(value.numel() == size, name, ": expected ", size, " values, found ", value.numel());
  return torch::stable::contiguous(as_type(value, x.scalar_type()));
}

Plan plan_of(const Tensor& x, int64_t groups) {
  STD_TORCH_CHECK(x.dim() >= 2, "x: expected [B, C, ...]");
  STD_TORCH_CHECK(groups > 0 && x.size(1) % groups == 0, "num_groups: expected a divisor of ", x.size(1), ", found ", groups);
  Plan plan{x.size(0), x.size(1), 1, groups, x.size(1) / groups, 1, false};
  for (int64_t d = 2; d < x.dim(); ++d) plan.positions *= x.size(d);
  plan.channels_last = plan.positions == 1 || !x.is_contiguous();
  if (plan.channels_last && plan.group_size > 0) plan.groups_per_piece = std::min(groups, (CHANNELS + plan.group_size - 1) / plan.group_size);
  return plan;
}

// The sums of the images one after the other, in the type of the parameter.
Tensor over_images(const Plan& plan, const std::vector<double>& sums, const Tensor& parameter) {
  Tensor result = torch::stable::new_empty(parameter, {plan.channels}, ScalarType::Double);
  double* out = output<double>(result);
  for (int64_t c = 0; c < plan.channels; ++c) {
    double sum = 0;
    for (int64_t b = 0; b < plan.batch; ++b) sum += sums[b * plan.channels + c];
    out[c] = sum;
  }
  return as_type(result, parameter.scalar_type());
}

template <class T>
Stream<const T> reads(const Tensor& tensor) {
  return {input<T>(tensor), true};
}

template <class T>
Stream<T> writes(Tensor& tensor) {
  return {output<T>(tensor), true};
}

// What all but the forward start from.
struct Saved {
  Tensor x;
  Plan plan;
  Tensor weight, bias, mean, rstd;

  Saved(const Tensor& x, const Tensor& weight, const Tensor& bias, const Tensor& mean, const Tensor& rstd, int64_t num_groups)
      : x(dense(x)),
        plan(plan_of(this->x, num_groups)),
        weight(row("weight", weight, this->x, plan.channels)),
        bias(row("bias", bias, this->x, plan.channels)),
        mean(row("mean", mean, this->x, plan.batch * num_groups)),
        rstd(row("rstd", rstd, this->x, plan.batch * num_groups)) {}

  template <class T>
  Call<T> call(bool silu) const {
    Call<T> call{plan, silu};
    call.x = reads<T>(x);
    call.weight = input<T>(weight), call.bias = input<T>(bias);
    call.mean = input<T>(mean), call.rstd = input<T>(rstd);
    return call;
  }
};

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_fwd(
    const Tensor& x, const Tensor& weight, const Tensor& bias, int64_t num_groups, double norm_eps, bool silu) {
  const Tensor features = dense(x);
  const Plan plan = plan_of(features, num_groups);
  const Tensor gamma = row("weight", weight, features, plan.channels), beta = row("bias", bias, features, plan.channels);
  Tensor y = torch::stable::empty_like(features);
  const auto statistics = [&] { return torch::stable::new_zeros(features, {plan.batch, plan.groups}); };  // they stay zero where C is 0
  Tensor mean = statistics(), rstd = statistics();
  dispatch("group_norm_silu_fwd", features, [&](auto number) {
    using T = decltype(number);
    Call<T> call{plan, silu, norm_eps};
    call.x = reads<T>(features), call.y = writes<T>(y);
    call.weight = input<T>(gamma), call.bias = input<T>(beta);
    call.new_mean = output<T>(mean), call.new_rstd = output<T>(rstd);
    run(call, functions<T>(plan).forward);
  });
  return {as_type(y, x.scalar_type()), mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> group_norm_silu_bwd(
    const Tensor& grad_y,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& mean,
    const Tensor& rstd,
    int64_t num_groups,
    bool silu) {
  const Saved saved(x, weight, bias, mean, rstd, num_groups);
  const Tensor g = like("grad_y", grad_y, saved.x);
  Tensor grad_x = torch::stable::empty_like(saved.x);
  std::vector<double> grad_weight(saved.plan.batch * saved.plan.channels), grad_bias(grad_weight.size());
  dispatch("group_norm_silu_bwd", saved.x, [&](auto number) {
    using T = decltype(number);
    Call<T> call = saved.call<T>(silu);
    call.grad_y = reads<T>(g), call.grad_x = writes<T>(grad_x);
    call.grad_weight = grad_weight.data(), call.grad_bias = grad_bias.data();
    run(call, functions<T>(saved.plan).backward);
  });
  return {as_type(grad_x, x.scalar_type()), over_images(saved.plan, grad_weight, weight), over_images(saved.plan, grad_bias, bias)};
}

Tensor group_norm_silu_tan(
    const Tensor& tx,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& mean,
    const Tensor& rstd,
    int64_t num_groups,
    bool silu) {
  const Saved saved(x, weight, bias, mean, rstd, num_groups);
  const Tensor t = like("tx", tx, saved.x);
  Tensor ty = torch::stable::empty_like(saved.x);
  dispatch("group_norm_silu_tan", saved.x, [&](auto number) {
    using T = decltype(number);
    Call<T> call = saved.call<T>(silu);
    call.t = reads<T>(t), call.y = writes<T>(ty);
    run(call, functions<T>(saved.plan).tangent);
  });
  return as_type(ty, x.scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor> group_norm_silu_bwd_bwd(
    const Tensor& ggx,
    const std::optional<Tensor>& ggweight,
    const std::optional<Tensor>& ggbias,
    const Tensor& grad_y,
    const Tensor& x,
    const Tensor& weight,
    const Tensor& bias,
    const Tensor& mean,
    const Tensor& rstd,
    int64_t num_groups,
    bool silu,
    const std::optional<Tensor>& y_bar,
    bool need_tangent) {
  const Saved saved(x, weight, bias, mean, rstd, num_groups);
  const Plan& plan = saved.plan;
  const Tensor t = like("ggx", ggx, saved.x), g = like("grad_y", grad_y, saved.x);
  const Tensor primal = y_bar ? like("y_bar", *y_bar, saved.x) : Tensor();
  const Tensor zeros = ggweight && ggbias ? Tensor() : torch::stable::new_zeros(saved.weight, {plan.channels});
  const Tensor dd_gamma = ggweight ? row("ggweight", *ggweight, saved.x, plan.channels) : zeros;
  const Tensor dd_beta = ggbias ? row("ggbias", *ggbias, saved.x, plan.channels) : zeros;
  Tensor x_bar = torch::stable::empty_like(saved.x);
  Tensor gg_y = need_tangent ? torch::stable::empty_like(saved.x) : torch::stable::new_empty(saved.x, {0});
  std::vector<double> weight_bar(plan.batch * plan.channels), bias_bar(weight_bar.size());
  dispatch("group_norm_silu_bwd_bwd", saved.x, [&](auto number) {
    using T = decltype(number);
    Call<T> call = saved.call<T>(silu);
    call.t = reads<T>(t), call.grad_y = reads<T>(g), call.grad_x = writes<T>(x_bar);
    if (y_bar) call.y_bar = reads<T>(primal);
    if (need_tangent) call.y = writes<T>(gg_y);
    call.ggweight = input<T>(dd_gamma), call.ggbias = input<T>(dd_beta);
    call.grad_weight = weight_bar.data(), call.grad_bias = bias_bar.data();
    run(call, functions<T>(plan).second_backward);
  });
  const ScalarType type = x.scalar_type();
  return {as_type(gg_y, type), as_type(x_bar, type), over_images(plan, weight_bar, weight), over_images(plan, bias_bar, bias)};
}

}  // namespace
}  // namespace sami_fast

STABLE_TORCH_LIBRARY_IMPL(sami_fast_C, CPU, m) {
  m.impl("group_norm_silu_fwd", TORCH_BOX(&sami_fast::group_norm_silu_fwd));
  m.impl("group_norm_silu_bwd", TORCH_BOX(&sami_fast::group_norm_silu_bwd));
  m.impl("group_norm_silu_tan", TORCH_BOX(&sami_fast::group_norm_silu_tan));
  m.impl("group_norm_silu_bwd_bwd", TORCH_BOX(&sami_fast::group_norm_silu_bwd_bwd));
}
