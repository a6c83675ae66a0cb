"""The Triton kernels compiled for SM80 and SM90, without a GPU: shared memory, instructions, and what is specialised.

The launchers are called as on a GPU, with tensors on the CPU, in a process whose Triton believes in a GPU that is not
there: each launch then compiles the kernel, with the arguments and options of the launch, and stops. As Triton keeps
what it compiled for such a GPU, the tests have a process of their own.
"""

import itertools
import math
import re
import subprocess
import tempfile
from pathlib import Path

import other_gpus
import pytest
import torch
import triton
from triton.runtime.jit import JITFunction

from pytest_batchinv.kernels import cuda, table, tiles
from pytest_batchinv.kernels.aten import common
from pytest_batchinv.kernels.cuda import implicit_gemm, matmul, norm, reduce, rows, scaled, scatter, softmax
from pytest_batchinv.kernels.cuda.attention import backward as attention_backward
from pytest_batchinv.kernels.cuda.attention import kernel as attention_kernel
from pytest_batchinv.kernels.cuda.attention import merge as attention_merge
from pytest_batchinv.kernels.cuda.attention import ranges as attention_ranges
from pytest_batchinv.kernels.launch import Launch

CHILD_ENVIRONMENT = {"TRITON_INTERPRET": None}
TRITON = tuple(map(int, triton.__version__.split(".")[:2]))
ROW_MODULES = [rows, reduce, softmax, norm, scatter]
# What widens a load or a store of a row. The order of a row's sum is written out, so it follows none of them.
ROW = {"x_ptr", "n_cols", "x_row_stride", "x_col_stride"}
GRADIENT = {"grad_ptr", "n_cols", "grad_row_stride", "grad_col_stride"}
ATTENTION_GRADIENT = {f"stride_{dim}" for dim in "qb qh qm qd kb kh kn kd vb vh vn vd gb gh gm gd".split()}
ATTENTION_GRADIENT |= {"q_ptr", "k_ptr", "v_ptr", "do_ptr"}
# Strides and pointers of a product's factors: they choose how it is loaded into shared memory, and no order of sums.
# N, K are the model's own. The bias and the result are read and written element by element.
SPECIALISED = {
    "_gemm_kernel": {"N", "K", "stride_ab", "stride_am", "stride_ak", "stride_bb", "stride_bk", "stride_bn"}
    | {"stride_biasb", "stride_biasm", "stride_biasn", "a_ptr", "b_ptr", "bias_ptr", "out_ptr"},
    "_grouped_gemm_kernel": {"N", "K", "stride_am", "stride_ak", "stride_bg", "stride_bk", "stride_bn"}
    | {"a_ptr", "b_ptr", "out_ptr"},
    "_grouped_gemm_over_k_kernel": {"M", "N", "stride_am", "stride_ak", "stride_bk", "stride_bn", "a_ptr", "b_ptr", "out_ptr"},
    "_scaled_gemm_kernel": {"N", "K", "stride_bias", "a_ptr", "b_ptr", "scale_a_ptr", "scale_b_ptr", "bias_ptr", "out_ptr"}
    | {f"stride_{dim}" for dim in "ab am ak bb bk bn sab sam sag sbb sbg sbn".split()},
    "_scaled_grouped_gemm_kernel": {"N", "K", "a_ptr", "b_ptr", "scale_a_ptr", "scale_b_ptr", "offs_ptr", "out_ptr"}
    | {f"stride_{dim}" for dim in "am ak bg bk bn sa sbg sbn".split()},
    "_scaled_grouped_gemm_over_k_kernel": {"M", "N", "a_ptr", "b_ptr", "scale_a_ptr", "scale_b_ptr", "offs_ptr", "out_ptr"}
    | {f"stride_{dim}" for dim in "am ak bk bn sag sam sbg sbn".split()},
    "_tree_sum_kernel": {"parts_ptr", "out_ptr", "n"},  # the additions are written out
    "_row_partials_kernel": ROW,
    "_row_reduce_kernel": ROW,
    "_row_cumsum_kernel": ROW | {"out_ptr"},
    "_row_softmax_kernel": ROW | {"out_ptr"},
    "_row_logprobs_kernel": ROW,
    "_column_sums_kernel": {"x_ptr", "n_cols", "stride"},
    "_softmax_backward_kernel": GRADIENT | {"y_ptr", "y_row_stride", "y_col_stride", "out_ptr"},
    "_norm_backward_sums_kernel": GRADIENT | ROW | {"weight_ptr", "weight_stride"},
    "_norm_backward_kernel": GRADIENT | ROW | {"weight_ptr", "weight_stride", "out_ptr"},
    "_attention_delta_kernel": {"out_ptr", "do_ptr", "n_heads"}
    | {f"stride_{dim}" for dim in "ob oh om od gb gh gm gd".split()},
    "_attention_dkdv_kernel": ATTENTION_GRADIENT | {"n_key_heads", "dk_ptr", "dv_ptr"},
    "_attention_dq_kernel": ATTENTION_GRADIENT | {"n_heads", "dq_ptr"},
    "_row_norm_kernel": ROW | {"weight_ptr", "weight_stride", "bias_ptr", "bias_stride", "y_ptr"},
    # The descriptors of the factors and the result are no arguments that Triton specialises.
    "_gemm_tma_kernel": {"N", "K", "stride_biasm", "stride_biasn", "bias_ptr"}
    | {"a_desc", "b_desc", "out_desc", "narrow_b_desc", "narrow_out_desc"},
    "_convolution_kernel": {"N", "C", "H", "W", "P", "Q", "x_ptr", "w_ptr", "bias_ptr", "out_ptr"}
    | {f"stride_{of}" for of in "xn xc xh xw wn wc wr ws on oc op oq".split()},
    "_convolution_tma_kernel": {"N", "C", "ALL_CHANNELS", "P", "Q", "bias_ptr", "out_ptr", "x_desc", "w_desc"}
    | {"stride_on", "stride_op", "stride_oq"},
    "_pointwise_tma_kernel": {"N", "C", "PQ", "bias_ptr", "out_ptr", "x_desc", "w_desc"},
    "_transpose_kernel": {"x_ptr", "out_ptr", "ROWS", "COLS"},
    # Integers, which no order can change.
    "_ranges_kernel": {"mask_ptr", "copy_ptr", "intervals_ptr", "ranges_ptr", "n_keys"}
    | {"stride_mb", "stride_mh", "stride_mq", "stride_mk"},
    "_attention_kernel": {f"stride_{dim}" for dim in "qb qh qm qd kb kh kn kd vb vh vn vd ob oh om".split()}
    | {"q_ptr", "k_ptr", "v_ptr", "out_ptr"},
}


