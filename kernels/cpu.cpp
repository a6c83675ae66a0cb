// The kernels of cpu.py. What they compute is told in reference.py, and here is how it is made batch-invariant:
//
// * The order of every sum is a function of the column index alone. Tiles, vectors and threads only choose which
//   *independent* sums are worked on together.
// * Every operation has one result: IEEE +, -, *, /, sqrt, and fused multiply-adds that are asked for by name (`fma`).
//   The compiler may not contract a * b + c on its own (-ffp-contract=off): it would do so in the body of a vectorised
//   loop and not in its tail, or in one instance of a template and not in another. exp and the like are written out
//   here, or are scalar calls of libm behind NOINLINE: no vector variant can stand in for them in the body of a loop.
// * Where a result is NaN it is always the same NaN: which of two NaNs an instruction hands on depends on the order of
//   its operands, and that is the compiler's choice.
//
// Plain C++17 without torch: it compiles in seconds, and one source serves every torch.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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

// Rounds to the neighbour with an odd last bit unless x is a float: a second rounding to 16 bits then sees on which
// side of a tie x was, and gives what one rounding would.
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

// What products are summed in: float32 products are exact in double, float16 and bfloat16 products in float.
template <class T>
using Accumulator = std::conditional_t<(sizeof(T) > 2), double, float>;

// ---------------------------------------------------------------------------------------------------------------------
// Tensors

// As cpu.py packs it. Strides count elements.
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

// Columns [start, start + n) of a row as doubles, which holds every dtype exactly.
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

