"""The Triton kernels against ``kernels/reference.py``, on the CPU, in Triton's interpreter.

The interpreter must be chosen before a kernel is defined, so the checks (``check_*``) run in a process of their own;
the tests (``test_*``) start it. To run the checks directly:
``TRITON_INTERPRET=1 python -P -m pytest -p no:batchinv -o python_functions='check_*' tests/kernels/test_triton.py``

The interpreter's own ``tl.dot`` leaves the order of sums to numpy. Here it is replaced by the chain the GPU was
measured to compute: K ascending, one product after the other. So the checks of bits see every order that a kernel
itself chooses.
"""

import ctypes
import inspect
import math
import mmap
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from pytest_batchinv.kernels import cuda, launch, matmul, reference, tiles, usual
from pytest_batchinv.kernels.aten import attention as aten_attention
from pytest_batchinv.kernels.aten import norms, products, reductions
from pytest_batchinv.kernels.cuda.attention import merge as attention_merge
from pytest_batchinv.kernels.cuda.attention import plan as attention_plan
from torch.nn import functional as F
from triton.backends.nvidia import driver as nvidia_driver
from triton.runtime import _allocation as allocation
from triton.runtime import driver

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Relative to the largest value: fp32 sums of some hundred terms, one rounding of the result. The interpreter cuts bf16
# off where the GPU rounds, and attention rounds its weights to 16 bits too.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("group", ["gemm", "row", "attention", "index_add", "usual"])
def test_checks_pass_in_the_interpreter(group, pytestconfig):
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:batchinv", "-p", "no:cacheprovider"]
    command += ["-o", "python_functions=check_*", "-k", f"check_{group} or check_grouped_{group}", __file__]
    run = subprocess.run(
        command,
        cwd=pytestconfig.rootpath,
        env={**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("name", cuda.__all__)
def test_launchers_have_the_signatures_of_the_reference(name):
    assert inspect.signature(getattr(cuda, name)) == inspect.signature(getattr(reference, name))


def test_the_kernel_set_is_complete():
    functions = {name for name, _ in inspect.getmembers(reference, inspect.isfunction)}
    assert set(cuda.__all__) == functions - {"accumulator_dtype"}


@pytest.mark.parametrize("scratch", [(0, 0), (16, 0), (0, 16)])
def test_a_launch_hands_over_what_tritons_own_launcher_does(scratch, monkeypatch):
    """Whichever way it takes: compared where Triton leaves Python. Needs no GPU."""
    launcher = object.__new__(nvidia_driver.CudaLauncher)
    handed = []
    of_triton = {"num_ctas": 1, "gsan_enabled": False, "arg_annotations": (), "kernel_signature": b""}
    of_kernel = {"launch_cooperative_grid": False, "launch_pdl": True, "global_scratch_align": 1, "profile_scratch_align": 1}
    vars(launcher).update(of_triton, **of_kernel, launch=lambda *args: handed.append(args))
    launcher.global_scratch_size, launcher.profile_scratch_size = scratch
    memory = SimpleNamespace(get=lambda: lambda size, align, stream: ("memory", size))
    monkeypatch.setattr(allocation, "_allocator", memory)
    monkeypatch.setattr(allocation, "_profile_allocator", memory)
    monkeypatch.setattr(allocation, "has_profile_allocator", lambda: True, raising=False)
    monkeypatch.setattr(driver, "_active", SimpleNamespace())
    binary = SimpleNamespace(run=launcher, function=11, packed_metadata=("packed",))
    run, before = launch._entry(binary)
    run(7, 2, 1, 99, *before, 1234, 5.0)
    launcher(7, 2, 1, 99, binary.function, binary.packed_metadata, None, None, None, 1234, 5.0)
    assert len(handed) == 2
    assert handed[0] == handed[1]


# --- what the checks share -------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def no_plans_of_others():
    launch.forget_plans()


@pytest.fixture(autouse=True)
def k_ascending_dot(monkeypatch):
    from triton.runtime import interpreter

    def wide(handle, dtype):
        if handle.data.dtype == np.uint16:  # bfloat16: the upper half of a float32
            return (handle.data.astype(np.uint32) << 16).view(np.float32).astype(dtype)
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
    return torch.randn(*shape, dtype=torch.float64).to(dtype)


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
    """The same values, contiguous, right in front of a page that ends the process of who reads it."""
    size = x.numel() * x.element_size()
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = mmap.mmap(-1, pages + mmap.PAGESIZE)
    fence = ctypes.addressof(ctypes.c_char.from_buffer(memory)) + pages
    assert ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(fence), mmap.PAGESIZE, 0) == 0, ctypes.get_errno()
    return torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=pages - size).view(x.shape).copy_(x)