# --- what the tests share -------------------------------------------------------------------------------------------


@pytest.fixture
def compile_for():
    """compile_for(arch, launch): the binaries that the launch compiles or finds compiled, each once."""

    def compile_for(arch, launch):
        with other_gpus.compiling_for(arch) as binaries:
            launch()
        assert binaries, "the launch launched nothing"
        return list({id(binary): binary for binary in binaries}.values())

    return compile_for


def tensor(*shape, dtype):
    return torch.zeros(shape, dtype=dtype)


def assert_sound(binary, arch, spilled_bytes=None):
    """It fits, nothing in it adds to memory in an order of its own, and it follows no argument that is not listed.

    spilled_bytes: that a thread may spill; None where the test asks for itself.
    """
    ptx = binary.asm["ptx"]
    assert f".target sm_{arch}" in ptx
    assert binary.metadata.shared <= other_gpus.DEVICES[arch].shared_memory
    assert re.findall(r"^\s*(?:@\S+\s+)?((?:atom|red)\.\S+)", ptx, re.MULTILINE) == []
    assert "tf32" not in ptx
    assert specialised_in(binary) <= SPECIALISED.get(binary.name, set())
    if spilled_bytes is not None:
        with tempfile.TemporaryDirectory() as folder:
            assert registers_and_spills(binary, Path(folder))[1] <= spilled_bytes


def specialised_in(binary):
    """The arguments that this binary is for certain values of, by its own signature: constexprs aside."""
    source = binary.src
    by_value = {name for name, kind in source.signature.items() if kind == "constexpr"}
    by_divisor = {source.fn.arg_names[index] for (index, *_), attributes in source.attrs.items() if attributes}
    return (by_value | by_divisor) - {param.name for param in source.fn.params if param.is_constexpr}


def instructions(binary):
    return set(re.findall(r"(?:mma\.sync|wgmma\.mma_async)[\w.]*", binary.asm["ptx"]))


BOTH = pytest.mark.parametrize("arch", [80, 90], ids=["sm80", "sm90"])
ARCHS = pytest.mark.parametrize("arch", [80, 89, 90, 100], ids=["sm80", "sm89", "sm90", "sm100"])
MOST_SPILLED = 64
"""Bytes a thread, of which some do not hurt where a tile uses all registers."""
MOST_SPILLED_BY_ATTENTION = 1600
"""The same, where two accumulators and the scores of a block are more than a thread's registers.

With twice the warps most of it spills nothing, and takes up to twice as long on an H200: each has fewer queries to a key.
"""


def gemm_tiles():
    """Every tile of the tables, on every architecture that may choose it."""
    for arch, device in other_gpus.DEVICES.items():
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            tuned = tiles.TUNED_GEMM.get((arch, dtype.itemsize), {})
            chosen = {tiles.Tile(*tile) for by_rows in tuned.values() for pair in by_rows.values() for tile in pair}
            for tile in [*tiles.GEMM_TILES[dtype], *sorted(chosen)]:
                label = "x".join(map(str, tile[:3])) + f"w{tile.num_warps}s{tile.num_stages}" + "t" * tile.tma
                yield pytest.param(arch, dtype, fitting(tile, dtype, device), id=f"sm{arch}-{str(dtype)[6:]}-{label}")


