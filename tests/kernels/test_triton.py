"""The Triton kernels against ``kernels/reference.py``, on the CPU, in Triton's interpreter.

The interpreter must be chosen before a kernel is defined, so the tests run in a process of their own.

The interpreter's own ``tl.dot`` leaves the order of sums to numpy. Here it is replaced by the chain the GPU was
measured to compute: K ascending, one product after the other. So the tests of bits see every order that a kernel
itself chooses.
"""

import contextlib
import ctypes
import inspect
import itertools
import math
import mmap
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.nn import functional as F
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

from pytest_batchinv.kernels import cpu, cuda, launch, plans, reference, table, tiles
from pytest_batchinv.kernels.aten import common
from pytest_batchinv.kernels.cuda import implicit_gemm, matmul, scaled
from pytest_batchinv.kernels.cuda.attention import merge as attention_merge
from pytest_batchinv.kernels.cuda.attention import plan as attention_plan

CHILD_ENVIRONMENT = {"TRITON_INTERPRET": "1"}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Relative to the largest value: fp32 sums of some hundred terms, one rounding of the result. The interpreter cuts bf16
# off where the GPU rounds, and attention rounds its weights to 16 bits too.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


KERNELS = [name for name in cuda.__all__ if not name.startswith("plan_")]


@pytest.mark.parametrize("name", KERNELS)
def test_launchers_have_the_signatures_of_the_reference(name):
    assert inspect.signature(getattr(cuda, name)) == inspect.signature(getattr(reference, name))


def test_the_kernel_set_is_complete():
    functions = {name for name, _ in inspect.getmembers(reference, inspect.isfunction)}
    assert set(KERNELS) == functions - {"accumulator_dtype"}


class Binary(CompiledKernel):
    """A compiled kernel that notes with what it is run."""

    def __init__(self, ran):
        self.function, self.packed_metadata = 11, ("packed",)
        self._run = lambda *args: ran.append(args)

    def __del__(self):  # there is nothing to unload
        pass


class Kernel:
    """A kernel that notes how Triton would launch it, and what its pre-run hooks are told."""

    def __init__(self, binary, by_triton):
        self.pre_run_hooks, self._binary, self._by_triton = [], binary, by_triton

    def __getitem__(self, grid):
        def run(*args, **options):
            for hook in self.pre_run_hooks:
                hook(*args, **options)
            self._by_triton.append((grid, args))
            return self._binary

        return run


@pytest.fixture
def launched(monkeypatch):
    """A launch that has run once, what its binary is run with, and what goes through Triton."""
    monkeypatch.setattr(driver, "_active", SimpleNamespace(get_current_stream=lambda device: 99))
    ran, by_triton = [], []
    kernel = Kernel(Binary(ran), by_triton)
    run = launch.Launch(kernel, (7, 2, 1), (5, True), num_warps=4)
    run(torch.ones(3), None, numbers=(0.5,))
    return kernel, run, ran, by_triton


def test_a_launch_hands_its_binary_addresses_and_the_remembered_arguments(launched):
    _, run, ran, by_triton = launched
    x = torch.ones(3)
    run(x, None, numbers=(0.25,))
    assert ran == [(7, 2, 1, 99, 11, ("packed",), None, None, None, x.data_ptr(), 0, 0.25, 5, True)]
    assert len(by_triton) == 1


def test_a_launch_runs_the_pre_run_hooks_of_its_kernel(launched):
    kernel, run, ran, by_triton = launched
    told = []
    kernel.pre_run_hooks.append(lambda *args, **options: told.append(args[2:]))
    x = torch.ones(3)
    run(x, None, numbers=(0.25,))
    assert told == [(0.25, 5, True)]
    assert not ran and len(by_triton) == 2


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
def test_a_launch_goes_through_triton_while_somebody_listens(hook, launched):
    _, run, ran, by_triton = launched
    hooks, listener = getattr(knobs.runtime, hook), lambda metadata: None
    hooks.add(listener)
    try:
        run(torch.ones(3), None, numbers=(0.25,))
    finally:
        hooks.remove(listener)
    assert not ran and len(by_triton) == 2
    run(torch.ones(3), None, numbers=(0.25,))
    assert len(ran) == 1 and len(by_triton) == 2


# --- what the tests share -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_plans_of_others():
    plans.forget_plans()


@pytest.fixture(autouse=True)
def k_ascending_dot(monkeypatch):
    from triton.runtime import interpreter

    def wide(handle, dtype):
        if handle.data.dtype == np.uint16:  # bfloat16: the upper half of a float32
            return (handle.data.astype(np.uint32) << 16).view(np.float32).astype(dtype)
        if handle.data.dtype == np.uint8:
            kind = {"fp8e4nv": torch.float8_e4m3fn, "fp8e5": torch.float8_e5m2}[str(handle.dtype.scalar)]
            return torch.from_numpy(handle.data.copy()).view(kind).float().numpy().astype(dtype)
        return handle.data.astype(dtype)

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        total = d.data.copy()
        a, b = wide(a, total.dtype), wide(b, total.dtype)
        with np.errstate(all="ignore"):
            for k in range(a.shape[1]):
                total = total + a[:, k, None] * b[None, k, :]
        return interpreter.TensorHandle(total, d.dtype.scalar)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_dot", create_dot)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def randn(*shape, dtype):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def bits(x):
    return x.contiguous().view({8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()])


def assert_same_bits(got, want):
    for x, y in zip(as_tuple(got), as_tuple(want), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert torch.equal(bits(x), bits(y)), f"{(bits(x) != bits(y)).sum().item()} of {x.numel()} values differ"


def assert_near(got, want, dtype):
    for x, y in zip(as_tuple(got), as_tuple(want), strict=True):
        assert x.dtype == y.dtype and x.shape == y.shape and x.is_contiguous()
        finite = y[y.isfinite()].double().abs()
        scale = max(1.0, finite.max().item()) if finite.numel() else 1.0
        torch.testing.assert_close(x, y, rtol=0, atol=TOLERANCE[dtype] * scale, equal_nan=True)


def as_tuple(x):
    return x if isinstance(x, tuple) else (x,)


def layouts(x):
    """The same values with other strides and alignment: a step of 2, transposed storage, an odd offset."""
    stepped = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]
    transposed = x.new_zeros(*x.shape[:-2], x.shape[-1], x.shape[-2]).transpose(-1, -2)
    offset = x.new_zeros(x.numel() + 1)[1:].view(x.shape)
    for view in (stepped, transposed, offset):
        yield view.copy_(x)


