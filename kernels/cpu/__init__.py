"""The kernel set for the CPU: ``reference.py`` in C++, with every sum in one fixed order.

Orders (k, columns and keys ascending; ``fma`` rounds once; "wide" is float64 for float64 and float32, else float32):

=================  ====================================================================================================
gemm               ``acc = fma(a[m, k], b[k, n], acc)`` from 0 in wide, one chain over all k; then ``alpha * acc``, then
                   ``+ (beta * bias)``, each rounded in wide; then once to the dtype. Exact zeros before or after the
                   values add nothing.
scaled_gemm        8-bit floats: each 128 of k one chain as in gemm, in float32; times ``scale_a * scale_b`` where each block
                   has scales; these sums one chain, ascending, from 0; times the scales of the row and the column; + the
                   bias; each step rounded in float32; then once to the dtype.
row sums           in float64: lane j of 32 sums the columns j, j + 32, j + 64, ...; then lane j += lane j + 16, + 8,
                   + 4, + 2, + 1. mean, norm, var (a second pass over ``(x - mean) ** 2``), layer_norm and rms_norm sum
                   in this order, too. Zeros before or after the values rotate them over the lanes, and the tree adds
                   the same pairs after any rotation: no bit changes.
softmax            ``exp(x - max)`` in float64, summed like a row. Columns of -inf before or after the others are zeros
                   there. log_softmax and logsumexp have the same sum.
attention's        the weights again from the logsumexp, each product one chain as in gemm, for tensors made wide (float32, or
gradients          float64 for float64); sums over the query heads of a key head ascending.
gradients          of softmax and norms in float64, their sums over a row as those of a row; of weight and bias one chain
                   over the rows for each column, ascending, in float64. Rounded once.
tree_sum           ``0 + 1``, ``2 + 3``, ..., then their sums, up to one, in float64 for float64, else float32; rounded once.
cumsum             one chain in float64, each partial sum rounded to the dtype.
attention          ``score = scale * chain(q, k) + mask`` in wide; ``weight = wide(exp(score - max))``; the weights are
                   summed like a row; ``acc = fma(weight[j], v[j], acc)`` in wide, without the keys of weight 0 (even if
                   v is NaN there); ``acc / sum`` in float64, rounded once. False, -inf or is_causal hide a key: it adds
                   nothing then, whatever it holds.
index_add          ``acc += alpha * source[i]`` in float64, i ascending, two roundings; then once to the dtype.
pointwise          in float64, rounded once.
=================  ====================================================================================================

``ops.py`` holds the functions, ``build.py`` compiles ``kernels.cpp`` at first use.
Threads: as many as torch uses, and the same ones: the library needs ``libgomp.so.1``, which torch has already loaded.
"""

from .ops import (
    KINDS,
    attention,
    attention_backward,
    gemm,
    grouped_gemm,
    grouped_gemm_over_k,
    index_add,
    packed_attention,
    pointwise,
    row_cumsum,
    row_layer_norm,
    row_logprobs,
    row_logsumexp,
    row_mean,
    row_mean_of_squares,
    row_norm,
    row_norm_backward,
    row_rms_norm,
    row_softmax,
    row_softmax_backward,
    row_sum,
    row_var_mean,
    scaled_gemm,
    scaled_grouped_gemm,
    scaled_grouped_gemm_over_k,
    tree_sum,
)

__all__ = [
    "KINDS",
    "attention",
    "attention_backward",
    "gemm",
    "grouped_gemm",
    "grouped_gemm_over_k",
    "index_add",
    "packed_attention",
    "pointwise",
    "row_cumsum",
    "row_layer_norm",
    "row_logprobs",
    "row_logsumexp",
    "row_mean",
    "row_mean_of_squares",
    "row_norm",
    "row_norm_backward",
    "row_rms_norm",
    "row_softmax",
    "row_softmax_backward",
    "row_sum",
    "row_var_mean",
    "scaled_gemm",
    "scaled_grouped_gemm",
    "scaled_grouped_gemm_over_k",
    "tree_sum",
]
