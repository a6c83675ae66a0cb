// Attention: softmax(scale * q @ k^T + mask) @ v.
#pragma once

#include "common.h"
#include "gemm.h"
#include "rows.h"

namespace {

// What changes or hides scores besides a mask. soft_cap and window: 0 for none.
struct Scores {
  double scale, soft_cap;
  bool is_causal;
  int64 causal_offset, window;
};

// Scales, caps and masks the scores of one query: -inf where the key is hidden.
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

// Replaces each score by its weight exp(score - max), not normalised. A query that sees no key gets weights of 0.
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

// The queries [i0, i0 + M) of one head.
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

}  // namespace

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
