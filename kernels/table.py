"""The table: which implementation stands for which aten overload, and nothing else.

``BACKEND_KERNELS`` are installed below autograd. ``COMPOSITES`` are installed above it: they are made of backend kernels, so
gradients flow. ``POINTWISE`` and ``WHOLE_VECTORS`` are installed on the CPU only, where torch's own kernels treat the tail of
a vector in another way. ``AS_IN_EAGER_CODE`` is for compiled code alone. ``REFUSED`` raise with the reason.
``OUT_GIVES_DTYPE`` and ``OUT_MAY_CAST`` say which dtypes an ``out=`` may have. ``OF_VLLM`` are operators of another library.
A functional overload stands for its ``.out`` and in-place siblings too: ``overloads.py`` finds them by their schemas.
"""

from collections.abc import Callable
from typing import Any

from pytest_batchinv.kernels import vllm
from pytest_batchinv.kernels.aten import (
    attention,
    convolution,
    distances,
    fourier,
    losses,
    norms,
    pointwise,
    products,
    recurrent,
    reductions,
    scaled,
    scatter,
    scatter_reduce,
    vectors,
)

BACKEND_KERNELS: dict[str, Callable[..., Any]] = {
    "mm": products.mm,
    "mm.dtype": products.mm_dtype,
    "addmm": products.addmm,
    "addmm.dtype": products.addmm_dtype,
    "_addmm_activation": products.addmm_activation,
    "bmm": products.bmm,
    "bmm.dtype": products.bmm_dtype,
    "baddbmm": products.baddbmm,
    "baddbmm.dtype": products.baddbmm_dtype,
    "addbmm": products.addbmm,
    "mv": products.mv,
    "addmv": products.addmv,
    "dot": products.dot,
    "vdot": products.vdot,
    "_grouped_mm": products.grouped_mm,
    "_scaled_mm": scaled.scaled_mm,
    "_scaled_mm_v2": scaled.scaled_mm_v2,
    "_scaled_grouped_mm": scaled.scaled_grouped_mm,
    "_scaled_grouped_mm_v2": scaled.scaled_grouped_mm_v2,
    "convolution": convolution.convolution,
    "sum": reductions.sum_all,
    "sum.dim_IntList": reductions.sum_dim,
    "mean": reductions.mean_all,
    "mean.dim": reductions.mean_dim,
    "var.correction": reductions.var,
    "std.correction": reductions.std,
    "var_mean.correction": reductions.var_mean,
    "std_mean.correction": reductions.std_mean,
    "logsumexp": reductions.logsumexp,
    "linalg_vector_norm": reductions.vector_norm,
    "norm.Scalar": reductions.norm_all,
    "norm.ScalarOpt_dtype": reductions.norm_all_dtype,
    "norm.ScalarOpt_dim": reductions.norm_dim,
    "norm.ScalarOpt_dim_dtype": reductions.norm_dim_dtype,
    "cumsum": reductions.cumsum,
    "nansum": reductions.nansum,
    "prod": reductions.prod_all,
    "prod.dim_int": reductions.prod_dim,
    "cumprod": reductions.cumprod,
    "logcumsumexp": reductions.logcumsumexp,
    "_softmax": reductions.softmax,
    "_log_softmax": reductions.log_softmax,
    "topk": reductions.topk,
    "native_layer_norm": norms.native_layer_norm,
    "native_group_norm": norms.native_group_norm,
    "_fused_rms_norm": norms.fused_rms_norm,
    "_weight_norm_interface": norms.weight_norm_interface,
    "_scaled_dot_product_flash_attention_for_cpu": attention.flash_attention_for_cpu,
    "_scaled_dot_product_efficient_attention": attention.efficient_attention,
    "index_add": scatter.index_add,
    "scatter_add": scatter.scatter_add,
    "scatter_reduce.two": scatter_reduce.scatter_reduce,
    "scatter.reduce": scatter_reduce.scatter_with,
    "scatter.value_reduce": scatter_reduce.scatter_value_with,
    "index_reduce": scatter_reduce.index_reduce,
    "_embedding_bag": scatter.embedding_bag,
    "_embedding_bag_forward_only": scatter.embedding_bag,
    "_cdist_forward": distances.cdist_forward,
    "addr": pointwise.addr,
    "_fft_c2c": fourier.fft_c2c,
    "_fft_r2c": fourier.fft_r2c,
    "_fft_c2r": fourier.fft_c2r,
    "nll_loss_forward": losses.nll_loss_forward,
    "nll_loss2d_forward": losses.nll_loss2d_forward,
    # gradients
    "_softmax_backward_data": reductions.softmax_backward,
    "_log_softmax_backward_data": reductions.log_softmax_backward,
    "native_layer_norm_backward": norms.native_layer_norm_backward,
    "native_group_norm_backward": norms.native_group_norm_backward,
    "_fused_rms_norm_backward": norms.fused_rms_norm_backward,
    "convolution_backward": convolution.convolution_backward,
    "embedding_dense_backward": scatter.embedding_dense_backward,
    "index_put": scatter.index_put,
    "_index_put_impl": scatter.index_put,
    "_unsafe_index_put": scatter.index_put,
}

