"""CppVecKernel.indirect_assert: bounds checks of gathered indices under a mask that is the same for a whole vector.

Up to torch 2.11 (read in 2.8.0 and 2.11.0, whose methods are the same) a scalar mask is written ``VecMask<T, N>(mask)``. There
is no such constructor, so a gather inside a masked region does not compile on the CPU. torch 2.12 writes
``VecMask<T, N>::from(mask)``, as this patch does.
"""

from collections.abc import Callable
from typing import Any

from pytest_batchinv.patches.registry import patch


@patch(
    "torch._inductor.codegen.cpp.CppVecKernel.indirect_assert",
    torch="<2.12",
    group="inductor",
    reason="a gather by index inside a masked region does not compile on the CPU",
    upstream="pytorch/pytorch#178148, vllm-project/vllm#40973",
    fingerprints={"2.11.0": "9bfdd3595ee2d82c"},
)
def indirect_assert(original: Callable[..., Any]) -> Callable[..., Any]:
    def indirect_assert(self: Any, var: Any, lower: Any, upper: Any, mask: Any = None) -> Any:
        if mask and var.is_vec and not mask.is_vec:
            mask = _Mask(f"{self._get_mask_type(var.dtype)}::from({mask})")
        return original(self, var, lower, upper, mask)

    return indirect_assert


class _Mask(str):
    """The text of a vector mask. The original reads ``is_vec`` to know that it has nothing left to convert."""

    is_vec = True
