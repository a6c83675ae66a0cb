"""Batch-invariant kernels: what the mode installs. Import as ``pytest_batchinv.kernels.<name>``."""