def fenced(x):
    """The same values, contiguous, right before a page that ends the process of who reads it."""
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    fence = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(fence), mmap.PAGESIZE, 0) == 0, ctypes.get_errno()
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=pages - size).view(x.shape).copy_(x)


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 33, 70), (1, 40, 65, 64), (3, 17, 2, 130)])
def test_gemm_is_near_the_reference(dtype, shape):
    B, M, N, K = shape
    a, b = randn(B, M, K, dtype=dtype) / K**0.5, randn(B, K, N, dtype=dtype)
    assert_near(cuda.gemm(a, b), reference.gemm(a, b), dtype)
    for bias in (randn(B, M, N, dtype=dtype), randn(N, dtype=dtype).expand(B, M, N)):
        assert_near(cuda.gemm(a, b, bias, 0.5, -2.0), reference.gemm(a, b, bias, 0.5, -2.0), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_alone_has_the_bits_of_one_that_is_scaled_by_one(dtype):
    a, b = randn(1, 20, 65, dtype=dtype), randn(1, 65, 70, dtype=dtype)
    a[0, 4, 5], b[0, 5, 6], a[0, 5] = torch.inf, 1.0, -0.0
    plain, scaled = cuda.gemm(a, b), cuda.gemm(a, b, torch.full((70,), -0.0).to(dtype).expand(1, 20, 70))
    assert_same_bits(plain, scaled)
    assert_same_bits(cuda.gemm(a, b, None, 2.0), cuda.gemm(2 * a, b))
    assert cuda.gemm(a * torch.nan, b).isnan().all()


def test_gemm_bias_with_beta_zero_is_not_read():
    a, b = randn(1, 3, 4, dtype=torch.float32), randn(1, 4, 5, dtype=torch.float32)
    assert_same_bits(cuda.gemm(a, b, torch.full((1, 3, 5), torch.nan), 1.0, 0.0), cuda.gemm(a, b))


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_rows_alone_and_in_a_batch(dtype):
    a, b = randn(1, 70, 150, dtype=dtype), randn(1, 150, 40, dtype=dtype)
    bias = randn(1, 70, 40, dtype=dtype)
    whole = cuda.gemm(a, b, bias, 0.3, 0.7)
    for rows in ([69], [3, 2, 1], list(range(69, 40, -1))):
        assert_same_bits(cuda.gemm(a[:, rows], b, bias[:, rows], 0.3, 0.7), whole[:, rows])
    twice = cuda.gemm(a.repeat(3, 1, 1), b.expand(3, -1, -1), bias.expand(3, -1, -1), 0.3, 0.7)
    assert_same_bits(twice[2:], whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gemm_tiles_are_one_class(dtype, monkeypatch):
    a, b = randn(1, 20, 150, dtype=dtype), randn(1, 150, 40, dtype=dtype)
    want = cuda.gemm(a, b)
    for tile in tiles.GEMM_TILES[dtype]:
        replace(monkeypatch, matmul, "gemm_tile", lambda *args, tile=tile: tile)
        assert_same_bits(cuda.gemm(a, b), want)


@pytest.mark.parametrize("shape", [(8, 192, 32), (70, 200, 72), (130, 520, 40)])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("multiprocessors", [2, 100], ids=["several tiles a program", "one tile a program"])
def test_gemm_with_descriptors_is_of_the_same_class(shape, is_transposed, multiprocessors, monkeypatch):
    """On tiles of one block, of two stores, and of two blocks side by side; inside the edges and over them."""
    M, N, K = shape
    monkeypatch.setattr(tiles, "device_of", lambda device: tiles.Device(multiprocessors, 1 << 20))
    a, b, bias = (randn(*s, dtype=torch.bfloat16) for s in ((1, M, K + 8), (1, K + 8, N + 8), (1, M, N)))
    b = b.mT.contiguous().mT if is_transposed else b
    a, b = a[..., :K], b[:, :K, :N]  # rows that are wider in memory
    want, sizes = cuda.gemm(a, b, bias, 0.5, 3.0), matmul.Sizes.of(a.shape, a.stride(), b.shape, b.stride(), bias.stride())
    assert sizes.fit_tma()
    alone = cuda.gemm(a, b)
    for block_n in (64, 128, 192, 256):
        tile = tiles.Tile(64, block_n, 32, 4, 2, True)
        out = torch.full_like(want, torch.nan)
        matmul.product(sizes, a.dtype, a.device, tile)(a, b, bias, out, 0.5, 3.0)
        assert_same_bits(out, want)
        matmul.product(sizes._replace(bias=None), a.dtype, a.device, tile)(a, b, None, out, 1.0, 1.0)
        assert_same_bits(out, alone)


@pytest.mark.parametrize("shape", [(5, 70, 64), (33, 32, 65), (16, 1, 1), (20, 33, 130)])
def test_gemm_reads_nothing_after_its_operands(shape):
    """Whichever dims fill their blocks, and whichever do not."""
    M, N, K = shape
    a, b, bias = (randn(*s, dtype=torch.float32) for s in ((2, M, K), (2, K, N), (2, M, N)))
    want = cuda.gemm(a, b, bias)
    assert_same_bits(cuda.gemm(fenced(a), fenced(b), fenced(bias)), want)
    assert_same_bits(cuda.gemm(fenced(a.mT).mT, fenced(b.mT).mT, fenced(bias.mT).mT), want)
    offs = torch.tensor([M, M], dtype=torch.int32)
    assert_same_bits(cuda.grouped_gemm(fenced(a[0]), fenced(b), fenced(offs)), cuda.gemm(a[:1], b[:1])[0])
    assert_same_bits(cuda.grouped_gemm(fenced(a[0]), fenced(b[:1]), fenced(offs[:1])), cuda.gemm(a[:1], b[:1])[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gemm_of_any_grid_has_the_same_bits(dtype, monkeypatch):
    """Longer than the axes of a grid may be, which only batches of many thousand matrices are; and tall ones."""
    a, b, bias = randn(3, 300, 40, dtype=dtype), randn(3, 40, 70, dtype=dtype), randn(70, dtype=dtype).expand(3, 300, 70)
    replace(monkeypatch, matmul, "gemm_tile", lambda *args: tiles.Tile(32, 32, 32, 4, 2))
    few = [cuda.gemm(a[:, rows : rows + 60], b, bias[:, :60]) for rows in range(0, 300, 60)]
    assert_same_bits(cuda.gemm(a, b, bias), torch.cat(few, dim=1))
    assert matmul.LONGEST_AXIS == 65_535
    replace(monkeypatch, matmul, "LONGEST_AXIS", 2)
    for batch, N in ((3, 70), (1, 70), (3, 30), (1, 30)):
        got = cuda.gemm(a[:batch, :60], b[:batch, :, :N], bias[:batch, :60, :N])
        assert_same_bits(got, few[0][:batch, :, :N].contiguous())


@pytest.mark.parametrize(("M", "N", "K", "batch"), [(1900, 5, 7, 1), (3, 1100, 7, 2), (5, 40, 700, 1), (17, 20, 7, 250)])
def test_gemm_of_what_int32_cannot_count_has_the_same_bits(M, N, K, batch, monkeypatch):
    a, b, bias = (randn(*s, dtype=torch.float32) for s in ((batch, M, K), (batch, K, N), (batch, M, N)))
    want = cuda.gemm(a, b, bias, 0.5, 2.0)
    want_of_rows = cuda.gemm(a.view(1, -1, K), b[:1])
    replace(monkeypatch, matmul, "INT32_END", 1000)
    launched, product = [], matmul.product
    monkeypatch.setattr(matmul, "product", lambda sizes, *args: launched.append(sizes) or product(sizes, *args))
    assert_same_bits(cuda.gemm(a, b, bias, 0.5, 2.0), want)
    with on_a_gpu():
        assert_same_bits(table.PLANNED["linear"](a, b[0].mT).view(want_of_rows.shape), want_of_rows)
    assert launched and not any(sizes.are_long() for sizes in launched)
    if max(M, N, K) > 488:
        with pytest.raises(ValueError, match="fewer than 488 rows"):
            cuda.grouped_gemm(a[0], b, torch.full((batch,), M, dtype=torch.int32))


def test_gemm_block_k_does_not_follow_m():
    for dtype, choice in tiles.GEMM_TILES.items():
        assert len({tile.block_k for tile in choice}) == 1, dtype


def test_gemm_strides_change_no_bit():
    a, b = randn(2, 5, 70, dtype=torch.float32), randn(2, 70, 33, dtype=torch.float32)
    want = cuda.gemm(a, b)
    for a_view, b_view in zip(layouts(a), layouts(b), strict=True):
        assert_same_bits(cuda.gemm(a_view, b_view), want)
    row = a[:, :1].expand(-1, 5, -1)
    assert_same_bits(cuda.gemm(row, b), want[:, :1].expand(-1, 5, -1).contiguous())


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (2, 2, 3, 0)])
def test_gemm_of_nothing(shape):
    B, M, N, K = shape
    a, b, bias = torch.ones(B, M, K), torch.ones(B, K, N), torch.ones(B, M, N)
    assert_same_bits(cuda.gemm(a, b, bias, 1.0, 3.0), reference.gemm(a, b, bias, 1.0, 3.0))


def test_gemm_nan_stays_in_its_row():
    a, b = randn(1, 20, 70, dtype=torch.float32), randn(1, 70, 33, dtype=torch.float32)
    want = cuda.gemm(a, b)
    a[0, 7, 3] = torch.nan
    got = cuda.gemm(a, b)
    assert got[0, 7].isnan().all()
    others = [row for row in range(20) if row != 7]
    assert_same_bits(got[:, others], want[:, others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", [[3, 3, 20, 37], [0, 0, 0, 0], [0, 45, 45, 45], [16, 32, 40, 45]])
def test_grouped_gemm_is_gemm_of_each_group(dtype, ends):
    a, b = randn(45, 70, dtype=dtype) / 8, randn(4, 70, 33, dtype=dtype)
    offs = torch.tensor(ends, dtype=torch.int32)
    got = cuda.grouped_gemm(a, b, offs)
    assert_near(got, reference.grouped_gemm(a, b, offs), dtype)
    start = 0
    for group, end in enumerate(ends):
        assert_same_bits(got[start:end], cuda.gemm(a[None, start:end], b[None, group])[0])
        start = end
    assert (got[start:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_product_that_is_not_rounded_is_the_rounded_one_before_its_rounding(dtype):
    a, b = randn(2, 19, 70, dtype=dtype) / 8, randn(2, 70, 33, dtype=dtype)
    wide = cuda.gemm(a, b, out_dtype=torch.float32)
    assert wide.dtype == torch.float32
    assert_near(wide, reference.gemm(a, b, out_dtype=torch.float32), torch.float32)
    assert_same_bits(wide, cuda.gemm(a.float(), b.float()))  # 16-bit products are exact in float32
    offs = torch.tensor([7, 19], dtype=torch.int32)
    grouped = cuda.grouped_gemm(a[0], b, offs, out_dtype=torch.float32)
    assert_same_bits(grouped[:7], wide[0, :7])
    assert grouped.dtype == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_parts", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("n", [0, 1, 700, 5000])
def test_tree_sum_adds_neighbours_then_their_sums(n_parts, n, dtype):
    wide = reference.accumulator_dtype(dtype)
    parts = randn(n_parts, n, dtype=dtype)
    parts[:, ::7] = -0.0
    level = list(parts.to(wide))
    while len(level) > 1:
        alone = level[-1:] if len(level) % 2 else []
        level = [a + b for a, b in zip(level[::2], level[1::2], strict=False)] + alone
    assert_same_bits(cuda.tree_sum(parts, wide), level[0])


# --- products of scaled 8-bit floats ---------------------------------------------------------------------------------


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def scaled_operands(batch, M, N, K, form="rows", dtypes=(E4M3, E4M3)):
    a, b = torch.randn(batch, M, K).to(dtypes[0]), torch.randn(batch, N, K).to(dtypes[1]).mT
    groups = 1 if form == "rows" else tiles.ceil_div(K, 128)
    columns = tiles.ceil_div(N, 128) if form == "blocks of columns" else N
    return a, b, torch.rand(batch, M, groups).add_(0.1), torch.rand(batch, groups, columns).add_(0.1)


each_form = pytest.mark.parametrize("form", ["rows", "blocks", "blocks of columns"])


@each_form
@pytest.mark.parametrize("dtypes", [(E4M3, E4M3), (E4M3, E5M2), (E5M2, E4M3)], ids=str)
@pytest.mark.parametrize("size", [(1, 1, 16, 16), (1, 70, 130, 400), (2, 20, 3, 257), (1, 3, 300, 128)], ids=str)
def test_scaled_gemm_has_the_bits_of_the_cpus(size, dtypes, form):
    """With the interpreter's products as a chain, both sets add the same numbers in the same order: the contract's."""
    operands = scaled_operands(*size, form, dtypes)
    for bias in (None, torch.randn(size[2]), torch.randn(size[2]).bfloat16()):
        got = cuda.scaled_gemm(*operands, bias, torch.float32)
        assert_same_bits(got, cpu.scaled_gemm(*operands, bias, torch.float32))
        torch.testing.assert_close(got, reference.scaled_gemm(*operands, bias, torch.float32), rtol=2e-6, atol=2e-5)
    for out_dtype in (torch.bfloat16, torch.float16):  # which the interpreter rounds in a way of its own
        got, want = (kernels.scaled_gemm(*operands, None, out_dtype) for kernels in (cuda, cpu))
        torch.testing.assert_close(got, want, rtol=1e-2, atol=1e-2)


@each_form
def test_scaled_rows_alone_and_in_a_batch(form):
    a, b, scale_a, scale_b = scaled_operands(1, 150, 40, 300, form)
    bias = torch.randn(40)
    whole = cuda.scaled_gemm(a, b, scale_a, scale_b, bias, torch.bfloat16)
    for rows in ([149], [3, 2, 1], list(range(149, 60, -1))):
        some = cuda.scaled_gemm(a[:, rows], b, scale_a[:, rows], scale_b, bias, torch.bfloat16)
        assert_same_bits(some, whole[:, rows])
    for a_view, scale_view in zip(layouts(a), layouts(scale_a), strict=True):
        assert_same_bits(cuda.scaled_gemm(a_view, b.contiguous(), scale_view, scale_b, bias, torch.bfloat16), whole)
    twice = cuda.scaled_gemm(*(x.expand(3, -1, -1) for x in (a, b, scale_a, scale_b)), bias, torch.bfloat16)
    assert_same_bits(twice[2:], whole)


@pytest.mark.parametrize("size", [(5, 70, 64), (33, 32, 144), (16, 1, 1), (66, 33, 130)], ids=str)
@each_form
def test_scaled_gemm_reads_nothing_after_its_operands(size, form):
    operands, bias = scaled_operands(1, *size, form), torch.randn(size[1])
    want = cuda.scaled_gemm(*operands, bias, torch.float32)
    assert_same_bits(cuda.scaled_gemm(*(fenced(x) for x in operands), fenced(bias), torch.float32), want)
    a, b, scale_a, scale_b = operands
    transposed = (fenced(x.mT).mT for x in operands)
    assert_same_bits(cuda.scaled_gemm(*transposed, fenced(bias), torch.float32), want)
    if form == "rows":
        offs = torch.tensor([size[0]], dtype=torch.int32)
        given = a[0], b, scale_a[0, :, 0], scale_b[:, 0]
        got = cuda.scaled_grouped_gemm(*(fenced(x) for x in given), fenced(offs), torch.float32)
        assert_same_bits(got, cuda.scaled_gemm(*operands, None, torch.float32)[0])


@pytest.mark.parametrize("ends", [[3, 3, 20, 37], [0, 0, 0, 0], [0, 145, 145, 145], [16, 32, 40, 145]], ids=str)
def test_scaled_grouped_gemm_is_scaled_gemm_of_each_group(ends):
    a, b = torch.randn(145, 200).to(E4M3), torch.randn(4, 33, 200).to(E4M3).mT
    scale_a, scale_b = torch.rand(145), torch.rand(4, 33)
    offs = torch.tensor(ends, dtype=torch.int32)
    got = cuda.scaled_grouped_gemm(a, b, scale_a, scale_b, offs, torch.float32)
    assert_same_bits(got, cpu.scaled_grouped_gemm(a, b, scale_a, scale_b, offs, torch.float32))
    start = 0
    for group, end in enumerate(ends):
        scales = scale_a[start:end, None], scale_b[group][None]
        assert_same_bits(got[start:end], cuda.scaled_gemm(a[start:end], b[group], *scales, None, torch.float32))
        start = end
    assert (got[start:] == 0).all()
    wrong = torch.tensor(
        [-7, 200, 30, 999], dtype=torch.int32
    )  # nobody waits to look at them: no row beyond the operands is read
    fences = (fenced(x) for x in (a, b.mT))
    cuda.scaled_grouped_gemm(next(fences), next(fences).mT, fenced(scale_a), scale_b, wrong, torch.float32)


@pytest.mark.parametrize("ends", [[3, 3, 200, 337], [0, 0, 0, 0], [0, 345, 345, 345]], ids=str)
def test_scaled_grouped_gemm_over_k_is_scaled_gemm_of_each_group(ends):
    a, b = torch.randn(70, 345).to(E4M3), torch.randn(33, 345).to(E4M3).t()
    scale_a, scale_b = torch.rand(4, 70), torch.rand(4, 33)
    offs = torch.tensor(ends, dtype=torch.int32)
    got = cuda.scaled_grouped_gemm_over_k(a, b, scale_a, scale_b, offs, torch.float32)
    assert_same_bits(got, cpu.scaled_grouped_gemm_over_k(a, b, scale_a, scale_b, offs, torch.float32))
    start = 0
    for group, end in enumerate(ends):
        scales = scale_a[group][:, None], scale_b[group][None]
        want = cuda.scaled_gemm(a[:, start:end], b[start:end], *scales, None, torch.float32)
        assert_same_bits(got[group], want)
        start = end
    cuda.scaled_grouped_gemm_over_k(
        fenced(a),
        fenced(b.t()).t(),
        fenced(scale_a),
        scale_b,
        torch.tensor([-7, 999, 30, 400], dtype=torch.int32),
        torch.float32,
    )


def test_scaled_gemm_nan_stays_in_its_row():
    a, b, scale_a, scale_b = scaled_operands(1, 20, 33, 200, "blocks")
    want = cuda.scaled_gemm(a, b, scale_a, scale_b, None, torch.float32)
    a = a.float()
    a[0, 7, 3] = torch.nan
    got = cuda.scaled_gemm(a.to(E4M3), b, scale_a, scale_b, None, torch.float32)
    assert got[0, 7].isnan().all()
    others = [row for row in range(20) if row != 7]
    assert_same_bits(got[:, others], want[:, others])


@pytest.mark.parametrize("size", [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (2, 2, 3, 0)], ids=str)
def test_scaled_gemm_of_nothing(size):
    operands, bias = scaled_operands(*size), torch.ones(size[2])
    got = cuda.scaled_gemm(*operands, bias, torch.float32)
    assert_same_bits(got, reference.scaled_gemm(*operands, bias, torch.float32))
    if size[3] == 0:
        blocks = scaled_operands(*size, "blocks")
        assert_same_bits(cuda.scaled_gemm(*blocks, bias, torch.float32), got)


def test_scaled_products_that_int32_cannot_count_are_refused(monkeypatch):
    operands = scaled_operands(1, 3, 40, 600)
    monkeypatch.setattr(scaled, "INT32_END", 1000)
    plans.forget_plans()
    with pytest.raises(ValueError, match="fewer than 488 rows"):
        cuda.scaled_gemm(*operands, None, torch.float32)


def test_grouped_gemm_of_nothing():
    offs = torch.zeros(2, dtype=torch.int32)
    assert cuda.grouped_gemm(torch.ones(0, 4), torch.ones(2, 4, 3), offs).shape == (0, 3)
    assert (cuda.grouped_gemm(torch.ones(5, 4), torch.ones(0, 4, 3), offs[:0]) == 0).all()


# --- rows ------------------------------------------------------------------------------------------------------------

ROW_FUNCTIONS = {
    "row_sum": lambda s, x, w: s.row_sum(x, x.dtype),
    "row_mean": lambda s, x, w: s.row_mean(x, x.dtype),
    "row_mean_of_squares": lambda s, x, w: s.row_mean_of_squares(x, reference.accumulator_dtype(x.dtype)),
    "row_norm_1": lambda s, x, w: s.row_norm(x, 1, x.dtype),
    "row_norm_2": lambda s, x, w: s.row_norm(x, 2.0, x.dtype),
    "row_var_mean": lambda s, x, w: s.row_var_mean(x, 1, x.dtype),
    "row_logsumexp": lambda s, x, w: s.row_logsumexp(x, x.dtype),
    "row_softmax": lambda s, x, w: s.row_softmax(x, False, x.dtype),
    "row_log_softmax": lambda s, x, w: s.row_softmax(x, True, x.dtype),
    "row_cumsum": lambda s, x, w: s.row_cumsum(x, x.dtype),
    "row_layer_norm": lambda s, x, w: s.row_layer_norm(x, w[0], w[1], 1e-5),
    "row_layer_norm_plain": lambda s, x, w: s.row_layer_norm(x, None, None, 1e-5),
    "row_rms_norm": lambda s, x, w: s.row_rms_norm(x, w[0], 1e-6),
    "row_rms_norm_plain": lambda s, x, w: s.row_rms_norm(x, None, 1e-6),
}
each_row_function = pytest.mark.parametrize("call", ROW_FUNCTIONS.values(), ids=ROW_FUNCTIONS)


@each_row_function
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_cols", [1, 129, 5000])
def test_row_functions_are_near_the_reference(call, dtype, n_cols):
    x, w = randn(3, n_cols, dtype=dtype), randn(2, n_cols, dtype=dtype)
    assert_near(call(cuda, x, w), call(reference, x, w), dtype)


@each_row_function
@pytest.mark.parametrize("n_cols", [100, 4500])
def test_row_functions_do_not_see_other_rows(call, n_cols):
    x, w = randn(19, n_cols, dtype=torch.float32), randn(2, n_cols, dtype=torch.float32)
    whole = as_tuple(call(cuda, x, w))
    for rows in ([18], [4, 3, 17], list(range(16))):
        assert_same_bits(call(cuda, x[rows], w), tuple(out[rows] for out in whole))
    x[2] = torch.nan
    others = [row for row in range(19) if row != 2]
    assert_same_bits(tuple(out[others] for out in as_tuple(call(cuda, x, w))), tuple(out[others] for out in whole))


@each_row_function
def test_row_functions_do_not_see_strides(call):
    x, w = randn(3, 300, dtype=torch.float32), randn(2, 300, dtype=torch.float32)
    want = call(cuda, x, w)
    for x_view, w_view in zip(layouts(x), layouts(w), strict=True):
        assert_same_bits(call(cuda, x_view, w_view), want)
    first = tuple(out[:1].expand(3, *out.shape[1:]).contiguous() for out in as_tuple(want))
    assert_same_bits(call(cuda, x[:1].expand(3, -1), w), first)


@each_row_function
@pytest.mark.parametrize("n_cols", [1, 129, 4500])
def test_row_functions_read_nothing_after_their_operands(call, n_cols):
    x, w = randn(3, n_cols, dtype=torch.float32), randn(2, n_cols, dtype=torch.float32)
    assert_same_bits(call(cuda, fenced(x), fenced(w)), call(cuda, x, w))
    assert_same_bits(call(cuda, fenced(x.T).T, fenced(w.T).T), call(cuda, x, w))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("n_cols", [3, 100, 128, 700, 4096])
def test_row_softmax_does_not_see_masked_columns_after(log, n_cols):
    x = randn(3, n_cols, dtype=torch.float32)
    want, want_lse = cuda.row_softmax(x, log, x.dtype), cuda.row_logsumexp(x, x.dtype)
    for width in (n_cols + 1, 129, 255, 1024, 1500, 5000, 9000):
        if width > n_cols:
            padded = torch.nn.functional.pad(x, (0, width - n_cols), value=-torch.inf)
            assert_same_bits(cuda.row_softmax(padded, log, x.dtype)[:, :n_cols], want)
            assert_same_bits(cuda.row_logsumexp(padded, x.dtype), want_lse)


@pytest.mark.parametrize("n_cols", [3, 100, 700, 4096])
def test_row_sums_do_not_see_zeros_after(n_cols):
    x = randn(3, n_cols, dtype=torch.float32)
    for width in (n_cols + 1, 129, 1500, 5000, 9000):
        padded = torch.nn.functional.pad(x, (0, max(0, width - n_cols)))
        assert_same_bits(cuda.row_sum(padded, x.dtype), cuda.row_sum(x, x.dtype))
        assert_same_bits(cuda.row_norm(padded, 2, x.dtype), cuda.row_norm(x, 2, x.dtype))


def test_row_cumsum_does_not_see_columns_after():
    x = randn(2, 2500, dtype=torch.float32)
    whole = cuda.row_cumsum(x, x.dtype)
    for n_cols in (1, 16, 1000, 1024, 1025, 2400):
        assert_same_bits(cuda.row_cumsum(x[:, :n_cols], x.dtype), whole[:, :n_cols])


def test_row_functions_of_infinities():
    x = randn(4, 50, dtype=torch.float32)
    x[0] = -torch.inf
    x[1, 3] = torch.inf
    x[2, :20] = -torch.inf
    for call in (ROW_FUNCTIONS["row_softmax"], ROW_FUNCTIONS["row_log_softmax"], ROW_FUNCTIONS["row_logsumexp"]):
        assert_near(call(cuda, x, None), call(reference, x, None), torch.float32)


@each_row_function
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_row_functions_of_nothing(call, shape):
    x, w = torch.ones(shape), torch.ones(2, shape[1])
    assert_near(call(cuda, x, w), call(reference, x, w), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_row_functions_take_and_give_wider_dtypes(dtype):
    x, w = randn(3, 300, dtype=dtype), randn(2, 300, dtype=torch.float32)
    for out_dtype in (torch.float32, torch.float64):
        assert_near(cuda.row_sum(x, out_dtype), reference.row_sum(x, out_dtype), torch.float32)
        assert_near(cuda.row_softmax(x, True, out_dtype), reference.row_softmax(x, True, out_dtype), torch.float32)
    assert_near(cuda.row_layer_norm(x, *w, 1e-5), reference.row_layer_norm(x, *w, 1e-5), dtype)
    assert_near(cuda.row_rms_norm(x, w[0], 1e-5), reference.row_rms_norm(x, w[0], 1e-5), dtype)


def test_row_scalars_keep_their_precision():
    x = randn(3, 30, dtype=torch.float64)
    assert_near(cuda.row_var_mean(x, 0.1, x.dtype), reference.row_var_mean(x, 0.1, x.dtype), torch.float64)
    assert_near(cuda.row_rms_norm(x * 1e-3, None, 1e-5), reference.row_rms_norm(x * 1e-3, None, 1e-5), torch.float64)


def replace(monkeypatch, module, name, value):
    """Plans made with what was there before are forgotten."""
    monkeypatch.setattr(module, name, value)
    plans.forget_plans()


# --- convolutions ------------------------------------------------------------------------------------------------------


def unfolded(x, weight, stride, padding, dilation, groups):
    """Rows [groups, pixels, R * S * C] of what lies under the kernel, and the kernel to multiply them by."""
    R, S = weight.shape[2:]
    view = F.pad(x, [p for p in reversed(padding) for _ in range(2)])
    for dim, (k, s, d) in enumerate(zip((R, S), stride, dilation, strict=True), 2):
        view = view.unfold(dim, d * (k - 1) + 1, s)[..., ::d]
    rows = view.unflatten(1, (groups, -1)).permute(1, 0, 3, 4, 5, 6, 2)
    pixels = rows.shape[1:4]
    kernel = weight.unflatten(0, (groups, -1)).permute(0, 3, 4, 2, 1).reshape(groups, -1, weight.shape[0] // groups)
    return rows.reshape(groups, -1, kernel.shape[1]), kernel, pixels


CONVOLUTIONS = {
    "of a block of channels": ((2, 64, 6, 7), (32, 64, 3, 3), (1, 1), (1, 1), (1, 1), 1),
    "of blocks of channels, in steps": ((3, 64, 9, 8), (40, 64, 3, 4), (3, 2), (1, 2), (1, 1), 1),
    "of blocks of channels, dilated": ((2, 96, 8, 6), (20, 96, 2, 3), (2, 1), (3, 0), (3, 2), 1),
    "of some channels": ((2, 20, 6, 7), (9, 20, 3, 2), (2, 1), (1, 0), (1, 2), 1),
    "of three channels": ((2, 3, 9, 8), (5, 3, 3, 3), (2, 2), (1, 1), (1, 1), 1),
    "grouped": ((2, 64, 5, 5), (6, 32, 2, 3), (1, 1), (0, 2), (1, 1), 2),
    "depthwise": ((2, 6, 7, 7), (6, 1, 3, 3), (1, 1), (1, 1), (1, 1), 6),
    "of one tap": ((3, 20, 4, 5), (17, 20, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "of one tap of blocks of channels": ((3, 64, 4, 6), (17, 64, 1, 1), (1, 1), (0, 0), (1, 1), 1),
    "of many images": ((70, 32, 2, 3), (17, 32, 2, 2), (1, 1), (1, 0), (1, 1), 1),
    "of a wide row": ((1, 32, 2, 70), (40, 32, 2, 3), (1, 2), (0, 1), (1, 1), 1),
    "of one tap in steps": ((2, 64, 5, 6), (8, 64, 1, 1), (2, 2), (0, 0), (1, 1), 1),
    "of patches": ((2, 3, 9, 8), (10, 3, 4, 4), (4, 4), (0, 0), (1, 1), 1),
}
"""Shapes of x and of the weight, stride, padding, dilation, groups."""


@pytest.mark.parametrize(
    ("dtype", "capability"), [(torch.float32, 80), (torch.bfloat16, 80), (torch.bfloat16, 90)], ids=["fp32", "bf16", "bf16-tma"]
)
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolution_has_the_bits_of_the_product_of_unfolded_rows_in_any_layout(name, dtype, capability, monkeypatch):
    """And where x has the channels last, so has the result, as torch's has."""
    replace(monkeypatch, implicit_gemm, "device_of", lambda _: tiles.Device(132, 232_448, capability))
    sizes, weight_sizes, *how, groups = CONVOLUTIONS[name]
    x, weight, bias = randn(*sizes, dtype=dtype), randn(*weight_sizes, dtype=dtype), randn(weight_sizes[0], dtype=dtype)
    rows, kernel, pixels = unfolded(x, weight, *how, groups)
    of_groups = bias.view(groups, 1, -1).expand(groups, rows.shape[1], kernel.shape[2])
    product = cuda.gemm(rows, kernel, of_groups).view(groups, *pixels, -1)
    want = product.permute(1, 0, 4, 2, 3).flatten(1, 2).contiguous()
    assert_near(want, reference.convolution(x, weight, bias, *how, groups), dtype)
    first, last = torch.contiguous_format, torch.channels_last
    for x_format, weight_format in ((first, first), (first, last), (last, last)):
        given = x.to(memory_format=x_format), weight.to(memory_format=weight_format)
        got = cuda.convolution(*given, bias, *how, groups)
        assert_same_bits(got, want)
        assert got.is_contiguous(memory_format=x_format) or weight_format == last
    alone = cuda.convolution(x[-1:], weight, None, *how, groups)
    plain = cuda.gemm(rows, kernel).view(groups, *pixels, -1).permute(1, 0, 4, 2, 3).flatten(1, 2)
    assert_same_bits(alone, plain[-1:].contiguous())


def test_convolution_of_views_and_of_rows_has_the_same_bits():
    x, weight = randn(5, 64, 6, 6, dtype=torch.float32), randn(8, 64, 3, 3, dtype=torch.float32)
    want = cuda.convolution(x, weight, None, (1, 1), (1, 1), (1, 1), 1)
    assert_same_bits(cuda.convolution(fenced(x.mT).mT, weight, None, (1, 1), (1, 1), (1, 1), 1), want)
    for i in range(5):
        assert_same_bits(cuda.convolution(x[i : i + 1], weight, None, (1, 1), (1, 1), (1, 1), 1), want[i : i + 1])


def test_convolution_of_more_pixels_than_int32_counts_is_taken_by_halves(monkeypatch):
    x, weight = randn(70, 16, 3, 3, dtype=torch.float32), randn(8, 16, 3, 3, dtype=torch.float32)
    want = cuda.convolution(x, weight, None, (1, 1), (1, 1), (1, 1), 1)
    replace(monkeypatch, implicit_gemm, "INT32_END", implicit_gemm.MARGIN + 300)
    assert_same_bits(cuda.convolution(x, weight, None, (1, 1), (1, 1), (1, 1), 1), want)
    with pytest.raises(ValueError, match="convolution takes images of fewer than 300 values"):
        cuda.convolution(torch.zeros(1, 16, 9, 9), weight, None, (1, 1), (1, 1), (1, 1), 1)


# --- attention -------------------------------------------------------------------------------------------------------


def qkv(B, H, Hkv, Sq, Skv, D, DV, dtype):
    return (
        randn(B, H, Sq, D, dtype=dtype),
        randn(B, Hkv, Skv, D, dtype=dtype),
        randn(B, Hkv, Skv, DV, dtype=dtype),
    )


SIZES = [(2, 4, 2, 5, 70, 20, 24), (1, 2, 2, 40, 40, 64, 64), (1, 3, 1, 1, 100, 130, 16)]
"""B, H, Hkv, Sq, Skv, D, DV; each in float32, and the first in every dtype."""


@pytest.mark.parametrize(
    ("dtype", "sizes"), [*((torch.float32, sizes) for sizes in SIZES), *((dtype, SIZES[0]) for dtype in DTYPES[1:])]
)
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "bool_causal", "additive", "lowest"])
def test_attention_is_near_the_reference(dtype, sizes, kind):
    q, k, v = qkv(*sizes, dtype)
    B, H, _, Sq, Skv = sizes[:5]
    mask = None
    if kind not in ("none", "causal"):
        mask = torch.rand(B, 1, Sq, Skv) > 0.4
        mask[..., :3] = False
        mask[0, 0, 0] = False  # a query that sees no key
    if kind == "additive":
        mask = torch.where(mask, randn(B, H, Sq, Skv, dtype=dtype), torch.full((), -torch.inf, dtype=dtype))
    if kind == "lowest":
        mask = torch.where(mask, torch.zeros((), dtype=dtype), torch.full((), torch.finfo(dtype).min, dtype=dtype))
    mask = None if mask is None else mask.expand(B, H, Sq, Skv)
    causal = kind in ("causal", "bool_causal")
    (out, lse), (want, want_lse) = (side.attention(q, k, v, mask, causal, 0.2) for side in (cuda, reference))
    # The logsumexp of a query all of whose keys are hidden by the lowest value: very low is all it says.
    low = want_lse < -1e30
    assert torch.equal(lse < -1e30, low)
    assert_near((out, lse.masked_fill(low, 0)), (want, want_lse.masked_fill(low, 0)), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("additive", [None, -torch.inf, "lowest"])
@pytest.mark.parametrize("pad", [1, 70])
def test_attention_does_not_see_padding(dtype, additive, pad):
    """One sequence of 50 alone, and padded on either side next to another one: causal, grouped heads."""
    q, k, v = qkv(1, 2, 1, 50, 50, 16, 16, dtype)
    want = cuda.attention(q, k, v, None, True, 0.25)
    causal = torch.ones(50, 50, dtype=torch.bool).tril()
    for left in (0, pad):
        size, here = 50 + pad, slice(left, left + 50)
        padded = [randn(2, x.shape[1], size, 16, dtype=dtype) for x in (q, k, v)]
        for x, y in zip(padded, (q, k, v), strict=True):
            x[1, :, here] = y[0]
        mask = torch.ones(2, 1, size, size, dtype=torch.bool).tril()
        mask[1] = False
        mask[1, 0, here, here] = causal
        if additive is not None:
            lowest = torch.finfo(dtype).min if additive == "lowest" else additive
            mask = torch.where(mask, 0.0, lowest).to(dtype)
            mask[1, 0, : here.start] = -torch.inf  # what the padding's own queries see is of no interest
        out, lse = cuda.attention(*padded, mask.expand(2, 2, size, size), False, 0.25)
        assert_same_bits((out[1:, :, here], lse[1:, :, here]), want)


@pytest.mark.parametrize("sizes", [(2, 2, 1, 5, 70, 20, 24), (1, 2, 2, 40, 40, 64, 64), (1, 2, 1, 1, 300, 130, 16)])
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_attention_reads_nothing_after_its_operands(sizes, kind):
    q, k, v = qkv(*sizes, torch.float32)
    B, H, _, Sq, Skv = sizes[:5]
    mask = {"none": None, "bool": torch.rand(B, H, Sq, Skv) > 0.4, "additive": randn(B, H, Sq, Skv, dtype=q.dtype)}[kind]
    want = cuda.attention(q, k, v, mask, kind == "none", 0.2)
    for turned in (lambda x: x, lambda x: x.transpose(1, 2), lambda x: x.mT):
        operands = [None if x is None else turned(fenced(turned(x))) for x in (q, k, v, mask)]
        assert_same_bits(cuda.attention(*operands, kind == "none", 0.2), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_decodes_as_it_prefills(dtype):
    q, k, v = qkv(1, 2, 1, 150, 150, 16, 16, dtype)
    out, lse = cuda.attention(q, k, v, None, True, 0.25)
    for i in (0, 1, 31, 32, 63, 64, 149):
        step = cuda.attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], None, False, 0.25)
        assert_same_bits(step, (out[:, :, i : i + 1], lse[:, :, i : i + 1]))
        cache = torch.arange(150).expand(1, 2, 1, 150) <= i
        step = cuda.attention(q[:, :, i : i + 1], k, v, cache, False, 0.25)
        assert_same_bits(step, (out[:, :, i : i + 1], lse[:, :, i : i + 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_tiles_are_one_class(dtype, monkeypatch):
    q, k, v = qkv(1, 2, 1, 40, 100, 16, 16, dtype)
    mask = (torch.rand(1, 1, 40, 100) > 0.3).expand(1, 2, 40, 100)
    chosen = tiles.attention_tile(dtype, 16, 40, torch.device("cpu"))
    want = cuda.attention(q, k, v, mask, False, 0.25)
    for block_m in (16, 32, 64, 128):
        tile = chosen._replace(block_m=block_m)
        replace(monkeypatch, attention_plan, "attention_tile", lambda *args, tile=tile, **_: tile)
        assert_same_bits(cuda.attention(q, k, v, mask, False, 0.25), want)
        each_head = mask.contiguous()  # a mask of its own for each head: heads are not packed into one tile
        assert_same_bits(cuda.attention(q, k, v, each_head, False, 0.25), want)


def test_attention_block_n_does_not_follow_the_queries():
    for dtype in DTYPES:
        for head_dim in (16, 64, 80, 128, 256):
            chosen = [tiles.attention_tile(dtype, head_dim, rows, torch.device("cpu")) for rows in (1, 40, 9999)]
            assert len({tile.block_n for tile in chosen}) == 1


@pytest.mark.parametrize("kind", ["keys", "queries"])
def test_attention_first_key_heeds_mask_and_causality(kind):
    """A left-padded sequence with a mask and is_causal; "queries": the padding's own queries see later keys alone."""
    q, k, v = qkv(1, 2, 1, 50, 50, 16, 16, torch.float32)
    want = cuda.attention(q, k, v, None, True, 0.25)
    padded = [torch.cat([randn(1, x.shape[1], 37, 16, dtype=x.dtype), x], 2) for x in (q, k, v)]
    mask = (torch.arange(87) >= 37).expand(1, 1, 1, 87)
    if kind == "queries":
        mask = mask.repeat(1, 1, 87, 1)
        mask[0, 0, :37] = torch.ones(37, 87, dtype=torch.bool).triu(1)
    out, lse = cuda.attention(*padded, mask.expand(1, 2, 87, 87), True, 0.25)
    assert_same_bits((out[:, :, 37:], lse[:, :, 37:]), want)


def test_attention_heads_with_masks_of_their_own():
    """Heads that share keys but not a mask: each counts its keys from its own first one."""
    q, k, v = qkv(1, 4, 2, 10, 100, 16, 16, torch.float32)
    mask = (torch.arange(100) >= torch.tensor([0, 5, 37, 70])[:, None])[None, :, None].expand(1, 4, 10, 100)
    whole = cuda.attention(q, k, v, mask, False, 0.25)
    for head in range(4):
        one, keys = slice(head, head + 1), slice(head // 2, head // 2 + 1)
        alone = cuda.attention(q[:, one], k[:, keys], v[:, keys], mask[:, one], False, 0.25)
        assert_same_bits(alone, tuple(x[:, one] for x in whole))


def test_attention_rows_strides_and_nan():
    q, k, v = qkv(3, 4, 2, 10, 40, 16, 16, torch.float32)
    mask = torch.rand(3, 4, 10, 40) > 0.3
    want = cuda.attention(q, k, v, mask, False, 0.25)
    for views in zip(layouts(q), layouts(k), layouts(v), layouts(mask), strict=True):
        assert_same_bits(cuda.attention(*views, False, 0.25), want)
    for b in range(3):
        one = slice(b, b + 1)
        assert_same_bits(cuda.attention(q[one], k[one], v[one], mask[one], False, 0.25), tuple(x[one] for x in want))
    q[1, 2, 4] = torch.nan
    v[2, 1] = torch.nan
    out, lse = cuda.attention(q, k, v, mask, False, 0.25)
    spoilt = torch.zeros(3, 4, 10, dtype=torch.bool)
    spoilt[1, 2, 4] = spoilt[2, 2:] = True
    assert torch.equal(out.isnan().any(-1), spoilt)
    assert_same_bits(out[~spoilt], want[0][~spoilt])


@pytest.mark.parametrize("sizes", [(0, 2, 2, 3, 4), (1, 0, 0, 3, 4), (1, 2, 2, 0, 4), (1, 2, 2, 3, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_of_nothing(sizes, masked):
    B, H, _, Sq, Skv = sizes
    q, k, v = qkv(*sizes, 8, 8, torch.float32)
    mask = torch.ones(B, H, Sq, Skv, dtype=torch.bool) if masked else None
    out, lse = cuda.attention(q, k, v, mask, False, 1.0)
    assert out.shape == q.shape and (out == 0).all() and (lse == -torch.inf).all() and lse.shape == q.shape[:3]


OPTIONS = [{}, {"window": 9}, {"soft_cap": 2.0}, {"sinks": True}, {"window": 70, "soft_cap": 3.0, "sinks": True}]


def with_sinks(options, n_heads, dtype):
    return {**options, "sinks": randn(n_heads, dtype=dtype)} if options.get("sinks") is True else options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", OPTIONS)
def test_attention_options_are_near_the_reference(dtype, options, monkeypatch):
    options = with_sinks(options, 4, dtype)
    for Sq, offset in ((80, 0), (1, 79), (5, 70)):
        q, k, v = qkv(1, 4, 2, Sq, 80, 20, 24, dtype)
        got = cuda.attention(q, k, v, None, True, 0.25, causal_offset=offset, **options)
        assert_near(got, reference.attention(q, k, v, None, True, 0.25, causal_offset=offset, **options), dtype)


@pytest.mark.parametrize("options", OPTIONS)
def test_attention_in_chunks_and_step_by_step_is_attention_as_a_whole(options, monkeypatch):
    """Few queries get a grid over the keys, many do not: the same order, so the same bits. 256 keys are a chunk."""
    options = with_sinks(options, 2, torch.float32)
    q, k, v = qkv(1, 2, 1, 300, 300, 16, 16, torch.float32)
    out, lse = cuda.attention(q, k, v, None, True, 0.25, **options)
    for start, stop in ((0, 1), (31, 32), (32, 33), (150, 157), (255, 257), (256, 257), (299, 300), (200, 300)):
        seen = tuple(x[:, :, :stop] for x in (k, v))
        chunk = cuda.attention(q[:, :, start:stop], *seen, None, True, 0.25, causal_offset=start, **options)
        assert_same_bits(chunk, (out[:, :, start:stop], lse[:, :, start:stop]))


@pytest.mark.parametrize(
    ("window", "n_before", "kind"),
    [(7, "dropped", "bool"), (40, "hidden", "bool"), (130, "dropped", "bool"), (40, "dropped", "additive")],
)
def test_attention_in_a_window_decodes_as_it_prefills_whether_old_keys_are_hidden_or_dropped(window, n_before, kind):
    """A row of 300 beside a shorter one that is padded on the left, in a mask with the window: blocks have 32 keys."""
    q, k, v = qkv(2, 2, 1, 300, 300, 16, 16, torch.float32)
    left = torch.tensor([0, 90])[:, None]
    columns = torch.arange(300)
    near = (columns <= columns[:, None]) & (columns > columns[:, None] - window)
    mask = (near & (columns >= left[..., None]))[:, None].expand(2, 2, 300, 300)
    mask = mask if kind == "bool" else torch.where(mask, 0.0, -torch.inf)
    positions = (columns - left).clamp(min=0)
    out, lse = cuda.attention(q, k, v, mask, False, 0.25)
    for start, stop in ((90, 91), (100, 107), (203, 204), (257, 258)):
        first = max(0, start - window + 1) if n_before == "dropped" else 0
        seen = (x[:, :, first:stop] for x in (k, v))
        now = {"positions": positions[:, start:stop], "mask_window": window}
        step = cuda.attention(q[:, :, start:stop], *seen, mask[:, :, start:stop, first:stop], False, 0.25, **now)
        assert_same_bits(step, (out[:, :, start:stop], lse[:, :, start:stop]))


DIVISIONS = [(1, 1), (1, 3), (8, 1), (8, 2)]
"""Blocks of a split, and splits of a program."""


def divided(split_blocks, splits_per_program):
    def division(programs, n_key_blocks, multiprocessors):
        num_splits = -(-n_key_blocks // split_blocks) if split_blocks else 1
        return attention_plan.Splits(split_blocks, num_splits, splits_per_program)

    return division


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mask", ["none", "holes", "left padding", "additive"])
def test_attention_does_not_depend_on_how_its_keys_are_divided(mask, options, monkeypatch):
    options = with_sinks(options, 2, torch.float32)
    q, k, v = qkv(1, 2, 1, 3, 330, 16, 16, torch.float32)
    masks = None if mask == "none" else torch.rand(1, 1, 3, 330) < 0.7
    if mask == "left padding":
        masks = (torch.arange(330) >= 37).expand(1, 1, 3, 330)
    elif mask == "additive":
        masks = torch.where(masks, 0.5, torch.finfo(torch.float32).min)
    masks = None if masks is None else masks.expand(1, 2, 3, 330)
    replace(monkeypatch, attention_plan, "num_splits_heuristic", lambda *_: attention_plan.Splits(0, 1, 1))
    want = cuda.attention(q, k, v, masks, False, 0.25, causal_offset=327, **options)
    for division in DIVISIONS:
        replace(monkeypatch, attention_plan, "num_splits_heuristic", divided(*division))
        assert_same_bits(cuda.attention(q, k, v, masks, False, 0.25, causal_offset=327, **options), want)


@pytest.mark.parametrize("division", [(0, 1), *DIVISIONS])
def test_attention_spreads_infinities_alike_however_its_keys_are_divided(division, monkeypatch):
    """A block of keys whose weights underflow to 0 still takes part: 0 * inf is NaN, whether it is merged at once or later."""
    replace(monkeypatch, attention_plan, "num_splits_heuristic", divided(*division))
    q, k, v = qkv(1, 4, 2, 1, 400, 16, 16, torch.float32)
    q, v[:, :, 270] = q.abs(), torch.inf
    k[:, :, 256:288] = -100.0
    out, _ = cuda.attention(q, k, v, None, False, 0.25)
    assert out.isnan().all()
    # So does one whose scores are all -inf, though they are not hidden.
    q, k, v = qkv(1, 4, 2, 1, 400, 16, 16, torch.float32)
    q, k[:, :, 32:64], v[:, :, 40] = q.abs(), -torch.inf, torch.inf
    out, _ = cuda.attention(q, k, v, None, False, 0.25)
    assert out.isnan().all()


@pytest.mark.parametrize("mask", ["right padding", "none"])
@pytest.mark.parametrize("division", [(0, 1), *DIVISIONS])
def test_attention_of_queries_that_see_nothing_is_zero_however_its_keys_are_divided(division, mask, monkeypatch):
    """The window begins after the last key. No program computes a split then, and none reads what memory held before."""
    replace(monkeypatch, attention_plan, "num_splits_heuristic", divided(*division))

    def filled(self, q):
        return torch.full((self._workspace_size,), 12345.0, dtype=q.dtype)

    monkeypatch.setattr(attention_merge.Merge, "workspace", filled)
    q, k, v = qkv(2, 4, 2, 1, 300, 16, 16, torch.float32)
    masks = (torch.arange(300) < 40).expand(2, 4, 1, 300) if mask == "right padding" else None
    out, lse = cuda.attention(q, k, v, masks, False, 0.25, causal_offset=350 if masks is None else 200, window=8)
    assert (out == 0).all()
    assert (lse == -torch.inf).all()


def test_attention_of_few_queries_gets_a_grid_over_the_keys(monkeypatch):
    launched = []
    kernel = attention_merge._merge_splits_kernel

    class Counted:
        def __getitem__(self, grid):
            launched.append(grid)
            return kernel[grid]

    replace(monkeypatch, attention_merge, "_merge_splits_kernel", Counted())
    for rows, merges in ((2, 1), (100, 1)):  # a hundred rows are programs enough
        cuda.attention(*qkv(rows, 4, 2, 1, 150, 16, 16, torch.float32), None, False, 0.25)
        assert len(launched) == merges


@pytest.mark.parametrize("programs", [1, 7, 100, 131, 132, 133, 1000])
@pytest.mark.parametrize("n_key_blocks", [1, 2, 7, 8, 9, 64, 100, 257])
def test_attention_divides_all_of_the_keys_and_nothing_else(programs, n_key_blocks):
    division = attention_plan.num_splits_heuristic(programs, n_key_blocks, 132)
    if division.split_blocks:
        assert (division.num_splits - 1) * division.split_blocks < n_key_blocks <= division.num_splits * division.split_blocks
        assert 1 <= division.splits_per_program <= division.num_splits
    assert division.split_blocks in ((0,) if n_key_blocks == 1 or programs == 132 else (0, 1, 8))
    assert (programs, division.split_blocks) != (1, 0) or n_key_blocks <= 2


def packed(rows, lengths):
    starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return torch.cat(rows), starts


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("queries", [None, 1, 3])
def test_attention_packed_and_paged_is_attention_of_each_row(options, queries, monkeypatch):
    options = with_sinks(options, 4, torch.float32)
    lengths, page = [5, 130, 1, 64], 8
    rows = [[randn(n, h, 16, dtype=torch.float32) for h in (4, 2, 2)] for n in lengths]
    last = [q if queries is None else q[-queries:] for q, _, _ in rows]
    q, q_starts = packed(last, [len(x) for x in last])
    (k, k_starts), (v, _) = (packed([row[i] for row in rows], lengths) for i in (1, 2))
    most = max(len(x) for x in last)
    in_a_line = cuda.packed_attention(q, k, v, q_starts, k_starts, most, 0.25, **options)
    assert_near(in_a_line, reference.packed_attention(q, k, v, q_starts, k_starts, most, 0.25, **options), torch.float32)

    counts = [-(-n // page) for n in lengths]
    places = torch.randperm(sum(counts)).to(torch.int32).split(counts)
    pages = torch.nn.utils.rnn.pad_sequence(places, batch_first=True)
    pool = [torch.full((sum(counts), page, 2, 16), 7.0) for _ in range(2)]
    for mine, (_, *keys_and_values) in zip(places, rows, strict=True):
        for store, x in zip(pool, keys_and_values, strict=True):
            slots = torch.arange(len(x))
            store[mine[slots // page].long(), slots % page] = x
    lens = torch.tensor(lengths, dtype=torch.int32)
    paged = cuda.packed_attention(q, *pool, q_starts, lens, most, 0.25, pages=pages, **options)
    assert_same_bits(paged, in_a_line)

    for i, (q_row, k_row, v_row) in enumerate(rows):
        line = (x.transpose(0, 1)[None] for x in (q_row, k_row, v_row))
        out, lse = cuda.attention(*line, None, True, 0.25, **options)
        here = slice(q_starts[i], q_starts[i + 1])
        mine = out[0].transpose(0, 1)[-len(last[i]) :], lse[0, :, -len(last[i]) :]
        assert_same_bits((in_a_line[0][here], in_a_line[1][:, here]), mine)


# --- index_add -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(6, 40, 30), (70, 1, 200), (3, 1500, 9), (200, 3, 50)])
def test_index_add_adds_in_the_order_of_the_sources(dtype, sizes):
    R, C, n = sizes
    x, source, index = randn(R, C, dtype=dtype), randn(n, C, dtype=dtype), torch.randint(0, R, (n,))
    index[: n // 2] = 1
    got = cuda.index_add(x, index, source, 0.3)
    assert_near(got, reference.index_add(x, index, source, 0.3), dtype)
    if dtype == torch.float32:
        want = x.clone()
        for i, row in enumerate(index.tolist()):
            want[row] = want[row] + torch.tensor(0.3) * source[i]
        assert_same_bits(got, want)
        for x_view, source_view in zip(layouts(x), layouts(source), strict=True):
            assert_same_bits(cuda.index_add(x_view, index, source_view, 0.3), got)
        assert_same_bits(cuda.index_add(fenced(x), fenced(index), fenced(source), 0.3), got)


@pytest.mark.parametrize("sizes", [(0, 3, 0), (3, 0, 2), (3, 4, 0)])
def test_index_add_of_nothing(sizes):
    R, C, n = sizes
    x, source, index = torch.ones(R, C), torch.ones(n, C), torch.zeros(n, dtype=torch.int64)
    assert_same_bits(cuda.index_add(x, index, source, 1.0), reference.index_add(x, index, source, 1.0))


def test_index_add_nan_stays_in_its_row():
    x, source, index = torch.zeros(5, 3), torch.ones(4, 3), torch.tensor([1, 2, 2, 4])
    source[1] = torch.nan
    assert cuda.index_add(x, index, source, 1.0).isnan().any(-1).tolist() == [False, False, True, False, False]


# --- aten's functions, by plans ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def on_a_gpu():
    """aten's functions take the kernels for CUDA."""
    plans.forget_plans()
    with mock.patch.object(common, "kernels_of_device", lambda device: cuda):
        yield
    plans.forget_plans()


@pytest.fixture
def gpu():
    with on_a_gpu():
        yield


def views_of(x):
    """Of one shape, and each with strides or an alignment of its own: a plan for one must not serve another."""
    yield x
    yield from layouts(x) if x.dim() > 1 else ()
    if x.dim() > 2:
        yield x.transpose(0, 1).contiguous().transpose(0, 1)
        yield x.movedim(-1, 0).contiguous().movedim(0, -1)


def as_rows(x, dims):
    kept = [d for d in range(x.dim()) if d not in dims]
    return x.permute(kept + dims).reshape(-1, math.prod(x.shape[d] for d in dims)).contiguous()


REDUCTIONS = {
    "sum.dim_IntList": lambda x: cuda.row_sum(x, x.dtype),
    "mean.dim": lambda x: cuda.row_mean(x, x.dtype),
    "var.correction": lambda x: cuda.row_var_mean(x, 1.0, x.dtype)[0],
    "var_mean.correction": lambda x: cuda.row_var_mean(x, 1.0, x.dtype),
    "logsumexp": lambda x: cuda.row_logsumexp(x, x.dtype),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_planned_reductions_have_the_bits_of_the_kernel_whatever_the_strides(name, gpu):
    x = randn(2, 3, 5, dtype=torch.bfloat16)
    for dims in ([2], [1], [0, 2], [0, 1, 2]):
        want = as_tuple(REDUCTIONS[name](as_rows(x, dims)))
        for view, keepdim in zip(views_of(x), itertools.cycle((False, True))):
            got = as_tuple(table.BACKEND_KERNELS[name](view, dims, keepdim=keepdim))
            assert_same_bits(tuple(y.flatten() for y in got), want)
            assert all(y.shape == x.sum(dims, keepdim).shape and y.is_contiguous() for y in got)


@pytest.mark.parametrize("shape", [(5, 7), (7,), (), (2, 3, 4), (3, 0), (0, 4)])
def test_planned_softmax_has_the_bits_of_the_kernel_along_any_dim(shape, gpu):
    x = randn(*shape, dtype=torch.bfloat16)
    for dim in range(-1, x.dim()):
        moved = x.movedim(dim, -1) if x.dim() else x.view(1)
        want = cuda.row_softmax(moved.reshape(moved.shape[:-1].numel(), moved.shape[-1]), False, x.dtype)
        want = want.view(moved.shape).movedim(-1, dim).reshape(shape)
        for view in views_of(x):
            got = table.BACKEND_KERNELS["_softmax"](view, dim, False)
            assert_same_bits(got, want)
            assert got.is_contiguous()


@pytest.mark.parametrize("n_dims", [1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_planned_norms_have_the_bits_of_the_kernel_whatever_the_strides(n_dims, dtype, gpu):
    x, shape = randn(2, 2, 12, dtype=dtype), (2, 12)[-n_dims:]
    rows, statistics = x.view(-1, math.prod(shape)), (*x.shape[:-n_dims], *[1] * n_dims)
    for weight in (None, *views_of(randn(*shape, dtype=dtype))):
        flat = None if weight is None else weight.flatten()
        want_rms, want = cuda.row_rms_norm(rows, flat, 1e-3), cuda.row_layer_norm(rows, flat, flat, 1e-3)
        for view in views_of(x):
            y, rstd = table.BACKEND_KERNELS["_fused_rms_norm"](view, shape, weight, 1e-3)
            assert_same_bits((y.view(rows.shape), rstd.flatten()), want_rms)
            assert rstd.shape == statistics
            assert_same_bits(table.PLANNED["rms_norm"](view, shape, weight, 1e-3), y)
            y, mean, rstd = table.BACKEND_KERNELS["native_layer_norm"](view, shape, weight, weight, 1e-3)
            assert_same_bits(y.view(rows.shape), want[0])
            assert_same_bits((mean.flatten(), rstd.flatten()), tuple(z.to(mean.dtype) for z in want[1:]))
            assert mean.shape == rstd.shape == statistics
            assert_same_bits(table.PLANNED["layer_norm"](view, shape, weight, weight, 1e-3), y)


@pytest.mark.parametrize("shape", [(5, 37), (37,), (2, 3, 37), (0, 37)])
def test_planned_linear_has_the_bits_of_the_product_whatever_the_strides(shape, gpu):
    x, weight = randn(*shape, dtype=torch.float32), randn(18, 37, dtype=torch.float32)
    rows = x.view(-1, 37)
    for bias in (None, randn(18, dtype=x.dtype), randn(36, dtype=x.dtype)[::2], randn(1, dtype=x.dtype)):
        want = cuda.gemm(rows, weight.t(), None if bias is None else bias.expand(len(rows), 18))
        for x_view, weight_view in zip(views_of(x), itertools.cycle(views_of(weight))):
            got = table.PLANNED["linear"](x_view, weight_view, bias)
            assert_same_bits(got.reshape(-1, 18), want)
            assert got.shape == (*shape[:-1], 18)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_planned_attention_has_the_bits_of_the_kernel_whatever_the_strides(dtype, gpu):
    q, k, v = qkv(2, 4, 2, 3, 20, 16, 16, dtype)
    seen = torch.rand(2, 4, 3, 20) < 0.7
    sdpa = table.PLANNED["scaled_dot_product_attention"]
    for mask in (None, seen[0, 0], seen.mT.contiguous().mT, torch.where(seen, 0.5, -2.0).to(dtype)):
        full = None if mask is None else mask.expand(2, 4, 3, 20)
        want, _ = cuda.attention(q, k, v, full, False, 0.25)
        for operands in zip(views_of(q), views_of(k), views_of(v), strict=True):
            assert_same_bits(sdpa(*operands, mask, enable_gqa=True), want)
    assert_same_bits(sdpa(q, k, v, None, 0.0, True, enable_gqa=True), cuda.attention(q, k, v, None, True, 0.25)[0])
    three = sdpa(q[0], *(x[0].repeat_interleave(2, 0) for x in (k, v)), seen[0])
    assert_same_bits(three[None], cuda.attention(q[:1], k[:1], v[:1], seen[:1], False, 0.25)[0])


X, W, V = (torch.randn(shape, generator=torch.Generator().manual_seed(7)) for shape in ((3, 5, 16), (6, 16), (16,)))
QKV = torch.randn(3, 2, 4, 7, 16, generator=torch.Generator().manual_seed(8))
SEEN = torch.arange(7) < 5
PLANNED_CALLS = {
    "linear": (table.PLANNED["linear"], F.linear, (X, W, V[:6]), {}),
    "layer_norm": (table.PLANNED["layer_norm"], F.layer_norm, (X, [16], V, V.cos(), 0.5), {}),
    "native_layer_norm": (table.BACKEND_KERNELS["native_layer_norm"], torch.native_layer_norm, (X, [16], V, V.cos(), 0.5), {}),
    "rms_norm": (table.PLANNED["rms_norm"], F.rms_norm, (X, [16], V, 0.5), {}),
    "softmax": (table.BACKEND_KERNELS["_softmax"], torch._softmax, (X, -1, False), {}),
    "log_softmax": (table.BACKEND_KERNELS["_log_softmax"], torch._log_softmax, (X, -1, False), {}),
    "sum": (table.BACKEND_KERNELS["sum.dim_IntList"], torch.sum, (X, [-1], True), {}),
    "mean": (table.BACKEND_KERNELS["mean.dim"], torch.mean, (X, [-1], False), {}),
    "attention": (
        table.PLANNED["scaled_dot_product_attention"],
        F.scaled_dot_product_attention,
        (*QKV, SEEN.expand(1, 1, 7, 7), 0.0, False),
        {"scale": 0.5},
    ),
    "attention, causal": (
        table.PLANNED["scaled_dot_product_attention"],
        F.scaled_dot_product_attention,
        (QKV[0], *QKV[1:, :, :2], None, 0.0, True),
        {"enable_gqa": True},
    ),
}


@pytest.mark.parametrize("name", PLANNED_CALLS)
def test_planned_calls_get_torchs_arguments(name, gpu):
    ours, torchs, args, kwargs = PLANNED_CALLS[name]
    assert_near(ours(*args, **kwargs), torchs(*args, **kwargs), torch.float32)


@triton.jit
def _number_kernel(out_ptr, number: tl.float64):
    tl.store(out_ptr, tl.full([], number, tl.float32))


def test_planned_products_tell_zero_from_minus_zero(gpu):
    """The two are equal, so a plan must not remember a factor."""
    _number_kernel[(1,)](out := torch.ones(1), -0.0)
    if not out.signbit():
        pytest.skip("Triton's interpreter up to 3.7 makes 0.0 of the number -0.0; a GPU gets it as an argument")
    a, b, nothing = torch.ones(2, 3), torch.ones(3, 2), torch.full((2,), -0.0)
    for alpha in (0.0, -0.0):
        got = table.BACKEND_KERNELS["addmm"](nothing, a, b, alpha=alpha)
        assert torch.equal(got.signbit(), torch.full((2, 2), alpha == 0 and math.copysign(1, alpha) < 0))


BAD_CALLS = {
    "linear": (table.PLANNED["linear"], (X, W[:, :9]), "shapes cannot be multiplied"),
    "mm": (table.BACKEND_KERNELS["mm"], (W, W), "mm: shapes cannot be multiplied"),
    "addmm": (table.BACKEND_KERNELS["addmm"], (V.double(), W, W.t()), "expected a bias in torch.float32"),
    "sum": (table.BACKEND_KERNELS["sum.dim_IntList"], (X, [0, 0]), "appears multiple times"),
    "rms_norm": (table.PLANNED["rms_norm"], (X, [15]), "normalized_shape"),
    "attention": (table.PLANNED["scaled_dot_product_attention"], (*QKV[:2], QKV[2, ..., :3, :]), "do not fit together"),
}


@pytest.mark.parametrize("name", BAD_CALLS)
def test_a_bad_call_is_refused_each_time(name, gpu):
    call, args, words = BAD_CALLS[name]
    for _ in range(2):
        with pytest.raises(RuntimeError, match=words):
            call(*args)
