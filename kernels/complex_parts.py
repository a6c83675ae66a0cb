"""A kernel set for complex numbers: their real and imaginary parts, by the kernels of the tensors' device.

All other arithmetic on the parts is a sum, product, quotient or root of one or two numbers, each rounded once. So it has
the same bits at every place of a vector, which torch's own complex products and magnitudes on the CPU do not have.
"""

import torch
from torch import Tensor

from pytest_batchinv.kernels.aten.common import kernels_of_device


def gemm(a: Tensor, b: Tensor, bias: Tensor | None = None, alpha: complex = 1.0, beta: complex = 1.0) -> Tensor:
    """``reference.gemm`` as one real product of twice the K: [re, im] of a by [[re, im], [-im, re]] of b."""
    re, im = b.real, b.imag
    rows = torch.cat([a.real, a.imag], -1)
    columns = torch.cat([torch.cat([re, im], -1), torch.cat([-im, re], -1)], -2)
    out, N = kernels_of_device(a.device).gemm(rows, columns), b.shape[-1]
    out = _times(torch.complex(out[..., :N], out[..., N:]), alpha)
    if bias is None or beta == 0:
        return out
    bias = _times(bias, beta)
    return torch.complex(out.real + bias.real, out.imag + bias.imag)


def row_sum(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.row_sum`` of each part."""
    return _of_each_part("row_sum", x, out_dtype)


def row_mean(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.row_mean`` of each part."""
    return _of_each_part("row_mean", x, out_dtype)


def row_cumsum(x: Tensor, out_dtype: torch.dtype) -> Tensor:
    """``reference.row_cumsum`` of each part."""
    return _of_each_part("row_cumsum", x, out_dtype)


def row_var_mean(x: Tensor, correction: float, out_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The sum of the parts' variances, a real number, and the complex mean."""
    kernels, dtype = kernels_of_device(x.device), out_dtype.to_real()
    (var_re, mean_re), (var_im, mean_im) = (kernels.row_var_mean(part, correction, dtype) for part in (x.real, x.imag))
    return var_re + var_im, torch.complex(mean_re, mean_im)


def index_add(x: Tensor, index: Tensor, source: Tensor, alpha: complex) -> Tensor:
    """``reference.index_add`` of each part."""
    add, source = kernels_of_device(x.device).index_add, _times(source, alpha)
    return torch.complex(*(add(to, index, part, 1.0) for to, part in ((x.real, source.real), (x.imag, source.imag))))


def magnitude(x: Tensor) -> Tensor:
    """|x| for complex x, in the dtype of its parts: large * sqrt(1 + (small / large) ** 2), which overflows no sooner."""
    parts = torch.stack([x.real.abs(), x.imag.abs()])
    large, small = parts.amax(0), parts.amin(0)
    ratio = torch.where(large == 0, 0.0, small / large)
    return torch.where(parts.isinf().any(0), torch.inf, large * (1 + ratio * ratio).sqrt())


def _of_each_part(name: str, x: Tensor, out_dtype: torch.dtype) -> Tensor:
    kernel = getattr(kernels_of_device(x.device), name)
    return torch.complex(*(kernel(part, out_dtype.to_real()) for part in (x.real, x.imag)))


def _times(x: Tensor, factor: complex) -> Tensor:
    if factor == 1:
        return x
    re, im, factor = x.real, x.imag, complex(factor)
    return torch.complex(re * factor.real - im * factor.imag, re * factor.imag + im * factor.real)
