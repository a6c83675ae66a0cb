"""Discrete Fourier transforms in one order for any number of rows: by Cooley and Tukey, of products by small matrices.

``X[k] = sum_j x[j] e^(-2 pi i j k / n)``. For ``n = a * b``, ``j = b * j1 + j2``, ``k = k1 + a * k2``: transforms of length a
over j1, a factor ``e^(-2 pi i j2 k1 / n)``, transforms of length b over j2. A length without such a factor a is one product by
its matrix, real parts before imaginary ones, by ``gemm``. All in float64, each value rounded once at the end.
(Cooley and Tukey, "An algorithm for the machine calculation of complex Fourier series", 1965.)
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pytest_batchinv.kernels.aten.common import Refused, kernels_of_device

RADICES = (8, 7, 6, 5, 4, 3, 2)
"""Lengths of the first transform, as products of few values are more accurate."""
LONGEST_WITHOUT_FACTORS = 4096
_FACTORS = {0: lambda n: 1.0, 1: lambda n: 1 / math.sqrt(n), 2: lambda n: 1 / n}  # by torch's numbers for ``norm=``

Parts = tuple[Tensor, Tensor]  # real, imaginary


def fft_c2c(self: Tensor, dim: Sequence[int], normalization: int, forward: bool) -> Tensor:
    if not dim:
        return self.clone(memory_format=torch.contiguous_format)
    return _finished(_over(_parts(self), dim, forward), _size(self, dim), normalization, self.dtype)


def fft_r2c(self: Tensor, dim: Sequence[int], normalization: int, onesided: bool) -> Tensor:
    x = self.double()
    re, im = _over((x, torch.zeros_like(x)), dim, True)
    if onesided:
        n = self.shape[dim[-1]] // 2 + 1
        re, im = re.narrow(dim[-1], 0, n), im.narrow(dim[-1], 0, n)
    return _finished((re, im), _size(self, dim), normalization, self.dtype.to_complex())


def fft_c2r(self: Tensor, dim: Sequence[int], normalization: int, last_dim_size: int) -> Tensor:
    """The second half is the conjugate of the first. The imaginary parts of the first and the middle value are not read."""
    *others, last = dim
    re, im = _over(_parts(self), others, False)
    n = last_dim_size
    re, im = (x.movedim(last, -1)[..., : n // 2 + 1].clone() for x in (re, im))
    im[..., 0] = 0
    if n % 2 == 0:
        im[..., n // 2] = 0
    mirrored = slice(1, (n + 1) // 2)
    re = torch.cat([re, re[..., mirrored].flip(-1)], -1)
    im = torch.cat([im, -im[..., mirrored].flip(-1)], -1)
    re, _ = _over((re, im), [-1], False)
    size = _size(self, others) * n
    return (re * _FACTORS[normalization](size)).movedim(-1, last).to(self.dtype.to_real()).contiguous()


def _parts(x: Tensor) -> Parts:
    return x.real.double(), x.imag.double()


def _size(x: Tensor, dim: Sequence[int]) -> int:
    return math.prod([x.shape[d] for d in dim])


def _finished(parts: Parts, size: int, normalization: int, dtype: torch.dtype) -> Tensor:
    factor = _FACTORS[normalization](size)
    return torch.complex(*(x * factor for x in parts)).to(dtype).contiguous()


def _over(parts: Parts, dims: Sequence[int], forward: bool) -> Parts:
    for dim in reversed(dims):
        moved = [x.movedim(dim, -1) for x in parts]
        shape = moved[0].shape
        if not shape[-1]:
            raise RuntimeError(f"fft: a transform needs at least one value, and dim {dim} of {list(parts[0].shape)} has none")
        rows = [x.reshape(math.prod(shape[:-1]), shape[-1]) for x in moved]
        re, im = (x.view(shape).movedim(-1, dim) for x in _transform((rows[0], rows[1]), forward))
        parts = re, im
    return parts


def _transform(parts: Parts, forward: bool) -> Parts:
    """Of the columns of two [rows, n]."""
    rows, n = parts[0].shape
    a = next((radix for radix in RADICES if n % radix == 0 and n > radix), 0)
    if not a:
        return _by_matrix(parts, forward)
    b = n // a
    over_j1 = [x.view(rows, a, b).transpose(1, 2).reshape(rows * b, a) for x in parts]
    re, im = (x.view(rows, b, a) for x in _by_matrix((over_j1[0], over_j1[1]), forward))
    cos, sin = _roots(n, b, a, forward, re.device)
    re, im = re * cos - im * sin, re * sin + im * cos
    over_j2 = [x.transpose(1, 2).reshape(rows * a, b) for x in (re, im)]
    re, im = (x.view(rows, a, b).transpose(1, 2).reshape(rows, n) for x in _transform((over_j2[0], over_j2[1]), forward))
    return re, im


def _by_matrix(parts: Parts, forward: bool) -> Parts:
    re, im = parts
    n = re.shape[1]
    if n > LONGEST_WITHOUT_FACTORS:
        raise Refused(
            f"batch-invariant mode transforms lengths that are products of factors up to 8 and of one up to "
            f"{LONGEST_WITHOUT_FACTORS}; pad the {n} values."
        )
    cos, sin = _roots(n, n, n, forward, re.device)
    matrix = torch.cat([torch.cat([cos, sin], 1), torch.cat([-sin, cos], 1)])
    out = kernels_of_device(re.device).gemm(torch.cat([re, im], 1), matrix)
    return out[:, :n], out[:, n:]


@functools.lru_cache(256)
def _roots(n: int, rows: int, columns: int, forward: bool, device: torch.device) -> Parts:
    """Cosine and sine of ``-+ 2 pi j k / n``, each by Python's own functions: [rows, columns]."""
    step = (-2 if forward else 2) * math.pi / n
    values = [(math.cos(step * i), math.sin(step * i)) for i in range(n)]
    exact = {
        0: (1.0, 0.0),
        n / 2: (-1.0, 0.0),
        n / 4: (0.0, -1.0 if forward else 1.0),
        3 * n / 4: (0.0, 1.0 if forward else -1.0),
    }
    table = torch.tensor([exact.get(i, value) for i, value in enumerate(values)], dtype=torch.float64)
    places = torch.arange(rows)[:, None] * torch.arange(columns) % n
    cos, sin = (table[:, part][places].to(device) for part in (0, 1))
    return cos, sin
