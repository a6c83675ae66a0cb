"""What the patches' tests share: whether this torch needs a patch, and compilations that no cache answers."""

import pytest
import torch
import torch._inductor.config

from pytest_batchinv.patches import registry


@pytest.fixture
def needed():
    """By a patch's name: whether this torch is in its range."""
    rows = {row.name: row for row in registry.status()}
    return lambda name: rows[name].state != "not needed"


@pytest.fixture
def cold():
    """Everything is lowered anew. C++ that was compiled before is taken from its cache: that is what costs seconds."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(force_disable_caches=True):
        yield
    torch._dynamo.reset()
