"""aten's operators by the kernel sets: each function here has the arguments of the aten overload it stands for.

It brings them into the canonical form of ``reference.py`` (matrices with one batch dimension, rows of a 2-d tensor), calls
the kernel set of the tensor's device, and brings the result back. Sums happen in the kernel sets alone; what is left here
is shape, dtype and pointwise work. Results are contiguous.
"""
