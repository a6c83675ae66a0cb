"""Engines: what turns a batch shape into logprobs. One Protocol, so that the checks know no model library."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from pytest_batchinv.shapes import BatchShape

if TYPE_CHECKING:
    from torch import Tensor


class NotRun(Exception):
    """This batch could not be run here (out of memory, say): it is reported as not run, and the session goes on."""


class Engine(Protocol):
    """A subject that is ready to run.

    subject, name, device, dtype, attn, compile_mode: words for records. layouts: those that it can build.
    max_length, max_tokens: bounds of a row and of a padded batch.
    """

    subject: str
    name: str
    device: str
    dtype: str
    attn: str
    compile_mode: str
    layouts: tuple[str, ...]
    max_length: int
    max_tokens: int

    def logprobs(self, shape: BatchShape) -> list[Tensor]:
        """Logprobs over the full vocabulary of every real token, a tensor [length, vocabulary] for each row of the batch.

        They stand in the order of ``shape.rows``, on the engine's device. Raises NotRun.
        """
        ...

    def in_eager_mode(self) -> Engine:
        """The same subject with the same weights, run by eager code."""
        ...
