"""Version-gated, reversible patches of torch. Import as ``pytest_batchinv.patches.<name>``."""