def fitting(tile, dtype, device):
    stage = (tile.block_m + tile.block_n) * tile.block_k * dtype.itemsize
    return tile._replace(num_stages=max(1, min(tile.num_stages, device.shared_memory // stage)))


def registers_and_spills(binary, tmp_path):
    """Registers and bytes on the stack of a thread; nothing of a kernel of ours is there but spilled registers."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(binary.asm["cubin"])
    command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", cubin]
    usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return tuple(map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()))


def main_of(binaries, name="_attention_kernel"):
    (binary,) = (binary for binary in binaries if binary.name == name)
    return binary


# --- what is in a binary ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "dtype", "tile"), list(gemm_tiles()))
def test_gemm_tile(arch, dtype, tile, compile_for, monkeypatch):
    monkeypatch.setattr(matmul, "gemm_tile", lambda *args: tile)
    a, b = tensor(1, 100, 512, dtype=dtype), tensor(1, 256, 512, dtype=dtype).mT
    (binary,) = compile_for(arch, lambda: cuda.gemm(a, b))
    assert_sound(binary, arch, MOST_SPILLED)
    ptx = binary.asm["ptx"]
    assert binary.name == ("_gemm_tma_kernel" if tile.tma else "_gemm_kernel")
    if arch == 100 and tile.block_m >= 64 and dtype.itemsize == 2:
        assert "tcgen05.mma" in ptx
    elif dtype.itemsize == 2:
        kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
        hopper = arch == 90 and tile.block_m >= 64
        # Each group of four warps has 64 rows; where there are no more rows, the groups share the columns.
        sharing = max(1, tile.num_warps // 4 * 64 // tile.block_m)
        wgmma = {f"wgmma.mma_async.sync.aligned.m64n{n // sharing}k16.f32.{kind}.{kind}" for n in tile.parts_n if n}
        assert instructions(binary) == (wgmma if hopper else {f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"})
        assert ("cp.async.bulk.tensor" if tile.tma else "cp.async.cg") in ptx  # in flight while the tensor cores work
    elif dtype == torch.float32:
        assert instructions(binary) == set() and "fma.rn.f32" in ptx
    elif has_tensor_cores_for_float64(arch):
        assert {name.split(".")[-1] for name in instructions(binary)} == {"f64"}
    else:
        assert instructions(binary) == set() and "fma.rn.f64" in ptx


def convolved(batch, channels, side, out, taps, stride, memory_format=torch.channels_last, groups=1):
    """A launch of a convolution of squares in bf16, and of one that is the same with a bias."""
    x = tensor(batch, channels, side, side, dtype=torch.bfloat16).to(memory_format=memory_format)
    weight = tensor(out, channels // groups, taps, taps, dtype=torch.bfloat16).to(memory_format=memory_format)
    how = (stride,) * 2, (taps // 2,) * 2, (1, 1), groups
    return lambda: [cuda.convolution(x, weight, bias, *how) for bias in (None, x.new_zeros(out))]


CONVOLUTIONS = {
    "3x3": ((64, 128, 28, 128, 3, 1), True),
    "3x3 of one image": ((1, 256, 14, 256, 3, 1), True),
    "3x3 in steps, channels first": ((8, 96, 28, 64, 3, 2, torch.contiguous_format), True),
    "grouped": ((4, 128, 14, 128, 3, 1, torch.channels_last, 2), True),
    "1x1, channels first": ((64, 256, 28, 512, 1, 1, torch.contiguous_format), True),
    "odd steps": ((8, 64, 27, 64, 3, 2), False),
    "few channels": ((8, 3, 32, 64, 7, 2), False),
    "depthwise": ((8, 32, 14, 32, 7, 1, torch.channels_last, 32), False),
}
"""Arguments of ``convolved``, and whether descriptors can describe the operands."""


@ARCHS
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_load_ahead_and_each_load_has_a_buffer_of_its_own(name, arch, compile_for):
    """A load without one would be written while an asynchronous product still reads it."""
    arguments, fits_tma = CONVOLUTIONS[name]
    for binary in compile_for(arch, convolved(*arguments)):
        is_product = binary.name == "_gemm_kernel"  # without TMA, of one tap: through columns that lie side by side
        assert_sound(binary, arch, 256 if is_product else MOST_SPILLED)
        if binary.name == "_transpose_kernel":
            continue
        has_tma = fits_tma and arch >= 90
        assert binary.name.endswith("_tma_kernel" if has_tma else "_kernel") and ("bulk.tensor" in binary.asm["ptx"]) == has_tma
        if arch == 90 and has_tma:
            M, N, K = (value_of(binary, f"BLOCK_{of}") for of in "MNK")
            stages = binary.metadata.num_stages * (M + N) * K * 2
            assert stages <= binary.metadata.shared < stages + 1024
            assert all("wgmma" in instruction for instruction in instructions(binary))


def value_of(binary, name):
    """Of a constexpr."""
    (value,) = (v for (index, *_), v in binary.src.constants.items() if binary.src.fn.arg_names[index] == name)
    return value


@pytest.mark.parametrize(
    ("block_m", "block_n", "of_images"), [(16, 64, False), (32, 128, True), (64, 32, False), (64, 256, True), (128, 128, False)]
)
def test_runs_of_any_length_have_a_buffer_for_each_load(block_m, block_n, of_images, compile_for, monkeypatch):
    tile = tiles.Tile(block_m, block_n, 64, 8 if block_m == 128 else 4, 3, True)
    monkeypatch.setattr(implicit_gemm, "convolution_run", lambda *_: (tile, of_images))
    for binary in compile_for(90, convolved(40, 128, 20, 256, 3, 1)):
        assert_sound(binary, 90, MOST_SPILLED)
        stages = 3 * (block_m + block_n) * 64 * 2
        assert stages <= binary.metadata.shared < stages + 1024


@BOTH
@pytest.mark.parametrize(
    "tile", [(16, 32, 256, 4, 4), (128, 128, 64, 4, 4), (128, 128, 64, 4, 5, True), (64, 192, 64, 4, 6, True)]
)
def test_gemm_alone_lacks_the_multiplications_of_a_scaled_one_and_nothing_else(arch, tile, compile_for, tmp_path):
    """So both have the same bits where alpha is 1."""
    tile, a, b = tiles.Tile(*tile), tensor(1, 64, 512, dtype=torch.bfloat16), tensor(1, 256, 512, dtype=torch.bfloat16).mT
    if tile.tma and arch < 90:
        return
    run = matmul.product(matmul.Sizes.of(a.shape, a.stride(), b.shape, b.stride()), a.dtype, a.device, tile)
    out = tensor(1, 64, 256, dtype=a.dtype)
    alone, scaled = compile_for(arch, lambda: [run(a, b, None, out, alpha, 1.0) for alpha in (1.0, 2.0)])
    assert registers_and_spills(scaled, tmp_path)[1] <= MOST_SPILLED
    arithmetic = r"^\s+(?:@\S+ )?((?:w?g?mma|fma|add|sub|mul|div)[\w.]*\.(?:f32|bf16)[\w.]*)"
    less, more = (re.findall(arithmetic, x.asm["ptx"], re.MULTILINE) for x in (alone, scaled))
    a_thread = tile.block_m * tile.block_n // (32 * tile.num_warps)
    assert sorted(less + ["mul.rn.f32"] * a_thread) == sorted(more)
    assert any("mma" in name for name in less)
    assert {name.split(".")[1] for name in re.findall(r"cvt\.[\w.]*bf16[\w.]*", alone.asm["ptx"])} == {"rn"}


@pytest.mark.parametrize("tiles_a_program", [1, 2])
@pytest.mark.parametrize("tile", sorted({tile for _, _, tile in (p.values for p in gemm_tiles()) if tile.tma}), ids=str)
def test_gemm_of_sm90_has_shared_memory_for_a_bias(tile, tiles_a_program, compile_for, monkeypatch):
    """Where the next tile's operands are already there and where there is none, whatever the strides of the bias are."""
    monkeypatch.setattr(tiles, "_nearest", lambda *args: tile)
    M, N = 132 * tile.programs * tile.block_m, tiles_a_program * tile.block_n
    a, b = tensor(1, M, 64, dtype=torch.bfloat16), tensor(1, N, 64, dtype=torch.bfloat16).mT
    values = tensor(M, N + 1, dtype=a.dtype)
    biases = {
        "of a row": values[0, :N],
        "one value": values[0, 0],
        "unaligned": values.view(-1)[1 : N + 1],
        "of odd rows": values[:, :N],
    }
    for bias in biases.values():
        (binary,) = compile_for(90, lambda bias=bias: cuda.gemm(a, b, bias.expand(1, M, N)))
        assert binary.name == "_gemm_tma_kernel"
        assert_sound(binary, 90)
        if tiles_a_program == 1:  # then a bias costs no stage, and there is no loop over tiles
            assert binary.metadata.num_stages == fitting_with_store(tile).num_stages
            assert "%nctaid" not in binary.asm["ptx"] and binary.asm["ttgir"].count("scf.for") == 1


def fitting_with_store(tile):
    """As many stages of the tile as fit beside what waits for a TMA store."""
    stored = 2 * tile.block_m * tile.columns_stored
    stages = (other_gpus.DEVICES[90].shared_memory - stored) // (2 * (tile.block_m + tile.block_n) * tile.block_k)
    return tile._replace(num_stages=min(tile.num_stages, stages))


def has_tensor_cores_for_float64(arch):
    """SM89 has next to no double precision, and no tensor core for it. Triton 3.6 and 3.7 do not use those of SM100."""
    return arch != 89 and not (arch == 100 and TRITON in ((3, 6), (3, 7)))


@ARCHS
def test_gemm_tile_chosen_fits(arch, compile_for):
    """The stages follow the device's shared memory: the launcher's own choice, for few and for many rows."""
    b = tensor(1, 128, 4096, dtype=torch.bfloat16)
    for M in (1, 4096):
        a = tensor(1, M, 128, dtype=torch.bfloat16)
        for binary in compile_for(arch, lambda a=a: cuda.gemm(a, b)):
            assert_sound(binary, arch, MOST_SPILLED)


@BOTH
def test_gemm_odd_and_grouped(arch, compile_for):
    bf16 = torch.bfloat16
    launches = [
        lambda: cuda.gemm(*(tensor(2, 3, 1, dtype=bf16), tensor(2, 1, 1, dtype=bf16), tensor(2, 3, 1, dtype=bf16))),
        lambda: cuda.gemm(tensor(2, 3, 101, dtype=bf16), tensor(2, 101, 33, dtype=bf16)),
        lambda: cuda.grouped_gemm(
            tensor(100, 64, dtype=bf16), tensor(8, 64, 128, dtype=bf16), torch.zeros(8, dtype=torch.int32)
        ),
    ]
    for launch in launches:
        (binary,) = compile_for(arch, launch)
        assert_sound(binary, arch, MOST_SPILLED)
        assert instructions(binary) == {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"}


@BOTH
def test_gemm_over_the_rows_of_groups(arch, compile_for):
    a, b = tensor(1000, 256, dtype=torch.bfloat16).t(), tensor(1000, 512, dtype=torch.bfloat16)
    (binary,) = compile_for(arch, lambda: cuda.grouped_gemm_over_k(a, b, torch.zeros(8, dtype=torch.int32)))
    assert_sound(binary, arch, MOST_SPILLED)
    kind = "wgmma" if arch == 90 else "mma.sync"
    assert {name.split("_async")[0][: len(kind)] for name in instructions(binary)} == {kind}


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def scaled_launches():
    """Each kernel of scaled 8-bit floats: (has a bias, reads by bytes, launch); few rows and many, scales of all kinds."""

    def of(M, N, K, groups=1, columns=None, dtypes=(E4M3, E4M3), bias=None, row_major_b=False):
        a, b = tensor(M, K, dtype=dtypes[0]), tensor(N, K, dtype=dtypes[1]).t()
        b, scales = b.contiguous() if row_major_b else b, (torch.zeros(M, groups), torch.zeros(groups, columns or N))
        return bias is not None, K % 16 > 0, lambda: cuda.scaled_gemm(a, b, *scales, bias, torch.bfloat16)

    def of_groups(T):
        a, scales = tensor(T, 512, dtype=E4M3), (torch.zeros(T), torch.zeros(8, 256))
        return False, False, lambda: cuda.scaled_grouped_gemm(a, experts, *scales, offs, torch.bfloat16)

    def over_k():
        a, b = tensor(256, 1024, dtype=E4M3), tensor(128, 1024, dtype=E4M3).t()
        cuda.scaled_grouped_gemm_over_k(a, b, torch.zeros(8, 256), torch.zeros(8, 128), offs, torch.bfloat16)

    offs, experts = torch.zeros(8, dtype=torch.int32), tensor(8, 256, 512, dtype=E4M3).mT
    yield of(1, 256, 512)
    yield of(300, 256, 512)
    yield of(300, 256, 512, 4, 2)
    yield False, True, over_k
    yield of(1, 256, 512, bias=tensor(256, dtype=torch.bfloat16))
    yield from (of(M, 256, 496) for M in (64, 65))
    yield of(1, 256, 512, 4)
    yield from (of(5, 256, 512, dtypes=dtypes) for dtypes in ((E4M3, E5M2), (E5M2, E4M3)))
    yield of(300, 256, 512, row_major_b=True)
    yield of(300, 32, 100)
    yield from map(of_groups, (8, 4000))


@pytest.mark.parametrize("arch", [89, 90, 100], ids=["sm89", "sm90", "sm100"])
def test_scaled_products_have_one_instruction_and_two_levels_of_sums(arch, compile_for):
    """Kinds of instructions round 8-bit floats in ways of their own, so one row has that of many; and what an instruction has
    summed is added in float32, not summed on by the next one: Triton would fold the addition into the product."""
    kinds = {
        89: r"mma\.sync\.aligned\.m16n8k32\.row\.col\.f32\.(e4m3|e5m2)\.(e4m3|e5m2)\.f32",
        90: r"wgmma\.mma_async\.sync\.aligned\.m64n128k32\.f32\.(e4m3|e5m2)\.(e4m3|e5m2)",
        100: r"tcgen05\.mma\.cta_group::1\.kind::f8f6f4",
    }
    for has_bias, by_bytes, launch in itertools.islice(scaled_launches(), None if arch == 90 else 4):
        (binary,) = compile_for(arch, launch)
        assert_sound(binary, arch, MOST_SPILLED if arch == 90 and not by_bytes else None)
        ptx = binary.asm["ptx"]
        found = set(re.findall(r"(?:mma\.sync|wgmma\.mma_async|tcgen05\.mma)\.[\w.:]*", ptx))
        assert len(found) == 1 and re.fullmatch(kinds[arch], found.pop())
        assert re.findall(r"\bfma[\w.]*f32", ptx) == []  # no scale or bias shares a rounding with a sum
        additions = len(re.findall(r"\badd\.rn\.f32 ", ptx)) + len(re.findall(r"\badd\.rn\.f32x2 ", ptx)) * 2
        accumulators = 64  # of a thread: 64 rows and 128 columns are those of four warps
        assert additions >= accumulators * (2 if has_bias else 1)
        if arch == 90:  # a product begins with zeros, and its operands lie in shared memory, in whose order K is summed
            first = re.findall(r"wgmma\.mma_async[\w.]*\s*\{[^}]*\}, (%rd\d+), (%rd\d+), (\w+|%p\d+)", ptx)
            assert len(first) == len(re.findall(r"wgmma\.mma_async", ptx))
            assert [accumulates for *_, accumulates in first].count("0") * 4 == len(first)


@BOTH
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 128)],
)
def test_attention(arch, dtype, head_dim, compile_for):
    k = tensor(1, 2, 1000, head_dim, dtype=dtype)
    for Sq in (1, 1000):
        q = tensor(1, 8, Sq, head_dim, dtype=dtype)
        binaries = compile_for(arch, lambda q=q: cuda.attention(q, k, k, None, True, 0.1))
        assert len(binaries) == (2 if Sq == 1 else 1)  # few queries: a grid over the keys
        for binary in binaries:
            assert_sound(binary, arch, MOST_SPILLED_BY_ATTENTION)
        binary = main_of(binaries)
        if dtype == torch.bfloat16:
            kind = "wgmma" if arch == 90 and Sq > 1 else "mma.sync"
            assert {name.split("_async")[0][: len(kind)] for name in instructions(binary)} == {kind}


@BOTH
def test_attention_with_masks(arch, compile_for):
    q, k = tensor(1, 8, 100, 64, dtype=torch.bfloat16), tensor(1, 2, 100, 64, dtype=torch.bfloat16)
    for mask in (torch.ones(1, 1, 1, 100, dtype=torch.bool), tensor(1, 1, 100, 100, dtype=torch.bfloat16)):
        mask = mask.expand(1, 8, 100, 100)
        ranges, main = compile_for(arch, lambda mask=mask: cuda.attention(q, k, k, mask, False, 0.1))
        assert_sound(ranges, arch, MOST_SPILLED_BY_ATTENTION)
        assert_sound(main, arch, MOST_SPILLED_BY_ATTENTION)


@BOTH
@pytest.mark.parametrize(("head_dim", "has_mask"), [(128, False), (256, False), (256, True)])
def test_attention_of_few_programs_has_shared_memory(arch, head_dim, has_mask, compile_for):
    """Each has more keys in flight then: with a block of queries for each of 64 heads, and for 8 heads with keys in parts."""
    for heads, Skv in ((64, 128), (8, 5000)):
        q, k = tensor(1, heads, 48, head_dim, dtype=torch.bfloat16), tensor(1, heads, Skv, head_dim, dtype=torch.bfloat16)
        mask = torch.ones(1, heads, 48, Skv, dtype=torch.bool) if has_mask else None
        binaries = compile_for(arch, lambda q=q, k=k, m=mask: cuda.attention(q, k, k, m, False, 0.1))
        assert ("_merge_splits_kernel" in {binary.name for binary in binaries}) == (heads == 8)
        for binary in binaries:
            assert_sound(binary, arch, MOST_SPILLED_BY_ATTENTION)


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [(80, torch.bfloat16), (90, torch.bfloat16), (90, torch.float16), (80, torch.float64), (90, torch.float64)],
    ids=["sm80-bfloat16", "sm90-bfloat16", "sm90-float16", "sm80-float64", "sm90-float64"],
)
def test_attention_has_one_order_of_k_within_an_instruction(arch, dtype, compile_for):
    """kWidth tells which k's one instruction takes: masks, and how many queries there are, must not change it.

    SM90 has both ways of multiplying, the one of SM80 where queries are few: there the other dtype of 16 bits is seen too.
    In float64 Triton 3.6 knows but one, and fails where a narrower load asks for another.
    """
    k = tensor(1, 2, 600, 64, dtype=dtype)
    for Sq in (1, 5, 100):
        q = tensor(1, 8, Sq, 64, dtype=dtype)
        boolean = torch.ones(Sq, 600, dtype=torch.bool).expand(1, 8, Sq, 600)
        for mask, causal in ((None, False), (None, True), (boolean, False), (boolean.to(dtype), False)):
            main = main_of(compile_for(arch, lambda q=q, m=mask, c=causal: cuda.attention(q, k, k, m, c, 0.1)))
            widths = set(re.findall(r"kWidth = (\d+)", main.asm["ttgir"]))
            assert widths == {"1" if dtype == torch.float64 else "2"}, (Sq, mask is None or mask.dtype, causal)


