"""Planted faults: what each relation must catch, and what none of them may complain about."""
