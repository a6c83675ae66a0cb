// Matrix products: gemm, grouped_gemm and grouped_gemm_over_k; those of scaled 8-bit floats.
#pragma once

#include "common.h"

namespace {

// Matrix product: one chain of fused multiply-adds over k for each element, k ascending.
//
// A tile multiplies some rows of a with a panel of columns of b, one outer product for each k: each lane holds the
// whole sum of one element. K is cut into blocks so that the packed operands stay in the cache; the accumulators are
// kept from block to block.

constexpr int K_BLOCK = 128, M_BLOCK = 128, N_BLOCK = 128;
constexpr int NARROW_ROWS = 2;                  // so few rows (decoding) get wider tiles: more parallel chains
constexpr int VECTORS = 2, NARROW_VECTORS = 4;  // columns of a tile, in vectors
template <class A> constexpr int MAX_PANEL = NARROW_VECTORS * LANES<A>;

int64 round_up(int64 n, int64 multiple) { return (n + multiple - 1) / multiple * multiple; }

// c[R, V vectors] += a @ b, with a packed as [K, R] and b as [K, V vectors]. With SKIP_ZEROS an element of a that is
// exactly 0 adds nothing, even if b is infinite or NaN there.
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

// Eight vectors of eight. Three rounds of interleaving the upper half with the lower half transpose them.
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

// Packs 8 columns x(k, 0..8), each contiguous along k, to packed[k * width + 0..8] for k < K.
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

// Packs x [K, N] as [K, width], with zeros after column N.
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

// c[M, N] += a @ b. c is row-major and c_stride a multiple of MAX_PANEL: the columns after N are scratch.
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

// c[M, N] += a @ b for M <= M_BLOCK.
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

// One block of a problem: out[m0:m0 + M, n0:n0 + N].
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

// A product of scaled 8-bit floats, which come as bfloat16.
template <class T>
struct ScaledProblem {
  View<bf16> a, b;
  View<float> scale_a, scale_b;  // [M, groups], [groups, N / columns]
  View<float> bias;              // one row; data may be null
  T* out;                        // row-major [M, N]
  int64 M, N, K, groups, columns;
};

// One block of a problem, in two levels: each SCALED_BLOCK terms are a chain from 0, and these sums are added in float.
constexpr int64 SCALED_BLOCK = 128;

template <class T>
void solve(const ScaledProblem<T>& p, int64 m0, int64 M, int64 n0, int64 N) {
  alignas(64) float sum[M_BLOCK * N_BLOCK], part[M_BLOCK * N_BLOCK];
  int64 stride = round_up(N, MAX_PANEL<float>);
  std::fill(sum, sum + M * stride, 0.f);
  auto scale = [&](int64 m, int64 n, int64 group) {
    return p.scale_a.at(m0 + m, group) * p.scale_b.at(group, (n0 + n) / p.columns);
  };
  for (int64 k = 0; k < p.K; k += SCALED_BLOCK) {
    std::fill(part, part + M * stride, 0.f);
    add_product<false>(p.a.from(m0, k), p.b.from(k, n0), M, N, std::min(SCALED_BLOCK, p.K - k), part, stride);
    for (int64 m = 0; m < M; m++)
      for (int64 n = 0; n < N; n++) {
        float& x = part[m * stride + n];
        if (p.groups != 1) x *= scale(m, n, k / SCALED_BLOCK);
        sum[m * stride + n] += x;
      }
  }
  for (int64 m = 0; m < M; m++)
    for (int64 n = 0; n < N; n++) {
      float x = sum[m * stride + n];
      if (p.groups == 1) x *= scale(m, n, 0);
      if (p.bias.data) x += p.bias.at(0, n0 + n);
      p.out[(m0 + m) * p.N + n0 + n] = narrow<T>(x);
    }
}

// Cuts the problems into blocks that are small enough to give every thread some work. A: what they are summed in.
template <class A, class P>
std::vector<Task> tasks_of(const std::vector<P>& problems, int threads, int64& n_step) {
  std::vector<Task> tasks;
  for (n_step = N_BLOCK;; n_step /= 2) {
    tasks.clear();
    for (std::size_t i = 0; i < problems.size(); i++)
      for (int64 m = 0; m < problems[i].M; m += M_BLOCK)
        for (int64 n = 0; n < problems[i].N; n += n_step) tasks.push_back({int64(i), m, n});
    if (int64(tasks.size()) >= 4 * threads || n_step <= MAX_PANEL<A>) return tasks;
  }
}

template <class A, class P, class... Factors>
void solve_all(const std::vector<P>& problems, int threads, Factors... factors) {
  double work = 0;
  for (const auto& p : problems) work += double(p.M) * double(p.N) * double(p.K + 1);
  int64 n_step;
  std::vector<Task> tasks = tasks_of<A>(problems, work > MIN_WORK ? threads : 0, n_step);
  parallel(int64(tasks.size()), work, threads, [&](int64 i) {
    const Task& task = tasks[i];
    const P& p = problems[task.problem];
    solve(p, task.m, std::min<int64>(M_BLOCK, p.M - task.m), task.n, std::min(n_step, p.N - task.n), factors...);
  });
}

}  // namespace

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
    solve_all<Accumulator<T>>(problems, threads, alpha, beta);
  });
  return nullptr;
}

