"""The operators of the suite by name: they are collected without torch."""

DTYPES = ("fp32", "bf16")
OPERATORS = (
    "linear", "matmul", "bmm", "softmax", "log_softmax", "mean", "sum", "var", "logsumexp", "norm", "cumsum", "layer_norm",
    "group_norm", "rms_norm", "attention", "silu", "gelu", "rsqrt",
)  # fmt: skip
