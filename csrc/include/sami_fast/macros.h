#pragma once
// What differs between a CPU and a GPU compiler, and between CPUs.

#if defined(__CUDACC__)
#define SAMI_FAST_HD __host__ __device__ __forceinline__
#elif defined(__GNUC__)
#define SAMI_FAST_HD inline __attribute__((always_inline))
#else
#define SAMI_FAST_HD inline
#endif

// A function compiled for several instruction sets (AVX-512, AVX2 with FMA, plain), of which the loader takes the best that the machine has.
// Everything it calls in a loop has to be inlined into it.
#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__) && !defined(SAMI_FAST_ONE_TARGET)
#define SAMI_FAST_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default"), flatten))
#else
#define SAMI_FAST_CLONES
#endif
