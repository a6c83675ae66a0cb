"""Modules with ``CHILD_ENVIRONMENT`` run in a process of their own: see ``child_process.py``."""

from child_process import pytest_pyfunc_call, pytest_runtest_logreport, pytest_runtestloop

__all__ = ["pytest_pyfunc_call", "pytest_runtest_logreport", "pytest_runtestloop"]
