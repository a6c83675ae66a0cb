"""The packaged conformance tests: ``pytest --batch-invariant --pyargs pytest_batchinv.suite``."""