# --- products --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 5, 33, 70), (1, 40, 65, 64), (3, 17, 2, 130)])
def check_gemm_is_near_the_reference(dtype, shape):
    B, M, N, K = shape
    a, b = randn(B, M, K, dtype=dtype) / K**0.5, randn(B, K, N, dtype=dtype)
    assert_near(cuda.gemm(a, b), reference.gemm(a, b), dtype)
    for bias in (randn(B, M, N, dtype=dtype), randn(N, dtype=dtype).expand(B, M, N)):
        assert_near(cuda.gemm(a, b, bias, 0.5, -2.0), reference.gemm(a, b, bias, 0.5, -2.0), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def check_gemm_alone_has_the_bits_of_one_that_is_scaled_by_one(dtype):
    a, b = randn(1, 20, 65, dtype=dtype), randn(1, 65, 70, dtype=dtype)
    a[0, 4, 5], b[0, 5, 6], a[0, 5] = torch.inf, 1.0, -0.0
    plain, scaled = cuda.gemm(a, b), cuda.gemm(a, b, torch.full((70,), -0.0).to(dtype).expand(1, 20, 70))
    assert_same_bits(plain, scaled)
    assert_same_bits(cuda.gemm(a, b, None, 2.0), cuda.gemm(2 * a, b))
    assert cuda.gemm(a * torch.nan, b).isnan().all()


def check_gemm_bias_with_beta_zero_is_not_read():
    a, b = randn(1, 3, 4, dtype=torch.float32), randn(1, 4, 5, dtype=torch.float32)
    assert_same_bits(cuda.gemm(a, b, torch.full((1, 3, 5), torch.nan), 1.0, 0.0), cuda.gemm(a, b))


@pytest.mark.parametrize("dtype", DTYPES)
def check_gemm_rows_alone_and_in_a_batch(dtype):
    a, b = randn(1, 70, 150, dtype=dtype), randn(1, 150, 40, dtype=dtype)
    bias = randn(1, 70, 40, dtype=dtype)
    whole = cuda.gemm(a, b, bias, 0.3, 0.7)
    for rows in ([69], [3, 2, 1], list(range(69, 40, -1))):
        assert_same_bits(cuda.gemm(a[:, rows], b, bias[:, rows], 0.3, 0.7), whole[:, rows])
    twice = cuda.gemm(a.repeat(3, 1, 1), b.expand(3, -1, -1), bias.expand(3, -1, -1), 0.3, 0.7)
    assert_same_bits(twice[2:], whole)


@pytest.mark.parametrize("dtype", DTYPES)
def check_gemm_tiles_are_one_class(dtype, monkeypatch):
    a, b = randn(1, 20, 150, dtype=dtype), randn(1, 150, 40, dtype=dtype)
    want = cuda.gemm(a, b)
    for tile in tiles.GEMM_TILES[dtype]:
        replace(monkeypatch, matmul, "gemm_tile", lambda *args, tile=tile: tile)
        assert_same_bits(cuda.gemm(a, b), want)


@pytest.mark.parametrize("shape", [(8, 192, 32), (70, 200, 72), (130, 520, 40)])
@pytest.mark.parametrize("is_transposed", [False, True])
@pytest.mark.parametrize("multiprocessors", [2, 100], ids=["several tiles a program", "one tile a program"])
def check_gemm_with_descriptors_is_of_the_same_class(shape, is_transposed, multiprocessors, monkeypatch):
    """On tiles of one block, of two stores, and of two blocks side by side; inside the edges and over them."""
    M, N, K = shape
    monkeypatch.setattr(tiles, "device_of", lambda device: tiles.Device(multiprocessors, 1 << 20))
    a, b, bias = (randn(*s, dtype=torch.bfloat16) for s in ((1, M, K + 8), (1, K + 8, N + 8), (1, M, N)))
    b = b.mT.contiguous().mT if is_transposed else b
    a, b = a[..., :K], b[:, :K, :N]  # rows that are wider in memory
    want, sizes = cuda.gemm(a, b, bias, 0.5, 3.0), matmul.Sizes.of(a.shape, a.stride(), b.shape, b.stride(), bias.stride())
    assert sizes.fit_tma()
    alone = cuda.gemm(a, b)
    grids, launch = [], matmul._launch
    monkeypatch.setattr(matmul, "_launch", lambda kernel, grid, *args: grids.append(grid) or launch(kernel, grid, *args))
    for block_n in (64, 128, 192, 256):
        tile = tiles.Tile(64, block_n, 32, 4, 2, True)
        out = torch.full_like(want, torch.nan)
        matmul.product(sizes, a.dtype, a.device, tile)(a, b, bias, out, 0.5, 3.0)
        assert_same_bits(out, want)
        matmul.product(sizes._replace(bias=None), a.dtype, a.device, tile)(a, b, None, out, 1.0, 1.0)
        assert_same_bits(out, alone)
        blocks = tiles.ceil_div(M, 64), tiles.ceil_div(N, block_n)
        assert grids[-1] == ((*blocks, 1) if math.prod(blocks) <= multiprocessors else (multiprocessors, 1, 1))


@pytest.mark.parametrize("shape", [(5, 70, 64), (33, 32, 65), (16, 1, 1), (20, 33, 130)])
def check_gemm_reads_nothing_behind_its_operands(shape):
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
def check_gemm_of_any_grid_has_the_same_bits(dtype, monkeypatch):
    """Longer than the axes of a grid may be, which only batches of many thousand matrices are; and tall ones."""
    a, b, bias = randn(3, 300, 40, dtype=dtype), randn(3, 40, 70, dtype=dtype), randn(70, dtype=dtype).expand(3, 300, 70)
    grids, launch = [], matmul._launch
    monkeypatch.setattr(matmul, "_launch", lambda kernel, grid, *args: grids.append(grid) or launch(kernel, grid, *args))
    replace(monkeypatch, matmul, "gemm_tile", lambda *args: tiles.Tile(32, 32, 32, 4, 2))
    few = [cuda.gemm(a[:, rows : rows + 60], b, bias[:, :60]) for rows in range(0, 300, 60)]
    assert_same_bits(cuda.gemm(a, b, bias), torch.cat(few, dim=1))
    assert matmul.LONGEST_AXIS == 65_535
    replace(monkeypatch, matmul, "LONGEST_AXIS", 2)
    for batch, N in ((3, 70), (1, 70), (3, 30), (1, 30)):
        got = cuda.gemm(a[:batch, :60], b[:batch, :, :N], bias[:batch, :60, :N])
        assert_same_bits(got, few[0][:batch, :, :N].contiguous())
    assert {*grids} == {(2, 3, 3), (90, 1, 1), (18, 1, 1), (6, 1, 1), (2, 1, 1)}


@pytest.mark.parametrize(("M", "N", "K", "batch"), [(1900, 5, 7, 1), (3, 1100, 7, 2), (5, 40, 700, 1), (17, 20, 7, 250)])
def check_gemm_of_what_int32_cannot_count_has_the_same_bits(M, N, K, batch, monkeypatch):
    a, b, bias = (randn(*s, dtype=torch.float32) for s in ((batch, M, K), (batch, K, N), (batch, M, N)))
    want = cuda.gemm(a, b, bias, 0.5, 2.0)
    want_of_rows = cuda.gemm(a.view(1, -1, K), b[:1])
    replace(monkeypatch, matmul, "INT32_END", 1000)
    launched, product = [], matmul.product
    monkeypatch.setattr(matmul, "product", lambda sizes, *args: launched.append(sizes) or product(sizes, *args))
    assert_same_bits(cuda.gemm(a, b, bias, 0.5, 2.0), want)
    assert_same_bits(usual.linear(a, b[0].mT, None).view(want_of_rows.shape), want_of_rows)
    assert launched and not any(sizes.are_long() for sizes in launched)
    if max(M, N, K) > 488:
        with pytest.raises(ValueError, match="fewer than 488 rows"):
            cuda.grouped_gemm(a[0], b, torch.full((batch,), M, dtype=torch.int32))


def check_gemm_block_k_does_not_follow_m():
    for dtype, table in tiles.GEMM_TILES.items():
        assert len({tile.block_k for tile in table}) == 1, dtype


def check_gemm_strides_change_no_bit():
    a, b = randn(2, 5, 70, dtype=torch.float32), randn(2, 70, 33, dtype=torch.float32)
    want = cuda.gemm(a, b)
    for a_view, b_view in zip(layouts(a), layouts(b), strict=True):
        assert_same_bits(cuda.gemm(a_view, b_view), want)
    row = a[:, :1].expand(-1, 5, -1)
    assert_same_bits(cuda.gemm(row, b), want[:, :1].expand(-1, 5, -1).contiguous())


@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (1, 0, 3, 4), (1, 2, 0, 4), (2, 2, 3, 0)])
def check_gemm_of_nothing(shape):
    B, M, N, K = shape
    a, b, bias = torch.ones(B, M, K), torch.ones(B, K, N), torch.ones(B, M, N)
    assert_same_bits(cuda.gemm(a, b, bias, 1.0, 3.0), reference.gemm(a, b, bias, 1.0, 3.0))