EXPORT const char* grouped_gemm_over_k(const Tensor<2>* a, const Tensor<2>* b, const std::int32_t* offs, int64 n_offs,
                                       const Tensor<3>* out, int threads) {
  int64 M = a->size[0], rows = a->size[1], N = b->size[1], start = 0;
  if (b->size[0] != rows || b->dtype != a->dtype)
    return "grouped_gemm_over_k needs a of shape [M, T], b of shape [T, N] and the same dtype, and offs of shape [G].";
  for (int64 g = 0; g < n_offs; start = offs[g++])
    if (offs[g] < start || offs[g] > rows) return "grouped_gemm_over_k needs offs that ascend from 0 to the number of rows.";
  with_type(a->dtype, [&](auto type) {
    using T = decltype(type);
    std::vector<Problem<T>> problems;
    int64 begin = 0;
    for (int64 g = 0; g < n_offs; begin = offs[g++]) {
      T* result = reinterpret_cast<T*>(out->data) + g * M * N;
      problems.push_back({matrix<T>(*a).from(0, begin), matrix<T>(*b).from(begin, 0), {}, result, M, N, offs[g] - begin});
    }
    solve_all<Accumulator<T>>(problems, threads, 1.0, 1.0);
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
    solve_all<Accumulator<T>>(problems, threads, 1.0, 1.0);
  });
  return nullptr;
}

EXPORT const char* scaled_gemm(const Tensor<3>* a, const Tensor<3>* b, const Tensor<3>* scale_a, const Tensor<3>* scale_b,
                               const Tensor<1>* bias, const Tensor<3>* out, int threads) {
  int64 B = a->size[0], M = a->size[1], K = a->size[2], N = b->size[2], groups = scale_a->size[2];
  int64 blocks = (K + SCALED_BLOCK - 1) / SCALED_BLOCK, columns = scale_b->size[2] == N ? 1 : SCALED_BLOCK;
  if (a->dtype != BFLOAT16 || b->dtype != BFLOAT16 || scale_a->dtype != FLOAT32 || scale_b->dtype != FLOAT32)
    return "scaled_gemm needs 8-bit floats as bfloat16, and scales in float32.";
  if (b->size[0] != B || b->size[1] != K) return "scaled_gemm needs a of shape [B, M, K] and b of shape [B, K, N].";
  if (scale_a->size[0] != B || scale_a->size[1] != M || scale_b->size[0] != B || scale_b->size[1] != groups ||
      (groups != 1 && groups != blocks) || scale_b->size[2] != (N + columns - 1) / columns)
    return "scaled_gemm needs scales of shape [B, M, groups] and [B, groups, N or N / 128], one group or one for 128 of K.";
  if (bias && (bias->size[0] != N || bias->dtype != FLOAT32)) return "scaled_gemm needs a bias of shape [N] in float32.";
  with_type(out->dtype, [&](auto type) {
    using T = decltype(type);
    std::vector<ScaledProblem<T>> problems(B);
    for (int64 i = 0; i < B; i++) {
      View<float> added{};
      if (bias) added = {reinterpret_cast<const float*>(bias->data), 0, bias->stride[0]};
      T* result = reinterpret_cast<T*>(out->data) + i * M * N;
      problems[i] = {matrix<bf16>(*a, {i}), matrix<bf16>(*b, {i}), matrix<float>(*scale_a, {i}), matrix<float>(*scale_b, {i}),
                     added, result, M, N, K, groups, columns};
    }
    solve_all<float>(problems, threads);
  });
  return nullptr;
}

