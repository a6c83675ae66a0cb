"""StorageBox.should_realize_on_reuse: a value used several times is stored where that moves fewer bytes.

Stock torch inlines a shared pointwise value into each of its users, up to a number of reads. In a chain of residual sums the
code of each user grows with the length of the chain. The cost model weighs the bytes: inlined, every one of n users reads
all inputs (n * r bytes); stored, the inputs are read once, the result of s bytes is written once and read n times
(r + s + n * s). The value is stored where that is no more. What stock torch stores stays stored.

This changes bits. A stored bf16 or fp16 value is rounded, an inlined one is not, and r holds weights and biases that do not
grow with the batch, so the decision flips with the batch size: a batch-dependent rounding. On CUDA it moves float32 as well,
since Triton fuses a product with a sum where both are in one kernel. Off unless asked for by name, and
refused together with batch-invariant mode, but for its setting ``emulate_precision_casts``: then inlined values are rounded
like stored ones (and Triton fuses no product with a sum), and no bit moves. Both are tested.

Read in the sources of torch 2.11.0, 2.12.0, 2.12.1, 2.13.0, 2.14.1 and 2.15.0: none of them has the cost model (pytorch
176994 was reverted before 2.12.0), and in all of them ``StorageBox`` has ``num_reads``, by a method of its own, and
``has_large_inner_fn``, inherited from ``MutableBox``; the stock method calls both. From 2.13 on it takes a keyword
``graph_reuse``, and where that is false it does not count reads; nor does this patch.
"""

from collections.abc import Callable
from typing import Any

from pytest_batchinv.patches.registry import patch


@patch(
    "torch._inductor.ir.StorageBox.should_realize_on_reuse",
    torch=">=2.11,<2.16",
    group="inductor",
    numerics=True,
    harmless_with="emulate_precision_casts",
    reason="stores shared values where that moves fewer bytes; a trade of bits for speed",
    upstream="pytorch/pytorch#176994 (reverted), vllm-project/vllm#42686 (reverted by #42913)",
    fingerprints={
        "2.11.0": "6b713813e4e68e97",
        "2.12.0": "6b713813e4e68e97",
        "2.12.1": "6b713813e4e68e97",
        "2.13.0": "7848c8e7d705ef9c",
        "2.14.1": "31dbe774428fee4f",
        "2.15.0": "31dbe774428fee4f",
    },
)
def realize_by_bytes(original: Callable) -> Callable:
    def should_realize_on_reuse(self, users: int, **options: Any) -> bool:
        if original(self, users, **options):
            return True
        from torch._inductor.ir import Pointwise, Reduction

        if users < 2 or not options.get("graph_reuse", True) or not isinstance(self.data, (Pointwise, Reduction)):
            return False
        read, result = _bytes_read(self), _bytes_of_result(self)
        return users * read >= read + result + users * result

    return should_realize_on_reuse


def _bytes_read(box: Any) -> int:
    """What one evaluation reads: each buffer once, by the sizes that the graph is compiled for."""
    from torch._inductor.virtualized import V

    graph = V.graph
    buffers = box.data.inner_fn_opcount().read_buffers
    return sum(_hint(graph.get_numel(name)) * graph.get_dtype(name).itemsize for name in buffers)


def _bytes_of_result(box: Any) -> int:
    numel = 1
    for size in box.get_size():
        numel = numel * size
    return _hint(numel) * box.get_dtype().itemsize


def _hint(numel: Any) -> int:
    from torch._inductor.virtualized import V

    return V.graph.sizevars.optimization_hint(numel)