void store(char* data, int64 dtype, int64 start, const double* x, int64 n) {
  with_type(dtype, [&](auto type) {
    using T = decltype(type);
    T* out = reinterpret_cast<T*>(data) + start;
    for (int64 i = 0; i < n; i++) out[i] = narrow<T>(x[i]);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Threads

// In multiply-adds, some 30 microseconds. Waking a thread takes a few, but milliseconds on a machine that is busy with
// other things, such as other workers of pytest-xdist.
constexpr int64 MIN_WORK = 1 << 17;

// Independent tasks; `work` is that of all tasks together.
template <class F>
void parallel(int64 n_tasks, double work, int threads, F task) {
  (void)work, (void)threads;  // without OpenMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1 && n_tasks > 1 && work > MIN_WORK)
  for (int64 i = 0; i < n_tasks; i++) task(i);
}

// ---------------------------------------------------------------------------------------------------------------------
// Vectors. Only fma needs a name of its own for each instruction set; all three give the one IEEE result of each lane.

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
// Matrix product: one chain of fused multiply-adds over k for each element, k ascending.
//
// Rows of a times a panel of columns of b, an outer product for each k: no lane holds a part of another lane's sum.
// K is cut into blocks only so that the packed operands stay in the cache; the accumulators are carried over.

constexpr int K_BLOCK = 128, M_BLOCK = 128, N_BLOCK = 128;
constexpr int NARROW_ROWS = 2;                  // up to here (decoding) tiles are wide, for enough chains at work
constexpr int VECTORS = 2, NARROW_VECTORS = 4;  // columns of a tile, in vectors
template <class A> constexpr int MAX_PANEL = NARROW_VECTORS * LANES<A>;

int64 round_up(int64 n, int64 multiple) { return (n + multiple - 1) / multiple * multiple; }

// c[R, V vectors] += a @ b, with a packed as [K, R] and b as [K, V vectors]. With SKIP_ZEROS an a of exactly 0 adds
// nothing, even if b is infinite or NaN there.
template <class A, int R, int V, bool SKIP_ZEROS>
void tile(int64 K, const A* a, const A* b, A* c, int64 c_stride) {
  using Vec = typename Vector<A>::type;
  Vec sum[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) std::memcpy(&sum[r][v], c + r * c_stride + v * LANES<A>, sizeof(Vec));
  for (int64 k = 0; k < K; k++) {
    Vec column[V];
    std::memcpy(column, b + k * V * LANES<A>, sizeof column);
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      A factor = a[k * R + r];
      if (SKIP_ZEROS && factor == 0) continue;
#pragma GCC unroll 4
      for (int v = 0; v < V; v++) sum[r][v] = fma(broadcast(factor), column[v], sum[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int v = 0; v < V; v++) std::memcpy(c + r * c_stride + v * LANES<A>, &sum[r][v], sizeof(Vec));
}

template <class A, int R, int V, bool SKIP_ZEROS>
void tile_of(int64 rows, int64 K, const A* a, const A* b, A* c, int64 c_stride) {
  if constexpr (R > 1) {
    if (rows < R) return tile_of<A, R - 1, V, SKIP_ZEROS>(rows, K, a, b, c, c_stride);
  }
  tile<A, R, V, SKIP_ZEROS>(K, a, b, c, c_stride);
}

// Eight vectors of eight: after three rounds of interleaving the upper half with the lower, rows are columns.
template <class A>
struct Block {
  typedef A Row __attribute__((vector_size(8 * sizeof(A))));
  typedef std::conditional_t<sizeof(A) == 8, std::int64_t, std::int32_t> Integer;
  typedef Integer Index __attribute__((vector_size(8 * sizeof(A))));
  Row row[8];

  INLINE void interleave(Row x, Row y, Row& low, Row& high) {
#ifdef __clang__
    low = __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
    high = __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    low = __builtin_shuffle(x, y, Index{0, 8, 1, 9, 2, 10, 3, 11});
    high = __builtin_shuffle(x, y, Index{4, 12, 5, 13, 6, 14, 7, 15});
#endif
  }

  void transpose() {
    Row half_done[8], nearly[8];
    for (int i = 0; i < 4; i++) interleave(row[i], row[i + 4], half_done[2 * i], half_done[2 * i + 1]);
    for (int i = 0; i < 4; i++) interleave(half_done[i], half_done[i + 4], nearly[2 * i], nearly[2 * i + 1]);
    for (int i = 0; i < 4; i++) interleave(nearly[i], nearly[i + 4], row[2 * i], row[2 * i + 1]);
  }
};

// x(k, 0..8), contiguous along k, for k < K -> packed[k * width + 0..8]
template <class A, class T>
void pack_columns(View<T> x, int64 K, int64 width, A* packed) {
  using Wide = decltype(widen(T{}));
  int64 k = 0;
  for (; k + 8 <= K; k += 8) {
    Block<Wide> block;
    for (int n = 0; n < 8; n++) {
      Wide column[8];
      for (int i = 0; i < 8; i++) column[i] = widen(x.data[n * x.col_stride + k + i]);
      std::memcpy(&block.row[n], column, sizeof column);
    }
    block.transpose();
    for (int i = 0; i < 8; i++) {
      auto row = __builtin_convertvector(block.row[i], typename Block<A>::Row);
      std::memcpy(packed + (k + i) * width, &row, sizeof row);
    }
  }
  for (; k < K; k++)
    for (int n = 0; n < 8; n++) packed[k * width + n] = widen(x.data[n * x.col_stride + k]);
}

// [K, N] -> [K, width], zeros behind column N
template <class A, class T>
void pack(View<T> x, int64 K, int64 N, int64 width, A* packed) {
  if (N < width) std::fill(packed, packed + K * width, A(0));
  if (x.col_stride == 1) {
    for (int64 k = 0; k < K; k++)
      for (int64 n = 0; n < N; n++) packed[k * width + n] = widen(x.data[k * x.row_stride + n]);
    return;
  }
  int64 n = 0;
  if (x.row_stride == 1)
    for (; n + 8 <= N; n += 8) pack_columns(x.from(0, n), K, width, packed + n);
  for (; n < N; n++)
    for (int64 k = 0; k < K; k++) packed[k * width + n] = widen(x.at(k, n));
}

// c[M, N] += a @ b. c is row-major, c_stride a multiple of MAX_PANEL: what stands behind column N is scratch.
template <class A, int V, bool SKIP_ZEROS, class TA, class TB>
void product_in_panels(View<TA> a, View<TB> b, int64 M, int64 N, int64 K, A* c, int64 c_stride) {
  constexpr int PANEL = V * LANES<A>, ROWS = V == VECTORS ? TILE_ROWS : NARROW_ROWS;
  alignas(64) A packed_a[M_BLOCK * K_BLOCK], packed_b[K_BLOCK * PANEL];
  for (int64 k = 0; k < K; k += K_BLOCK) {
    int64 k_size = std::min<int64>(K_BLOCK, K - k);
    for (int64 m = 0; m < M; m += ROWS) {
      int64 rows = std::min<int64>(ROWS, M - m);
      pack(a.from(m, k).transposed(), k_size, rows, rows, packed_a + m * k_size);
    }
    for (int64 n = 0; n < N; n += PANEL) {
      pack(b.from(k, n), k_size, std::min<int64>(PANEL, N - n), PANEL, packed_b);
      for (int64 m = 0; m < M; m += ROWS)
        tile_of<A, ROWS, V, SKIP_ZEROS>(M - m, k_size, packed_a + m * k_size, packed_b, c + m * c_stride + n, c_stride);
    }
  }
}

// M <= M_BLOCK
template <bool SKIP_ZEROS, class A, class TA, class TB>
void add_product(View<TA> a, View<TB> b, int64 M, int64 N, int64 K, A* c, int64 c_stride) {
  if (M <= NARROW_ROWS) {
    product_in_panels<A, NARROW_VECTORS, SKIP_ZEROS>(a, b, M, N, K, c, c_stride);
  } else {
    product_in_panels<A, VECTORS, SKIP_ZEROS>(a, b, M, N, K, c, c_stride);
  }
}

template <class T>
struct Problem {
  View<T> a, b, bias;  // bias.data may be null
  T* out;              // row-major [M, N]
  int64 M, N, K;
};

struct Task {
  int64 problem, m, n;
};

template <class T>
void solve(const Problem<T>& p, int64 m0, int64 M, int64 n0, int64 N, double alpha, double beta) {
  using A = Accumulator<T>;
  alignas(64) A sum[M_BLOCK * N_BLOCK];
  int64 stride = round_up(N, MAX_PANEL<A>);
  std::fill(sum, sum + M * stride, A(0));
  add_product<false>(p.a.from(m0, 0), p.b.from(0, n0), M, N, p.K, sum, stride);
  for (int64 m = 0; m < M; m++) {
    A* row = sum + m * stride;
    if (alpha != 1)
      for (int64 n = 0; n < N; n++) row[n] *= A(alpha);
    if (p.bias.data)
      for (int64 n = 0; n < N; n++) row[n] += A(beta) * widen(p.bias.at(m0 + m, n0 + n));
    T* out = p.out + (m0 + m) * p.N + n0;
    for (int64 n = 0; n < N; n++) out[n] = narrow<T>(row[n]);
  }
}

// Blocks small enough to give every thread something to do.
template <class T>
std::vector<Task> tasks_of(const std::vector<Problem<T>>& problems, int threads, int64& n_step) {
  std::vector<Task> tasks;
  for (n_step = N_BLOCK;; n_step /= 2) {
    tasks.clear();
    for (std::size_t i = 0; i < problems.size(); i++)
      for (int64 m = 0; m < problems[i].M; m += M_BLOCK)
        for (int64 n = 0; n < problems[i].N; n += n_step) tasks.push_back({int64(i), m, n});
    if (int64(tasks.size()) >= 4 * threads || n_step <= MAX_PANEL<Accumulator<T>>) return tasks;
  }
}

template <class T>
void solve_all(const std::vector<Problem<T>>& problems, double alpha, double beta, int threads) {
  double work = 0;
  for (const auto& p : problems) work += double(p.M) * double(p.N) * double(p.K + 1);
  int64 n_step;
  std::vector<Task> tasks = tasks_of(problems, work > MIN_WORK ? threads : 0, n_step);
  parallel(int64(tasks.size()), work, threads, [&](int64 i) {
    const Task& task = tasks[i];
    const Problem<T>& p = problems[task.problem];
    solve(p, task.m, std::min<int64>(M_BLOCK, p.M - task.m), task.n, std::min(n_step, p.N - task.n), alpha, beta);
  });
}

// ---------------------------------------------------------------------------------------------------------------------
// Functions of one number, branch-free so that loops over them become vector code

// 2^n e^r with x = n ln 2 + r, |r| <= ln(2) / 2, e^r by its Taylor series up to r^13 / 13! (remainder 4e-18).
// 0 and infinity somewhat early, below e^-708 and above e^709: so 2^n and the result are normal numbers. Underflow
// would be slow, and happen for every masked score.
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

// For float32 and below: erfc(z) = t P(2t - 1) e^(-z^2) with t = 3 / (3 + z), z >= 0; relative error 3e-11. P was
// fitted at the Chebyshev nodes.
INLINE double erfc_(double x) {
  double z = std::fabs(x), t = 3.0 / (3.0 + z), s = 2.0 * t - 1.0;
  double p = 5.308803288917317e-07;
  p = std::fma(p, s, 7.959119591627887e-07);
  p = std::fma(p, s, -5.292408507744221e-06);
  p = std::fma(p, s, -9.13866014117692e-06);
  p = std::fma(p, s, 3.546772332574711e-05);
  p = std::fma(p, s, 9.156113348738448e-05);
  p = std::fma(p, s, -0.00018261633495116105);
  p = std::fma(p, s, -0.001011081454426149);
  p = std::fma(p, s, -0.0004041705889358986);
  p = std::fma(p, s, 0.00894235585187059);
  p = std::fma(p, s, 0.03984259000467199);
  p = std::fma(p, s, 0.10348909237850937);
  p = std::fma(p, s, 0.1967427856237489);
  p = std::fma(p, s, 0.29446481758811205);
  p = std::fma(p, s, 0.3580023023627799);
  double tail = t * p * exp_(-z * z);
  return x < 0 ? 2.0 - tail : tail;
}

// ---------------------------------------------------------------------------------------------------------------------
// Rows

constexpr int64 CHUNK = 1024;
constexpr int SUM_LANES = 32;

// Lane j sums columns j, j + 32, j + 64, ...; then lane j += lane j + 16, + 8, + 4, + 2, + 1.
// Zeros before or behind the values change no bit: they turn the circle of lanes, and the tree looks the same from each
// of them, as lanes always meet those opposite to them.
struct LaneSum {
  double lane[SUM_LANES] = {};

  template <class A>
  void add(const A* x, int64 n) {  // n is a multiple of 32 except in the last call
    int64 i = 0;
    for (; i + SUM_LANES <= n; i += SUM_LANES)
      for (int j = 0; j < SUM_LANES; j++) lane[j] += double(x[i + j]);
    for (int j = 0; i + j < n; j++) lane[j] += double(x[i + j]);
  }

  double total() {
    for (int width = SUM_LANES / 2; width; width /= 2)
      for (int j = 0; j < width; j++) lane[j] += lane[j + width];
    return lane[0];
  }
};

// NaN if there is one. The order cannot be seen.
struct LaneMax {
  double lane[SUM_LANES];

  LaneMax() { std::fill(lane, lane + SUM_LANES, -INF); }

  static double larger(double x, double y) { return x > y || x != x ? x : y; }

  template <class A>
  void add(const A* x, int64 n) {
    int64 i = 0;
    for (; i + SUM_LANES <= n; i += SUM_LANES)
      for (int j = 0; j < SUM_LANES; j++) lane[j] = larger(x[i + j], lane[j]);
    for (int j = 0; i + j < n; j++) lane[j] = larger(x[i + j], lane[j]);
  }

  double total() {
    for (int width = SUM_LANES / 2; width; width /= 2)
      for (int j = 0; j < width; j++) lane[j] = larger(lane[j + width], lane[j]);
    return lane[0];
  }
};

// f(x, n, start) with the columns [start, start + n) as doubles in x
template <class F>
void each_chunk(const Row& row, F f) {
  alignas(64) double x[CHUNK];
  for (int64 start = 0; start < row.n; start += CHUNK) {
    int64 n = std::min(CHUNK, row.n - start);
    load(row, start, n, x);
    f(x, n, start);
  }
}

// Sum of f(x) over the columns, in lanes
template <class F>
double sum_of(const Row& row, F f) {
  LaneSum sum;
  each_chunk(row, [&](double* x, int64 n, int64) {
    for (int64 i = 0; i < n; i++) x[i] = f(x[i]);
    sum.add(x, n);
  });
  return sum.total();
}

double mean_of(const Row& row) {
  return sum_of(row, [](double x) { return x; }) / double(row.n);
}

double squared_deviations(const Row& row, double mean) {
  return sum_of(row, [=](double x) { return (x - mean) * (x - mean); });
}

double max_of(const Row& row) {
  LaneMax max;
  each_chunk(row, [&](double* x, int64 n, int64) { max.add(x, n); });
  return max.total();
}

// Columns of -inf before and behind the others add exact zeros, which change no bit.
double sum_of_exp(const Row& row, double max) {
  return sum_of(row, [=](double x) { return exp_(x - max); });
}

double logsumexp_of(const Row& row) {
  double max = max_of(row);
  return std::isinf(max) ? max : max + std::log(sum_of_exp(row, max));
}

template <class F>
void each_row(const Tensor<2>& x, double cost, int threads, F f) {
  int64 rows = x.size[0], step = std::max<int64>(1, 8 * CHUNK / std::max<int64>(1, x.size[1]));
  parallel((rows + step - 1) / step, double(rows) * double(x.size[1]) * cost, threads, [&](int64 task) {
    for (int64 r = task * step; r < std::min(rows, (task + 1) * step); r++) f(r, row_of(x, r));
  });
}

template <class F>
void reduce_rows(const Tensor<2>& x, const Tensor<1>& out, double cost, int threads, F f) {
  each_row(x, cost, threads, [&](int64 r, const Row& row) {
    double value = f(row);
    store(out.data, out.dtype, r, &value, 1);
  });
}

void multiply_add(const Tensor<1>* weight, const Tensor<1>* bias, int64 start, int64 n, double* x) {
  alignas(64) double factor[CHUNK];
  if (weight) {
    load(row_of(*weight), start, n, factor);
    for (int64 i = 0; i < n; i++) x[i] *= factor[i];
  }
  if (bias) {
    load(row_of(*bias), start, n, factor);
    for (int64 i = 0; i < n; i++) x[i] += factor[i];
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Attention

// What changes or hides scores besides a mask. soft_cap: 0 for none. window: 0 for none.
struct Scores {
  double scale, soft_cap;
  bool is_causal;
  int64 causal_offset, window;
};

// The scores of one query: scaled, capped, masked and with -inf where the key is hidden.
template <class T, class A>
void mask_scores(A* score, int64 n, const Scores& how, const Tensor<4>* mask, int64 b, int64 h, int64 i) {
  constexpr A HIDDEN = -std::numeric_limits<A>::infinity();
  for (int64 j = 0; j < n; j++) score[j] *= A(how.scale);
  if (how.soft_cap != 0)
    for (int64 j = 0; j < n; j++) score[j] = A(how.soft_cap * std::tanh(double(score[j]) / how.soft_cap));
  if (mask && mask->dtype == BOOL) {
    View<std::uint8_t> shown = matrix<std::uint8_t>(*mask, {b, h}).from(i, 0);
    for (int64 j = 0; j < n; j++) score[j] = shown.at(0, j) ? score[j] : HIDDEN;
  } else if (mask) {
    View<T> added = matrix<T>(*mask, {b, h}).from(i, 0);
    for (int64 j = 0; j < n; j++) {
      A bias = widen(added.at(0, j));
      score[j] = bias == HIDDEN ? HIDDEN : score[j] + bias;
    }
  }
  int64 last = i + how.causal_offset;
  if (how.is_causal && last + 1 < n) std::fill(score + std::max<int64>(0, last + 1), score + n, HIDDEN);
  if (how.window > 0) std::fill(score, score + std::clamp<int64>(last - how.window + 1, 0, n), HIDDEN);
}

struct Softmax {
  double max, sum;
};

// score -> weight = exp(score - max), not normalised. A query that sees no key gets weights of 0.
template <class A>
Softmax weights_of(A* score, int64 n) {
  LaneMax largest;
  largest.add(score, n);
  double max = largest.total();
  if (max == -INF) {
    std::fill(score, score + n, A(0));
    return {max, 0};
  }
  for (int64 j = 0; j < n; j++) score[j] = A(exp_(double(score[j]) - max));
  LaneSum sum;
  sum.add(score, n);
  return {max, sum.total()};
}

struct Attention {
  const Tensor<4>*q, *k, *v, *mask;
  Scores scores;
  const Tensor<1>* sinks;
  const Tensor<4>* out;
  const Tensor<3>* lse;
};

// Queries [i0, i0 + M) of one head
template <class T>
void attend(const Attention& at, int64 b, int64 h, int64 i0, int64 M) {
  using A = Accumulator<T>;
  int64 h_kv = h / (at.q->size[1] / at.k->size[1]);
  int64 queries = at.q->size[2], D = at.q->size[3], Dv = at.v->size[3];
  int64 seen = i0 + M + at.scores.causal_offset;
  int64 keys = at.scores.is_causal ? std::clamp<int64>(seen, 0, at.k->size[2]) : at.k->size[2];
  int64 score_stride = round_up(keys, MAX_PANEL<A>), sum_stride = round_up(Dv, MAX_PANEL<A>);
  std::unique_ptr<A[]> scratch(new A[M * (score_stride + sum_stride)]);
  A *scores = scratch.get(), *sums = scores + M * score_stride;
  std::fill(scores, sums + M * sum_stride, A(0));

  View<T> q = matrix<T>(*at.q, {b, h}).from(i0, 0), k = matrix<T>(*at.k, {b, h_kv});
  add_product<false>(q, k.transposed(), M, keys, D, scores, score_stride);
  std::vector<Softmax> softmax(M);
  for (int64 m = 0; m < M; m++) {
    mask_scores<T>(scores + m * score_stride, keys, at.scores, at.mask, b, h, i0 + m);
    softmax[m] = weights_of(scores + m * score_stride, keys);
  }
  View<A> weights{scores, score_stride, 1};
  add_product<true>(weights, matrix<T>(*at.v, {b, h_kv}), M, Dv, keys, sums, sum_stride);

  int64 row = (b * at.q->size[1] + h) * queries + i0;
  for (int64 m = 0; m < M; m++, row++) {
    T* out = reinterpret_cast<T*>(at.out->data) + row * Dv;
    auto [max, sum] = softmax[m];
    bool sees_none = max == -INF;
    double lse = sees_none || max == INF ? max : max + std::log(sum);
    if (at.sinks) {  // one more key, whose value is 0
      double sink = widen(reinterpret_cast<T*>(at.sinks->data)[h * at.sinks->stride[0]]);
      double larger = std::max(lse, sink), smaller = std::min(lse, sink);
      sum += sees_none ? 0 : std::exp(sink - max);
      lse = larger + std::log1p(std::exp(smaller - larger));
    }
    double divisor = sees_none ? 1.0 : sum;
    for (int64 d = 0; d < Dv; d++) out[d] = narrow<T>(double(sums[m * sum_stride + d]) / divisor);
    store(at.lse->data, at.lse->dtype, row, &lse, 1);
  }
}

// ---------------------------------------------------------------------------------------------------------------------
// Pointwise

using Params = const double*;
using Loop = void (*)(double*, int64, Params);

template <double (*F)(double, Params)>
void loop(double* x, int64 n, Params p) {
  for (int64 i = 0; i < n; i++) x[i] = F(x[i], p);
}

INLINE double fast_exp(double x, Params) { return exp_(x); }
INLINE double fast_sigmoid(double x, Params) { return 1.0 / (1.0 + exp_(-x)); }
INLINE double fast_silu(double x, Params) { return x / (1.0 + exp_(-x)); }
INLINE double fast_gelu(double x, Params) { return 0.5 * x * erfc_(x * -0x1.6a09e667f3bcdp-1); }

// 0.5 x (1 + tanh(u)) = x / (1 + e^(-2u)) loses nothing to cancellation.
INLINE double fast_gelu_tanh(double x, Params) {
  double u = 0x1.9884533d43651p-1 * (x + 0.044715 * x * x * x);  // sqrt(2 / pi)
  return x / (1.0 + exp_(-2.0 * u));
}

INLINE double fast_tanh(double x, Params) {
  double e = exp_(2.0 * (std::fabs(x) > 20.0 ? 20.0 : std::fabs(x)));
  double large = std::copysign((e - 1.0) / (e + 1.0), x), small = x * (1.0 - x * x * (1.0 / 3.0));
  double y = std::fabs(x) < 0x1p-10 ? small : large;
  return x != x ? x : y;
}

// tanh(log(1 + e)) = (e^2 + 2e) / (e^2 + 2e + 2), e = e^x
INLINE double fast_mish(double x, Params) {
  double e = exp_(x > 40.0 ? 40.0 : x), square = e * (e + 2.0);
  return x * (square / (square + 2.0));
}

INLINE double rsqrt(double x, Params) { return 1.0 / std::sqrt(x); }

NOINLINE double exact_exp(double x, Params) { return std::exp(x); }
NOINLINE double exact_sigmoid(double x, Params) { return 1.0 / (1.0 + std::exp(-x)); }
NOINLINE double exact_silu(double x, Params) { return x / (1.0 + std::exp(-x)); }
NOINLINE double exact_gelu(double x, Params) { return 0.5 * x * std::erfc(x * -0x1.6a09e667f3bcdp-1); }
NOINLINE double exact_gelu_tanh(double x, Params) {
  double u = 0x1.9884533d43651p-1 * (x + 0.044715 * x * x * x);
  return x / (1.0 + std::exp(-2.0 * u));
}
NOINLINE double exact_tanh(double x, Params) { return std::tanh(x); }
NOINLINE double exact_mish(double x, Params) {
  double e = std::exp(x > 40.0 ? 40.0 : x), square = e * (e + 2.0);
  return x * (square / (square + 2.0));
}
NOINLINE double exact_erf(double x, Params) { return std::erf(x); }
NOINLINE double exact_expm1(double x, Params) { return std::expm1(x); }
NOINLINE double exact_log(double x, Params) { return std::log(x); }
NOINLINE double exact_log1p(double x, Params) { return std::log1p(x); }
NOINLINE double exact_sin(double x, Params) { return std::sin(x); }
NOINLINE double exact_cos(double x, Params) { return std::cos(x); }
NOINLINE double exact_pow(double x, Params p) {  // the roots differ from std::pow at -0 and -inf, as torch's do
  return p[0] == 0.5 ? std::sqrt(x) : p[0] == -0.5 ? 1.0 / std::sqrt(x) : std::pow(x, p[0]);
}
NOINLINE double exact_softplus(double x, Params p) {
  double scaled = x * p[0];
  return scaled > p[1] ? x : std::log1p(std::exp(scaled)) / p[0];
}
NOINLINE double exact_log_sigmoid(double x, Params) {
  return (x < 0 ? x : 0.0) - std::log1p(std::exp(-std::fabs(x)));
}
NOINLINE double exact_elu(double x, Params p) {  // alpha, scale, input_scale
  return x <= 0 ? std::expm1(x * p[2]) * (p[0] * p[1]) : x * p[1];
}

// float64 needs more digits than the fast forms give; all others are computed in double and rounded once.
const struct Pointwise {
  const char* name;
  Loop fast, exact;
} POINTWISE[] = {
    {"silu", loop<fast_silu>, loop<exact_silu>},
    {"sigmoid", loop<fast_sigmoid>, loop<exact_sigmoid>},
    {"gelu", loop<fast_gelu>, loop<exact_gelu>},
    {"gelu_tanh", loop<fast_gelu_tanh>, loop<exact_gelu_tanh>},
    {"tanh", loop<fast_tanh>, loop<exact_tanh>},
    {"exp", loop<fast_exp>, loop<exact_exp>},
    {"mish", loop<fast_mish>, loop<exact_mish>},
    {"rsqrt", loop<rsqrt>, loop<rsqrt>},
    {"softplus", loop<exact_softplus>, loop<exact_softplus>},
    {"log_sigmoid", loop<exact_log_sigmoid>, loop<exact_log_sigmoid>},
    {"elu", loop<exact_elu>, loop<exact_elu>},
    {"pow", loop<exact_pow>, loop<exact_pow>},
    {"erf", loop<exact_erf>, loop<exact_erf>},
    {"expm1", loop<exact_expm1>, loop<exact_expm1>},
    {"log", loop<exact_log>, loop<exact_log>},
    {"log1p", loop<exact_log1p>, loop<exact_log1p>},
    {"sin", loop<exact_sin>, loop<exact_sin>},
    {"cos", loop<exact_cos>, loop<exact_cos>},
};

}  // namespace

// ---------------------------------------------------------------------------------------------------------------------
// What cpu.py calls. Outputs are contiguous. The result is null, or a sentence that says what is wrong with the input.

EXPORT const char* gemm(const Tensor<3>* a, const Tensor<3>* b, const Tensor<3>* bias, double alpha, double beta,
                        const Tensor<3>* out, int threads) {
  int64 B = a->size[0], M = a->size[1], K = a->size[2], N = b->size[2];
  if (b->size[0] != B || b->size[1] != K) return "gemm needs a of shape [B, M, K] and b of shape [B, K, N].";
  if (b->dtype != a->dtype || (bias && bias->dtype != a->dtype)) return "gemm needs operands of one dtype.";
  if (bias && (bias->size[0] != B || bias->size[1] != M || bias->size[2] != N))
    return "gemm needs a bias of shape [B, M, N].";
  with_type(a->dtype, [&](auto type) {
    using T = decltype(type);
    std::vector<Problem<T>> problems(B);
    for (int64 i = 0; i < B; i++) {
      View<T> added = bias && beta != 0 ? matrix<T>(*bias, {i}) : View<T>{};
      T* result = reinterpret_cast<T*>(out->data) + i * M * N;
      problems[i] = {matrix<T>(*a, {i}), matrix<T>(*b, {i}), added, result, M, N, K};
    }
    solve_all(problems, alpha, beta, threads);
  });
  return nullptr;
}

EXPORT const char* grouped_gemm(const Tensor<2>* a, const Tensor<3>* b, const std::int32_t* offs, int64 n_offs,
                                const Tensor<2>* out, int threads) {
  int64 rows = a->size[0], K = a->size[1], N = b->size[2], start = 0;
  if (b->size[0] != n_offs || b->size[1] != K || b->dtype != a->dtype)
    return "grouped_gemm needs a of shape [T, K], b of shape [G, K, N] and the same dtype, and offs of shape [G].";
  for (int64 g = 0; g < n_offs; start = offs[g++])
    if (offs[g] < start || offs[g] > rows) return "grouped_gemm needs offs that ascend from 0 to the number of rows.";
  with_type(a->dtype, [&](auto type) {
    using T = decltype(type);
    T* result = reinterpret_cast<T*>(out->data);
    std::vector<Problem<T>> problems;
    int64 begin = 0;
    for (int64 g = 0; g < n_offs; begin = offs[g++]) {
      View<T> rows_of_group = matrix<T>(*a).from(begin, 0);
      problems.push_back({rows_of_group, matrix<T>(*b, {g}), {}, result + begin * N, offs[g] - begin, N, K});
    }
    std::fill(result + begin * N, result + rows * N, T{});
    solve_all(problems, 1.0, 1.0, threads);
  });
  return nullptr;
}

EXPORT const char* row_sum(const Tensor<2>* x, const Tensor<1>* out, int threads) {
  reduce_rows(*x, *out, 1, threads, [](const Row& row) { return sum_of(row, [](double v) { return v; }); });
  return nullptr;
}

EXPORT const char* row_mean(const Tensor<2>* x, const Tensor<1>* out, int threads) {
  reduce_rows(*x, *out, 1, threads, mean_of);
  return nullptr;
}

EXPORT const char* row_norm(const Tensor<2>* x, double p, const Tensor<1>* out, int threads) {
  if (p != 1 && p != 2) return "row_norm knows p = 1 and p = 2.";
  reduce_rows(*x, *out, 1, threads, [=](const Row& row) {
    return p == 1 ? sum_of(row, [](double v) { return std::fabs(v); })
                  : std::sqrt(sum_of(row, [](double v) { return v * v; }));
  });
  return nullptr;
}

EXPORT const char* row_var_mean(const Tensor<2>* x, double correction, const Tensor<1>* var, const Tensor<1>* mean,
                                int threads) {
  each_row(*x, 2, threads, [&](int64 r, const Row& row) {
    double m = mean_of(row), v = squared_deviations(row, m) / std::max(double(row.n) - correction, 0.0);
    store(var->data, var->dtype, r, &v, 1);
    store(mean->data, mean->dtype, r, &m, 1);
  });
  return nullptr;
}

EXPORT const char* row_logsumexp(const Tensor<2>* x, const Tensor<1>* out, int threads) {
  reduce_rows(*x, *out, 8, threads, logsumexp_of);
  return nullptr;
}

EXPORT const char* row_softmax(const Tensor<2>* x, bool log, const Tensor<2>* out, int threads) {
  each_row(*x, 16, threads, [&](int64 r, const Row& row) {
    double max = max_of(row), sum = sum_of_exp(row, max), log_sum = log ? std::log(sum) : 0;
    each_chunk(row, [&](double* v, int64 n, int64 start) {
      if (log) {
        for (int64 i = 0; i < n; i++) v[i] = (v[i] - max) - log_sum;
      } else {
        for (int64 i = 0; i < n; i++) v[i] = exp_(v[i] - max) / sum;
      }
      store(out->data, out->dtype, r * row.n + start, v, n);
    });
  });
  return nullptr;
}

EXPORT const char* row_cumsum(const Tensor<2>* x, const Tensor<2>* out, int threads) {
  each_row(*x, 2, threads, [&](int64 r, const Row& row) {
    double sum = 0;
    each_chunk(row, [&](double* v, int64 n, int64 start) {
      for (int64 i = 0; i < n; i++) v[i] = sum += v[i];
      store(out->data, out->dtype, r * row.n + start, v, n);
    });
  });
  return nullptr;
}

EXPORT const char* row_layer_norm(const Tensor<2>* x, const Tensor<1>* weight, const Tensor<1>* bias, double eps,
                                  const Tensor<2>* y, const Tensor<1>* mean, const Tensor<1>* rstd, int threads) {
  if ((weight && weight->size[0] != x->size[1]) || (bias && bias->size[0] != x->size[1]))
    return "row_layer_norm needs a weight and a bias of one value for each column.";
  each_row(*x, 4, threads, [&](int64 r, const Row& row) {
    double m = mean_of(row), inverse = 1.0 / std::sqrt(squared_deviations(row, m) / double(row.n) + eps);
    each_chunk(row, [&](double* v, int64 n, int64 start) {
      for (int64 i = 0; i < n; i++) v[i] = (v[i] - m) * inverse;
      multiply_add(weight, bias, start, n, v);
      store(y->data, y->dtype, r * row.n + start, v, n);
    });
    store(mean->data, mean->dtype, r, &m, 1);
    store(rstd->data, rstd->dtype, r, &inverse, 1);
  });
  return nullptr;
}

EXPORT const char* row_rms_norm(const Tensor<2>* x, const Tensor<1>* weight, double eps, const Tensor<2>* y,
                                const Tensor<1>* rstd, int threads) {
  if (weight && weight->size[0] != x->size[1]) return "row_rms_norm needs a weight of one value for each column.";
  each_row(*x, 3, threads, [&](int64 r, const Row& row) {
    double squares = sum_of(row, [](double v) { return v * v; });
    double inverse = 1.0 / std::sqrt(squares / double(row.n) + eps);
    each_chunk(row, [&](double* v, int64 n, int64 start) {
      for (int64 i = 0; i < n; i++) v[i] *= inverse;
      multiply_add(weight, nullptr, start, n, v);
      store(y->data, y->dtype, r * row.n + start, v, n);
    });
    store(rstd->data, rstd->dtype, r, &inverse, 1);
  });
  return nullptr;
}

EXPORT const char* attention(const Tensor<4>* q, const Tensor<4>* k, const Tensor<4>* v, const Tensor<4>* mask,
                             bool is_causal, double scale, int64 causal_offset, int64 window, double soft_cap,
                             const Tensor<1>* sinks, const Tensor<4>* out, const Tensor<3>* lse, int threads) {
  int64 B = q->size[0], H = q->size[1], queries = q->size[2], D = q->size[3], keys = k->size[2];
  if (k->size[0] != B || v->size[0] != B || k->size[1] != v->size[1] || k->size[3] != D || v->size[2] != keys)
    return "attention needs q of shape [B, H, Sq, D], k of shape [B, Hkv, Skv, D] and v of shape [B, Hkv, Skv, Dv].";
  if (k->size[1] == 0 ? H != 0 : H % k->size[1] != 0) return "attention needs H to be a multiple of Hkv.";
  if (k->dtype != q->dtype || v->dtype != q->dtype) return "attention needs q, k and v of one dtype.";
  if (mask && (mask->size[0] != B || mask->size[1] != H || mask->size[2] != queries || mask->size[3] != keys))
    return "attention needs a mask of shape [B, H, Sq, Skv].";
  if (mask && mask->dtype != BOOL && mask->dtype != q->dtype)
    return "attention needs a mask of bool or of q's dtype.";
  if (sinks && (sinks->size[0] != H || sinks->dtype != q->dtype))
    return "attention needs one sink for each query head, of q's dtype.";
  int64 fits = (1 << 17) / std::max<int64>(1, keys);  // scores of 1 MiB
  int64 block = std::max<int64>(TILE_ROWS, std::min<int64>(M_BLOCK, fits / TILE_ROWS * TILE_ROWS));
  while (block > 2 * TILE_ROWS && B * H * ((queries + block - 1) / block) < threads) block -= TILE_ROWS;
  int64 blocks = (queries + block - 1) / block;
  Attention at{q, k, v, mask, {scale, soft_cap, is_causal, causal_offset, window}, sinks, out, lse};
  double work = double(B) * double(H) * double(queries) * double(keys) * double(D + v->size[3] + 16);
  parallel(B * H * blocks, work, threads, [&](int64 task) {
    int64 i0 = task % blocks * block, head = task / blocks;
    with_type(q->dtype, [&](auto type) {
      attend<decltype(type)>(at, head / H, head % H, i0, std::min(block, queries - i0));
    });
  });
  return nullptr;
}

EXPORT const char* index_add(const Tensor<2>* self, const Tensor<1>* index, const Tensor<2>* source, double alpha,
                             const Tensor<2>* out, int threads) {
  constexpr int64 COLUMNS = 64;
  int64 rows = self->size[0], cols = self->size[1], n = index->size[0];
  const int64* target = reinterpret_cast<const int64*>(index->data);
  if (source->size[0] != n || source->size[1] != cols || source->dtype != self->dtype)
    return "index_add needs self of shape [R, C], index of shape [n], and source of shape [n, C] and self's dtype.";
  for (int64 i = 0; i < n; i++)
    if (target[i * index->stride[0]] < 0 || target[i * index->stride[0]] >= rows)
      return "index_add needs every index in [0, R), the rows of self.";
  parallel((cols + COLUMNS - 1) / COLUMNS, double(rows + n) * double(cols), threads, [&](int64 task) {
    int64 start = task * COLUMNS, width = std::min(COLUMNS, cols - start);
    std::unique_ptr<double[]> sum(new double[rows * width]);
    for (int64 r = 0; r < rows; r++) load(row_of(*self, r), start, width, &sum[r * width]);
    for (int64 i = 0; i < n; i++) {
      alignas(64) double added[COLUMNS];
      double* row = &sum[target[i * index->stride[0]] * width];
      load(row_of(*source, i), start, width, added);
      for (int64 c = 0; c < width; c++) row[c] += alpha * added[c];
    }
    for (int64 r = 0; r < rows; r++) store(out->data, out->dtype, r * cols + start, &sum[r * width], width);
  });
  return nullptr;
}

// Over n elements that lie one behind the other. x and out may be the same.
EXPORT const char* pointwise(const char* kind, const double* params, int64 dtype, char* x, char* out, int64 n,
                             int threads) {
  const Pointwise* op = std::find_if(std::begin(POINTWISE), std::end(POINTWISE),
                                     [&](const Pointwise& entry) { return !std::strcmp(entry.name, kind); });
  if (op == std::end(POINTWISE)) return "pointwise does not know this kind.";
  Loop apply = dtype == FLOAT64 ? op->exact : op->fast;
  parallel((n + CHUNK - 1) / CHUNK, double(n) * 8, threads, [&](int64 task) {
    alignas(64) double values[CHUNK];
    int64 start = task * CHUNK, width = std::min(CHUNK, n - start);
    load({x, dtype, 0, 1, n}, start, width, values);
    apply(values, width, params);
    store(out, dtype, start, values, width);
  });
  return nullptr;
}
