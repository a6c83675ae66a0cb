"""Matrix products and linear layers: all by ``gemm`` and ``grouped_gemm`` of the kernel sets."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pytest_batchinv.kernels.aten.common import (
    FLOATS,
    Refused,
    after,
    factor,
    kernel_set,
    merged,
    planned,
    reads_addresses,
    shape_of,
    too_few_dims,
)
from pytest_batchinv.kernels.plans import Description, describe, plan

Product = Callable[[Tensor, Tensor, Tensor | None, complex, complex], Tensor]
"""(a, b, bias, alpha, beta) -> alpha * (a @ b) + beta * bias"""


def mm(self: Tensor, mat2: Tensor) -> Tensor:
    return _plan_mm(describe(self), describe(mat2))(self, mat2, None, 1.0, 1.0)


@plan
def _plan_mm(a: Description, b: Description) -> Product:
    _check_matrices("mm", a, b)
    return planned("gemm", (a, b, None))


def mm_dtype(self: Tensor, mat2: Tensor, out_dtype: torch.dtype) -> Tensor:
    if self.dim() == 0 or mat2.dim() < 2:
        raise too_few_dims("mm", self, mat2)
    _check_matrices("mm", self, mat2)
    _check_out_dtype("mm", self, out_dtype)
    return mm(self.to(out_dtype), mat2.to(out_dtype))


def addmm(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = _plan_addmm(describe(mat1), describe(mat2), describe(self), beta != 0)
    return product(mat1, mat2, self, factor(alpha, mat1), factor(beta, mat1))


@plan
def _plan_addmm(a: Description, b: Description, bias: Description, reads_bias: bool) -> Product:
    _check_matrices("addmm", a, b)
    # torch's addmm on CUDA does not look at the shape of what beta leaves out.
    return _plan_biased("addmm", a, b, bias, reads_bias, must_fit=reads_bias or not a.is_cuda)


def _plan_biased(
    name: str,
    a: Description,
    b: Description,
    bias: Description,
    reads_bias: bool = True,
    must_fit: bool = True,
    shape: tuple[int, ...] | None = None,
) -> Product:
    """A product and its bias, which is expanded to [M, N] or [B, M, N]. shape: of the result, if it is another."""
    full = (*a.shape[:-1], b.shape[-1])
    _check_bias(name, bias, a)
    expanded = bias.expand(full) if must_fit else None
    if not reads_bias:
        product = planned("gemm", (a, b, None), shape=shape)
        return lambda a, b, bias, alpha, beta: product(a, b, None, alpha, beta)
    product = planned("gemm", (a, b, expanded), shape=shape)
    return product if reads_addresses(a) else after((None, None, lambda bias: bias.expand(full)), product)


def addmm_dtype(self: Tensor, mat1: Tensor, mat2: Tensor, out_dtype: torch.dtype, *, beta=1, alpha=1) -> Tensor:
    _check_matrices("addmm", mat1, mat2)
    _check_out_dtype("addmm", mat1, out_dtype, self)
    return addmm(self.to(out_dtype), mat1.to(out_dtype), mat2.to(out_dtype), beta=beta, alpha=alpha)


def addmm_activation(self: Tensor, mat1: Tensor, mat2: Tensor, *, beta=1, alpha=1, use_gelu: bool = False) -> Tensor:
    out = addmm(self, mat1, mat2, beta=beta, alpha=alpha)
    # The gelu of the fused epilogue is the tanh form on CUDA, and the exact one on the CPU.
    form = "none" if out.device.type == "cpu" else "tanh"
    return torch.nn.functional.gelu(out, approximate=form) if use_gelu else out.relu()


def bmm(self: Tensor, mat2: Tensor) -> Tensor:
    return _plan_bmm(describe(self), describe(mat2))(self, mat2, None, 1.0, 1.0)


@plan
def _plan_bmm(a: Description, b: Description) -> Product:
    if a.dim() != 3 or b.dim() != 3:
        raise _wrong_product("bmm", a, b, 3)
    _check_batches("bmm", a, b)
    return planned("gemm", (a, b, None))


def bmm_dtype(self: Tensor, mat2: Tensor, out_dtype: torch.dtype) -> Tensor:
    _check_batches("bmm", self, mat2)
    _check_out_dtype("bmm", self, out_dtype)
    return bmm(self.to(out_dtype), mat2.to(out_dtype))


def baddbmm(self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    product = _plan_baddbmm(describe(batch1), describe(batch2), describe(self), beta != 0)
    return product(batch1, batch2, self, factor(alpha, batch1), factor(beta, batch1))


@plan
def _plan_baddbmm(a: Description, b: Description, bias: Description, reads_bias: bool) -> Product:
    _check_batches("baddbmm", a, b)
    return _plan_biased("baddbmm", a, b, bias, reads_bias)


def baddbmm_dtype(self: Tensor, batch1: Tensor, batch2: Tensor, out_dtype: torch.dtype, *, beta=1, alpha=1) -> Tensor:
    _check_batches("baddbmm", batch1, batch2)
    _check_out_dtype("baddbmm", batch1, out_dtype, self)
    return baddbmm(self.to(out_dtype), batch1.to(out_dtype), batch2.to(out_dtype), beta=beta, alpha=alpha)


def addbmm(self: Tensor, batch1: Tensor, batch2: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    """The sum over the batch is one longer K: [M, B * K] @ [B * K, N]."""
    _check_batches("addbmm", batch1, batch2)
    a, b = batch1.shape, batch2.shape
    _check_bias("addbmm", self, batch1)
    bias = self.expand(a[1], b[2])
    rows = batch1.transpose(0, 1).reshape(a[1], a[0] * a[2])
    return addmm(bias, rows, batch2.reshape(a[0] * a[2], b[2]), beta=beta, alpha=alpha)


def mv(self: Tensor, vec: Tensor) -> Tensor:
    if self.dim() == 0:
        raise too_few_dims("mv", self, vec)
    _check_matrix_and_vector("mv", self, vec)
    return mm(self, vec[:, None])[:, 0]


def addmv(self: Tensor, mat: Tensor, vec: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    _check_matrix_and_vector("addmv", mat, vec)
    bias = self.expand(mat.shape[0])[:, None]
    return addmm(bias, mat, vec[:, None], beta=beta, alpha=alpha)[:, 0]


def dot(self: Tensor, tensor: Tensor) -> Tensor:
    if self.dim() != 1 or tensor.dim() != 1:
        raise RuntimeError(f"dot: expected two vectors, but got shapes {shape_of(self)} and {shape_of(tensor)}")
    return mm(self[None], tensor[:, None])[0, 0]


def vdot(self: Tensor, other: Tensor) -> Tensor:
    return dot(self.conj(), other)


def multi_dot(tensors: Sequence[Tensor]) -> Tensor:
    """The products from left to right. torch picks the cheapest order for the shapes, and so another for another batch.

    The first may be a vector, a row, and the last one, a column. Raises RuntimeError for other shapes.
    """
    if len(tensors) < 2:
        raise RuntimeError(f"multi_dot(): expected at least 2 tensors but got {len(tensors)}")
    dims = [x.dim() for x in tensors]
    if any(dim != 2 for dim in dims[1:-1]) or not {dims[0], dims[-1]} <= {1, 2}:
        raise RuntimeError(f"multi_dot(): expected matrices, and vectors only at the two ends, but got tensors of {dims} dims")
    first, *others, last = tensors
    out = first if first.dim() == 2 else first[None]
    for matrix in (*others, last if last.dim() == 2 else last[:, None]):
        out = out.mm(matrix)
    return out.reshape((*first.shape[:-1], *last.shape[1:]))


def multi_dot_out(tensors: Sequence[Tensor], *, out: Tensor) -> Tensor:
    result = multi_dot(tensors)
    if out.dtype != result.dtype:
        raise RuntimeError(f"multi_dot(): expected out tensor to have dtype {result.dtype} but got {out.dtype} instead")
    if out.shape != result.shape:
        out.resize_(result.shape)
    return out.copy_(result)


def chain_matmul(matrices: Sequence[Tensor]) -> Tensor:
    """:func:`multi_dot` of matrices, of which there may be one."""
    if any(x.dim() != 2 for x in matrices):
        raise RuntimeError(f"chain_matmul(): expected matrices, but got tensors of {[x.dim() for x in matrices]} dims")
    return multi_dot(matrices) if len(matrices) > 1 else matrices[0].clone()


def chain_matmul_out(matrices: Sequence[Tensor], *, out: Tensor) -> Tensor:
    return multi_dot_out(matrices, out=out) if len(matrices) > 1 else out.resize_(matrices[0].shape).copy_(matrices[0])


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
    # Groups of the summed dimension: the gradients of the weights of a product by groups of rows.
    return kernel_set(self).grouped_gemm_over_k(self, mat2, offs)


_GROUPED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _check_grouped(a: Tensor, b: Tensor, offs: Tensor | None) -> None:
    """torch's own conditions; groups are told apart by a 2-d operand, and then offs is needed."""
    if a.dim() not in (2, 3) or b.dim() not in (2, 3):
        raise RuntimeError(f"_grouped_mm: expected operands of 2 or 3 dims, but got {shape_of(a)} and {shape_of(b)}")
    if a.dtype not in _GROUPED_DTYPES or a.dtype != b.dtype:
        raise RuntimeError(f"_grouped_mm: expected float32, bfloat16 or float16 twice, but got {a.dtype} and {b.dtype}")
    if a.device != b.device:
        raise RuntimeError(f"_grouped_mm: expected both operands on one device, but got {a.device} and {b.device}")
    if a.shape[-1] != b.shape[-2] or (a.dim() == b.dim() == 3 and a.shape[0] != b.shape[0]):
        raise RuntimeError(f"_grouped_mm: shapes cannot be multiplied ({shape_of(a)} and {shape_of(b)})")
    if (offs is None) != (a.dim() == b.dim() == 3):
        raise RuntimeError("_grouped_mm: offs is needed where an operand has 2 dims, and there alone")
    for x in (a, b):
        inner, leading = (0, 1) if x.stride(-2) == 1 and x.stride(-1) >= max(1, x.shape[-2]) else (1, 0)
        strides = x.stride()[-2:]
        if strides[inner] != 1 or strides[leading] < x.shape[-2:][inner] or strides[leading] * x.element_size() % 16:
            raise RuntimeError(
                f"_grouped_mm: expected a stride of 1 and one of a multiple of 16 bytes, but got {x.stride()} for {shape_of(x)}"
            )
        if x.is_cuda and x.data_ptr() % 16:
            raise RuntimeError(f"_grouped_mm: expected operands that begin at multiples of 16 bytes; clone the {shape_of(x)}")
    if offs is None:
        return
    if offs.dim() != 1 or offs.dtype != torch.int32 or offs.device != a.device:
        raise RuntimeError(f"_grouped_mm: expected offs as int32 vector on {a.device}, but got {offs.dtype}, {shape_of(offs)}")
    groups = {a.shape[0] for _ in range(a.dim() == 3)} | {b.shape[0] for _ in range(b.dim() == 3)}
    if groups and groups != {offs.shape[0]}:
        raise RuntimeError(f"_grouped_mm: expected one end a group, but got {offs.shape[0]} for {shape_of(a)} by {shape_of(b)}")


