"""CppKernel.cache_dtype_convert: the C++ backend rounds where ``emulate_precision_casts`` says that it does.

Up to torch 2.12 (read in 2.11.0, 2.12.0 and 2.12.1) the C++ backend remembers the float32 value of each value that it rounds to
bf16 or fp16, and uses it when the rounded value is needed in float32 again. The setting asks for just this rounding, and so has
no effect on the CPU: compiled bf16 and fp16 code has other bits than eager code. From torch 2.13 on nothing is remembered while
the setting is on, nor is it with this patch. Without the setting nothing changes.
"""

from collections.abc import Callable
from typing import Any

from pytest_batchinv.patches.registry import patch


@patch(
    "torch._inductor.codegen.cpp.CppKernel.cache_dtype_convert",
    torch="<2.13",
    group="inductor",
    gives_effect_to="emulate_precision_casts",
    reason="emulate_precision_casts has no effect on the CPU: compiled bf16 and fp16 have other bits than in eager code",
    upstream="pytorch/pytorch#185337, in 2.13.0",
    fingerprints={"2.11.0": "878245bbd0a38bd2", "2.12.0": "878245bbd0a38bd2", "2.12.1": "878245bbd0a38bd2"},
)
def rounded_casts(original: Callable[..., Any]) -> Callable[..., Any]:
    def cache_dtype_convert(self: Any, *converted: Any) -> None:
        import torch._inductor.config

        if not torch._inductor.config.emulate_precision_casts:
            original(self, *converted)

    return cache_dtype_convert
