"""The table: which implementation stands for which aten overload, and nothing else.

``LEAVES`` are installed below autograd, ``COMPOSITES`` above it (they are made of leaves, so gradients flow), ``POINTWISE``
on the CPU only, whose stock kernels treat the tail of a vector differently, ``REFUSED`` raise with the reason.
`OUT_GIVES_DTYPE` and `OUT_MAY_CAST` say which dtypes an ``out=`` may have.
A functional overload stands for its ``.out`` and in-place siblings too: ``doors.py`` finds them by their schemas.
"""

from pytest_batchinv.kernels import aten

LEAVES = {
    "mm": aten.mm,
    "mm.dtype": aten.mm_dtype,
    "addmm": aten.addmm,
    "addmm.dtype": aten.addmm_dtype,
    "_addmm_activation": aten.addmm_activation,
    "bmm": aten.bmm,
    "bmm.dtype": aten.bmm_dtype,
    "baddbmm": aten.baddbmm,
    "baddbmm.dtype": aten.baddbmm_dtype,
    "addbmm": aten.addbmm,
    "mv": aten.mv,
    "addmv": aten.addmv,
    "dot": aten.dot,
    "vdot": aten.dot,
    "_grouped_mm": aten.grouped_mm,
    "convolution": aten.convolution,
    "sum": aten.sum_all,
    "sum.dim_IntList": aten.sum_dim,
    "mean": aten.mean_all,
    "mean.dim": aten.mean_dim,
    "var.correction": aten.var,
    "std.correction": aten.std,
    "var_mean.correction": aten.var_mean,
    "std_mean.correction": aten.std_mean,
    "logsumexp": aten.logsumexp,
    "linalg_vector_norm": aten.vector_norm,
    "norm.Scalar": aten.norm_all,
    "norm.ScalarOpt_dtype": aten.norm_all_dtype,
    "norm.ScalarOpt_dim": aten.norm_dim,
    "norm.ScalarOpt_dim_dtype": aten.norm_dim_dtype,
    "cumsum": aten.cumsum,
    "_softmax": aten.softmax,
    "_log_softmax": aten.log_softmax,
    "topk": aten.topk,
    "native_layer_norm": aten.native_layer_norm,
    "native_group_norm": aten.native_group_norm,
    "_fused_rms_norm": aten.fused_rms_norm,
    "_scaled_dot_product_flash_attention_for_cpu": aten.flash_attention_for_cpu,
    "_scaled_dot_product_efficient_attention": aten.efficient_attention,
    "index_add": aten.index_add,
    "scatter_add": aten.scatter_add,
}

COMPOSITES = {
    "linear": aten.linear,
    "rms_norm": aten.rms_norm,
    "scaled_dot_product_attention": aten.scaled_dot_product_attention,
}

POINTWISE = {
    **{kind: aten.unary(kind) for kind in ("silu", "sigmoid", "mish", "rsqrt", "exp", "tanh", "erf")},
    **{kind: aten.unary(kind) for kind in ("expm1", "log", "log1p", "sin", "cos")},
    "gelu": aten.gelu,
    "softplus": aten.softplus,
    "elu": aten.elu,
    "pow.Tensor_Scalar": aten.pow,
}

# torch's rules for ``out=``. Elsewhere it must have the result's dtype.
OUT_GIVES_DTYPE = {"sum.IntList_out", "mean.out", "mean.dtype_out", "cumsum.out"}
"""Without ``dtype=`` these compute in the dtype of ``out``."""
OUT_MAY_CAST = {
    "var.correction_out", "std.correction_out", "logsumexp.out",
    *(f"{kind}.out" for kind in ("sigmoid", "rsqrt", "exp", "tanh", "erf", "expm1", "log", "log1p", "sin", "cos")),
    "pow.Tensor_Scalar_out",
}  # fmt: skip
"""These write into any dtype that the result can be cast to."""

_SDPA = "call torch.nn.functional.scaled_dot_product_attention, which the mode covers whatever backend is chosen"
_UNFUSED = "this fused path is not covered: call it in training mode or with gradients, where torch uses plain operators"
_NO_KERNEL = "there is no batch-invariant kernel for it"

REFUSED = {
    "_scaled_dot_product_flash_attention": _SDPA,
    "_scaled_dot_product_cudnn_attention": _SDPA,
    "_flash_attention_forward": _SDPA,
    "_efficient_attention_forward": _SDPA,
    "_native_multi_head_attention": _UNFUSED,
    "_transformer_encoder_layer_fwd": _UNFUSED,
    "_scaled_mm": _NO_KERNEL,
    "_scaled_grouped_mm": _NO_KERNEL,
    "nansum": _NO_KERNEL,
    "prod": _NO_KERNEL,
    "prod.dim_int": _NO_KERNEL,
    "cumprod": _NO_KERNEL,
    "logcumsumexp": _NO_KERNEL,
    "_masked_softmax": _NO_KERNEL,
    "scatter_reduce.two": _NO_KERNEL,
    "_cdist_forward": _NO_KERNEL,
    "_embedding_bag": _NO_KERNEL,
    "_embedding_bag_forward_only": _NO_KERNEL,
    "_thnn_fused_lstm_cell": _NO_KERNEL,
    "_cudnn_rnn": _NO_KERNEL,
}
