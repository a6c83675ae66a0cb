"""Convolutions of a ViT-B and of a ResNet-50, over stock torch (cuDNN with its default settings), channels first and last."""

import dataclasses

import torch
from measurements import OURS, STOCK, Point
from timing import Contender

from cases import DTYPES, Bench
from pytest_batchinv.kernels.aten.convolution import convolution

BATCHES = (1, 64)
FORMATS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


@dataclasses.dataclass(frozen=True)
class Layer:
    """A convolution of squares: input and output channels, pixels of a side, taps of a side, stride, padding."""

    channels: int
    out_channels: int
    side: int
    taps: int
    stride: int = 1
    padding: int = 0


PATCHES = Layer(3, 768, 224, 16, 16)
STEM = Layer(3, 64, 224, 7, 2, 3)
STAGES = ((64, 64, 256, 56), (256, 128, 512, 28), (512, 256, 1024, 14), (1024, 512, 2048, 7))
"""Channels before, within and after a stage of ResNet-50, and the side of its images."""


def layers() -> list[Layer]:
    """Each size once."""
    every = [PATCHES, STEM]
    for before, within, after, side in STAGES:
        stride = 1 if before == within else 2
        every += [
            Layer(before, within, side * stride, 1),
            Layer(within, within, side * stride, 3, stride, 1),
            Layer(within, after, side, 1),
            Layer(before, after, side * stride, 1, stride),
            Layer(after, within, side, 1),
            Layer(within, within, side, 3, 1, 1),
        ]
    return list(dict.fromkeys(every))


@dataclasses.dataclass(frozen=True)
class Call:
    dtype: str
    layer: Layer
    batch: int
    memory_format: str

    def __str__(self) -> str:
        one = self.layer
        return (
            f"conv {self.dtype} {one.channels}x{one.side}^2 -> {one.out_channels}, {one.taps}^2/{one.stride}, "
            f"batch {self.batch}, {self.memory_format}"
        )


def run(bench: Bench) -> None:
    every, batches = (layers(), BATCHES) if not bench.options.quick else ([Layer(3, 8, 8, 3, 1, 1), Layer(8, 8, 4, 1)], (1, 2))

    def measure(call: Call) -> None:
        one, dtype = call.layer, DTYPES[call.dtype]
        how = ([one.stride] * 2, [one.padding] * 2, [1, 1], False, [0, 0], 1)
        contenders = (
            Contender(STOCK, lambda x, w: torch.convolution(x, w, None, *how)),
            Contender(OURS, lambda x, w: convolution(x, w, None, *how)),
        )
        sizes = (call.batch, one.channels, one.side, one.side), (one.out_channels, one.channels, one.taps, one.taps)
        plan = bench.stopwatch.rotation(sum(torch.Size(size).numel() for size in sizes) * dtype.itemsize)
        made = (
            [
                torch.empty(size, device=bench.device).normal_().to(dtype, memory_format=FORMATS[call.memory_format])
                for size in sizes
            ]
            for _ in range(plan.sets)
        )
        found = bench.stopwatch.measure(contenders, [tuple(tensors) for tensors in made], plan.rounds)
        named = {"channels": one.channels, "out": one.out_channels, "side": one.side, "taps": one.taps, "stride": one.stride}
        point = Point(
            work="convolution",
            dtype=call.dtype,
            sizes={**named, "batch": call.batch, "format": call.memory_format},
            timings=found.timings,
            distance=found.distances[OURS],
            refused=found.refused,
        )
        bench.result.points.append(point)
        bench.check(point.label, call.dtype, point.distance)

    calls = (
        Call(dtype, layer, batch, name)
        for dtype in bench.options.dtypes
        for layer in every
        for batch in batches
        for name in FORMATS
    )
    bench.plan(calls, measure)
