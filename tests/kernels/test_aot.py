"""The Triton kernels compiled for SM80 and SM90, without a GPU: shared memory, instructions, and what is specialised.

The launchers are called as on a GPU, with tensors on the CPU, in a process whose Triton believes in a GPU that is not
there: each launch then compiles the kernel, with the arguments and options of the launch, and stops. As Triton keeps
what it compiled for such a GPU, the checks (``check_*``) have a process of their own; the tests (``test_*``) start it.
Directly:
``python -P -m pytest -p no:batchinv -o python_functions='check_*' tests/kernels/test_aot.py``
"""

import os
import re
import subprocess
import sys

import pytest
import torch
from pytest_batchinv.kernels import attention as attention_module
from pytest_batchinv.kernels import cuda, matmul, norm, reduce, scatter, softmax, tiles

SM80 = tiles.Device(multiprocessors=108, shared_memory=tiles.SHARED_MEMORY_SM80)
SM90 = tiles.Device(multiprocessors=132, shared_memory=232_448)
DEVICES = {80: SM80, 90: SM90}

ROW_MODULES = [reduce, softmax, norm, scatter]
# Strides and pointers of a product's factors: they choose how it is loaded into shared memory, and no order of sums.
# N, K are the model's own. The bias and the result are read and written element by element.
SPECIALISED = {
    "_gemm_kernel": {"N", "K", "stride_ab", "stride_am", "stride_ak", "stride_bb", "stride_bk", "stride_bn"}
    | {"stride_biasb", "stride_biasm", "stride_biasn", "a_ptr", "b_ptr", "bias_ptr", "out_ptr"},
    "_grouped_gemm_kernel": {"N", "K", "stride_am", "stride_ak", "stride_bg", "stride_bk", "stride_bn"}
    | {"a_ptr", "b_ptr", "out_ptr"},
    "_attention_kernel": {f"stride_{dim}" for dim in "qb qh qm qd kb kh kn kd vb vh vn vd".split()}
    | {"q_ptr", "k_ptr", "v_ptr", "out_ptr"},
}


