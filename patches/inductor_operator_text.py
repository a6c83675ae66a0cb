"""OperatorIssue.operator_str: the text of an operator without a lowering is made when it is needed, and not before.

Up to torch 2.12 ``GraphLowering.call_function`` makes the text of each operator that has no lowering for a log message, even if
nobody logs. The text of an argument holds the text of everything it was made from, so the time is exponential in the depth of a
chain of operators that use the previous result twice. torch 2.13 makes the text only when it is logged, as this patch does. In
the versions that were read (2.11.0, 2.12.0, 2.12.1) the text goes nowhere else but into messages of exceptions.
"""

from collections.abc import Callable
from typing import Any

from pytest_batchinv.patches.registry import patch


@patch(
    "torch._inductor.exc.OperatorIssue.operator_str",
    torch="<2.13",
    group="inductor",
    reason="compile time is exponential in the depth of a chain of custom operators",
    upstream="vllm-project/vllm#42129",
    fingerprints={"2.11.0": "457278dd5ce4f644", "2.12.0": "457278dd5ce4f644", "2.12.1": "457278dd5ce4f644"},
)
def lazy_operator_text(original: Callable[..., str]) -> Callable[..., Any]:
    def operator_str(*args: Any) -> Any:
        from torch._logging import LazyString

        return LazyString(original, *args)

    return operator_str