@pytest.mark.parametrize(
    ("arch", "keys"),
    # SM80 and SM89 multiply by the same instruction: one way of reading the keys on each.
    [(80, "packed"), (89, "paged"), (90, "packed"), (90, "paged"), (100, "packed"), (100, "paged")],
    ids=["sm80-packed", "sm89-paged", "sm90-packed", "sm90-paged", "sm100-packed", "sm100-paged"],
)
def test_attention_packed_and_paged_has_that_order_too(arch, keys, compile_for):
    q, starts = tensor(40, 8, 64, dtype=torch.bfloat16), torch.zeros(3, dtype=torch.int32)
    k = tensor(*((600,) if keys == "packed" else (38, 16)), 2, 64, dtype=torch.bfloat16)
    pages = None if keys == "packed" else torch.zeros(2, 38, dtype=torch.int32)
    for options in ({}, {"window": 9}, {"soft_cap": 2.0, "sinks": tensor(8, dtype=torch.bfloat16)}):
        for most in (1, 40):
            binaries = compile_for(
                arch, lambda most=most, o=options: cuda.packed_attention(q, k, k, starts, starts, most, 0.1, pages=pages, **o)
            )
            for binary in binaries:
                assert_sound(binary, arch, MOST_SPILLED_BY_ATTENTION)
            if arch != 100:  # tcgen05 has no operands in registers
                assert set(re.findall(r"kWidth = (\d+)", main_of(binaries).asm["ttgir"])) == {"2"}


