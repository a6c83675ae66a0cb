"""StorageBox.should_realize_on_reuse: a value used several times is stored if that moves fewer bytes.

Stock torch inlines a shared pointwise value into each of its users, up to a number of reads. This cost model counts bytes.
Inlined, each of n users reads all inputs: n * r bytes. Stored, the inputs are read once, the result of s bytes is written once
and read n times: r + s + n * s. The value is stored if that is no more. What stock torch stores stays stored.

This changes bits. A stored bf16 or fp16 value is rounded and an inlined one is not, and r holds weights that do not grow with
the batch, so the decision, and with it the rounding, follows the batch size. On CUDA float32 varies as well, as Triton fuses a
product with a sum if both are in one kernel. With ``emulate_precision_casts`` inlined values are rounded as well, and no bit
changes. None of the versions that were read (the fingerprints below) has the cost model; from 2.13 on the method takes a
keyword ``graph_reuse``, and does not count reads if it is false.
"""

import math
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
def realize_by_bytes(original: Callable[..., Any]) -> Callable[..., Any]:
    def should_realize_on_reuse(self: Any, users: int, **options: Any) -> bool:
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

    buffers = box.data.inner_fn_opcount().read_buffers
    return sum(_hint(V.graph.get_numel(name)) * V.graph.get_dtype(name).itemsize for name in buffers)


def _bytes_of_result(box: Any) -> int:
    return _hint(math.prod(box.get_size())) * box.get_dtype().itemsize


def _hint(numel: Any) -> int:
    from torch._inductor.virtualized import V

    return int(V.graph.sizevars.optimization_hint(numel))