Operand = Tensor | Description


def _wrong_product(name: str, a: Operand, b: Operand, dims: int) -> RuntimeError:
    """What is wrong with operands that failed a product's check."""
    if a.dim() != dims or b.dim() != dims or a.shape[-1] != b.shape[-2] or a.shape[:-2] != b.shape[:-2]:
        return RuntimeError(f"{name}: shapes cannot be multiplied ({shape_of(a)} and {shape_of(b)})")
    if a.device != b.device:
        return RuntimeError(f"{name}: expected both matrices on one device, but got {a.device} and {b.device}")
    return RuntimeError(f"{name}: expected both matrices to have the same dtype, but got {a.dtype} and {b.dtype}")


def _check_matrices(name: str, a: Operand, b: Operand) -> None:
    """The check of :func:`mm`."""
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0] or a.dtype != b.dtype or a.device != b.device:
        raise _wrong_product(name, a, b, 2)


def _check_batches(name: str, a: Operand, b: Operand) -> None:
    """[B, M, K] and [B, K, N], of one dtype on one device."""
    if a.dim() != 3 or b.dim() != 3 or a.shape[2] != b.shape[1] or a.shape[0] != b.shape[0]:
        raise too_few_dims(name, a, b) if a.dim() < 2 or b.dim() < 3 else _wrong_product(name, a, b, 3)
    if a.dtype != b.dtype or a.device != b.device:
        raise _wrong_product(name, a, b, 3)