ROW_ARCHS = pytest.mark.parametrize("arch", [80, 89, 90, 100], ids=["sm80", "sm89", "sm90", "sm100"])
ROW_LAUNCHES = {
    "sum": lambda x: cuda.row_sum(x, x.dtype),
    "norm": lambda x: cuda.row_norm(x, 2, x.dtype),
    "var_mean": lambda x: cuda.row_var_mean(x, 1, x.dtype),
    "logsumexp": lambda x: cuda.row_logsumexp(x, x.dtype),
    "logprobs": lambda x: softmax.row_logprobs(x, torch.zeros(len(x), 1, dtype=torch.int64), x.dtype),
    "softmax": lambda x: cuda.row_softmax(x, False, x.dtype),
    "log_softmax": lambda x: cuda.row_softmax(x, True, x.dtype),
    "layer_norm": lambda x: cuda.row_layer_norm(x, x[0], x[0], 1e-5),
    "rms_norm": lambda x: cuda.row_rms_norm(x, x[0], 1e-5),
    "cumsum": lambda x: cuda.row_cumsum(x, x.dtype),
}
WRITES_ROWS = {"softmax", "log_softmax", "layer_norm", "rms_norm", "cumsum"}
HAS_LOGARITHM = {"logsumexp", "logprobs", "log_softmax"}  # its polynomial is made of fused multiply-adds
each_row_launch = pytest.mark.parametrize("name", ROW_LAUNCHES)