def check_gemm_nan_stays_in_its_row():
    a, b = randn(1, 20, 70, dtype=torch.float32), randn(1, 70, 33, dtype=torch.float32)
    want = cuda.gemm(a, b)
    a[0, 7, 3] = torch.nan
    got = cuda.gemm(a, b)
    assert got[0, 7].isnan().all()
    others = [row for row in range(20) if row != 7]
    assert_same_bits(got[:, others], want[:, others])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ends", [[3, 3, 20, 37], [0, 0, 0, 0], [0, 45, 45, 45], [16, 32, 40, 45]])
def check_grouped_gemm_is_gemm_of_each_group(dtype, ends):
    a, b = randn(45, 70, dtype=dtype) / 8, randn(4, 70, 33, dtype=dtype)
    offs = torch.tensor(ends, dtype=torch.int32)
    got = cuda.grouped_gemm(a, b, offs)
    assert_near(got, reference.grouped_gemm(a, b, offs), dtype)
    start = 0
    for group, end in enumerate(ends):
        assert_same_bits(got[start:end], cuda.gemm(a[None, start:end], b[None, group])[0])
        start = end
    assert (got[start:] == 0).all()


def check_grouped_gemm_of_nothing():
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
def check_row_functions_are_near_the_reference(call, dtype, n_cols):
    x, w = randn(3, n_cols, dtype=dtype), randn(2, n_cols, dtype=dtype)
    assert_near(call(cuda, x, w), call(reference, x, w), dtype)


