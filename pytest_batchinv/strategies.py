"""Public: Hypothesis strategies of batch shapes."""

from pytest_batchinv.search.strategies import batch_shapes, sizes

__all__ = ["batch_shapes", "sizes"]
