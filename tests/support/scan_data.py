"""For tests of what the mode makes of a scan's data, on a torch or a CPU of which there is none."""

import pytest

from pytest_batchinv.kernels import scanned


@pytest.fixture(autouse=True)
def scanned_data(monkeypatch):
    """That of the pinned torch, where this torch, or this CPU, has none of its own."""
    cached = scanned.scan_of
    if cached("cpu") is not None:
        yield
        return
    monkeypatch.setattr(scanned, "path_of", lambda device: scanned.FOLDER / "torch-2.13.0-cpu-avx512.json")
    cached.cache_clear()
    yield
    cached.cache_clear()