@each_row_function
@pytest.mark.parametrize("n_cols", [100, 4500])
def check_row_functions_do_not_see_other_rows(call, n_cols):
    x, w = randn(19, n_cols, dtype=torch.float32), randn(2, n_cols, dtype=torch.float32)
    whole = as_tuple(call(cuda, x, w))
    for rows in ([18], [4, 3, 17], list(range(16))):
        assert_same_bits(call(cuda, x[rows], w), tuple(out[rows] for out in whole))
    x[2] = torch.nan
    others = [row for row in range(19) if row != 2]
    assert_same_bits(tuple(out[others] for out in as_tuple(call(cuda, x, w))), tuple(out[others] for out in whole))


@each_row_function
def check_row_functions_do_not_see_strides(call):
    x, w = randn(3, 300, dtype=torch.float32), randn(2, 300, dtype=torch.float32)
    want = call(cuda, x, w)
    for x_view, w_view in zip(layouts(x), layouts(w), strict=True):
        assert_same_bits(call(cuda, x_view, w_view), want)
    first = tuple(out[:1].expand(3, *out.shape[1:]).contiguous() for out in as_tuple(want))
    assert_same_bits(call(cuda, x[:1].expand(3, -1), w), first)


@each_row_function
@pytest.mark.parametrize("n_cols", [1, 129, 4500])
def check_row_functions_read_nothing_behind_their_operands(call, n_cols):
    x, w = randn(3, n_cols, dtype=torch.float32), randn(2, n_cols, dtype=torch.float32)
    assert_same_bits(call(cuda, fenced(x), fenced(w)), call(cuda, x, w))
    assert_same_bits(call(cuda, fenced(x.T).T, fenced(w.T).T), call(cuda, x, w))


@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("n_cols", [3, 100, 128, 700, 4096])
def check_row_softmax_does_not_see_masked_columns_behind(log, n_cols):
    x = randn(3, n_cols, dtype=torch.float32)
    want, want_lse = cuda.row_softmax(x, log, x.dtype), cuda.row_logsumexp(x, x.dtype)
    for width in (n_cols + 1, 129, 255, 1024, 1500, 5000, 9000):
        if width > n_cols:
            padded = torch.nn.functional.pad(x, (0, width - n_cols), value=-torch.inf)
            assert_same_bits(cuda.row_softmax(padded, log, x.dtype)[:, :n_cols], want)
            assert_same_bits(cuda.row_logsumexp(padded, x.dtype), want_lse)


@pytest.mark.parametrize("n_cols", [3, 100, 700, 4096])
def check_row_sums_do_not_see_zeros_behind(n_cols):
    x = randn(3, n_cols, dtype=torch.float32)
    for width in (n_cols + 1, 129, 1500, 5000, 9000):
        padded = torch.nn.functional.pad(x, (0, max(0, width - n_cols)))
        assert_same_bits(cuda.row_sum(padded, x.dtype), cuda.row_sum(x, x.dtype))
        assert_same_bits(cuda.row_norm(padded, 2, x.dtype), cuda.row_norm(x, 2, x.dtype))


def check_row_cumsum_does_not_see_columns_behind():
    x = randn(2, 2500, dtype=torch.float32)
    whole = cuda.row_cumsum(x, x.dtype)
    for n_cols in (1, 16, 1000, 1024, 1025, 2400):
        assert_same_bits(cuda.row_cumsum(x[:, :n_cols], x.dtype), whole[:, :n_cols])


def check_row_functions_of_infinities():
    x = randn(4, 50, dtype=torch.float32)
    x[0] = -torch.inf
    x[1, 3] = torch.inf
    x[2, :20] = -torch.inf
    for call in (ROW_FUNCTIONS["row_softmax"], ROW_FUNCTIONS["row_log_softmax"], ROW_FUNCTIONS["row_logsumexp"]):
        assert_near(call(cuda, x, None), call(reference, x, None), torch.float32)


@each_row_function
@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def check_row_functions_of_nothing(call, shape):
    x, w = torch.ones(shape), torch.ones(2, shape[1])
    assert_near(call(cuda, x, w), call(reference, x, w), torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def check_row_functions_take_and_give_wider_dtypes(dtype):
    x, w = randn(3, 300, dtype=dtype), randn(2, 300, dtype=torch.float32)
    for out_dtype in (torch.float32, torch.float64):
        assert_near(cuda.row_sum(x, out_dtype), reference.row_sum(x, out_dtype), torch.float32)
        assert_near(cuda.row_softmax(x, True, out_dtype), reference.row_softmax(x, True, out_dtype), torch.float32)
    assert_near(cuda.row_layer_norm(x, *w, 1e-5), reference.row_layer_norm(x, *w, 1e-5), dtype)
    assert_near(cuda.row_rms_norm(x, w[0], 1e-5), reference.row_rms_norm(x, w[0], 1e-5), dtype)


def check_row_scalars_keep_their_precision():
    x = randn(3, 30, dtype=torch.float64)
    assert_near(cuda.row_var_mean(x, 0.1, x.dtype), reference.row_var_mean(x, 0.1, x.dtype), torch.float64)
    assert_near(cuda.row_rms_norm(x * 1e-3, None, 1e-5), reference.row_rms_norm(x * 1e-3, None, 1e-5), torch.float64)


def replace(monkeypatch, module, name, value):
    """Plans made with what was there before are forgotten."""
    monkeypatch.setattr(module, name, value)
    launch.forget_plans()


# --- attention -------------------------------------------------------------------------------------------------------


def qkv(B, H, Hkv, Sq, Skv, D, DV, dtype):
    return (
        randn(B, H, Sq, D, dtype=dtype),
        randn(B, Hkv, Skv, D, dtype=dtype),
        randn(B, Hkv, Skv, DV, dtype=dtype),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(2, 4, 2, 5, 70, 20, 24), (1, 2, 2, 40, 40, 64, 64), (1, 3, 1, 1, 100, 130, 16)])
