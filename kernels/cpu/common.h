// How the kernels of the CPU are made batch-invariant, and what they all share: dtypes, tensors, threads, vectors, exp.
//
// * The order of every sum is a function of the column index alone. Tiles, vectors and threads only choose which
//   *independent* sums are computed together.
// * Every operation has one result: IEEE +, -, *, /, sqrt, and fused multiply-adds that the source asks for by name
//   (`fma`). The compiler may not contract a * b + c on its own (-ffp-contract=off): it would do so in the body of a
//   vectorised loop and not in its tail, or in one instance of a template and not in another. exp and erfc are written
//   out here; other functions are scalar calls of libm inside a NOINLINE function, so the compiler cannot replace them
//   by a vector variant in the body of a loop.
// * A NaN result is always the same NaN. Which of two NaNs an instruction returns depends on the order of its operands,
//   and the compiler chooses that order.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <initializer_list>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>
#endif

#define INLINE static inline __attribute__((always_inline))
#define NOINLINE static __attribute__((noinline))
#define EXPORT extern "C" __attribute__((visibility("default")))

namespace {

using int64 = std::int64_t;
constexpr double INF = std::numeric_limits<double>::infinity();
constexpr int64 CHUNK = 1024;  // doubles that a loop over a row holds at a time

// ---------------------------------------------------------------------------------------------------------------------
// Dtypes

struct bf16 { std::uint16_t bits; };
struct half { std::uint16_t bits; };

enum Dtype : int64 { FLOAT64, FLOAT32, FLOAT16, BFLOAT16, BOOL };

template <class F>
void with_type(int64 dtype, F f) {
  switch (dtype) {
    case FLOAT64: return f(double{});
    case FLOAT32: return f(float{});
    case FLOAT16: return f(half{});
    case BFLOAT16: return f(bf16{});
  }
}

template <class To, class From>
INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast keeps the size");
  To to;
  std::memcpy(&to, &from, sizeof to);
  return to;
}

INLINE double widen(double x) { return x; }
INLINE float widen(float x) { return x; }
INLINE float widen(bf16 x) { return bit_cast<float>(std::uint32_t(x.bits) << 16); }

INLINE float widen(half x) {
  std::uint32_t magnitude = std::uint32_t(x.bits & 0x7fff) << 13, sign = std::uint32_t(x.bits & 0x8000) << 16;
  float rebiased = bit_cast<float>(magnitude) * 0x1p112f;  // exact, for subnormals too
  std::uint32_t special = (x.bits & 0x7fff) >= 0x7c00 ? 0x7f800000u : 0u;
  return bit_cast<float>(bit_cast<std::uint32_t>(rebiased) | special | sign);
}

// narrow<T>(x) rounds once, to nearest even.
template <class T> struct Narrow;

template <> struct Narrow<double> {
  INLINE double from(double x) { return x != x ? std::numeric_limits<double>::quiet_NaN() : x; }
};

template <> struct Narrow<float> {
  INLINE float from(double x) { return x != x ? std::numeric_limits<float>::quiet_NaN() : float(x); }
};

// Rounds to the neighbour with an odd last bit, unless x is a float. A second rounding to 16 bits then knows on which
// side of a tie x was, and gives the result of one rounding.
INLINE float round_to_odd(double x) {
  float nearest = float(x);
  double back = nearest;
  std::uint32_t bits = bit_cast<std::uint32_t>(nearest);
  std::uint32_t other = std::fabs(back) < std::fabs(x) ? bits + 1 : bits - 1;
  return bit_cast<float>(back == x || x != x || (bits & 1) ? bits : other);
}

template <> struct Narrow<bf16> {
  INLINE bf16 from(float x) {
    std::uint32_t bits = bit_cast<std::uint32_t>(x);
    std::uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    return {std::uint16_t(x != x ? 0x7fc0u : rounded)};
  }
  INLINE bf16 from(double x) { return from(round_to_odd(x)); }
};