SPILLED = {
    # One value, across the calls of the division in float64.
    ((3, 6), "float64", "var_mean"): {90: 8, 100: 8},
    ((3, 7), "float64", "var_mean"): {90: 8},
    ((3, 6), "aligned", "layer_norm"): {89: 8},
    # Split rows, whose values, weights and biases are all in flight at once. A newer ptxas spills as much of the same PTX on
    # SM90, so there it is Triton's code. Where most is spilled, ptxas has given up on 128 registers, and takes 64 or 32.
    ((3, 6), "unaligned", "layer_norm"): {80: 416, 89: 960, 90: 880, 100: 880},
    ((3, 7), "unaligned", "layer_norm"): {80: 1248, 89: 960, 90: 912, 100: 368},
}
"""Bytes a thread that a row kernel may spill with an older Triton, by architecture; what is not named has no such right."""


def assert_keeps_to_registers(binary, tmp_path, rows, name, arch, spilled_bytes=0):
    """``STACK`` counts what is spilled of a thread's registers: nothing else of a kernel of ours is on the stack."""
    registers, stack = registers_and_spills(binary, tmp_path)
    assert stack <= SPILLED.get((TRITON, rows, name), {}).get(arch, spilled_bytes)
    assert registers * 32 * binary.metadata.num_warps <= 65_536


@ROW_ARCHS
@each_row_launch
@pytest.mark.parametrize("shape", [(2048, 1024), (3, 16384), (3, 151936), (400, 151936)])
def test_row_kernels_load_and_store_16_bytes(arch, name, shape, compile_for, tmp_path):
    """Aligned rows, of each way of reading them: wide loads, no block through shared memory, sums that fuse nothing."""
    x = tensor(*shape, dtype=torch.bfloat16)
    binaries = compile_for(arch, lambda: ROW_LAUNCHES[name](x))
    assert len(binaries) == (2 if shape == (3, 151936) and name != "cumsum" else 1)
    for binary in binaries:
        ptx = binary.asm["ptx"]
        assert_sound(binary, arch)
        assert_keeps_to_registers(binary, tmp_path, "aligned", name, arch)
        assert binary.metadata.shared <= 1024
        if binary is binaries[0] or name in WRITES_ROWS:  # else it only merges what the first wrote
            assert re.search(r"ld\.global\S*\.(v4|v8)\.b32", ptx)
        if name != "logprobs":
            assert not re.search(r"ld\.global\S*\.b16", ptx)
        if name in WRITES_ROWS:
            assert not re.search(r"st\.global\S*\.b16", ptx)
        if name not in HAS_LOGARITHM:
            assert "fma." not in ptx


@ROW_ARCHS
@each_row_launch
def test_row_kernels_of_float64(arch, name, compile_for, tmp_path):
    for n_cols in (4096, 20000):
        for binary in compile_for(arch, lambda n_cols=n_cols: ROW_LAUNCHES[name](tensor(3, n_cols, dtype=torch.float64))):
            assert_sound(binary, arch)
            assert_keeps_to_registers(binary, tmp_path, "float64", name, arch)


@ROW_ARCHS
@each_row_launch
def test_row_kernels_of_unaligned_rows(arch, name, compile_for, tmp_path):
    """Each value has a load, an address and a register of its own here: norms, with two or three a column, spill some."""
    for n_cols in (4095, 20001):
        for binary in compile_for(arch, lambda n_cols=n_cols: ROW_LAUNCHES[name](tensor(3, n_cols, dtype=torch.bfloat16))):
            assert_sound(binary, arch)
            spilled_bytes = 256 if name in ("layer_norm", "rms_norm") else 0
            assert_keeps_to_registers(binary, tmp_path, "unaligned", name, arch, spilled_bytes)


@ROW_ARCHS
def test_row_kernels_of_more_than_2_to_the_31_columns(arch, compile_for):
    x = tensor(1, 1, dtype=torch.bfloat16).expand(1, 2**31 + 5)
    for name in ("sum", "logprobs"):
        for binary in compile_for(arch, lambda name=name: ROW_LAUNCHES[name](x)):
            assert_sound(binary, arch)
            assert binary.src.signature["n_cols"] == "i64"


