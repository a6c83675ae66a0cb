"""Tiles: how much one program of a kernel does at a time, and the little a launch must know about its device.

A tile may follow the number of rows for speed, but only within one *invariance class*: tiles that give the same bits.
For products the class is "K ascending, one accumulator": no split-K, no atomics. Blocks, warps, stages and the way of
loading are free in it. BLOCK_N of attention is a function of the dtype and of the model's sizes alone.
``benchmarks/class_check.py`` checks the class on a GPU; ``benchmarks/tune.py`` fills ``tiles.json`` on one, where it takes
no tile whose bits differ. Nothing is timed on the user's machine.

For sums over rows the order is written out in the kernels: ``cuda/rows.py`` has their tiles.
"""

import functools
import itertools
import json
import math
from pathlib import Path
from typing import NamedTuple

import torch
import triton.language as tl

from .plans import on_device as on_device

SHARED_MEMORY_SM80 = 166_912
"""Bytes of shared memory that one block may have on SM80 (A100); SM90 has 232,448, SM86 and SM89 101,376."""


class Tile(NamedTuple):
    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    tma: bool = False
    """Loads and stores through TMA descriptors (SM90 and later)."""
    programs: int = 1
    """With TMA, the most programs a multiprocessor: where there are more tiles, each takes several."""

    @property
    def parts_n(self) -> tuple[int, int]:
        """block_n as a power of two and what is left: 192 with TMA is computed as 128 columns and 64 beside them."""
        wide = 1 << self.block_n.bit_length() - 1
        return wide, self.block_n - wide

    @property
    def columns_stored(self) -> int:
        """That wait in shared memory at once for a TMA store: a block of 256 is stored by halves."""
        return self.block_n if self.block_n < 256 else 128


class Device(NamedTuple):
    multiprocessors: int
    shared_memory: int
    capability: int = 80
    """10 * major + minor of the compute capability."""

    @property
    def has_tma(self) -> bool:
        return self.capability >= 90


GEMM_TILES: dict[torch.dtype, tuple[Tile, ...]] = {
    torch.bfloat16: (
        Tile(128, 256, 64, 8, 4),
        Tile(128, 128, 64, 4, 4),
        Tile(64, 128, 64, 4, 4),
        Tile(64, 64, 64, 4, 5),
        Tile(32, 128, 64, 4, 5),
        Tile(32, 64, 64, 4, 6),
        Tile(32, 32, 64, 4, 6),
        Tile(16, 128, 64, 4, 5),
        Tile(16, 64, 64, 4, 6),
        Tile(16, 32, 64, 4, 8),
    ),
    # Plain fused multiply-adds: no tensor core multiplies fp32 without rounding its inputs first.
    torch.float32: (
        Tile(128, 64, 32, 8, 3),
        Tile(64, 64, 32, 4, 3),
        Tile(32, 64, 32, 4, 3),
        Tile(32, 32, 32, 4, 3),
        Tile(16, 64, 32, 4, 4),
        Tile(16, 32, 32, 4, 4),
    ),
    torch.float64: (
        Tile(64, 64, 16, 4, 3),
        Tile(32, 64, 16, 4, 3),
        Tile(32, 32, 16, 4, 4),
        Tile(16, 32, 16, 4, 4),
    ),
}
"""For each dtype, largest tile first; all of one dtype have the same BLOCK_K."""
GEMM_TILES[torch.float16] = GEMM_TILES[torch.bfloat16]

TunedGemm = dict[tuple[int, int], dict[int, tuple[tuple, tuple]]]
"""(K, N) -> M -> (the fastest tile, the fastest without TMA)."""


def _tuned_gemm() -> dict[tuple[int, int], TunedGemm]:
    """``tiles.json``, by (compute capability, bytes of an element)."""
    tuned: dict[tuple[int, int], TunedGemm] = {}
    for entry in json.loads(Path(__file__).with_name("tiles.json").read_text()):
        of_architecture = tuned.setdefault((entry["capability"], entry["itemsize"]), {})
        pair = tuple(entry["tile"]), tuple(entry["without_tma"])
        of_architecture.setdefault((entry["K"], entry["N"]), {})[entry["M"]] = pair
    return tuned


TUNED_GEMM = _tuned_gemm()

GROUP_M = 8
"""Tiles of this many block rows are run column by column, so that neighbours share operands in the L2 cache."""