template <> struct Narrow<half> {
  INLINE half from(float x) {
    std::uint32_t bits = bit_cast<std::uint32_t>(x), magnitude = bits & 0x7fffffff;
    // Adding 0.5 leaves the last bit of a subnormal half (2^-24) as the last bit of the sum.
    std::uint32_t subnormal = bit_cast<std::uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3f000000u;
    std::uint32_t normal = (magnitude - (112u << 23) + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    std::uint32_t rounded = magnitude < 0x38800000u ? subnormal : normal;
    rounded = magnitude >= 0x477ff000u ? 0x7c00u : rounded;
    return {std::uint16_t(x != x ? 0x7e00u : rounded | ((bits >> 16) & 0x8000u))};
  }
  INLINE half from(double x) { return from(round_to_odd(x)); }
};

template <class T, class From>
INLINE T narrow(From x) { return Narrow<T>::from(x); }

// The type that products are summed in: float32 products are exact in double, float16 and bfloat16 products in float.
template <class T>
using Accumulator = std::conditional_t<(sizeof(T) > 2), double, float>;

// ---------------------------------------------------------------------------------------------------------------------
// Tensors

// ops.py packs this struct. Strides count elements.
template <int N>
struct Tensor {
  char* data;
  int64 dtype, size[N], stride[N];
};

template <class T>
struct View {
  const T* data;
  int64 row_stride, col_stride;

  const T& at(int64 row, int64 col) const { return data[row * row_stride + col * col_stride]; }
  View from(int64 row, int64 col) const { return {data + row * row_stride + col * col_stride, row_stride, col_stride}; }
  View transposed() const { return {data, col_stride, row_stride}; }
};

template <class T, int N>
View<T> matrix(const Tensor<N>& x, std::initializer_list<int64> batch_index = {}) {
  const T* data = reinterpret_cast<const T*>(x.data);
  int dim = 0;
  for (int64 index : batch_index) data += index * x.stride[dim++];
  return {data, x.stride[N - 2], x.stride[N - 1]};
}

struct Row {
  const char* data;
  int64 dtype, offset, stride, n;
};

Row row_of(const Tensor<2>& x, int64 row) {
  return {x.data, x.dtype, row * x.stride[0], x.stride[1], x.size[1]};
}

Row row_of(const Tensor<1>& x) { return {x.data, x.dtype, 0, x.stride[0], x.size[0]}; }

// Loads columns [start, start + n) of a row as doubles, which represent every dtype exactly.
void load(const Row& row, int64 start, int64 n, double* out) {
  with_type(row.dtype, [&](auto type) {
    using T = decltype(type);
    const T* x = reinterpret_cast<const T*>(row.data) + row.offset + start * row.stride;
    if (row.stride == 1) {
      for (int64 i = 0; i < n; i++) out[i] = widen(x[i]);
    } else {
      for (int64 i = 0; i < n; i++) out[i] = widen(x[i * row.stride]);
    }
  });
}

// Rounds n doubles once each, and stores them at data[start:].
void store(char* data, int64 dtype, int64 start, const double* x, int64 n) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    T* out = reinterpret_cast<T*>(data) + start;
    for (int64 i = 0; i < n; i++) out[i] = narrow<T>(x[i]);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads

// The number of multiply-adds from which threads pay: some 30 microseconds of work. Waking a thread takes a few
// microseconds, but milliseconds on a machine that is busy with other things, such as other workers of pytest-xdist.
constexpr int64 MIN_WORK = 1 << 17;

// Runs independent tasks. `work` counts the multiply-adds of all tasks together.
template <class F>
void parallel(int64 n_tasks, double work, int threads, F task) {
  (void)work, (void)threads;  // without OpenMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && n_tasks > 1 && work > MIN_WORK)
  for (int64 i = 0; i < n_tasks; i++) task(i);
}

// ---------------------------------------------------------------------------------------------------------------------
// Vectors. Only broadcast and fma are written for each instruction set; all give the one IEEE result for each lane.

#if defined(__AVX512F__)
constexpr int VECTOR_BYTES = 64, TILE_ROWS = 8;
#elif defined(__AVX2__) && defined(__FMA__)
constexpr int VECTOR_BYTES = 32, TILE_ROWS = 6;
#else
constexpr int VECTOR_BYTES = 16, TILE_ROWS = 6;
#endif

template <class A> struct Vector;
template <> struct Vector<double> { typedef double type __attribute__((vector_size(VECTOR_BYTES))); };
template <> struct Vector<float> { typedef float type __attribute__((vector_size(VECTOR_BYTES))); };
template <class A> constexpr int LANES = VECTOR_BYTES / int(sizeof(A));

using vdouble = Vector<double>::type;
using vfloat = Vector<float>::type;

#if defined(__AVX512F__)
INLINE vdouble broadcast(double x) { return _mm512_set1_pd(x); }
INLINE vfloat broadcast(float x) { return _mm512_set1_ps(x); }
INLINE vdouble fma(vdouble a, vdouble b, vdouble c) { return _mm512_fmadd_pd(a, b, c); }
INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(__AVX2__) && defined(__FMA__)
INLINE vdouble broadcast(double x) { return _mm256_set1_pd(x); }
INLINE vfloat broadcast(float x) { return _mm256_set1_ps(x); }
INLINE vdouble fma(vdouble a, vdouble b, vdouble c) { return _mm256_fmadd_pd(a, b, c); }
INLINE vfloat fma(vfloat a, vfloat b, vfloat c) { return _mm256_fmadd_ps(a, b, c); }
#else
template <class V, class A>
INLINE V broadcast_lanes(A x) {
  V v;
  for (int i = 0; i < LANES<A>; i++) v[i] = x;
  return v;
}
INLINE vdouble broadcast(double x) { return broadcast_lanes<vdouble>(x); }
INLINE vfloat broadcast(float x) { return broadcast_lanes<vfloat>(x); }
INLINE vdouble fma(vdouble a, vdouble b, vdouble c) {
  for (int i = 0; i < LANES<double>; i++) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
}
INLINE vfloat fma(vfloat a, vfloat b, vfloat c) {
  for (int i = 0; i < LANES<float>; i++) c[i] = std::fma(a[i], b[i], c[i]);
  return c;
}
#endif

// ---------------------------------------------------------------------------------------------------------------------
// exp

// 2^n e^r with x = n ln 2 + r, |r| <= ln(2) / 2, e^r by its Taylor series up to r^13 / 13! (remainder 4e-18).
// The result is 0 below e^-708 and infinity above e^709, so that 2^n and the result are normal numbers. Underflow would
// be slow, and it would happen for every masked score. No branches, so that the compiler vectorises loops over it.
INLINE double exp_(double original) {
  constexpr double ROUND = 0x1.8p52, LOG2E = 0x1.71547652b82fep+0;
  constexpr double LN2 = 0x1.62e42fefa39efp-1, LN2_LOW = 0x1.abc9e3b39803fp-56;
  double x = original < -708.0 ? -708.0 : original;
  x = x > 709.0 ? 709.0 : x;
  double shifted = std::fma(x, LOG2E, ROUND);  // n is in the last bits
  double n = shifted - ROUND;
  double r = std::fma(n, -LN2_LOW, std::fma(n, -LN2, x));
  double sum = 1.0 / 6227020800;
  sum = std::fma(sum, r, 1.0 / 479001600);
  sum = std::fma(sum, r, 1.0 / 39916800);
  sum = std::fma(sum, r, 1.0 / 3628800);
  sum = std::fma(sum, r, 1.0 / 362880);
  sum = std::fma(sum, r, 1.0 / 40320);
  sum = std::fma(sum, r, 1.0 / 5040);
  sum = std::fma(sum, r, 1.0 / 720);
  sum = std::fma(sum, r, 1.0 / 120);
  sum = std::fma(sum, r, 1.0 / 24);
  sum = std::fma(sum, r, 1.0 / 6);
  sum = std::fma(sum, r, 0.5);
  sum = std::fma(sum, r, 1.0);
  sum = std::fma(sum, r, 1.0);
  std::int64_t exponent = bit_cast<std::int64_t>(shifted) - bit_cast<std::int64_t>(ROUND);
  double result = sum * bit_cast<double>(std::uint64_t(exponent + 1023) << 52);
  result = original < -708.0 ? 0.0 : result;
  return original > 709.0 ? INF : result;
}

}  // namespace
