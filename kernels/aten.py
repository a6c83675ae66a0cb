"""aten's operators by the kernel sets: each function here has the arguments of the aten overload it stands for.

It brings them into the canonical form of ``reference.py`` (matrices with one batch dimension, rows of a 2-d tensor), calls
the kernel set of the tensor's device, and brings the result back. Sums happen in the kernel sets alone; what is left here
is shape, dtype and pointwise work. Results are contiguous.
"""

import functools
import math
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from pytest_batchinv.kernels.reference import accumulator_dtype
from torch import Tensor
from torch._prims_common import suggest_memory_format


class Refused(NotImplementedError):
    """The mode does not cover this call and says so, instead of falling back to a kernel that may vary."""


def kernel_set(x: Tensor) -> ModuleType:
    """The kernels for this tensor's device: C++ for the CPU, Triton for CUDA. Raises Refused for any other."""
    return _kernel_set(x.device.type)


@functools.cache
def _kernel_set(device_type: str) -> ModuleType:
    if device_type == "cpu":
        from pytest_batchinv.kernels import cpu

        return cpu
    if device_type == "cuda":
        from pytest_batchinv.kernels import cuda

        return cuda
    raise Refused(f"batch-invariant mode has kernels for cpu and cuda, not for {device_type}.")


# --- matrix products ---------------------------------------------------------------------------------------------------


def mm(self: Tensor, mat2: Tensor) -> Tensor:
    a, b = self.shape, mat2.shape
    if len(a) != 2 or len(b) != 2 or a[1] != b[0] or self.dtype != mat2.dtype or self.device != mat2.device:
        raise _wrong_product("mm", self, mat2, 2)
    return kernel_set(self).gemm(self[None], mat2[None])[0]


def mm_dtype(self: Tensor, mat2: Tensor, out_dtype: torch.dtype) -> Tensor:
    _check_out_dtype("mm", self, out_dtype)
    return mm(self.to(out_dtype), mat2.to(out_dtype))


