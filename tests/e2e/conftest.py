"""Data of a scan for torches and CPUs that have none."""

from scan_data import scanned_data  # noqa: F401