@pytest.mark.parametrize("kind", ["none", "causal", "bool", "bool_causal", "additive", "lowest"])
def check_attention_is_near_the_reference(dtype, sizes, kind):
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
def check_attention_does_not_see_padding(dtype, additive, pad):
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


@pytest.mark.parametrize("sizes", [(2, 4, 2, 5, 70, 20, 24), (1, 2, 2, 40, 40, 64, 64), (1, 3, 1, 1, 300, 130, 16)])
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def check_attention_reads_nothing_behind_its_operands(sizes, kind):
    q, k, v = qkv(*sizes, torch.float32)
    B, H, _, Sq, Skv = sizes[:5]
    mask = {"none": None, "bool": torch.rand(B, H, Sq, Skv) > 0.4, "additive": randn(B, H, Sq, Skv, dtype=q.dtype)}[kind]
    want = cuda.attention(q, k, v, mask, kind == "none", 0.2)
    for turned in (lambda x: x, lambda x: x.transpose(1, 2), lambda x: x.mT):
        operands = [None if x is None else turned(fenced(turned(x))) for x in (q, k, v, mask)]
        assert_same_bits(cuda.attention(*operands, kind == "none", 0.2), want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def check_attention_decodes_as_it_prefills(dtype):
    q, k, v = qkv(1, 4, 2, 150, 150, 16, 16, dtype)
    out, lse = cuda.attention(q, k, v, None, True, 0.25)
    for i in (0, 1, 31, 32, 63, 64, 149):
        step = cuda.attention(q[:, :, i : i + 1], k[:, :, : i + 1], v[:, :, : i + 1], None, False, 0.25)
        assert_same_bits(step, (out[:, :, i : i + 1], lse[:, :, i : i + 1]))
        cache = torch.arange(150).expand(1, 4, 1, 150) <= i
        step = cuda.attention(q[:, :, i : i + 1], k, v, cache, False, 0.25)
        assert_same_bits(step, (out[:, :, i : i + 1], lse[:, :, i : i + 1]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def check_attention_tiles_are_one_class(dtype, monkeypatch):
    q, k, v = qkv(1, 4, 2, 40, 100, 16, 16, dtype)
    mask = (torch.rand(1, 1, 40, 100) > 0.3).expand(1, 4, 40, 100)
    chosen = tiles.attention_tile(dtype, 16, 40, torch.device("cpu"))
    want = cuda.attention(q, k, v, mask, False, 0.25)
    for block_m in (16, 32, 64, 128):
        tile = chosen._replace(block_m=block_m)
        replace(monkeypatch, attention_plan, "attention_tile", lambda *args, tile=tile, **_: tile)
        assert_same_bits(cuda.attention(q, k, v, mask, False, 0.25), want)
        each_head = mask.contiguous()  # a mask of its own for each head: heads are not packed into one tile
        assert_same_bits(cuda.attention(q, k, v, each_head, False, 0.25), want)


def check_attention_block_n_does_not_follow_the_queries():
    for dtype in DTYPES:
        for head_dim in (16, 64, 80, 128, 256):
            chosen = [tiles.attention_tile(dtype, head_dim, rows, torch.device("cpu")) for rows in (1, 40, 9999)]
            assert len({tile.block_n for tile in chosen}) == 1


@pytest.mark.parametrize("kind", ["keys", "queries"])
def check_attention_first_key_heeds_mask_and_causality(kind):
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


def check_attention_heads_with_masks_of_their_own():
    """Heads that share keys but not a mask: each counts its keys from its own first one."""
    q, k, v = qkv(1, 4, 2, 10, 100, 16, 16, torch.float32)
    mask = (torch.arange(100) >= torch.tensor([0, 5, 37, 70])[:, None])[None, :, None].expand(1, 4, 10, 100)
    whole = cuda.attention(q, k, v, mask, False, 0.25)
    for head in range(4):
        one, keys = slice(head, head + 1), slice(head // 2, head // 2 + 1)
        alone = cuda.attention(q[:, one], k[:, keys], v[:, keys], mask[:, one], False, 0.25)
        assert_same_bits(alone, tuple(x[:, one] for x in whole))


def check_attention_rows_strides_and_nan():
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
def check_attention_of_nothing(sizes, masked):
    B, H, _, Sq, Skv = sizes
    q, k, v = qkv(*sizes, 8, 8, torch.float32)
    mask = torch.ones(B, H, Sq, Skv, dtype=torch.bool) if masked else None
    out, lse = cuda.attention(q, k, v, mask, False, 1.0)
    assert out.shape == q.shape and (out == 0).all() and (lse == -torch.inf).all() and lse.shape == q.shape[:3]


OPTIONS = [{}, {"window": 9}, {"soft_cap": 2.0}, {"sinks": True}, {"window": 70, "soft_cap": 3.0, "sinks": True}]


def with_sinks(options, n_heads, dtype):
    return {**options, "sinks": randn(n_heads, dtype=dtype)} if options.get("sinks") is True else options


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", OPTIONS)
def check_attention_options_are_near_the_reference(dtype, options, monkeypatch):
    options = with_sinks(options, 4, dtype)
    for Sq, offset in ((80, 0), (1, 79), (5, 70)):
        q, k, v = qkv(1, 4, 2, Sq, 80, 20, 24, dtype)
        got = cuda.attention(q, k, v, None, True, 0.25, causal_offset=offset, **options)
        assert_near(got, reference.attention(q, k, v, None, True, 0.25, causal_offset=offset, **options), dtype)


@pytest.mark.parametrize("options", OPTIONS)
def check_attention_in_chunks_and_step_by_step_is_attention_as_a_whole(options, monkeypatch):
    """Few queries get a grid over the keys, many do not: the same order, so the same bits. 256 keys are a chunk."""
    options = with_sinks(options, 4, torch.float32)
    q, k, v = qkv(1, 4, 2, 300, 300, 16, 16, torch.float32)
    out, lse = cuda.attention(q, k, v, None, True, 0.25, **options)
    for start, stop in ((0, 1), (31, 32), (32, 33), (150, 157), (255, 257), (256, 257), (299, 300), (200, 300)):
        seen = tuple(x[:, :, :stop] for x in (k, v))
        chunk = cuda.attention(q[:, :, start:stop], *seen, None, True, 0.25, causal_offset=start, **options)
        assert_same_bits(chunk, (out[:, :, start:stop], lse[:, :, start:stop]))


DIVISIONS = [(1, 1), (1, 3), (8, 1), (8, 2)]
"""Blocks of a split, and splits of a program."""


def divided(split_blocks, splits_per_program):
    def division(programs, n_key_blocks, multiprocessors):
        num_splits = -(-n_key_blocks // split_blocks) if split_blocks else 1
        return attention_plan.Splits(split_blocks, num_splits, splits_per_program)

    return division


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("mask", ["none", "holes", "left padding", "additive"])
def check_attention_does_not_depend_on_how_its_keys_are_divided(mask, options, monkeypatch):
    options = with_sinks(options, 4, torch.float32)
    q, k, v = qkv(2, 4, 2, 3, 330, 16, 16, torch.float32)
    masks = None if mask == "none" else torch.rand(2, 1, 3, 330) < 0.7
    if mask == "left padding":
        masks = (torch.arange(330) >= 37).expand(2, 1, 3, 330)
    elif mask == "additive":
        masks = torch.where(masks, 0.5, torch.finfo(torch.float32).min)
    masks = None if masks is None else masks.expand(2, 4, 3, 330)
    replace(monkeypatch, attention_plan, "num_splits_heuristic", lambda *_: attention_plan.Splits(0, 1, 1))
    want = cuda.attention(q, k, v, masks, False, 0.25, causal_offset=327, **options)
    for division in DIVISIONS:
        replace(monkeypatch, attention_plan, "num_splits_heuristic", divided(*division))
        assert_same_bits(cuda.attention(q, k, v, masks, False, 0.25, causal_offset=327, **options), want)


@pytest.mark.parametrize("division", [(0, 1), *DIVISIONS])
def check_attention_spreads_infinities_alike_however_its_keys_are_divided(division, monkeypatch):
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
def check_attention_of_queries_that_see_nothing_is_zero_however_its_keys_are_divided(division, mask, monkeypatch):
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


def check_attention_of_few_queries_gets_a_grid_over_the_keys(monkeypatch):
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
def check_attention_divides_all_of_the_keys_and_nothing_else(programs, n_key_blocks):
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
def check_attention_packed_and_paged_is_attention_of_each_row(options, queries, monkeypatch):
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
def check_index_add_adds_in_the_order_of_the_sources(dtype, sizes):
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
def check_index_add_of_nothing(sizes):
    R, C, n = sizes
    x, source, index = torch.ones(R, C), torch.ones(n, C), torch.zeros(n, dtype=torch.int64)
    assert_same_bits(cuda.index_add(x, index, source, 1.0), reference.index_add(x, index, source, 1.0))


def check_index_add_nan_stays_in_its_row():
    x, source, index = torch.zeros(5, 3), torch.ones(4, 3), torch.tensor([1, 2, 2, 4])
    source[1] = torch.nan
    assert cuda.index_add(x, index, source, 1.0).isnan().any(-1).tolist() == [False, False, True, False, False]


# --- calls that are planned whole ------------------------------------------------------------------------------------

CONTIGUOUS = [(5, 37), (1, 37), (2, 3, 37), (37,), (1, 1, 37)]
"""Usual shapes; below, views that are not usual."""


def unusual_views(x):
    yield from (x.T, x[:, ::2], x[:, :3], x[:0], x[0, 0], x[:, None].expand(-1, 2, -1), x.long(), x.to(torch.complex64))
    yield x[:1].as_strided((1, 37), (1000, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", CONTIGUOUS)
def check_usual_rows_are_those_of_the_kernels(shape, dtype):
    x = randn(3, *shape, dtype=dtype)[1]
    matrix = x.reshape(-1, 37)
    for log in (False, True):
        for out_dtype in (dtype, torch.float32):
            got = usual.softmax(x, x.dim() - 1, log, out_dtype)
            assert_same_bits(got.reshape(-1, 37), cuda.row_softmax(matrix, log, out_dtype))
            assert got.shape == shape
            assert got.is_contiguous()
    for weight in (None, randn(37, dtype=dtype), randn(74, dtype=torch.float32)[::2]):
        for eps in (None, 1e-3):
            given = torch.finfo(reference.accumulator_dtype(dtype)).eps if eps is None else eps
            got = usual.rms_norm(x, [37], weight, eps)
            assert_same_bits(got.reshape(-1, 37), cuda.row_rms_norm(matrix, weight, given)[0])
            assert got.shape == shape
    for weight, bias in ((None, None), (randn(37, dtype=dtype), None), (randn(74, dtype=dtype)[::2], randn(37, dtype=dtype))):
        got = usual.layer_norm(x, [37], weight, bias, 1e-3, True)
        want = cuda.row_layer_norm(matrix, weight, bias, 1e-3)
        assert_same_bits(tuple(y.flatten() for y in got), tuple(y.flatten() for y in want))
        assert [y.shape for y in got] == [shape, *[(*shape[:-1], 1)] * 2]
        alone, *statistics = usual.layer_norm(x, [37], weight, bias, 1e-3, False)
        assert_same_bits(alone, got[0])
        assert statistics == [None, None]
    for result, kernel in (("sum", cuda.row_sum), ("mean", cuda.row_mean)):
        for dim, keepdim in ((-1, False), ([x.dim() - 1], True)):
            got = usual.reduce(x, dim, keepdim, result)
            assert_same_bits(got.flatten(), kernel(matrix, dtype))
            assert got.shape == x.sum(dim, keepdim).shape
    for correction, keepdim in ((1.0, False), (0.0, True), (40.0, False)):
        got = usual.reduce(x, [-1], keepdim, "var", correction)
        assert_same_bits(got.flatten(), cuda.row_var_mean(matrix, correction, dtype)[0])
        assert got.shape == x.sum(-1, keepdim).shape


@pytest.mark.parametrize("shape", CONTIGUOUS)
def check_usual_linear_is_the_product(shape):
    dtype = torch.float32
    x = randn(3, *shape, dtype=dtype)[1]
    matrix, weight = x.reshape(-1, 37), randn(18, 37, dtype=dtype)
    for w in (weight, weight.mT.contiguous().mT, weight[::2], weight[:1]):
        for bias in (None, randn(len(w), dtype=dtype), randn(2 * len(w), dtype=dtype)[::2]):
            expanded = None if bias is None else bias.expand(len(matrix), len(w))
            got = usual.linear(x, w, bias)
            assert_same_bits(got.reshape(-1, len(w)), cuda.gemm(matrix, w.t(), expanded))
            assert got.shape == (*shape[:-1], len(w))


X, W, V = (torch.randn(shape, generator=torch.Generator().manual_seed(7)) for shape in ((3, 5, 16), (6, 16), (16,)))
QKV = torch.randn(3, 2, 4, 7, 16, generator=torch.Generator().manual_seed(8))
SEEN = torch.arange(7) < 5
USUAL_CALLS = {
    "linear": (products.linear, F.linear, (X, W, V[:6]), {}),
    "layer_norm": (norms.layer_norm, F.layer_norm, (X, [16], V, V.cos(), 0.5), {}),
    "native_layer_norm": (norms.native_layer_norm, torch.native_layer_norm, (X, [16], V, V.cos(), 0.5), {}),
    "rms_norm": (norms.rms_norm, F.rms_norm, (X, [16], V, 0.5), {}),
    "softmax": (reductions.softmax, torch._softmax, (X, -1, False), {}),
    "log_softmax": (reductions.log_softmax, torch._log_softmax, (X, -1, False), {}),
    "sum": (reductions.sum_dim, torch.sum, (X, [-1], True), {}),
    "mean": (reductions.mean_dim, torch.mean, (X, [-1], False), {}),
    "attention": (
        aten_attention.scaled_dot_product_attention,
        F.scaled_dot_product_attention,
        (*QKV, SEEN.expand(1, 1, 7, 7), 0.0, False),
        {"scale": 0.5},
    ),
    "attention, causal": (
        aten_attention.scaled_dot_product_attention,
        F.scaled_dot_product_attention,
        (QKV[0], *QKV[1:, :, :2], None, 0.0, True),
        {"enable_gqa": True},
    ),
}


@pytest.mark.parametrize("name", USUAL_CALLS)
def check_usual_calls_get_torchs_arguments(name, monkeypatch):
    ours, torchs, args, kwargs = USUAL_CALLS[name]
    results = []

    def as_on_a_gpu(name, *args):
        results.append(getattr(usual, name)(*args))
        return results[-1]

    for module in (aten_attention, norms, products, reductions):
        monkeypatch.setattr(module, "usual", as_on_a_gpu)
    straight = {"straight": True} if "straight" in inspect.signature(ours).parameters else {}
    got, want = ours(*args, **kwargs, **straight), torchs(*args, **kwargs)
    assert len(results) == 1 and results[0] is not None
    assert_near(got, want, torch.float32)


def check_usual_linear_leaves_what_is_not_usual_to_the_general_way():
    x, weight = randn(5, 37, dtype=torch.float32), randn(4, 37, dtype=torch.float32)
    assert usual.linear(x, weight, torch.ones(4)) is not None
    for view in unusual_views(x):
        assert usual.linear(view, weight, None) is None
    for other in (weight[0], weight[None], weight[:, :36], weight[:0], weight.double(), weight.to("meta")):
        assert usual.linear(x, other, None) is None
    for shape in ((), (1,), (3,), (1, 4)):
        assert usual.linear(x, weight, torch.ones(shape)) is None
    for bias in (torch.ones(4).double(), torch.ones(4, device="meta")):
        assert usual.linear(x, weight, bias) is None


def check_usual_rows_leave_what_is_not_usual_to_the_general_way():
    x = randn(5, 37, dtype=torch.float32)
    for view in unusual_views(x):
        assert usual.softmax(view, -1, False, torch.float32) is None
        assert usual.rms_norm(view, list(view.shape[-1:]), None, 1e-6) is None
        assert usual.layer_norm(view, list(view.shape[-1:]), None, None, 1e-6, True) is None
        assert usual.reduce(view, -1, False, "sum") is None
    assert usual.softmax(x, 0, False, torch.float32) is None
    assert usual.softmax(x, 2, False, torch.float32) is None
    assert usual.rms_norm(x, [5, 37], None, 1e-6) is None
    assert usual.rms_norm(x, [36], None, 1e-6) is None
    for weight in (torch.ones(36), torch.ones(1, 37), torch.ones(()), torch.ones(37).long(), torch.ones(37, device="meta")):
        assert usual.rms_norm(x, [37], weight, 1e-6) is None
        assert usual.layer_norm(x, [37], None, weight, 1e-6, False) is None
    assert usual.layer_norm(x, [37], torch.ones(37).double(), None, 1e-6, False) is None
    for dim in (None, 0, 2, [], [0, 1], [-2], [-1, -1]):
        assert usual.reduce(x, dim, False, "sum") is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def check_usual_attention_is_that_of_the_kernel(dtype):
    q, k, v = qkv(2, 4, 2, 3, 50, 16, 16, dtype)
    wide = v.repeat_interleave(2, 3)[:, :, :, ::2]
    transposed = q.transpose(1, 2).contiguous().transpose(1, 2)
    seen = torch.rand(2, 4, 3, 50) < 0.7
    for mask in (None, seen, seen[:1], seen[:, :1], seen[:, :, :1], seen[..., :1], seen.transpose(2, 3).contiguous().mT):
        full = None if mask is None else mask.expand(2, 4, 3, 50)
        for causal in (False, True):
            want = cuda.attention(q, k, v, full, causal, 0.25)
            for inputs in ((q, k, v), (transposed, k, wide)):
                assert_same_bits(usual.attention(*inputs, mask, causal, None, True, True), want)
                out, lse = usual.attention(*inputs, mask, causal, 0.25, True, False)
                assert_same_bits(out, want[0])
                assert lse is None
    assert_same_bits(usual.attention(q, k, v, None, False, 0.5, True, True), cuda.attention(q, k, v, None, False, 0.5))


def check_usual_attention_leaves_what_is_not_usual_to_the_general_way():
    q, k, v = qkv(2, 4, 2, 3, 50, 16, 16, torch.float32)
    seen = torch.rand(2, 4, 3, 50) < 0.7

    def attend(q, k, v, mask=None, grouped=True):
        return usual.attention(q, k, v, mask, False, None, grouped, False)

    assert attend(q, k, v) is not None
    assert attend(q, k, v, seen) is not None
    assert attend(q, k, v, grouped=False) is None
    assert attend(q[0], k[0], v[0]) is None
    assert attend(q, k[:1], v[:1]) is None
    assert attend(q, k, v[:, :, :9]) is None
    assert attend(q, k[..., :8], v) is None
    assert attend(q, k[:, :, :0], v[:, :, :0]) is None
    assert attend(q[:, :3], k, v) is None
    assert attend(q, k.double(), v) is None
    assert attend(q, k, v.to("meta")) is None
    assert attend(q.long(), k.long(), v.long()) is None
    assert attend(*(x.repeat(1, 1, 1, 9) for x in (q, k, v))) is None
    for mask in (seen[0], seen[:, :3], seen[..., :9], seen.float(), seen.to("meta"), seen[:0]):
        assert attend(q, k, v, mask) is None
