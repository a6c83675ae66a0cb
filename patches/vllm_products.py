"""dispatch_cpu_unquantized_gemm of vLLM: the products of its CPU build by plain weights while batch-invariant mode is on.

vLLM 0.32.0 packs a layer's weight when it is loaded, for oneDNN or for its own AMX kernels, and drops it. Both choose the order
of their sums by the number of rows. This patch keeps the weight, so that it is in memory twice, and calls
``torch.nn.functional.linear`` in the mode and vLLM's product outside of it.
"""

from collections.abc import Callable
from typing import Any

from pytest_batchinv.patches.registry import patch


@patch(
    "vllm.model_executor.layers.utils.dispatch_cpu_unquantized_gemm",
    torch=">=2.11",
    vllm="==0.32.*",
    group="vllm",
    reason="products on a CPU are given packed weights, and the order of their sums follows the number of rows",
    fingerprints={"0.32.0": "d0cc00dbd80cb25d"},
)
def vllm_products(original: Callable[..., Any]) -> Callable[..., Any]:
    import torch

    from pytest_batchinv import mode

    def dispatch_cpu_unquantized_gemm(layer: Any, remove_weight: bool) -> None:
        kept = layer.weight
        original(layer, remove_weight)
        if "cpu_linear" not in vars(layer):  # weights that are no matrix: those of convolutions and of experts
            return
        packed = layer.cpu_linear

        def cpu_linear(x: Any, weight: Any, bias: Any) -> Any:
            if not mode.is_on():
                return packed(x, weight, bias)
            # vLLM keeps the bias in float32 for its AMX kernels: rounded back it is what was loaded.
            return torch.nn.functional.linear(x, kept, None if bias is None else bias.to(x.dtype))

        layer.cpu_linear = cpu_linear

    return dispatch_cpu_unquantized_gemm