@pytest.mark.parametrize("group", ["sm80", "sm90", "specialised"])
def test_checks_pass_on_a_gpu_that_is_not_there(group, pytestconfig):
    command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:batchinv", "-p", "no:cacheprovider"]
    command += ["-o", "python_functions=check_*", "-k", group, __file__]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        command,
        cwd=pytestconfig.rootpath,
        env={**environment, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


# --- what the checks share -------------------------------------------------------------------------------------------


@pytest.fixture
def compile_for(monkeypatch):
    """compile_for(arch, launch): the binaries that the launch compiles or finds compiled, each once."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class Driver:
        def __init__(self, arch):
            self.get_current_target = lambda: GPUTarget("cuda", arch, 32)
            self.get_current_device = lambda: arch  # Triton keeps binaries by device
            self.get_current_stream = lambda device: 0

    binaries = []
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        binary = run(self, *args, grid=grid, warmup=True, **kwargs)
        if all(binary is not other for other in binaries):
            binaries.append(binary)

    def compile_for(arch, launch):
        driver.set_active(Driver(arch))
        monkeypatch.setattr(JITFunction, "run", compile_only)
        monkeypatch.setattr(tiles, "device_of", lambda device: DEVICES[arch])
        binaries.clear()
        launch()
        assert binaries, "the launch launched nothing"
        return list(binaries)

    return compile_for


def tensor(*shape, dtype):
    return torch.zeros(shape, dtype=dtype)


def assert_sound(binary, arch):
    """It fits, and nothing in it adds to memory in an order of its own."""
    ptx = binary.asm["ptx"]
    assert f".target sm_{arch}" in ptx
    assert binary.metadata.shared <= DEVICES[arch].shared_memory
    assert re.findall(r"^\s*(?:@\S+\s+)?((?:atom|red)\.\S+)", ptx, re.MULTILINE) == []
    assert "tf32" not in ptx


def instructions(binary):
    return set(re.findall(r"(?:mma\.sync|wgmma\.mma_async)[\w.]*", binary.asm["ptx"]))


BOTH = pytest.mark.parametrize("arch", [80, 90], ids=["sm80", "sm90"])
GEMM_TILES = [
    *((torch.bfloat16, tile) for tile in tiles.GEMM_TILES[torch.bfloat16]),
    *((torch.float16, tile) for tile in tiles.GEMM_TILES[torch.float16][::9]),
    *((torch.float32, tile) for tile in tiles.GEMM_TILES[torch.float32]),
    *((torch.float64, tile) for tile in tiles.GEMM_TILES[torch.float64][::3]),
]


# --- what is in a binary ---------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("dtype", "tile"), GEMM_TILES)
def check_gemm_tile(arch, dtype, tile, compile_for, monkeypatch):
    monkeypatch.setattr(matmul, "gemm_tile", lambda *args: tile)
    a, b = tensor(1, 100, 512, dtype=dtype), tensor(1, 256, 512, dtype=dtype).mT
    (binary,) = compile_for(arch, lambda: cuda.gemm(a, b))
    assert_sound(binary, arch)
    ptx = binary.asm["ptx"]
    if dtype.itemsize == 2:
        kind = {torch.bfloat16: "bf16", torch.float16: "f16"}[dtype]
        hopper = arch == 90 and tile.block_m >= 64
        want = f"wgmma.mma_async.sync.aligned.m64n{tile.block_n}k16.f32.{kind}.{kind}"
        assert instructions(binary) == {want if hopper else f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32"}
        assert "cp.async" in ptx  # loads in flight while the tensor cores work
    elif dtype == torch.float32:
        assert instructions(binary) == set() and "fma.rn.f32" in ptx
    else:
        assert {name.split(".")[-1] for name in instructions(binary)} == {"f64"}


@BOTH
def check_gemm_tile_chosen_fits(arch, compile_for):
    """The stages follow the device's shared memory: the launcher's own choice, for few and for many rows."""
    b = tensor(1, 128, 4096, dtype=torch.bfloat16)
    for M in (1, 4096):
        a = tensor(1, M, 128, dtype=torch.bfloat16)
        for binary in compile_for(arch, lambda a=a: cuda.gemm(a, b)):
            assert_sound(binary, arch)


@BOTH
def check_gemm_odd_and_grouped(arch, compile_for):
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
        assert_sound(binary, arch)
        assert instructions(binary) == {"mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"}


@BOTH
@pytest.mark.parametrize(
    ("dtype", "head_dim"),
    [(torch.bfloat16, 64), (torch.bfloat16, 128), (torch.bfloat16, 256), (torch.float32, 128)],
)
def check_attention(arch, dtype, head_dim, compile_for):
    k = tensor(1, 2, 1000, head_dim, dtype=dtype)
    for Sq in (1, 1000):
        q = tensor(1, 8, Sq, head_dim, dtype=dtype)
        (binary,) = compile_for(arch, lambda q=q: cuda.attention(q, k, k, None, True, 0.1))
        assert_sound(binary, arch)
        if dtype == torch.bfloat16:
            kind = "wgmma" if arch == 90 and Sq > 1 else "mma.sync"
            assert {name.split("_async")[0][: len(kind)] for name in instructions(binary)} == {kind}


@BOTH
def check_attention_with_masks(arch, compile_for):
    q, k = tensor(1, 8, 100, 64, dtype=torch.bfloat16), tensor(1, 2, 100, 64, dtype=torch.bfloat16)
    for mask in (torch.ones(1, 1, 1, 100, dtype=torch.bool), tensor(1, 1, 100, 100, dtype=torch.bfloat16)):
        mask = mask.expand(1, 8, 100, 100)
        search, main = compile_for(arch, lambda mask=mask: cuda.attention(q, k, k, mask, False, 0.1))
        assert_sound(search, arch)
        assert_sound(main, arch)


@BOTH
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def check_attention_has_one_order_of_k_within_an_instruction(arch, dtype, compile_for):
    """kWidth tells which k's one instruction takes: masks, and how many queries there are, must not change it."""
    k = tensor(1, 2, 200, 64, dtype=dtype)
    for Sq in (1, 5, 100):
        q = tensor(1, 8, Sq, 64, dtype=dtype)
        boolean = torch.ones(Sq, 200, dtype=torch.bool).expand(1, 8, Sq, 200)
        for mask, causal in ((None, False), (None, True), (boolean, False), (boolean.to(dtype), False)):
            *_, main = compile_for(arch, lambda q=q, m=mask, c=causal: cuda.attention(q, k, k, m, c, 0.1))
            widths = set(re.findall(r"kWidth = (\d+)", main.asm["ttgir"]))
            assert widths == {"2"}, (Sq, mask is None or mask.dtype, causal)


@pytest.mark.parametrize(("arch", "n_cols"), [(80, 128), (90, 5000)], ids=["sm80", "sm90"])
def check_row_kernels(arch, n_cols, compile_for):
    """Nothing fuses a multiplication with an addition: it would round once where the kernel says twice."""
    x = tensor(3, n_cols, dtype=torch.bfloat16)
    launches = {
        "sum": lambda: cuda.row_sum(x, x.dtype),
        "norm": lambda: cuda.row_norm(x, 2, x.dtype),
        "var_mean": lambda: cuda.row_var_mean(x, 1, x.dtype),
        "layer_norm": lambda: cuda.row_layer_norm(x, x[0], x[0], 1e-5),
        "rms_norm": lambda: cuda.row_rms_norm(x, x[0], 1e-5),
        "softmax": lambda: cuda.row_softmax(x, False, x.dtype),
        "logsumexp": lambda: cuda.row_logsumexp(x, x.dtype),
        "cumsum": lambda: cuda.row_cumsum(x, x.dtype),
        "index_add": lambda: cuda.index_add(x, torch.zeros(3, dtype=torch.int64), x, 0.5),
    }
    for name, launch in launches.items():
        (binary,) = compile_for(arch, launch)
        assert_sound(binary, arch)
        if name != "logsumexp":  # the logarithm's polynomial is made of them
            assert "fma." not in binary.asm["ptx"], name


# --- what is specialised ---------------------------------------------------------------------------------------------


def check_specialised_arguments_are_the_ones_named():
    kernels = [
        value
        for module in [*ROW_MODULES, matmul, attention_module]
        for name, value in vars(module).items()
        if name.endswith("_kernel") and value.__module__ == module.__name__
    ]
    assert len(kernels) == 12
    for kernel in kernels:
        specialised = {
            param.name
            for param in kernel.params
            if not param.is_constexpr
            and param.annotation_type != "fp64"
            and not (param.do_not_specialize_on_alignment if param.name.endswith("_ptr") else param.do_not_specialize)
        }
        assert specialised == SPECIALISED.get(kernel.fn.__name__, set()), kernel.fn.__name__


ROW_LAUNCHES = {
    "sum": lambda x: cuda.row_sum(x, x.dtype),
    "softmax": lambda x: cuda.row_softmax(x, False, x.dtype),
    "rms_norm": lambda x: cuda.row_rms_norm(x, x[0], 1e-5),
    "cumsum": lambda x: cuda.row_cumsum(x, x.dtype),
    "index_add": lambda x: cuda.index_add(x, torch.zeros(len(x), dtype=torch.int64), x, 1.0),
}


@pytest.mark.parametrize("launch", ROW_LAUNCHES.values(), ids=ROW_LAUNCHES)
def check_specialised_row_kernels_are_one_binary(launch, compile_for):
    """Divisible by 16 or not, 1 or not, aligned or not: the same binary, so the same layout and the same order."""
    x = tensor(64, 1024, dtype=torch.bfloat16)
    views = [x[:rows, :n_cols] for rows in (1, 2, 16, 17) for n_cols in (1000, 1008, 1023, 1024)]
    views += [x.view(-1)[1:3001].view(3, 1000), x[:1, :1].expand(16, 1000), x.new_zeros(1000, 16).T]
    assert len(compile_for(80, lambda: [launch(view) for view in views])) == 1


def check_specialised_gemm_is_one_binary_for_every_m_of_a_tile(compile_for):
    bias = tensor(1, 1, 256, dtype=torch.bfloat16)
    b = tensor(3, 256, 256, dtype=torch.bfloat16)

    def launch():
        for batch, M in ((1, 1), (1, 2), (1, 7), (1, 15), (2, 15), (3, 1)):
            a = tensor(batch, M, 256, dtype=torch.bfloat16)
            cuda.gemm(a, b[:batch], bias.expand(batch, M, 256))
        # torch leaves anything in the stride of a dim of size 1.
        cuda.gemm(b.as_strided((1, 1, 256), (7, 13, 1)), b[:1], bias.as_strided((1, 1, 256), (7, 13, 1)))

    assert len(compile_for(80, launch)) == 1


def check_specialised_attention_is_one_binary_for_every_length_of_a_tile(compile_for):
    def launch():
        for batch, Sq, Skv in ((1, 1, 1), (1, 2, 16), (2, 3, 17), (3, 16, 160)):
            q, k = tensor(batch, 1, Sq, 64, dtype=torch.bfloat16), tensor(batch, 1, Skv, 64, dtype=torch.bfloat16)
            cuda.attention(q, k, k, torch.ones(batch, 1, 1, Skv, dtype=torch.bool).expand(-1, 1, Sq, -1), False, 0.1)

    search, main = compile_for(80, launch)
    assert (search.metadata.name, main.metadata.name) == ("_first_key_kernel", "_attention_kernel")