def accumulator(dtype: torch.dtype) -> tl.dtype:
    """The dtype of sums in a kernel: fp64 for float64, else fp32."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def gemm_tile(
    dtype: torch.dtype,
    M: int,
    N: int,
    K: int,
    batch: int,
    device: torch.device,
    fits_tma: bool = False,
    bias_blocks: int = 0,
) -> Tile:
    """The tile tuned for the nearest product on this architecture, or a rule where nothing has been tuned.

    fits_tma: whether the operands are such that descriptors can describe them.
    bias_blocks: how often a bias is in shared memory, once if it is read 16 bytes at a time, else twice; 0 without one.
    """
    tuned = TUNED_GEMM.get((device_of(device).capability, dtype.itemsize)) if batch == 1 else None
    tile = _nearest(tuned, M, N, K, fits_tma) if tuned else _covering(dtype, M, N, batch, device)
    stage = (tile.block_m + tile.block_n) * tile.block_k * dtype.itemsize
    beside = _beside_stages(tile, dtype, M, N, bias_blocks, device)
    return tile._replace(num_stages=_stages(tile.num_stages, stage, beside, device))


def _beside_stages(tile: Tile, dtype: torch.dtype, M: int, N: int, bias_blocks: int, device: torch.device) -> int:
    """Bytes of shared memory beside the operands: what waits for a TMA store, and a bias that takes another layout.

    Each is as large as the block that is stored. The bias lies where the operands were, unless those of a program's next
    tile are already being loaded.
    """
    if not tile.tma:
        return 0
    tiles, programs = tiles_and_programs(tile, M, N, device)
    blocks = 1 + (bias_blocks if tiles > programs else 0)
    return blocks * tile.block_m * tile.columns_stored * dtype.itemsize


def tiles_and_programs(tile: Tile, M: int, N: int, device: torch.device) -> tuple[int, int]:
    """How many tiles a product has with TMA, and how many programs share them."""
    tiles = ceil_div(M, tile.block_m) * ceil_div(N, tile.block_n)
    return tiles, min(tiles, device_of(device).multiprocessors * tile.programs)


def _nearest(tuned: TunedGemm, M: int, N: int, K: int, fits_tma: bool) -> Tile:
    """By the logarithms of K and N first; then the next larger M that was tuned, else the largest."""
    size = min(tuned, key=lambda size: abs(math.log(size[0] / max(K, 1))) + abs(math.log(size[1] / N)))
    rows = next((rows for rows in sorted(tuned[size]) if rows >= M), max(tuned[size]))
    best, best_without_tma = tuned[size][rows]
    return Tile(*(best if fits_tma else best_without_tma))


def _covering(dtype: torch.dtype, rows: int, cols: int, batch: int, device: torch.device, is_narrow: bool = False) -> Tile:
    """The largest tile that is no taller than the rows need and still gives most multiprocessors a program.

    is_narrow: and one that is no wider than the columns need, if there is one.
    """
    height = max(16, next_power_of_2(rows))
    candidates = [tile for tile in GEMM_TILES[dtype] if tile.block_m <= height]
    if is_narrow:
        candidates = [tile for tile in candidates if tile.block_n <= max(32, next_power_of_2(cols))] or candidates
    for tile in candidates:
        if batch * ceil_div(rows, tile.block_m) * ceil_div(cols, tile.block_n) * 4 >= device_of(device).multiprocessors * 3:
            break
    return tile


def convolution_tile(dtype: torch.dtype, pixels: int, channels: int, groups: int, device: torch.device) -> Tile:
    """block_m pixels by block_n channels of a group: of the class of ``gemm``, as all tiles of convolutions are."""
    tile = _covering(dtype, pixels, channels, groups, device, is_narrow=True)
    stage = (tile.block_m + tile.block_n) * tile.block_k * dtype.itemsize
    return tile._replace(num_stages=_stages(tile.num_stages, stage, 0, device))


def convolution_run(
    batch: int, P: int, Q: int, channels: int, terms: int, groups: int, device: torch.device
) -> tuple[Tile, bool]:
    """With TMA, 16 bits: a run of block_m pixels of one place in several images (True), or of one row of an image.

    The rows that are computed decide, those after the edges among them; short runs are slower by a factor. terms: channels of a
    group of the input, a multiple of 32.
    """

    def runs(block_m: int, of_images: bool) -> int:
        return P * Q * ceil_div(batch, block_m) if of_images else batch * P * ceil_div(Q, block_m)

    slower = {64: 1.0, 32: 1.3, 16: 1.7}
    forms = itertools.product(slower, (False, True))
    block_m, of_images = min(forms, key=lambda form: runs(*form) * form[0] * slower[form[0]])
    return _of_runs(block_m, runs(block_m, of_images), channels, terms, groups, device), of_images


def pointwise_tile(batch: int, pixels: int, channels: int, terms: int, device: torch.device) -> Tile:
    """With TMA, 16 bits: block_m channels by block_n pixels of an image. terms: channels of the input, a multiple of 32."""
    return _of_runs(64, batch * ceil_div(channels, 64), pixels, terms, 1, device)


def _of_runs(block_m: int, runs: int, cols: int, terms: int, groups: int, device: torch.device) -> Tile:
    """The widest that still gives each multiprocessor a program. Where there are few programs, they have few and long steps."""
    multiprocessors = device_of(device).multiprocessors
    fitting = [block_n for block_n in (128, 64, 32) if block_n <= max(cols, 32) and (block_n > 32 or block_m >= 64)] or [64]
    block_n = next((n for n in fitting if groups * runs * ceil_div(cols, n) >= multiprocessors), fitting[-1])
    is_few = groups * runs * ceil_div(cols, block_n) <= 2 * multiprocessors
    block_k = 128 if is_few and terms % 128 == 0 else 64 if terms % 64 == 0 else 32
    return Tile(block_m, block_n, block_k, 4, _stages(3, (block_m + block_n) * block_k * 2, 0, device), True)


def scaled_tile(rows: int, cols: int, device: torch.device, fits_tma: bool = False) -> Tile:
    """Of products of 8-bit floats: 64 rows to four warps, 128 columns, 128 terms, so that all have one instruction.

    With many tiles a multiprocessor has two or three programs, whose additions run while another's products do: that leaves
    each fewer stages. Few rows of many columns were faster through pointers on an H200.
    """
    n_tiles, multiprocessors = ceil_div(rows, 64) * ceil_div(cols, 128), device_of(device).multiprocessors
    stages = 6 if rows <= 64 or n_tiles <= multiprocessors else 4 if n_tiles <= 2 * multiprocessors else 3
    tma = fits_tma and (rows > 64 or 2 * n_tiles <= multiprocessors)
    return Tile(64, 128, 128, 4, _stages(stages, (64 + 128) * 128, 0, device), tma)


def gemm_class(dtype: torch.dtype, device: torch.device) -> list[Tile]:
    """Every tile that ``gemm_tile`` may choose on this device: they must all give one bit pattern."""
    tuned = TUNED_GEMM.get((device_of(device).capability, dtype.itemsize), {})
    chosen = {Tile(*tile) for by_rows in tuned.values() for pair in by_rows.values() for tile in pair}
    return [*GEMM_TILES[dtype], *sorted(chosen)]


def attention_tile(
    dtype: torch.dtype,
    head_dim: int,
    rows: int,
    device: torch.device,
    has_mask: bool = False,
    in_parts: bool = False,
    stages: int = 2,
) -> Tile:
    """block_m queries by block_n keys; block_k is the padded head dim. block_n follows the dtype and head dim alone.

    in_parts: a program stores accumulators of several parts of its keys, one after the other.
    """
    block_d = max(16, next_power_of_2(head_dim))
    if dtype.itemsize == 2:
        block_n = 128 if block_d <= 128 else 64
        block_m = 16 if rows <= 16 else 64 if rows < 512 or block_d > 128 else 128
    else:
        block_n = 32 if block_d * dtype.itemsize <= 512 else 16
        block_m = 16 if rows <= 16 or block_d * dtype.itemsize > 512 else 32
    size = block_d * dtype.itemsize
    fixed = block_m * size
    if device_of(device).has_tma:  # the instructions of SM90 leave the queries there, so what changes its layout is beside them
        mask = block_m * block_n * dtype.itemsize if has_mask else 0
        fixed += max(mask, block_m * block_d * 4 if in_parts else 0)
    stages = _stages(stages, 2 * block_n * size, fixed, device)
    # Two accumulators of block_m x block_d, and no more registers than there are.
    return Tile(block_m, block_n, block_d, 8 if block_m * block_d >= 128 * 128 else 4, stages)


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


@functools.cache
def device_of(device: torch.device) -> Device:
    """What the tile depends on. A device that is no GPU (Triton's interpreter) counts as an A100."""
    if device.type != "cuda":
        return Device(108, SHARED_MEMORY_SM80)
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    return Device(properties.multi_processor_count, properties.shared_memory_per_block_optin, capability)


def _stages(wanted: int, stage_bytes: int, fixed_bytes: int, device: torch.device) -> int:
    """As many stages of loads in flight as fit; they order nothing, so they may follow the device."""
    return max(1, min(wanted, (device_of(device).shared_memory - fixed_bytes) // stage_bytes))