COMPOSITES: dict[str, Callable[..., Any]] = {
    "linear": products.linear,
    "layer_norm": norms.layer_norm,
    "rms_norm": norms.rms_norm,
    "scaled_dot_product_attention": attention.scaled_dot_product_attention,
    "batch_norm": norms.batch_norm,
    "cdist": distances.cdist,
    "linalg_multi_dot": products.multi_dot,
    "linalg_multi_dot.out": products.multi_dot_out,
    "chain_matmul": products.chain_matmul,
    "chain_matmul.out": products.chain_matmul_out,
    "cross": pointwise.cross,
    "cross.out": pointwise.cross_out,
    "lstm_cell": recurrent.lstm_cell,
    "gru_cell": recurrent.gru_cell,
    **{
        f"{kind}.{form}": recurrent.decomposed(f"{kind}.{form}")
        for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")
        for form in ("input", "data")
    },
}

PLANNED = {
    "linear": products.planned_linear,
    "layer_norm": norms.planned_layer_norm,
    "rms_norm": norms.planned_rms_norm,
    "scaled_dot_product_attention": attention.planned_sdpa,
}
"""The composites without their operators in between, for calls in which the dispatcher has nothing to do. The same bits."""

_OF_ANY_DTYPE = ("sigmoid", "rsqrt", "exp", "tanh", "erf", "expm1", "log", "log1p", "sin", "cos")

POINTWISE: dict[str, Callable[..., Any]] = {
    **{kind: pointwise.unary(kind) for kind in ("silu", "mish", *_OF_ANY_DTYPE)},
    "gelu": pointwise.gelu,
    "softplus": pointwise.softplus,
    "elu": pointwise.elu,
    "pow.Tensor_Scalar": pointwise.pow,
}

WHOLE_VECTORS: dict[str, Callable[..., Any]] = {
    name: vectors.whole_vectors(name)
    for name in (
        *("exp2", "sinh", "cosh", "atanh", "special_i0e", "softshrink", "sgn", "digamma", "igamma", "igammac"),
        *("atan2", "hypot", "logaddexp", "logaddexp2", "lerp.Scalar", "binary_cross_entropy"),
        *(
            f"{kind}_backward"
            for kind in ("silu", "gelu", "mish", "sigmoid", "tanh", "softplus", "elu", "log_sigmoid", "logit")
        ),
        *(f"{kind}_backward" for kind in ("hardswish", "hardsigmoid", "softshrink", "hardshrink")),
    )
} | {"pow.Tensor_Tensor": vectors.pow_of_tensors, "angle": vectors.angle}
"""Pointwise operators whose values follow their place in memory: torch's kernels, on whole vectors (``aten/vectors.py``)."""

