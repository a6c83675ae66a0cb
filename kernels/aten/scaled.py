"""Products of scaled 8-bit floats: ``_scaled_mm``, ``_scaled_grouped_mm`` and their second versions.

The kernels' form: a scale for each row of the first operand and each column of the second, or one for each block of 128 of K.
What is refused: one scale for several rows of the first operand. Whoever computes it from the rows makes each depend on the
others; and a scale of 128 rows makes a row depend on its place. Scales of MX and NVFP4 have no kernel.

Errors are torch's where torch raises: of the first version RuntimeError, for its scales ValueError on a CPU; of the others
ValueError. Strides are free, of operands and of scales. ``use_fast_accum`` changes no bit: there is one order of sums.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pytest_batchinv.kernels.aten.common import Refused, kernel_set, shape_of
from pytest_batchinv.kernels.reference import SCALED_BLOCK
from pytest_batchinv.kernels.tiles import ceil_div

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
_OTHER_8_BITS = ("float8_e4m3fnuz", "float8_e5m2fnuz", "float4_e2m1fn_x2")
_UNROUNDED = (torch.float32, torch.bfloat16, torch.float16)
"""What the kernels give. Results in 8 bits are rounded from float32."""

Error = type[Exception]
Scales = tuple[Tensor, Tensor]

# The values of torch.nn.functional.ScalingType.
_TENSOR_WISE, _ROW_WISE, _1X16, _1X32, _1X128, _128X128 = range(6)


def scaled_mm(
    self: Tensor,
    mat2: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    name = "_scaled_mm"
    _check_matrices(name, self, mat2, RuntimeError)
    scales = _scales_by_shape(name, self, mat2, scale_a, scale_b)
    if scale_result is not None and (scale_result.numel() != 1 or scale_result.dtype != torch.float32):
        raise RuntimeError(f"{name}: expected scale_result as one float32, but got {_described(scale_result)}")
    if scale_result is not None and (out_dtype or self.dtype) in FLOAT8:
        raise Refused(
            f"batch-invariant mode does not cover aten::{name} with scale_result for a result in 8 bits, which torch divides "
            "by on a CPU, and whose use by cuBLAS was not compared; leave it out, and put its factor into scale_a or scale_b."
        )
    return _product(name, self, mat2, scales, bias, out_dtype, RuntimeError)


def scaled_mm_fake(self, mat2, scale_a, scale_b, bias=None, scale_result=None, out_dtype=None, use_fast_accum=False):
    return self.new_empty((self.shape[0], mat2.shape[1]), dtype=out_dtype or self.dtype)


def scaled_mm_v2(
    self: Tensor,
    mat2: Tensor,
    scale_a: Sequence[Tensor],
    recipe_a: Sequence[int],
    swizzle_a: Sequence[int],
    scale_b: Sequence[Tensor],
    recipe_b: Sequence[int],
    swizzle_b: Sequence[int],
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    contraction_dim: Sequence[int] = (),
    use_fast_accum: bool = False,
) -> Tensor:
    name = "_scaled_mm_v2"
    _check_contraction(name, contraction_dim)
    _check_matrices(name, self, mat2, ValueError)
    recipe = _recipe(name, recipe_a, recipe_b, swizzle_a, swizzle_b, scale_a, scale_b)
    scales = _scales_by_recipe(name, self, mat2, recipe, scale_a[0], scale_b[0])
    return _product(name, self, mat2, scales, bias, out_dtype, ValueError)


def scaled_mm_v2_fake(
    self, mat2, scale_a, recipe_a, swizzle_a, scale_b, recipe_b, swizzle_b, bias=None, out_dtype=None, *others, **named
):
    return self.new_empty((self.shape[0], mat2.shape[1]), dtype=out_dtype or self.dtype)


def scaled_grouped_mm(
    self: Tensor,
    mat2: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    scale_result: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    use_fast_accum: bool = False,
) -> Tensor:
    if scale_result is not None:
        raise ValueError("_scaled_grouped_mm: scale_result is not supported")
    return _grouped("_scaled_grouped_mm", self, mat2, scale_a, scale_b, offs, bias, out_dtype)


def scaled_grouped_mm_fake(self, mat2, scale_a, scale_b, offs=None, *others, **named):
    return self.new_empty(_grouped_shape(self, mat2, offs), dtype=torch.bfloat16)


def scaled_grouped_mm_v2(
    self: Tensor,
    mat2: Tensor,
    scale_a: Sequence[Tensor],
    recipe_a: Sequence[int],
    swizzle_a: Sequence[int],
    scale_b: Sequence[Tensor],
    recipe_b: Sequence[int],
    swizzle_b: Sequence[int],
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    contraction_dim: Sequence[int] = (),
    use_fast_accum: bool = False,
) -> Tensor:
    name = "_scaled_grouped_mm_v2"
    _check_contraction(name, contraction_dim)
    if _recipe(name, recipe_a, recipe_b, swizzle_a, swizzle_b, scale_a, scale_b) != (_ROW_WISE, _ROW_WISE):
        raise ValueError(f"{name}: expected the recipe RowWise twice, but got {list(recipe_a)} and {list(recipe_b)}")
    return _grouped(name, self, mat2, scale_a[0], scale_b[0], offs, bias, out_dtype)


def scaled_grouped_mm_v2_fake(
    self, mat2, scale_a, recipe_a, swizzle_a, scale_b, recipe_b, swizzle_b, offs=None, *others, **named
):
    return self.new_empty(_grouped_shape(self, mat2, offs), dtype=torch.bfloat16)


FAKES = {
    "_scaled_mm": scaled_mm_fake,
    "_scaled_mm_v2": scaled_mm_v2_fake,
    "_scaled_grouped_mm": scaled_grouped_mm_fake,
    "_scaled_grouped_mm_v2": scaled_grouped_mm_v2_fake,
}
"""The results' shapes and dtypes. torch has none for the last one, and the second's asks for other scales than it takes."""


# --- one product ----------------------------------------------------------------------------------------------------------


def _product(
    name: str, a: Tensor, b: Tensor, scales: Scales, bias: Tensor | None, out_dtype: torch.dtype | None, error: Error
) -> Tensor:
    dtype = a.dtype if out_dtype is None else out_dtype
    if dtype not in (*_UNROUNDED, *FLOAT8):
        raise Refused(f"batch-invariant mode covers aten::{name} into float32, bfloat16, float16 and 8 bits, not {dtype}.")
    if bias is not None:
        _check_bias(name, bias, b.shape[1], dtype, error)
    _check_device(name, a, b, *scales, bias)
    if a.is_cuda:
        if b.shape[0] % 16 or b.shape[1] % 16:
            raise error(f"{name}: expected K and N that are multiples of 16 on CUDA, but got {shape_of(b)}")
        if a.dtype == b.dtype == torch.float8_e5m2:
            raise ValueError(f"{name}: two operands in float8_e5m2 cannot be multiplied on CUDA; one may be")
    added = None if bias is None else bias.reshape(-1)
    if dtype in _UNROUNDED:
        return kernel_set(a).scaled_gemm(a, b, *scales, added, dtype)
    most = torch.finfo(dtype).max  # beyond it is the largest number, as the GPU's own conversion has it
    return kernel_set(a).scaled_gemm(a, b, *scales, added, torch.float32).clamp(-most, most).to(dtype)


def _check_matrices(name: str, a: Tensor, b: Tensor, error: Error) -> None:
    if a.dim() != 2 or b.dim() != 2 or a.shape[1] != b.shape[0]:
        raise error(f"{name}: shapes cannot be multiplied ({shape_of(a)} and {shape_of(b)})")
    _check_dtypes(name, a, b, _error_of_scales(name, a))


def _check_dtypes(name: str, a: Tensor, b: Tensor, error: Error) -> None:
    for x in (a, b):
        if str(x.dtype).removeprefix("torch.") in _OTHER_8_BITS:
            raise Refused(f"batch-invariant mode covers aten::{name} in float8_e4m3fn and float8_e5m2, not {x.dtype}.")
    if a.dtype not in FLOAT8 or b.dtype not in FLOAT8:
        raise error(f"{name}: expected two operands in float8_e4m3fn or float8_e5m2, but got {a.dtype} and {b.dtype}")


def _check_bias(name: str, bias: Tensor, n_cols: int, dtype: torch.dtype, error: Error) -> None:
    if bias.numel() != n_cols:
        raise error(f"{name}: expected a bias of {n_cols} values, but got {bias.numel()}")
    if not bias.is_cuda:
        if bias.dtype not in _UNROUNDED:
            raise Refused(
                f"batch-invariant mode covers aten::{name} with a bias in float32, bfloat16 or float16, not {bias.dtype}."
            )
        return
    allowed = {torch.bfloat16: (torch.bfloat16,), torch.float16: (torch.float16,), torch.float32: ()}
    if bias.dtype not in allowed.get(dtype, (torch.bfloat16, torch.float16)):
        raise error(f"{name}: a bias in {bias.dtype} cannot be added to a result in {dtype} on CUDA")


def _check_device(name: str, a: Tensor, *others: Tensor | None) -> None:
    for x in others:
        if x is not None and x.device != a.device:
            raise RuntimeError(f"{name}: expected all tensors on one device, but got {a.device} and {x.device}")
    if a.is_cuda and torch.cuda.get_device_capability(a.device) < (8, 9):
        major, minor = torch.cuda.get_device_capability(a.device)
        raise Refused(
            f"batch-invariant mode covers aten::{name} on GPUs of compute capability 8.9 and more, not on "
            f"{major}.{minor}, which has no products of 8-bit floats; multiply in bfloat16, where these values are exact."
        )


# --- scales ---------------------------------------------------------------------------------------------------------------


def _scales_by_shape(name: str, a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor) -> Scales:
    """In the kernels' form: [M, groups] and [groups, N], or [groups, blocks of N]. Shapes alone say what scales are.

    Where two recipes have the same shapes they have the same bits: K is one block then, or there is one row or column.
    """
    (M, K), N = a.shape, b.shape[1]
    groups = ceil_div(K, SCALED_BLOCK)
    of_a, of_b = tuple(scale_a.shape), tuple(scale_b.shape)
    _refuse_other_scales(name, scale_a, scale_b)
    if scale_a.dtype == scale_b.dtype == torch.float32:
        if scale_a.numel() == scale_b.numel() == 1:
            return _one_scale(name, M, N, scale_a, scale_b)
        by_columns = of_b in ((groups, N), (groups, ceil_div(N, SCALED_BLOCK)))
        if (of_a, of_b) == ((M, 1), (1, N)) or of_a == (M, groups) and by_columns:
            return scale_a, scale_b
        if of_a == (ceil_div(M, SCALED_BLOCK), groups) and of_b == (groups, N):
            raise _refused_rows(name, "128 rows")
    raise _error_of_scales(name, a)(
        f"{name}: Invalid scaling configuration: {_described(scale_a)} and {_described(scale_b)} for {shape_of(a)} by "
        f"{shape_of(b)}. Expected float32, of shape [{M}, 1] and [1, {N}] for scales of rows and columns; [{M}, {groups}] and "
        f"[{groups}, {N}] or [{groups}, {ceil_div(N, SCALED_BLOCK)}] for scales of blocks; for one row one value and one value."
    )


def _error_of_scales(name: str, a: Tensor) -> Error:
    return RuntimeError if a.is_cuda and name == "_scaled_mm" else ValueError


def _scales_by_recipe(name: str, a: Tensor, b: Tensor, recipe: tuple[int, int], scale_a: Tensor, scale_b: Tensor) -> Scales:
    (M, K), N = a.shape, b.shape[1]
    groups, padded = ceil_div(K, SCALED_BLOCK), 4 * ceil_div(K, 4 * SCALED_BLOCK)
    rows, columns = ceil_div(M, SCALED_BLOCK), ceil_div(N, SCALED_BLOCK)
    if recipe == (_TENSOR_WISE, _TENSOR_WISE):
        if scale_a.numel() != 1 or scale_b.numel() != 1:
            raise ValueError(f"{name}: expected one scale each, but got {_described(scale_a)} and {_described(scale_b)}")
        return _one_scale(name, M, N, scale_a, scale_b)
    shapes: dict[tuple[int, int], tuple[tuple[int, int], tuple[tuple[int, int], ...]]] = {
        (_ROW_WISE, _ROW_WISE): ((M, 1), ((1, N), (N, 1))),
        (_1X128, _1X128): ((M, groups), ((N, groups),)),
        (_1X128, _128X128): ((M, groups), ((padded, columns),)),
        (_128X128, _1X128): ((padded, rows), ((N, groups),)),
    }
    if recipe not in shapes:
        raise ValueError(f"{name}: Invalid scaling configuration: the recipes {recipe[0]} and {recipe[1]} together")
    of_a, of_b = shapes[recipe]
    if tuple(scale_a.shape) != of_a or tuple(scale_b.shape) not in of_b:
        raise ValueError(
            f"{name}: expected scales of shape {list(of_a)} and {' or '.join(str(list(shape)) for shape in of_b)}, but got "
            f"{_described(scale_a)} and {_described(scale_b)}"
        )
    if recipe == (_ROW_WISE, _ROW_WISE):
        return scale_a, scale_b.reshape(1, N)
    if recipe == (_128X128, _1X128):
        if M > 1:
            raise _refused_rows(name, "128 rows")
        scale_a = scale_a[:groups].t().reshape(M, groups)
    return scale_a, scale_b[:groups] if recipe == (_1X128, _128X128) else scale_b.t()


def _recipe(
    name: str,
    recipe_a: Sequence[int],
    recipe_b: Sequence[int],
    swizzle_a: Sequence[int],
    swizzle_b: Sequence[int],
    scale_a: Sequence[Tensor],
    scale_b: Sequence[Tensor],
) -> tuple[int, int]:
    _refuse_other_scales(name, *scale_a, *scale_b)
    if any(kind in (_1X16, _1X32) for kind in (*recipe_a, *recipe_b)) or any((*swizzle_a, *swizzle_b)):
        raise _refused_scales(name)
    if not len(recipe_a) == len(recipe_b) == len(scale_a) == len(scale_b) == 1:
        raise ValueError(f"{name}: Invalid scaling configuration: expected one scale and one recipe for each operand")
    if scale_a[0].dtype != torch.float32 or scale_b[0].dtype != torch.float32:
        dtypes = f"{scale_a[0].dtype} and {scale_b[0].dtype}"
        raise ValueError(f"{name}: Invalid scaling configuration: expected scales in float32, but got {dtypes}")
    return recipe_a[0], recipe_b[0]


def _one_scale(name: str, M: int, N: int, scale_a: Tensor, scale_b: Tensor) -> Scales:
    if M > 1:
        raise _refused_rows(name, "all rows")
    return scale_a.reshape(1, 1).expand(M, 1), scale_b.reshape(1, 1).expand(1, N)


def _refuse_other_scales(name: str, *scales: Tensor) -> None:
    if any(scale.dtype in (torch.float8_e8m0fnu, torch.float8_e4m3fn) for scale in scales):
        raise _refused_scales(name)


def _refused_scales(name: str) -> Refused:
    return Refused(
        f"batch-invariant mode does not cover aten::{name} with scales of MX or NVFP4, or swizzled ones: there is no "
        "batch-invariant kernel for it; scales in float32, of rows or of blocks of 128, are covered."
    )


def _refused_rows(name: str, shared_by: str) -> Refused:
    return Refused(
        f"batch-invariant mode does not cover aten::{name} with one scale for {shared_by} of its first operand: computed from "
        "them, it makes every row depend on the others; give each row a scale of its own, or a constant that was calibrated: "
        "scale_a.expand(M, 1).contiguous(), with scale_b.expand(1, N).contiguous()."
    )


def _described(scale: Tensor) -> str:
    return f"{list(scale.shape)} in {scale.dtype}"


def _check_contraction(name: str, dims: Sequence[int]) -> None:
    """K is the last dim of the first operand and the last but one of the second."""
    if len(dims) not in (0, 2):
        raise ValueError(f"{name}: expected two contraction dims, but got {list(dims)}")
    if len(dims) == 2 and not (dims[0] in (-1, 1) and dims[1] in (-2, 0)):
        raise ValueError(f"{name}: expected the contraction dims -1 and -2, but got {list(dims)}")


# --- products of groups ---------------------------------------------------------------------------------------------------


def _grouped(
    name: str,
    a: Tensor,
    b: Tensor,
    scale_a: Tensor,
    scale_b: Tensor,
    offs: Tensor | None,
    bias: Tensor | None,
    out_dtype: torch.dtype | None,
) -> Tensor:
    """torch's own conditions, and those that keep a kernel within its operands. Groups are told apart by a 2-d operand."""
    if a.dim() not in (2, 3) or b.dim() not in (2, 3):
        raise ValueError(f"{name}: expected operands of 2 or 3 dims, but got {shape_of(a)} and {shape_of(b)}")
    if a.shape[-1] != b.shape[-2] or (a.dim() == b.dim() == 3 and a.shape[0] != b.shape[0]):
        raise ValueError(f"{name}: shapes cannot be multiplied ({shape_of(a)} and {shape_of(b)})")
    _check_dtypes(name, a, b, ValueError)
    _refuse_other_scales(name, scale_a, scale_b)
    if scale_a.dtype != torch.float32 or scale_b.dtype != torch.float32:
        raise ValueError(f"{name}: expected scales in float32, but got {scale_a.dtype} and {scale_b.dtype}")
    if a.dtype != torch.float8_e4m3fn or b.dtype != torch.float8_e4m3fn:
        raise ValueError(f"{name}: expected float8_e4m3fn twice, but got {a.dtype} and {b.dtype}")
    if a.shape[-1] % 16 or b.shape[-1] % 16:
        raise ValueError(f"{name}: expected K and N that are multiples of 16, but got {shape_of(a)} and {shape_of(b)}")
    if bias is not None:
        raise ValueError(f"{name}: a bias is not supported")
    if out_dtype not in (None, torch.bfloat16):
        raise ValueError(f"{name}: expected out_dtype=torch.bfloat16, but got {out_dtype}")
    if (offs is None) != (a.dim() == b.dim() == 3):
        raise ValueError(f"{name}: offs is needed where an operand has 2 dims, and there alone")
    if offs is not None:
        if offs.dim() != 1 or offs.dtype != torch.int32:
            raise ValueError(f"{name}: expected offs as int32 vector, but got {_described(offs)}")
        groups = [x.shape[0] for x in (a, b) if x.dim() == 3]
        if any(size != offs.shape[0] for size in groups):
            raise RuntimeError(f"{name}: expected one end a group, but got {offs.shape[0]} for {shape_of(a)} by {shape_of(b)}")
    _check_device(name, a, b, scale_a, scale_b, offs)
    sums = offs.shape[0] if offs is not None and a.dim() == b.dim() == 2 else 1
    for x, size, scale in ((a, a.shape[-2], scale_a), (b, b.shape[-1], scale_b)):
        expected = (size * sums,) if x.dim() == 2 else (x.shape[0], size)
        if tuple(scale.shape) != expected:
            raise RuntimeError(f"{name}: expected a scale of shape {list(expected)}, but got {list(scale.shape)}")
    kernels, dtype = kernel_set(a), torch.bfloat16
    if offs is None:
        return kernels.scaled_gemm(a, b, scale_a[:, :, None], scale_b[:, None], None, dtype)
    if a.dim() == 2 and b.dim() == 3:
        return kernels.scaled_grouped_gemm(a, b, scale_a, scale_b, offs, dtype)
    if a.dim() == 3:  # groups of columns: the rows of the transposed product
        return kernels.scaled_grouped_gemm(b.t(), a.transpose(1, 2), scale_b, scale_a, offs, dtype).t().contiguous()
    # Groups of the summed dimension: the gradients of the weights of a product by groups of rows.
    return kernels.scaled_grouped_gemm_over_k(a, b, scale_a.view(sums, -1), scale_b.view(sums, -1), offs, dtype)


def _grouped_shape(a: Tensor, b: Tensor, offs: Tensor | None) -> tuple[int, ...]:
    if a.dim() == b.dim() == 2:
        return offs.shape[0], a.shape[0], b.shape[1]
    return (*([a.shape[0]] if a.dim() == b.dim() == 3 else []), a.shape[-2], b.shape[-1])