def addmm(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    a, b = mat1.shape, mat2.shape
    if len(a) != 2 or len(b) != 2 or a[1] != b[0] or mat1.dtype != mat2.dtype or mat1.device != mat2.device:
        raise _wrong_product("addmm", mat1, mat2, 2)
    bias = _expanded_bias("addmm", self, (a[0], b[1]), mat1)
    return kernel_set(mat1).gemm(mat1[None], mat2[None], bias[None], _real(alpha), _real(beta))[0]


def addmm_dtype(self: Tensor, mat1: Tensor, mat2: Tensor, out_dtype: torch.dtype, *, beta=1, alpha=1) -> Tensor:
    _check_out_dtype("addmm", mat1, out_dtype)
    return addmm(self.to(out_dtype), mat1.to(out_dtype), mat2.to(out_dtype), beta=beta, alpha=alpha)


def addmm_activation(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta=1, alpha=1, use_gelu: bool = False) -> Tensor:
    out = addmm(self, mat1, mat2, beta=beta, alpha=alpha)
    # The gelu of the fused epilogue is the tanh form on CUDA, and the exact one on the CPU.
    form = "none" if out.device.type == "cpu" else "tanh"
    return torch.nn.functional.gelu(out, approximate=form) if use_gelu else out.relu()


def bmm(self: Tensor, mat2: Tensor) -> Tensor:
    a, b = self.shape, mat2.shape
    if len(a) != 3 or len(b) != 3 or a[2] != b[1] or a[0] != b[0] or self.dtype != mat2.dtype or self.device != mat2.device:
        raise _wrong_product("bmm", self, mat2, 3)
    return kernel_set(self).gemm(self, mat2)


def bmm_dtype(self: Tensor, mat2: Tensor, out_dtype: torch.dtype) -> Tensor:
    _check_out_dtype("bmm", self, out_dtype)
    return bmm(self.to(out_dtype), mat2.to(out_dtype))


def baddbmm(self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    a, b = _batched_shapes("baddbmm", batch1, batch2)
    bias = _expanded_bias("baddbmm", self, (a[0], a[1], b[2]), batch1)
    return kernel_set(batch1).gemm(batch1, batch2, bias, _real(alpha), _real(beta))


def baddbmm_dtype(self: Tensor, batch1: Tensor, batch2: Tensor, out_dtype: torch.dtype, *, beta=1, alpha=1) -> Tensor:
    _check_out_dtype("baddbmm", batch1, out_dtype)
    return baddbmm(self.to(out_dtype), batch1.to(out_dtype), batch2.to(out_dtype), beta=beta, alpha=alpha)


def addbmm(self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """The sum over the batch is one longer K: [M, B * K] @ [B * K, N]."""
    a, b = _batched_shapes("addbmm", batch1, batch2)
    rows = batch1.transpose(0, 1).reshape(a[1], a[0] * a[2])
    return addmm(self, rows, batch2.reshape(a[0] * a[2], b[2]), beta=beta, alpha=alpha)


def mv(self: Tensor, vec: Tensor) -> Tensor:
    if self.dim() == 0:
        raise _too_few_dims("mv", self, vec)
    _check_matrix_and_vector("mv", self, vec)
    return mm(self, vec[:, None])[:, 0]


def addmv(self: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    _check_matrix_and_vector("addmv", mat, vec)
    bias = self.expand(mat.shape[0])[:, None]
    return addmm(bias, mat, vec[:, None], beta=beta, alpha=alpha)[:, 0]


def dot(self: Tensor, tensor: Tensor) -> Tensor:
    if self.dim() != 1 or tensor.dim() != 1:
        raise RuntimeError(f"dot: expected two vectors, but got shapes {_shape(self)} and {_shape(tensor)}")
    return mm(self[None], tensor[:, None])[0, 0]


def grouped_mm(
    self: Tensor,
    mat2: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    if bias is not None or out_dtype not in (None, self.dtype):
        raise Refused("batch-invariant mode covers _grouped_mm without bias and in the dtype of its inputs.")
    _check_grouped(self, mat2, offs)
    if offs is None:
        return bmm(self, mat2)
    if self.dim() == 2 and mat2.dim() == 3:
        return kernel_set(self).grouped_gemm(self, mat2, offs)
    if self.dim() == 3 and mat2.dim() == 2:  # groups of columns: the rows of the transposed product
        return kernel_set(self).grouped_gemm(mat2.t(), self.transpose(1, 2), offs).t().contiguous()
    raise Refused(
        "batch-invariant mode covers _grouped_mm with groups of rows or of columns, not groups of the summed dimension: "
        f"{list(self.shape)} by {list(mat2.shape)}. Those are gradients of a grouped product's weights."
    )


_GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _check_grouped(a: Tensor, b: Tensor, offs: Tensor | None) -> None:
    """torch's own conditions; groups are told apart by a 2-d operand, and then offs is needed."""
    if a.dim() not in (2, 3) or b.dim() not in (2, 3):
        raise RuntimeError(f"_grouped_mm: expected operands of 2 or 3 dims, but got {_shape(a)} and {_shape(b)}")
    if a.dtype not in _GROUPED_DTYPES or a.dtype != b.dtype:
        raise RuntimeError(f"_grouped_mm: expected float32, bfloat16 or float16 twice, but got {a.dtype} and {b.dtype}")
    if a.shape[-1] != b.shape[-2] or (a.dim() == b.dim() == 3 and a.shape[0] != b.shape[0]):
        raise RuntimeError(f"_grouped_mm: shapes cannot be multiplied ({_shape(a)} and {_shape(b)})")
    if (offs is None) != (a.dim() == b.dim() == 3):
        raise RuntimeError("_grouped_mm: offs is needed where an operand has 2 dims, and there alone")
    for x in (a, b):
        inner, leading = (0, 1) if x.stride(-2) == 1 and x.stride(-1) >= max(1, x.shape[-2]) else (1, 0)
        strides = x.stride()[-2:]
        if strides[inner] != 1 or strides[leading] < x.shape[-2:][inner] or strides[leading] * x.element_size() % 16:
            raise RuntimeError(
                f"_grouped_mm: expected a stride of 1 and one of a multiple of 16 bytes, but got {x.stride()} for {_shape(x)}"
            )
    if offs is None:
        return
    if offs.dim() != 1 or offs.dtype != torch.int32 or offs.device != a.device:
        raise RuntimeError(f"_grouped_mm: expected offs as int32 vector on {a.device}, but got {offs.dtype}, {_shape(offs)}")
    groups = {a.shape[0] for _ in range(a.dim() == 3)} | {b.shape[0] for _ in range(b.dim() == 3)}
    if groups and groups != {offs.shape[0]}:
        raise RuntimeError(f"_grouped_mm: expected one end a group, but got {offs.shape[0]} for {_shape(a)} by {_shape(b)}")


def convolution(input, weight, bias, stride, padding, dilation, transposed, output_padding, groups) -> Tensor:
    """1-d convolution as one GEMM a group: each output position is a row of the C // groups * k inputs under the kernel."""
    if input.dim() != 3 or transposed:
        kind = "transposed" if transposed else f"{input.dim() - 2}-d"
        raise Refused(f"batch-invariant mode covers 1-d convolution; this one is {kind}. Run it outside the mode.")
    _check_convolution(input, weight, bias, stride, padding, dilation, output_padding, groups)
    n_batch, channels, _ = input.shape
    out_channels, group_channels, taps = weight.shape
    reach = dilation[0] * (taps - 1) + 1
    columns = torch.nn.functional.pad(input, (padding[0], padding[0])).unfold(2, reach, stride[0])[..., :: dilation[0]]
    length = columns.shape[2]
    columns = columns.reshape(n_batch, groups, group_channels, length, taps)
    rows = columns.permute(1, 0, 3, 2, 4).reshape(groups, n_batch * length, group_channels * taps)
    kernel = weight.reshape(groups, out_channels // groups, group_channels * taps).transpose(1, 2)
    offset = None
    if bias is not None:
        offset = bias.view(groups, 1, -1).expand(groups, rows.shape[1], out_channels // groups)
    out = kernel_set(input).gemm(rows, kernel, offset)
    out = out.view(groups, n_batch, length, out_channels // groups).permute(1, 0, 3, 2)
    return out.reshape(n_batch, out_channels, length).contiguous()


def _check_convolution(input, weight, bias, stride, padding, dilation, output_padding, groups) -> None:
    """torch's own conditions, for one dimension."""
    if any(len(sizes) != 1 for sizes in (stride, padding, dilation, output_padding)):
        raise RuntimeError("convolution: stride, padding, dilation and output_padding need one value for a 1-d convolution")
    if stride[0] < 1 or padding[0] < 0 or dilation[0] < 1 or output_padding[0] < 0 or groups < 1:
        raise RuntimeError(
            f"convolution: stride {stride}, dilation {dilation} and groups {groups} must be positive, "
            f"padding {padding} and output_padding {output_padding} not negative"
        )
    if weight.dim() != 3 or weight.shape[0] % groups or input.shape[1] != weight.shape[1] * groups or 0 in weight.shape:
        raise RuntimeError(f"convolution: a weight of shape {_shape(weight)} in {groups} groups does not fit {_shape(input)}")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise RuntimeError(f"convolution: expected one bias for each of {weight.shape[0]} channels, but got {_shape(bias)}")
    if any(x is not None and (x.dtype != input.dtype or x.device != input.device) for x in (weight, bias)):
        raise RuntimeError("convolution: expected input, weight and bias of one dtype on one device")
    if input.shape[2] + 2 * padding[0] < dilation[0] * (weight.shape[2] - 1) + 1:
        raise RuntimeError(f"convolution: a kernel of {_shape(weight)} is longer than the padded input {_shape(input)}")
    if input.shape[2] == 0 and input.shape[0] and input.shape[1]:
        raise RuntimeError(f"convolution: only batch and channels may be empty, but the input is {_shape(input)}")


def _wrong_product(name: str, a: Tensor, b: Tensor, dims: int) -> RuntimeError:
    """What is wrong with operands that failed a product's check."""
    if a.dim() != dims or b.dim() != dims or a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
        return RuntimeError(f"{name}: shapes cannot be multiplied ({_shape(a)} and {_shape(b)})")
    if a.device != b.device:
        return RuntimeError(f"{name}: expected both matrices on one device, but got {a.device} and {b.device}")
    return RuntimeError(f"{name}: expected both matrices to have the same dtype, but got {a.dtype} and {b.dtype}")


def _batched_shapes(name: str, a: Tensor, b: Tensor) -> tuple[torch.Size, torch.Size]:
    """The shapes [B, M, K] and [B, K, N], after the check of :func:`bmm`."""
    if a.dim() != 3 or b.dim() != 3 or a.shape[2] != b.shape[1] or a.shape[0] != b.shape[0]:
        raise _too_few_dims(name, a, b) if a.dim() < 2 or b.dim() < 3 else _wrong_product(name, a, b, 3)
    if a.dtype != b.dtype or a.device != b.device:
        raise _wrong_product(name, a, b, 3)
    return a.shape, b.shape


def _too_few_dims(name: str, *operands: Tensor) -> IndexError:
    """torch reads the sizes before it checks the dims, and so says "dimension out of range"."""
    return IndexError(f"{name}: operands have too few dims: {' and '.join(str(list(x.shape)) for x in operands)}")


def _check_matrix_and_vector(name: str, matrix: Tensor, vector: Tensor) -> None:
    if matrix.dim() != 2 or vector.dim() != 1:
        raise RuntimeError(f"{name}: expected a matrix and a vector, but got shapes {_shape(matrix)} and {_shape(vector)}")


def _expanded_bias(name: str, bias: Tensor, shape: tuple[int, ...], a: Tensor) -> Tensor:
    if bias.dtype != a.dtype or bias.device != a.device:
        raise RuntimeError(f"{name}: expected a bias in {a.dtype} on {a.device}, but got {bias.dtype} on {bias.device}")
    return bias.expand(shape)


def _check_out_dtype(name: str, a: Tensor, out_dtype: torch.dtype) -> None:
    if out_dtype != a.dtype and (out_dtype != torch.float32 or a.dtype not in (torch.float16, torch.bfloat16)):
        raise RuntimeError(f"{name}: out_dtype must be {a.dtype}, or float32 for float16 and bfloat16, but got {out_dtype}")


def _real(scalar: float) -> float:
    if isinstance(scalar, complex):
        raise RuntimeError(f"expected a real factor for real matrices, but got {scalar}")
    return float(scalar)


def _shape(x: Tensor) -> str:
    return "x".join(str(size) for size in x.shape)


# --- reductions --------------------------------------------------------------------------------------------------------


def sum_all(self: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return sum_dim(self, None, dtype=dtype)


def sum_dim(self: Tensor, dim, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    x = self.to(dtype or self.dtype)
    rows = _Rows(x, dim, keepdim)
    return rows.restore(kernel_set(x).row_sum(rows.matrix, x.dtype))


def mean_all(self: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
    return mean_dim(self, None, dtype=dtype)


def mean_dim(self: Tensor, dim, keepdim: bool = False, *, dtype: torch.dtype | None = None) -> Tensor:
    x = self.to(dtype or self.dtype)
    rows = _Rows(x, dim, keepdim)
    return rows.restore(kernel_set(x).row_mean(rows.matrix, x.dtype))


def var(self: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return var_mean(self, dim, correction=correction, keepdim=keepdim)[0]


def std(self: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> Tensor:
    return std_mean(self, dim, correction=correction, keepdim=keepdim)[0]


def var_mean(self: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    rows = _Rows(self, dim, keepdim)
    var, mean = kernel_set(self).row_var_mean(rows.matrix, _correction(correction), self.dtype)
    return rows.restore(var), rows.restore(mean)


def std_mean(self: Tensor, dim=None, *, correction: float | None = None, keepdim: bool = False) -> tuple[Tensor, Tensor]:
    rows = _Rows(self, dim, keepdim)
    var, mean = kernel_set(self).row_var_mean(rows.matrix, _correction(correction), accumulator_dtype(self.dtype))
    return rows.restore(var.sqrt().to(self.dtype)), rows.restore(mean.to(self.dtype))


def logsumexp(self: Tensor, dim, keepdim: bool = False) -> Tensor:
    rows = _Rows(self, dim, keepdim)
    return rows.restore(kernel_set(self).row_logsumexp(rows.matrix, self.dtype))


def vector_norm(self: Tensor, ord: float = 2, dim=None, keepdim: bool = False, *, dtype=None) -> Tensor:
    """p = 1 and p = 2 in one kernel; other p as a sum of powers; 0 counts; infinite p is a maximum, free of any order."""
    dtype = dtype or self.dtype
    if not self.is_floating_point() or not dtype.is_floating_point or torch.promote_types(self.dtype, dtype) != dtype:
        raise RuntimeError(f"linalg.vector_norm: {self.dtype} cannot be converted without narrowing to the dtype {dtype}")
    x = self.to(dtype)
    rows = _Rows(x, dim, keepdim)
    kernels, p = kernel_set(x), _real(ord)
    if not rows.matrix.shape[1] and (p < 0 or math.isinf(p)):
        raise RuntimeError(f"linalg.vector_norm cannot compute the norm of order {p} of no values: it has no identity")
    if p in (1.0, 2.0):
        return rows.restore(kernels.row_norm(rows.matrix, p, x.dtype))
    magnitudes = rows.matrix.abs()
    if math.isinf(p):
        return rows.restore(magnitudes.amax(1) if p > 0 else magnitudes.amin(1))
    wide = accumulator_dtype(x.dtype)
    if p == 0.0:
        return rows.restore(kernels.row_sum((magnitudes != 0).to(wide), wide).to(x.dtype))
    total = kernels.row_sum(magnitudes.to(wide).pow(p), wide)
    return rows.restore(total.pow(1.0 / p).to(x.dtype))


def norm_all(self: Tensor, p: float = 2) -> Tensor:
    return vector_norm(self, p)


def norm_all_dtype(self: Tensor, p: float | None, *, dtype: torch.dtype) -> Tensor:
    return vector_norm(self, 2 if p is None else p, dtype=dtype)


def norm_dim(self: Tensor, p: float | None, dim, keepdim: bool = False) -> Tensor:
    return vector_norm(self, 2 if p is None else p, dim, keepdim)


def norm_dim_dtype(self: Tensor, p: float | None, dim, keepdim: bool, *, dtype: torch.dtype) -> Tensor:
    return vector_norm(self, 2 if p is None else p, dim, keepdim, dtype=dtype)


def cumsum(self: Tensor, dim: int, *, dtype: torch.dtype | None = None) -> Tensor:
    x = self.to(dtype or self.dtype)
    return _along(x, dim, lambda matrix: kernel_set(x).row_cumsum(matrix, x.dtype))


def softmax(self: Tensor, dim: int, half_to_float: bool) -> Tensor:
    out_dtype = _softmax_dtype(self, half_to_float)
    return _along(self, dim, lambda matrix: kernel_set(self).row_softmax(matrix, False, out_dtype))


def log_softmax(self: Tensor, dim: int, half_to_float: bool) -> Tensor:
    out_dtype = _softmax_dtype(self, half_to_float)
    return _along(self, dim, lambda matrix: kernel_set(self).row_softmax(matrix, True, out_dtype))


def _softmax_dtype(x: Tensor, half_to_float: bool) -> torch.dtype:
    if not half_to_float:
        return x.dtype
    if x.device.type == "cpu" or x.dtype not in (torch.float16, torch.bfloat16):
        raise RuntimeError(f"softmax: half_to_float is for float16 and bfloat16 on a GPU, not {x.dtype} on {x.device}")
    return torch.float32


def topk(self: Tensor, k: int, dim: int = -1, largest: bool = True, sorted: bool = True) -> tuple[Tensor, Tensor]:
    """Ties go to the lower index for any number of rows, NaN counts as the largest, 0.0 and -0.0 are equal."""
    dim = _wrap(self, dim)
    n = self.shape[dim] if self.dim() else 1
    if not 0 <= k <= n:
        raise RuntimeError(f"topk: k must be from 0 to the size of dimension {dim} of {_shape(self)}, but is {k}")
    if self.dim() and self.dtype != torch.float64 and (n > _SORTED_UP_TO or self.device.type == "cpu"):
        indices = _topk_of_keys(self, k, dim, largest)
        return self.gather(dim, indices), indices
    values, indices = torch.sort(self, dim=dim, descending=largest, stable=True)
    if self.dim():
        values, indices = values.narrow(dim, 0, k), indices.narrow(dim, 0, k)
    return values.contiguous(), indices.contiguous()


_SORTED_UP_TO = 1024
"""Columns up to which a GPU sorts all values, in fewer launches than selecting takes. Both give the same result."""


def _topk_of_keys(x: Tensor, k: int, dim: int, largest: bool) -> Tensor:
    """The indices of the first k, by torch's own topk of 64-bit keys without ties: the value's rank, then its column.

    A float's bits ascend with its value where the sign bit is 0, and descend where it is 1.
    """
    bits = (x.float() + 0.0).view(torch.int32)  # + 0.0: -0.0 becomes 0.0
    rank = torch.where(x.isnan(), 2**31 - 1, bits ^ ((bits >> 31) & (2**31 - 1)))
    column = torch.arange(x.shape[dim], device=x.device)
    column = (x.shape[dim] - 1 - column if largest else column).view([-1 if d == dim else 1 for d in range(x.dim())])
    keys = torch.topk((rank.long() << 32) | column, k, dim, largest, sorted=True).values
    column = keys & (2**32 - 1)
    return (x.shape[dim] - 1 - column if largest else column).contiguous()


class _Rows:
    """A tensor as [rows, n_cols] over the dims that are reduced, and the way back for one value a row."""

    def __init__(self, x: Tensor, dim: int | Sequence[int] | None, keepdim: bool) -> None:
        dims = _dims(x, dim)
        kept = [d for d in range(x.dim()) if d not in dims]
        n_cols = math.prod([x.shape[d] for d in dims])
        n_rows = math.prod([x.shape[d] for d in kept])
        self.matrix = x.permute(kept + dims).reshape(n_rows, n_cols)
        self._shape = [1 if d in dims else x.shape[d] for d in range(x.dim()) if keepdim or d not in dims]

    def restore(self, values: Tensor) -> Tensor:
        return values.view(self._shape)


def _dims(x: Tensor, dim: int | Sequence[int] | None) -> list[int]:
    """The reduced dims in ascending order; none given, or an empty list, means all of them."""
    if not isinstance(dim, int) and not dim:
        return list(range(x.dim()))
    wrapped = sorted([_wrap(x, d) for d in ([dim] if isinstance(dim, int) else dim)])
    if len(set(wrapped)) != len(wrapped):
        raise RuntimeError(f"a dim appears multiple times in the list of dims {dim}")
    return wrapped if x.dim() else []


def _wrap(x: Tensor, dim: int) -> int:
    n_dims = x.dim() or 1
    if not -n_dims <= dim < n_dims:
        raise IndexError(f"Dimension out of range (expected to be in [{-n_dims}, {n_dims - 1}], but got {dim})")
    return dim % n_dims


def _along(x: Tensor, dim: int, function) -> Tensor:
    """``function`` of [rows, n_cols] -> [rows, n_cols], applied along any dim."""
    dim = _wrap(x, dim)
    if x.dim() == 0:
        return function(x.view(1, 1)).view(())
    moved = x.movedim(dim, -1)
    n_cols = moved.shape[-1]
    out = function(moved.reshape(math.prod(moved.shape[:-1]), n_cols))
    return out.view(moved.shape).movedim(-1, dim).contiguous()


def _correction(correction: float | None) -> float:
    return 1.0 if correction is None else float(correction)


# --- norms -------------------------------------------------------------------------------------------------------------


def native_layer_norm(input, normalized_shape, weight, bias, eps) -> tuple[Tensor, Tensor, Tensor]:
    n_dims = _check_normalized("layer_norm", input, normalized_shape, weight, bias)
    _check_parameter_dtypes("layer_norm", input, weight, bias)
    leading = input.shape[: input.dim() - n_dims]
    matrix = input.reshape(math.prod(leading), math.prod(normalized_shape))
    y, mean, rstd = kernel_set(input).row_layer_norm(matrix, _flat(weight), _flat(bias), eps)
    stats = (*leading, *[1] * n_dims)
    # The CPU's stock layer norm hands its statistics out in the input's dtype when no parameter is wider; CUDA's never.
    wider = _wider(weight, input) or _wider(bias, input)
    stats_dtype = input.dtype if input.device.type == "cpu" and not wider else mean.dtype
    return y.view(input.shape), mean.view(stats).to(stats_dtype), rstd.view(stats).to(stats_dtype)


def native_group_norm(input, weight, bias, N, C, HxW, group, eps) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of C // group * HxW values normalised by the layer norm's kernel, then one scale and shift a channel."""
    if group < 1 or C % group or input.numel() != N * C * HxW:
        raise RuntimeError(f"group_norm: {N} x {C} x {HxW} values in {group} groups do not fit an input of {_shape(input)}")
    if any(x is not None and tuple(x.shape) != (C,) for x in (weight, bias)):
        raise RuntimeError(f"group_norm: expected weight and bias of {C} values, one for each channel")
    if not input.is_contiguous(memory_format=suggest_memory_format(input)):
        raise RuntimeError(f"group_norm: expected a contiguous input, but got strides {input.stride()}; call contiguous()")
    _check_parameter_dtypes("group_norm", input, weight, bias)
    if not input.numel():
        return input.new_empty(input.shape), input.new_zeros(N, group), input.new_zeros(N, group)
    matrix = input.reshape(N * group, C // group * HxW)
    wide = accumulator_dtype(input.dtype)
    y, mean, rstd = kernel_set(input).row_layer_norm(matrix.to(wide), None, None, eps)
    y = y.view(N, C, HxW)
    y = y if weight is None else y * weight.to(wide).view(1, C, 1)
    y = y if bias is None else y + bias.to(wide).view(1, C, 1)
    wider = _wider(weight, input) or _wider(bias, input)
    stats_dtype = input.dtype if input.device.type != "cpu" or not wider else mean.dtype
    y = y.to(input.dtype).view(input.shape)
    return y, mean.view(N, group).to(stats_dtype), rstd.view(N, group).to(stats_dtype)


def fused_rms_norm(input, normalized_shape, weight, eps) -> tuple[Tensor, Tensor]:
    n_dims = _check_normalized("rms_norm", input, normalized_shape, weight)
    leading = input.shape[: input.dim() - n_dims]
    matrix = input.reshape(math.prod(leading), math.prod(normalized_shape))
    eps = torch.finfo(accumulator_dtype(input.dtype)).eps if eps is None else eps
    y, rstd = kernel_set(input).row_rms_norm(matrix, _flat(weight), eps)
    return y.view(input.shape), rstd.view(*leading, *[1] * n_dims)


def _check_normalized(name: str, input: Tensor, normalized_shape: Sequence[int], *parameters: Tensor | None) -> int:
    """How many dims are normalised. Raises RuntimeError where they are not the input's last, or not the parameters'."""
    shape, n_dims = tuple(normalized_shape), len(normalized_shape)
    for parameter in parameters:
        if parameter is not None and tuple(parameter.shape) != shape:
            raise RuntimeError(f"{name}: expected weight and bias of shape {list(shape)}, but got {list(parameter.shape)}")
    if n_dims == 0 or n_dims > input.dim() or tuple(input.shape[input.dim() - n_dims :]) != shape:
        error = ValueError if name == "rms_norm" and n_dims > input.dim() else RuntimeError  # torch's types
        raise error(
            f"{name}: normalized_shape={list(shape)} must hold the last sizes of the input, at least one, "
            f"and the input is {list(input.shape)}"
        )
    return n_dims


def _check_parameter_dtypes(name: str, input: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """The parameters share one dtype: the input's, or float32 beside 16 bits on the CPU."""
    dtypes = {x.dtype for x in (weight, bias) if x is not None}
    is_mixed = input.device.type == "cpu" and input.dtype in (torch.float16, torch.bfloat16) and dtypes == {torch.float32}
    if not (dtypes <= {input.dtype} or is_mixed):
        raise RuntimeError(
            f"{name}: expected weight and bias in the input's dtype {input.dtype}, or both in float32 beside 16 bits "
            f"on the CPU, but got {', '.join(map(str, dtypes))}"
        )


def _flat(parameter: Tensor | None) -> Tensor | None:
    return None if parameter is None else parameter.reshape(-1)


def _wider(parameter: Tensor | None, x: Tensor) -> bool:
    return parameter is not None and parameter.dtype != x.dtype


# --- attention ---------------------------------------------------------------------------------------------------------

ATTENTION_SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? mask, bool is_causal, float scale) -> (Tensor, Tensor)"
)
MAX_HEAD_DIM = 256


def attention(query, key, value, mask, is_causal, scale) -> tuple[Tensor, Tensor]:
    """``reference.attention`` on the tensors' device. Raises Refused for head dims above 256."""
    if max(query.shape[-1], value.shape[-1]) > MAX_HEAD_DIM:
        raise Refused(f"batch-invariant attention covers head dims up to {MAX_HEAD_DIM}, not {query.shape[-1]}.")
    if query.device.type == "cuda" and query.dtype == torch.float64 and max(query.shape[-1], value.shape[-1]) > 128:
        raise Refused("batch-invariant attention in float64 covers head dims up to 128 on CUDA: Triton compiles no larger.")
    return kernel_set(query).attention(query, key, value, mask, is_causal, scale)


def attention_fake(query, key, value, mask, is_causal, scale) -> tuple[Tensor, Tensor]:
    out = query.new_empty(*query.shape[:-1], value.shape[-1])
    return out, query.new_empty(query.shape[:-1], dtype=accumulator_dtype(query.dtype))


def attention_setup_context(ctx, inputs, output) -> None:
    query, key, value, mask, ctx.is_causal, ctx.scale = inputs
    ctx.save_for_backward(query, key, value, mask, *output)


def attention_backward(ctx, grad_out: Tensor, grad_lse: Tensor | None):
    """The weights are computed again from the logsumexp: P = exp(S - lse), dS = P * (dO @ V.T - rowsum(dO * O) + dlse)."""
    query, key, value, mask, out, lse = ctx.saved_tensors
    wide = accumulator_dtype(query.dtype)
    group = query.shape[1] // key.shape[1]
    q, k, v, out, grad_out = (x.to(wide) for x in (query, key, value, out, grad_out))
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = (q @ k.transpose(-1, -2)) * ctx.scale
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(wide)
    if ctx.is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(hidden, -torch.inf)
    weights = (scores - lse[..., None]).exp().masked_fill((lse == -torch.inf)[..., None], 0.0)
    delta = (grad_out * out).sum(-1, keepdim=True) - (0 if grad_lse is None else grad_lse.to(wide)[..., None])
    grad_scores = weights * (grad_out @ v.transpose(-1, -2) - delta) * ctx.scale
    grad_q = grad_scores @ k
    grad_k = (grad_scores.transpose(-1, -2) @ q).unflatten(1, (-1, group)).sum(2)
    grad_v = (weights.transpose(-1, -2) @ grad_out).unflatten(1, (-1, group)).sum(2)
    return grad_q.to(query.dtype), grad_k.to(key.dtype), grad_v.to(value.dtype), None, None, None


def flash_attention_for_cpu(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
    _check_four_dims(query, key, value, attn_mask, dropout_p)
    if query.shape[3] != value.shape[3]:
        raise RuntimeError(f"attention: expected one head size, but got {_shape(query)}, {_shape(key)}, {_shape(value)}")
    mask = _expanded_mask(attn_mask, query, key)
    return attention(query, key, value, mask, is_causal, _scale(query, scale))


def efficient_attention(query, key, value, attn_bias, compute_log_sumexp, dropout_p=0.0, is_causal=False, *, scale=None):
    _check_four_dims(query, key, value, attn_bias, dropout_p)
    mask = _expanded_mask(attn_bias, query, key)
    out, lse = attention(query, key, value, mask, is_causal, _scale(query, scale))
    seed = torch.empty((), dtype=torch.int64, device=query.device)
    return out, lse if compute_log_sumexp else lse[..., :0], seed, seed.clone()


def _check_four_dims(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float) -> None:
    _refuse_dropout(dropout_p)
    if query.dim() < 3:
        raise _too_few_dims("attention", query, key, value)
    if query.dim() != 4 or key.dim() != 4 or value.dim() != 4:
        raise RuntimeError(f"attention: expected 4 dims, but got {_shape(query)}, {_shape(key)}, {_shape(value)}")
    if mask is not None and mask.dim() not in (2, 4):
        raise RuntimeError(f"attention: expected a mask of 2 or 4 dims, but got {_shape(mask)}")
    _check_attention(query, key, value, mask)
    if not query.shape[0] == key.shape[0] == value.shape[0] or key.shape[1] != value.shape[1]:
        raise RuntimeError(f"attention: batches and heads differ: {_shape(query)}, {_shape(key)}, {_shape(value)}")


def _check_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> None:
    """Dtypes, devices and the last two dims: what torch itself asks for."""
    if not query.dtype == key.dtype == value.dtype or not query.device == key.device == value.device:
        raise RuntimeError(
            "attention: expected query, key and value of one dtype on one device, but got "
            f"{query.dtype} on {query.device}, {key.dtype} on {key.device}, {value.dtype} on {value.device}"
        )
    if query.dim() < 2 or key.dim() < 2 or value.dim() < 2:
        raise RuntimeError(f"attention: expected 2 dims or more, but got {_shape(query)}, {_shape(key)}, {_shape(value)}")
    if query.shape[-1] != key.shape[-1] or key.shape[-2] != value.shape[-2]:
        raise RuntimeError(f"attention: sizes do not fit together: {_shape(query)}, {_shape(key)}, {_shape(value)}")
    if mask is not None and (mask.dtype not in (torch.bool, torch.float32, query.dtype) or mask.device != query.device):
        raise RuntimeError(
            f"attention: expected a mask of bool, float32 or {query.dtype} on {query.device}, "
            f"but got {mask.dtype} on {mask.device}"
        )


# --- composites: above autograd, made of differentiable operators that the table covers --------------------------------


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Always one product of [rows, K] by [K, N] with the bias in its epilogue.

    torch chooses between addmm and a product followed by an addition by contiguity, which can depend on the batch.
    """
    if input.dim() == 0 or weight.dim() == 0:
        raise RuntimeError(f"linear: expected input and weight of at least 1 dim, but got {_shape(input)}, {_shape(weight)}")
    if weight.dim() == 1:
        out = input.matmul(weight)
        return out if bias is None else (out + bias).to(out.dtype)
    rows = input if input.dim() == 2 else input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    out = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return out if input.dim() == 2 else out.view(*input.shape[:-1], weight.shape[0])


def rms_norm(input: Tensor, normalized_shape, weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """In the accumulator's dtype, weight included, rounded once; the same operators in eager and compiled code."""
    n_dims = _check_normalized("rms_norm", input, normalized_shape, weight)
    if not input.is_floating_point():
        raise (Refused if input.is_complex() else NotImplementedError)(f"rms_norm is for floats, not for {input.dtype}.")
    wide = accumulator_dtype(input.dtype)
    x = input.to(wide)
    eps = torch.finfo(wide).eps if eps is None else eps
    dims = list(range(-n_dims, 0))
    x = x * torch.rsqrt((x * x).mean(dims, keepdim=True) + eps)
    x = x if weight is None else x * weight.to(wide)
    return x.to(input.dtype).contiguous()


def scaled_dot_product_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, *, scale=None, enable_gqa=False
) -> Tensor:
    """One kernel whatever backend torch would pick: the pick depends on masks, strides and head dims."""
    if enable_gqa and min(query.dim(), key.dim(), value.dim()) == 2:
        raise _too_few_dims("scaled_dot_product_attention", query, key, value)
    _check_attention(query, key, value, attn_mask)
    if attn_mask is not None and is_causal:
        raise RuntimeError("scaled_dot_product_attention: give attn_mask or is_causal, not both")
    _refuse_dropout(dropout_p)
    if not query.is_floating_point():
        raise Refused(f"batch-invariant attention covers floats, not {query.dtype}.")
    if attn_mask is not None and attn_mask.requires_grad:
        raise Refused("batch-invariant attention has no gradient for attn_mask; detach it.")
    query, key, value = _broadcast(query, key, value, enable_gqa)
    if attn_mask is not None and attn_mask.dim() > query.dim():
        raise RuntimeError(f"attention: a mask of {_shape(attn_mask)} has more dims than the query, {_shape(query)}")
    leading = query.shape[:-2]
    query, key, value = (_four_dims(x) for x in (query, key, value))
    if attn_mask is not None:
        if len(leading) > 2:  # several dims become the batch: the mask is broadcast over each of them first
            attn_mask = _four_dims(attn_mask.expand(*leading, query.shape[2], key.shape[2]))
        attn_mask = _expanded_mask(attn_mask, query, key)
    out, _ = torch.ops.batchinv.attention(query, key, value, attn_mask, is_causal, _scale(query, scale))
    return out.view(*leading, *out.shape[-2:])


def _broadcast(query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Leading dims as torch's product would broadcast them; with ``enable_gqa`` the heads (dim -3) stay as they are."""
    q, k, v = query.shape, key.shape, value.shape
    if enable_gqa:
        if k[-3] != v[-3] or (q[-3] if k[-3] == 0 else q[-3] % k[-3]):
            raise RuntimeError(f"attention: with enable_gqa {k} and {v} need heads whose number divides that of {q}")
        batch = torch.broadcast_shapes(q[:-3], k[:-3], v[:-3])
        return tuple(x if x.shape[:-3] == batch else x.expand(*batch, *x.shape[-3:]) for x in (query, key, value))
    if q[:-2] == k[:-2] == v[:-2]:
        return query, key, value
    leading = torch.broadcast_shapes(q[:-2], k[:-2], v[:-2])
    return tuple(x.expand(*leading, *x.shape[-2:]) for x in (query, key, value))


def _four_dims(x: Tensor) -> Tensor:
    """[B, H, S, D] from any rank: a missing batch is 1, and further leading dims go into the batch."""
    if x.dim() < 4:
        return x[(None,) * (4 - x.dim())]
    return x if x.dim() == 4 else x.flatten(0, x.dim() - 4)


def _expanded_mask(mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """As [B, H, Sq, Skv], bool or in the query's dtype: a float32 mask of 16-bit tensors is rounded."""
    if mask is None:
        return None
    mask = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    return mask.expand(*query.shape[:2], query.shape[2], key.shape[2])


def _scale(query: Tensor, scale: float | None) -> float:
    if not query.shape[-1]:
        return 1.0  # all scores are sums of nothing
    return 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)


def _refuse_dropout(dropout_p: float) -> None:
    if dropout_p != 0.0:
        raise Refused("batch-invariant attention has no dropout; call it with dropout_p=0 (model.eval()).")


# --- scatter -----------------------------------------------------------------------------------------------------------


def index_add(self: Tensor, dim: int, index: Tensor, source: Tensor, *, alpha: float = 1) -> Tensor:
    dim = _wrap(self, dim)
    if index.dim() > 1:
        raise IndexError(f"index_add: expected a vector as index, but got {_shape(index)}")
    if index.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"index_add: expected an index of int64 or int32, but got {index.dtype}")
    if self.dtype != source.dtype or self.device != source.device or self.device != index.device:
        raise RuntimeError("index_add: expected self and source of one dtype, and self, source and index on one device")
    if source.dim() == 0 and dim == 0 and index.numel() != 1:
        raise _too_few_dims("index_add", source)
    if self.dim() == 0:
        if source.dim():
            raise RuntimeError(f"index_add: one value is added to one, but got {_shape(source)}")
        return index_add(self[None], 0, index, source[None], alpha=alpha)[0]
    if source.shape != self.shape[:dim] + (index.numel(),) + self.shape[dim + 1 :]:
        raise RuntimeError(f"index_add: {_shape(source)} added at {index.numel()} places does not fit {_shape(self)}")
    moved, index = self.movedim(dim, 0), _checked(index.reshape(-1).long(), self.shape[dim], IndexError)
    n_cols = math.prod(moved.shape[1:])
    out = kernel_set(self).index_add(
        moved.reshape(moved.shape[0], n_cols), index, source.movedim(dim, 0).reshape(index.shape[0], n_cols), _real(alpha)
    )
    return out.view(moved.shape).movedim(0, dim).contiguous()


def scatter_add(self: Tensor, dim: int, index: Tensor, src: Tensor) -> Tensor:
    """Each value as a row of one column, added at its place in the flat tensor, in the order of the flat index."""
    dim = _wrap(self, dim)
    if self.dtype != src.dtype:
        raise RuntimeError(f"scatter_add: expected self and src of one dtype, but got {self.dtype} and {src.dtype}")
    if not index.numel():
        return self.clone(memory_format=torch.contiguous_format)
    if index.dtype not in (torch.int64, torch.int32):
        raise RuntimeError(f"scatter_add: expected an index of int64 or int32, but got {index.dtype}")
    if self.device != src.device or self.device != index.device:
        raise RuntimeError("scatter_add: expected self, index and src on one device")
    shape = self.shape
    self, index, src = (x[None] if x.dim() == 0 else x for x in (self, index, src))
    n_dims = self.dim()
    if index.dim() != n_dims or src.dim() != n_dims:
        raise RuntimeError(f"scatter_add: ranks differ: {_shape(self)}, index {_shape(index)}, src {_shape(src)}")
    if any(index.shape[d] > src.shape[d] or d != dim and index.shape[d] > self.shape[d] for d in range(n_dims)):
        raise RuntimeError(f"scatter_add: an index of {_shape(index)} is larger than self {_shape(self)} or src {_shape(src)}")
    index = _checked(index.long(), self.shape[dim], RuntimeError)
    src = src[tuple(slice(size) for size in index.shape)]
    strides = [math.prod(self.shape[d + 1 :]) for d in range(n_dims)]
    place = index * strides[dim]
    for d in range(n_dims):
        if d != dim:
            steps = torch.arange(index.shape[d], device=index.device) * strides[d]
            place = place + steps.view([-1 if i == d else 1 for i in range(n_dims)])
    out = kernel_set(self).index_add(self.reshape(-1, 1), place.reshape(-1), src.reshape(-1, 1), 1.0)
    return out.view(shape)


def _checked(index: Tensor, size: int, error: type[Exception]) -> Tensor:
    """On the CPU an index out of range is an error; on CUDA such rows are left out, as asking would wait for the GPU."""
    if index.device.type == "cpu" and index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise error(f"index out of range: indices must be from 0 to {size - 1}")
    return index


# --- pointwise operators whose stock CPU kernels treat the vector's tail differently -----------------------------------


def _pointwise(x: Tensor, kind: str, *params: float) -> Tensor:
    from pytest_batchinv.kernels import cpu

    return cpu.pointwise(x, kind, params)


def unary(kind: str) -> Callable[[Tensor], Tensor]:
    """A pointwise operator without further arguments."""
    return lambda self: _pointwise(self, kind)


def gelu(self: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate not in ("none", "tanh"):
        raise RuntimeError(f"gelu: approximate must be 'none' or 'tanh', not {approximate!r}")
    return _pointwise(self, "gelu_tanh" if approximate == "tanh" else "gelu")


def softplus(self: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    return _pointwise(self, "softplus", beta, threshold)


def elu(self: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    return _pointwise(self, "elu", alpha, scale, input_scale)


def pow(self: Tensor, exponent: float) -> Tensor:
    return _pointwise(self, "pow", exponent)
