"""Asks a loaded model, with a tolerance, what it can do: read our masks, take padding and packing, go on from a cache."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from pytest_batchinv.shapes import CACHES, BatchShape, Row, Steps
from pytest_batchinv.subjects.transformers import attention, masks
from pytest_batchinv.subjects.transformers.forward import Forward
from pytest_batchinv.subjects.transformers.layout import BatchLayout, lay_out, padded, row_slots

LENGTH, PADDING = 24, 16
_WORDS = {"right": "padding on the right", "left": "padding on the left", "packed": "packing"}
_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory")


class Probe:
    """forward: without windows once the model turned out to read no 4-d masks. left_out: what it cannot do, as sentences."""

    def __init__(self, name: str, forward: Forward, vocabulary: int, outlier: int, longest: int) -> None:
        self.name, self.forward, self.vocabulary, self.outlier = name, forward, vocabulary, outlier
        self.length = min(LENGTH, longest)
        self.left_out: list[str] = []

    def layouts(self) -> tuple[str, ...]:
        """The layouts that leave a row what it is alone; each is asked for by itself.

        Left out too are those in which a row is not promised one order of sums: our own attention counts keys from the start
        of the row, the CPU's kernels skip what is hidden, but on CUDA a product over padded keys counts from the start of the
        sequence. sdpa's mask tells where a row starts, that of eager does not. Raises ValueError where padding moves a row
        on either side.
        """
        alone = self._padded("right", self.length, [0])
        (expected,) = replace(self.forward, windows=None).rows(alone, None)
        if self.forward.windows is not None and not (self.forward.takes_positions and not self._moved(alone, expected)):
            self.forward = replace(self.forward, windows=None)
        width, pads = self.length + PADDING, [0, self.outlier]
        why = {side: self._moved(self._padded(side, width, pads), expected) for side in ("right", "left")}
        if all(why.values()):
            raise ValueError(
                f"the forward of {self.name} ignores the attention mask: padding on the right {why['right']}, on the left "
                f"{why['left']}, so a batch cannot give what the row gives alone; test a model that masks its padding, or "
                f"another attention implementation than {self.forward.attention!r}"
            )
        why["packed"] = self._moved_by_packing(expected)
        for layout in self._unpromised():
            why[layout] = why[layout] or f"has no order of sums of its own under attention {self.forward.attention} on CUDA"
        self.left_out += [f"{self.name}: {_WORDS[layout]} is left out: it {words}" for layout, words in why.items() if words]
        return tuple(layout for layout, words in why.items() if not words)

    def caches(self) -> tuple[str, ...]:
        """The caches with which the model gives in steps what it gives at once."""
        if self.length < 3:
            return ()
        row = self._padded("right", self.length, [0])
        (expected,) = self.forward.rows(row, None)
        has_window = masks.window_of(self.forward.model.config.get_text_config())
        caches = []
        for name in CACHES if has_window else CACHES[:-1]:
            if why := self._moved(row, expected, Steps((2, self.length - 1), name)):
                self.left_out.append(f"{self.name}: a {name} cache is left out: it {why}")
            else:
                caches.append(name)
        return tuple(caches)

    def _moved_by_packing(self, expected: Tensor) -> str:
        if self.forward.windows is None:
            return "is for models that read 4-d masks"
        other_first = BatchShape((Row(1, self.length), Row(0, self.length)), "packed")
        return self._moved(lay_out(other_first, self.vocabulary, self.outlier), expected, first_row=1)

    def _unpromised(self) -> tuple[str, ...]:
        if self.forward.attention == attention.NAME or torch.device(self.forward.device).type == "cpu":
            return ()
        return ("packed",) if self.forward.attention == "sdpa" else ("left", "packed")

    def _padded(self, side: str, width: int, pads: list[int]) -> BatchLayout:
        """The row that is asked with, once for each of these pad tokens."""
        row = Row(0, self.length)
        rows = [row_slots(number, row, self.vocabulary, self.outlier) for number in range(len(pads))]
        return padded(rows, side, width, pads)

    def _moved(self, layout: BatchLayout, expected: Tensor, steps: Steps | None = None, first_row: int = 0) -> str:
        """Why the layout's rows, from this one on, are not what the row is alone, as the end of a sentence; else empty."""
        try:
            distance = max(_distance(expected, other) for other in self.forward.rows(layout, steps)[first_row:])
        except Exception as error:  # whatever a model that knows no such mask or cache trips over
            if is_out_of_memory(error):
                raise
            return (
                f"makes the forward fail ({type(error).__name__}: {(str(error).strip() or 'no words').splitlines()[0][:100]})"
            )
        tolerance = 0.01 if self.forward.dtype in (torch.float32, torch.float64) else 0.15
        return "" if distance <= tolerance else f"moves a row's logprobs by {distance:.2g} times their spread"


def _distance(expected: Tensor, actual: Tensor) -> float:
    """How far the logprobs of the middle token moved, in units of their spread; 0 where they are NaN on both sides."""
    moved = (expected - actual).abs().mean(-1) / expected.std(-1)
    return float(moved.nanmedian().nan_to_num(0.0))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the host had no memory left; the CPU's allocator says so in a plain RuntimeError."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