_ON_THE_CPU = (
    *("sqrt", "log2", "log10", "tan", "asin", "acos", "atan", "asinh", "acosh", "erfc", "erfinv", "sinc", "logit"),
    *("pow.Scalar", "lgamma", "polygamma", "mvlgamma", "i0", "xlogy.Tensor", "special_xlog1py", "special_zeta"),
    *("special_erfcx", "special_i1", "special_i1e", "special_ndtri", "special_log_ndtr", "special_entr", "special_airy_ai"),
    *("special_bessel_j0", "special_bessel_j1", "special_bessel_y0", "special_bessel_y1", "special_spherical_bessel_j0"),
    *("special_modified_bessel_i0", "special_modified_bessel_i1", "special_modified_bessel_k0", "special_modified_bessel_k1"),
    *("special_scaled_modified_bessel_k0", "special_scaled_modified_bessel_k1"),
    *(f"special_chebyshev_polynomial_{kind}" for kind in "tuvw"),
    *("special_hermite_polynomial_h", "special_hermite_polynomial_he", "special_laguerre_polynomial_l"),
    *("log_sigmoid_forward", "round.decimals", "remainder.Tensor", "remainder.Scalar"),
)
_IN_SEVERAL_STEPS = (
    *("add.Tensor", "sub.Tensor", "div.Tensor_mode", "floor_divide", "lerp.Tensor", "addcmul", "addcdiv", "glu", "nextafter"),
    *("ldexp.Tensor", "linspace", "logspace", "linalg_cross", "mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"),
    *("binary_cross_entropy_with_logits", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d", "col2im"),
    *("grid_sampler_2d", "grid_sampler_3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d"),
    *(
        "_weight_norm_interface_backward",
        "upsample_trilinear3d",
        "_upsample_bilinear2d_aa",
        "_upsample_bicubic2d_aa",
    ),
    *("upsample_linear1d.vec", "upsample_bilinear2d.vec", "upsample_bicubic2d.vec", "upsample_trilinear3d.vec"),
)
OF_VLLM: dict[str, Callable[..., Any]] = {
    "_C::cpu_attn_reshape_and_cache": vllm.reshape_and_cache,
    "_C::cpu_attention_with_kv_cache": vllm.attention_with_kv_cache,
    "_C::rotary_embedding": vllm.rotary_embedding,
    "_C::greedy_argmax": vllm.greedy_argmax,
}
"""Installed on the CPU, where vLLM's CPU build has been imported before the mode is entered."""

WRAPPERS = {"vllm::unified_attention_with_output", "vllm::unified_kv_cache_update"}
"""Operators that, on the CPU, are Python which calls others and computes nothing itself (read in vLLM 0.32.0): op coverage sees
what they call. On a GPU they may launch kernels that no dispatcher sees."""

AS_IN_EAGER_CODE = {
    **dict.fromkeys(_ON_THE_CPU, ("cpu",)),
    **dict.fromkeys(_IN_SEVERAL_STEPS, ("cpu", "cuda")),
}
"""Operators that Inductor computes by another formula or another function than eager code, and the devices where it does: there
compiled code calls eager code's kernel, as an opaque operator."""

ONLY_WITH_A_FACTOR = {"add.Tensor", "sub.Tensor"}
"""Those of them that Inductor computes as eager code does unless ``alpha`` is given."""
ONLY_OF_FLOATS = {"add.Tensor", "sub.Tensor", "div.Tensor_mode", "floor_divide", "remainder.Tensor", "remainder.Scalar"}
"""Those whose integers are exact in any code."""

ADD_ONLY_TO_ACCUMULATE = {"index_put", "_index_put_impl", "_unsafe_index_put"}
"""Entries that only move values, as torch's own kernels do, unless they are called with ``accumulate``."""

FLOATS_OF_INTEGERS = {*_OF_ANY_DTYPE, "pow", "logsumexp"}
"""Entries that make floats of integers, and then compute as for those. ``pow`` does where its exponent is a float."""

COMPLEX = {
    *("mm", "addmm", "bmm", "baddbmm", "addbmm", "mv", "addmv", "dot", "vdot"),
    *("convolution", "convolution_backward", "index_add", "scatter_add", "_fft_c2c", "_fft_c2r"),
    *("index_put", "_index_put_impl", "_unsafe_index_put", "embedding_dense_backward"),
    *("sum", "mean", "var", "std", "var_mean", "std_mean", "linalg_vector_norm", "norm", "cumsum", "prod", "cumprod"),
}
"""Entries that take complex64 and complex128 too (``complex_parts.py``), as pointwise ones do wherever torch does. The others
are refused, as is complex32."""

OF_FLOAT8 = set(scaled.FAKES)
"""Entries that take 8-bit floats, and refuse or name what else they are given."""

# torch's rules for ``out=``. Elsewhere it must have the result's dtype.
OUT_GIVES_DTYPE = {
    *("sum.IntList_out", "mean.out", "mean.dtype_out", "cumsum.out", "cumprod.out", "nansum.out", "prod.int_out"),
    *("_scaled_mm.out", "_scaled_mm_v2.out"),
}
"""Without ``dtype=`` (``out_dtype``) these compute in the dtype of ``out``."""
OUT_MAY_CAST = {
    "var.correction_out", "std.correction_out", "logsumexp.out",
    *(f"{kind}.out" for kind in _OF_ANY_DTYPE),
    "pow.Tensor_Scalar_out",
}  # fmt: skip
"""These write into any dtype that the result can be cast to. So do those of ``WHOLE_VECTORS``."""

_SDPA = "call torch.nn.functional.scaled_dot_product_attention, which the mode covers whatever backend is chosen"
_FASTPATH = (
    "call torch.backends.mha.set_fastpath_enabled(False), as the mode does when it is entered, and the layer uses operators "
    "that are covered"
)
_CELL = "call torch.nn.LSTMCell or torch.nn.GRUCell, or torch.lstm_cell or torch.gru_cell, which the mode covers"
_LAYER = (
    "call torch.nn.LSTM, GRU or RNN, which the mode covers; with torch before 2.13 on a CPU, layers of them are not covered"
)
_BATCH_NORM = "call torch.nn.functional.batch_norm, which the mode covers"
_ONEDNN = (
    "oneDNN chooses the order of its sums by the number of rows; call torch.nn.functional.linear or torch.nn.functional.conv2d"
)
_DYNAMIC = (
    "the scale of its integers is that of the whole batch, so that every row depends on the others; quantise the weights "
    "alone, or give each row a scale of its own: integer sums are exact in any order"
)
_NO_KERNEL = "there is no batch-invariant kernel for it"

REFUSED = {
    "_scaled_dot_product_flash_attention": _SDPA,
    "_scaled_dot_product_cudnn_attention": _SDPA,
    "_flash_attention_forward": _SDPA,
    "_efficient_attention_forward": _SDPA,
    "_native_multi_head_attention": _FASTPATH,
    "_transformer_encoder_layer_fwd": _FASTPATH,
    "_masked_softmax": _NO_KERNEL,
    "_thnn_fused_lstm_cell": _CELL,
    "_thnn_fused_gru_cell": _CELL,
    "_cudnn_rnn": _LAYER,
    "mkldnn_rnn_layer": _LAYER,
    "mkldnn_linear": _ONEDNN,
    "mkldnn_convolution": _ONEDNN,
    "mkldnn::_linear_pointwise": _ONEDNN,
    "mkldnn::_linear_pointwise.binary": _ONEDNN,
    "mkldnn::_convolution_pointwise": _ONEDNN,
    "mkldnn::_convolution_pointwise.binary": _ONEDNN,
    "mkldnn::_convolution_transpose_pointwise": _ONEDNN,
    "mkl::_mkl_linear": _ONEDNN,
    **dict.fromkeys(
        (
            *("quantized::linear_dynamic", "quantized::linear_relu_dynamic", "_quantized::linear_dynamic"),
            *("sparse::qlinear_dynamic", "sparse::qlinear_relu_dynamic", "quantize_per_tensor_dynamic"),
            *("fbgemm_linear_int8_weight", "fbgemm_linear_int8_weight_fp32_activation"),
            *(f"quantized::conv{dims}d_dynamic" for dims in (1, 2, 3)),
            *(f"quantized::conv_transpose{dims}d_dynamic" for dims in (1, 2, 3)),
            *(f"quantized::quantized_{kind}_cell_dynamic" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
            *(f"quantized_{kind}.{form}" for kind in ("lstm", "gru") for form in ("input", "data")),
            *(f"quantized_{kind}.{form}_legacy" for kind in ("lstm", "gru") for form in ("input", "data")),
            *(f"quantized_{kind}_cell" for kind in ("lstm", "gru", "rnn_tanh", "rnn_relu")),
        ),
        _DYNAMIC,
    ),
    "quantized::linear_dynamic_fp16": _NO_KERNEL,
    "quantized::linear_relu_dynamic_fp16": _NO_KERNEL,
    "quantized::linear_dynamic_fp16_unpacked_weight": _NO_KERNEL,
    "onednn::linear_dynamic_fp16": _NO_KERNEL,
    "onednn::linear_relu_dynamic_fp16": _NO_KERNEL,
    "native_batch_norm": _BATCH_NORM,
    "_native_batch_norm_legit": _BATCH_NORM,
    "_native_batch_norm_legit.no_stats": _BATCH_NORM,
    "_batch_norm_with_update": _BATCH_NORM,
    "_batch_norm_no_update": _BATCH_NORM,
    "cudnn_batch_norm": _BATCH_NORM,
}