@BOTH
@pytest.mark.parametrize("n_parts", [2, 3, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_tree_sum_adds_once_for_each_pair_and_keeps_the_sign_of_zero(n_parts, dtype, arch, compile_for):
    """What stands for a part that is missing is -0.0: +0.0 would make +0.0 of a sum of -0.0."""
    parts = tensor(n_parts, 70000, dtype=dtype)
    (binary,) = compile_for(arch, lambda: cuda.tree_sum(parts, dtype))
    assert_sound(binary, arch, 0)
    # Of two 16-bit parts LLVM adds without widening, with the same bits; before SM90 as fma(a, 1, b).
    assert re.findall(r"fma\.rn\.f\d\d|mul\.", binary.asm["ptx"].replace("mul.wide", "").replace("mul.lo", "")) == []
    assert "dense<-0.000000e+00>" in binary.asm["ttir"]


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_that_are_not_rounded_compile(dtype, arch, compile_for):
    a, b = tensor(4, 100, 256, dtype=dtype), tensor(4, 512, 256, dtype=dtype).mT
    offs = torch.zeros(4, dtype=torch.int32)
    for launch in (
        lambda: cuda.gemm(a, b, out_dtype=torch.float32),
        lambda: cuda.gemm(a[0], b[0], out_dtype=torch.float32),
        lambda: cuda.grouped_gemm(a[0], b, offs, out_dtype=torch.float32),
    ):
        (binary,) = compile_for(arch, launch)
        assert_sound(binary, arch, MOST_SPILLED)
        assert any("mma" in name for name in instructions(binary))


@BOTH
def test_index_add_fuses_nothing(arch, compile_for):
    x = tensor(3, 1000, dtype=torch.bfloat16)
    (binary,) = compile_for(arch, lambda: cuda.index_add(x, torch.zeros(3, dtype=torch.int64), x, 0.5))
    assert_sound(binary, arch, 0)
    assert "fma." not in binary.asm["ptx"]


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n_cols", [128, 4096, 20000])
def test_the_gradients_of_norms_and_softmax_fuse_nothing_and_keep_to_registers(arch, dtype, n_cols, compile_for):
    x, weight = tensor(2048, n_cols, dtype=dtype), tensor(n_cols, dtype=dtype)
    rstd = tensor(2048, dtype=torch.float32)
    launches = [
        lambda: cuda.row_norm_backward(x, x, rstd, rstd, weight),
        lambda: cuda.row_norm_backward(x, x, None, rstd, weight, True, True, False),
        lambda: cuda.row_softmax_backward(x, x, False, dtype),
        lambda: cuda.row_softmax_backward(x, x, True, dtype),
        lambda: cuda.row_sum(x.t(), dtype),
    ]
    for number, launch in enumerate(launches):
        binaries = compile_for(arch, launch)
        assert len(binaries) >= (2 if number < 2 else 1)
        for binary in binaries:
            assert_sound(binary, arch, MOST_SPILLED)
            assert "fma." not in binary.asm["ptx"]


@BOTH
@pytest.mark.parametrize(("dtype", "head_dim"), [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.float32, 128)])
def test_the_gradients_of_attention(arch, dtype, head_dim, compile_for):
    q, k = tensor(1, 8, 1000, head_dim, dtype=dtype), tensor(1, 2, 1000, head_dim, dtype=dtype)
    lse = tensor(1, 8, 1000, dtype=torch.float32)
    masks = [None] if dtype == torch.float32 else [None, torch.ones(1, 1, 1000, 1000, dtype=torch.bool).expand(1, 8, -1, -1)]
    for mask in masks:
        binaries = compile_for(arch, lambda m=mask: cuda.attention_backward(q, q, k, k, m, q, lse, m is None, 0.1))
        assert len(binaries) == (3 if mask is None else 4)
        for binary in binaries:
            assert_sound(binary, arch, MOST_SPILLED_BY_ATTENTION)
            if binary.name in ("_attention_dq_kernel", "_attention_dkdv_kernel") and dtype == torch.bfloat16:
                kind = "wgmma" if arch == 90 else "mma.sync"
                assert {name.split("_async")[0][: len(kind)] for name in instructions(binary)} == {kind}
                assert set(re.findall(r"kWidth = (\d+)", binary.asm["ttgir"])) <= {"2"}


# --- what is specialised ---------------------------------------------------------------------------------------------


def test_specialised_arguments_are_the_ones_named():
    kernels = [
        value
        for module in [
            *ROW_MODULES,
            matmul,
            implicit_gemm,
            scaled,
            attention_backward,
            attention_kernel,
            attention_merge,
            attention_ranges,
        ]
        for name, value in vars(module).items()
        if name.endswith("_kernel") and value.__module__ == module.__name__
    ]
    assert len(kernels) == 28
    for kernel in kernels:
        assert type(kernel) is JITFunction, f"{kernel}: tuned or chosen at run time, by sizes that nobody lists"
        specialised = {
            param.name
            for param in kernel.params
            if not param.is_constexpr
            and param.annotation_type != "fp64"
            and not (param.do_not_specialize_on_alignment if param.name.endswith("_ptr") else param.do_not_specialize)
        }
        assert specialised == SPECIALISED.get(kernel.fn.__name__, set()), kernel.fn.__name__


def test_specialised_index_add_is_one_binary(compile_for):
    """Divisible by 16 or not, 1 or not, aligned or not: the same binary."""
    x = tensor(64, 1024, dtype=torch.bfloat16)
    views = [x[:rows, :n_cols] for rows in (1, 2, 16, 17) for n_cols in (1000, 1008, 1023, 1024)]
    views += [x.view(-1)[1:3001].view(3, 1000), x[:1, :1].expand(16, 1000), x.new_zeros(1000, 16).T]

    def launch():
        for view in views:
            cuda.index_add(view, torch.zeros(len(view), dtype=torch.int64), view, 1.0)

    assert len(compile_for(80, launch)) == 1


@each_row_launch
def test_specialised_row_kernels_do_not_follow_the_number_of_rows(name, compile_for):
    x = tensor(1000, 1024, dtype=torch.bfloat16)
    assert len(compile_for(80, lambda: [ROW_LAUNCHES[name](x[:rows]) for rows in (1, 2, 16, 17, 1000)])) == 1


def test_specialised_gemm_is_one_binary_for_every_m_of_a_tile(compile_for):
    bias = tensor(1, 1, 256, dtype=torch.bfloat16)
    b = tensor(3, 256, 256, dtype=torch.bfloat16)

    def launch():
        for batch, M in ((1, 1), (1, 2), (1, 7), (1, 15), (2, 15), (3, 1)):
            a = tensor(batch, M, 256, dtype=torch.bfloat16)
            cuda.gemm(a, b[:batch], bias.expand(batch, M, 256))
        # torch leaves anything in the stride of a dim of size 1.
        cuda.gemm(b.as_strided((1, 1, 256), (7, 13, 1)), b[:1], bias.as_strided((1, 1, 256), (7, 13, 1)))

    assert len(compile_for(80, launch)) == 1


def test_specialised_attention_is_one_binary_for_every_length_of_a_tile(compile_for):
    def launch():
        for batch, Sq, Skv in ((1, 1, 1), (1, 2, 16), (2, 3, 17), (3, 16, 112)):
            q, k = tensor(batch, 1, Sq, 64, dtype=torch.bfloat16), tensor(batch, 1, Skv, 64, dtype=torch.bfloat16)
            cuda.attention(q, k, k, torch.ones(batch, 1, 1, Skv, dtype=torch.bool).expand(-1, 1, Sq, -1), False, 0.1)

    main_of(compile_for(80, launch))


def shifted(*shape, offset):
    """bf16 that begins ``offset`` elements behind a multiple of 16 bytes."""
    return tensor(offset + math.prod(shape), dtype=torch.bfloat16)[offset:].view(shape)


def test_specialised_launches_are_remembered_by_all_that_their_binary_depends_on(monkeypatch):
    """A ``Launch`` keeps the first binary that it gets: all its calls must be calls of that one."""
    binaries_of = {}
    call = Launch.__call__

    def noted(self, *tensors, **numbers):
        call(self, *tensors, **numbers)
        binaries_of.setdefault(self, set()).add(binaries[-1])

    monkeypatch.setattr(Launch, "__call__", noted)
    monkeypatch.setattr(common, "kernels_of_device", lambda device: cuda)
    with other_gpus.compiling_for(90) as binaries:
        x = tensor(32, 4096, dtype=torch.bfloat16)
        for n_cols in (112, 1010):
            for rows in (1, 3):
                for name in ("sum", "softmax", "rms_norm", "cumsum"):
                    ROW_LAUNCHES[name](x[:rows, :n_cols])
                for weight in (None, x[0, :n_cols], x[0, :n_cols].float()):
                    for with_rstd in (False, True):
                        cuda.row_rms_norm(x[:rows, :n_cols], weight, 1e-6, with_rstd)
        ROW_LAUNCHES["sum"](x[:3, 1:241])
        rstd = tensor(32, dtype=torch.float32)
        for start in (0, 1):
            y, other = x[:32, start : start + 112], tensor(32, 112, dtype=x.dtype)
            cuda.row_sum(y.t(), x.dtype)
            cuda.row_softmax_backward(y, other, True, x.dtype)
            for weight in (None, x[0, :112], x[0, start : start + 112].float()):
                cuda.row_norm_backward(y, other, None, rstd, weight, True, True, False)
            cuda.grouped_gemm_over_k(x[:5, start : start + 64].t(), x[:5, :72], torch.arange(1, 3, dtype=torch.int32))
        for T, G, K, N in ((1, 2, 64, 64), (9, 2, 64, 64), (9, 3, 72, 64), (32, 2, 64, 72), (32, 1, 65, 63)):
            a, b, offs = x[:T, :K], tensor(G, N, K, dtype=x.dtype), torch.arange(1, G + 1)
            for dtype in (torch.int32, torch.int64):
                cuda.grouped_gemm(a, b.mT, offs.to(dtype))
                cuda.grouped_gemm(a, b.mT.contiguous(), offs.to(dtype))
                cuda.grouped_gemm(x[:T, 1 : K + 1], b.mT, offs.to(dtype))
        for M, K, N in ((1, 64, 64), (3, 64, 64), (16, 64, 64), (32, 65, 64), (32, 64, 72)):
            a, b = x[None, :M, :K], tensor(N, K, dtype=x.dtype)
            cuda.gemm(a, b.T[None])
            cuda.gemm(a, b.T.contiguous()[None], tensor(N, dtype=x.dtype).expand(1, M, N))
        for M, K, N in ((1, 64, 64), (3, 64, 64), (64, 128, 64), (65, 256, 80), (300, 250, 72)):
            a, b, scale_b = tensor(M, K, dtype=E4M3), tensor(N, K, dtype=E4M3), torch.zeros(1, N + 1)
            for shift, bias in ((0, None), (1, None), (1, x[0, :N]), (0, x[0, 1 : N + 1])):
                scales = torch.zeros(M, 1), scale_b[:, shift : N + shift]
                cuda.scaled_gemm(a, b.t(), *scales, bias, x.dtype)
                cuda.scaled_gemm(a, b.t().contiguous(), *scales, bias, x.dtype)
            for G in (2, 3):
                offs, experts = torch.arange(1, G + 1, dtype=torch.int32), tensor(G, N, K, dtype=E4M3).mT
                cuda.scaled_grouped_gemm(a, experts, torch.zeros(M + 1)[1:], torch.zeros(G, N), offs, x.dtype)
                scales = torch.zeros(G, K), torch.zeros(G, K)
                cuda.scaled_grouped_gemm_over_k(a.t(), a, *scales, offs, x.dtype)
        for Sq, Skv in ((1, 64), (1, 600), (3, 600), (40, 40)):
            q, k = tensor(1, 4, Sq, 64, dtype=x.dtype), tensor(1, 2, Skv, 64, dtype=x.dtype)
            for options in ({}, {"window": 3}, {"with_lse": False}):
                cuda.attention(q, k, k, None, True, 0.1, **options)
        sdpa, linear = table.PLANNED["scaled_dot_product_attention"], table.PLANNED["linear"]
        rms_norm, layer_norm = table.PLANNED["rms_norm"], table.PLANNED["layer_norm"]
        for shifts in itertools.product((0, 1), repeat=3):
            q, k, v = (shifted(1, heads, 8, 64, offset=offset) for heads, offset in zip((4, 2, 2), shifts, strict=True))
            mask = torch.ones(1, 1, 8, 8, dtype=torch.bool)
            for seen in (None, mask, torch.ones(65, dtype=torch.bool)[1:].view(mask.shape)):
                sdpa(q, k, v, seen, enable_gqa=True)
            cuda.attention(q, k, v, None, False, 0.1)
        for shape, offset in itertools.product(((112,), (1, 240), (2, 3, 240), (3, 1010)), (0, 1)):
            y = shifted(*shape, offset=offset)
            table.BACKEND_KERNELS["_softmax"](y, -1, False)
            for weight in (shifted(64, shape[-1], offset=0), shifted(64, shape[-1], offset=1)):
                for bias in (None, weight[:, 0], weight[1:2, :64].reshape(64)):
                    linear(y, weight, bias)
            table.BACKEND_KERNELS["mean.dim"](y, [-1], True)
            table.BACKEND_KERNELS["var.correction"](y, [-1])
            for weight in (None, x[0, : shape[-1]], x[0, 1 : shape[-1] + 1], x[0, : shape[-1]].float()):
                rms_norm(y, list(shape[-1:]), weight)
                table.BACKEND_KERNELS["_fused_rms_norm"](y, list(shape[-1:]), weight, None)
                if weight is None or weight.dtype == y.dtype:
                    layer_norm(y, list(shape[-1:]), None, weight)
                    table.BACKEND_KERNELS["native_layer_norm"](y, list(shape[-1:]), None, weight, 1e-6)
    assert len(binaries_of) > 30
    assert {len(binaries) for binaries in binaries_of.values()} == {1}