EXPORT const char* scaled_grouped_gemm(const Tensor<2>* a, const Tensor<3>* b, const Tensor<1>* scale_a,
                                       const Tensor<2>* scale_b, const std::int32_t* offs, int64 n_offs,
                                       const Tensor<2>* out, int threads) {
  int64 rows = a->size[0], K = a->size[1], N = b->size[2], start = 0;
  if (a->dtype != BFLOAT16 || b->dtype != BFLOAT16 || scale_a->dtype != FLOAT32 || scale_b->dtype != FLOAT32)
    return "scaled_grouped_gemm needs 8-bit floats as bfloat16, and scales in float32.";
  if (b->size[0] != n_offs || b->size[1] != K || scale_a->size[0] != rows || scale_b->size[0] != n_offs || scale_b->size[1] != N)
    return "scaled_grouped_gemm needs a of shape [T, K], b of shape [G, K, N], scales of [T] and [G, N], and offs of shape [G].";
  for (int64 g = 0; g < n_offs; start = offs[g++])
    if (offs[g] < start || offs[g] > rows) return "scaled_grouped_gemm needs offs that ascend from 0 to the number of rows.";
  with_type(out->dtype, [&](auto type) {
    using T = decltype(type);
    T* result = reinterpret_cast<T*>(out->data);
    View<float> of_rows{reinterpret_cast<const float*>(scale_a->data), scale_a->stride[0], 0};
    std::vector<ScaledProblem<T>> problems;
    int64 begin = 0;
    for (int64 g = 0; g < n_offs; begin = offs[g++])
      problems.push_back({matrix<bf16>(*a).from(begin, 0), matrix<bf16>(*b, {g}), of_rows.from(begin, 0),
                          matrix<float>(*scale_b).from(g, 0), {}, result + begin * N, offs[g] - begin, N, K, 1, 1});
    std::fill(result + begin * N, result + rows * N, T{});
    solve_all<float>(problems, threads);
  });
  return nullptr;
}

EXPORT const char* scaled_grouped_gemm_over_k(const Tensor<2>* a, const Tensor<2>* b, const Tensor<2>* scale_a,
                                              const Tensor<2>* scale_b, const std::int32_t* offs, int64 n_offs,
                                              const Tensor<3>* out, int threads) {
  int64 M = a->size[0], rows = a->size[1], N = b->size[1], start = 0;
  if (a->dtype != BFLOAT16 || b->dtype != BFLOAT16 || scale_a->dtype != FLOAT32 || scale_b->dtype != FLOAT32)
    return "scaled_grouped_gemm_over_k needs 8-bit floats as bfloat16, and scales in float32.";
  if (b->size[0] != rows || scale_a->size[0] != n_offs || scale_a->size[1] != M || scale_b->size[0] != n_offs ||
      scale_b->size[1] != N)
    return "scaled_grouped_gemm_over_k needs a of shape [M, T], b of shape [T, N], scales of [G, M] and [G, N], and offs of [G].";
  for (int64 g = 0; g < n_offs; start = offs[g++])
    if (offs[g] < start || offs[g] > rows)
      return "scaled_grouped_gemm_over_k needs offs that ascend from 0 to the number of rows.";
  with_type(out->dtype, [&](auto type) {
    using T = decltype(type);
    std::vector<ScaledProblem<T>> problems;
    int64 begin = 0;
    for (int64 g = 0; g < n_offs; begin = offs[g++]) {
      T* result = reinterpret_cast<T*>(out->data) + g * M * N;
      problems.push_back({matrix<bf16>(*a).from(0, begin), matrix<bf16>(*b).from(begin, 0),
                          matrix<float>(*scale_a).from(g, 0).transposed(), matrix<float>(*scale_b).from(g, 0), {}, result, M, N,
                          offs[g] - begin, 1, 1});
    }
    solve_all<float>(problems, threads);
  });
  return nullptr;
}
