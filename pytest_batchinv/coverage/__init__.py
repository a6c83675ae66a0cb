"""The scan: torch's own operator database, measured in the mode on this machine, one cell after the other.

``python -m pytest_batchinv.coverage`` runs it. A *call* is one aten overload with the arguments that a sample gave it. Its
*rows* are found by trying (``rows.py``): a dimension of its inputs that some outputs follow, and along which no row depends on
the content of the others. They are then compared, bit for bit, alone and in batches (``measure.py``). A *cell* is an overload
in a dtype, and its *state* (``states.py``) is the worst that any call of it showed. What is found is the data that the mode
itself reads (``kernels/scans/``), and ``docs/coverage.md``.
"""