def _check_matrix_and_vector(name: str, matrix: Tensor, vector: Tensor) -> None:
    if matrix.dim() != 2 or vector.dim() != 1:
        raise RuntimeError(f"{name}: expected a matrix and a vector, but got shapes {shape_of(matrix)} and {shape_of(vector)}")


def _check_bias(name: str, bias: Operand, a: Operand) -> None:
    if bias.dtype != a.dtype or bias.device != a.device:
        raise RuntimeError(f"{name}: expected a bias in {a.dtype} on {a.device}, but got {bias.dtype} on {bias.device}")


def _check_out_dtype(name: str, a: Tensor, out_dtype: torch.dtype, bias: Tensor | None = None) -> None:
    if out_dtype != a.dtype and (out_dtype != torch.float32 or a.dtype not in (torch.float16, torch.bfloat16)):
        raise RuntimeError(f"{name}: out_dtype must be {a.dtype}, or float32 for float16 and bfloat16, but got {out_dtype}")
    if bias is not None and bias.dtype not in (a.dtype, out_dtype):
        raise RuntimeError(f"{name}: expected a bias in {a.dtype} or {out_dtype}, but got {bias.dtype}")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Always one product of [rows, K] by [K, N] with the bias in its epilogue.

    torch chooses between addmm and a product followed by an addition by contiguity, which can depend on the batch.
    """
    if input.dim() == 0 or weight.dim() == 0:
        raise RuntimeError(
            f"linear: expected input and weight of at least 1 dim, but got {shape_of(input)}, {shape_of(weight)}"
        )
    if weight.dim() == 1:
        if bias is not None and bias.dtype != input.dtype:
            raise RuntimeError(f"linear: expected a bias in {input.dtype}, as input and weight are, but got {bias.dtype}")
        out = input.matmul(weight)
        return out if bias is None else out + bias
    if bias is not None and bias.dim() > 1 and input.dim() != 2:
        return _with_wide_bias(linear(input, weight), bias)
    rows = input if input.dim() == 2 else input.reshape(math.prod(input.shape[:-1]), input.shape[-1])
    out = torch.mm(rows, weight.t()) if bias is None else torch.addmm(bias, rows, weight.t())
    return out if input.dim() == 2 else out.view(*input.shape[:-1], weight.shape[0])


def planned_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """:func:`linear` for calls in which the dispatcher has nothing to do."""
    return _plan_linear(describe(input), describe(weight), describe(bias))(input, weight, bias)


@plan
def _plan_linear(
    x: Description, weight: Description, bias: Description | None
) -> Callable[[Tensor, Tensor, Tensor | None], Tensor]:
    """The product that :func:`linear` comes to; or :func:`linear`, for what is no float or no single product."""
    is_product = x.dim() > 0 and weight.dim() == 2 and (bias is None or bias.dim() < 2 or x.dim() == 2)
    if not is_product or x.dtype not in FLOATS:
        return linear
    rows, rows_of = merged(x, range(x.dim() - 1), [x.dim() - 1])
    columns, columns_of = weight.t(), None if reads_addresses(x) else torch.t
    shape = (*x.shape[:-1], weight.shape[0])
    _check_matrices("mm" if bias is None else "addmm", rows, columns)
    if bias is None:
        product = planned("gemm", (rows, columns, None), shape=shape)
    else:
        product = _plan_biased("addmm", rows, columns, bias, shape=shape)
    product = after((rows_of, columns_of), product)
    return lambda x, weight, bias: product(x, weight, bias, 1.0, 1.0)


def _with_wide_bias(out: Tensor, bias: Tensor) -> Tensor:
    """A bias of several dims is that of the result, and not of its rows."""
    extra = max(0, bias.dim() - out.dim())
    if any(size != 1 for size in bias.shape[:extra]) or bias.dtype != out.dtype:
        raise RuntimeError(f"linear: a bias of {shape_of(bias)} in {bias.dtype} does not fit {shape_of(out)} in {out.dtype}")
    return out + bias.reshape(bias.shape[extra:]).expand(out.shape)
