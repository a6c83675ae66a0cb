"""The text of an operator without a lowering: made only if somebody reads it."""

import logging

import pytest
import torch
from torch._inductor import exc

from pytest_batchinv.patches.registry import applied

NAMESPACE = "batchinv_chain"
DEPTH = 5
pytestmark = pytest.mark.usefixtures("cold")


@pytest.fixture
def chain():
    """Different operators one after the other, each on the previous result twice."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for i in range(DEPTH):
        library.define(f"of_chain{i}(Tensor[] xs) -> Tensor")
        library.impl(f"of_chain{i}", lambda xs: xs[0] + xs[1], "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::of_chain{i}", lambda xs: torch.empty_like(xs[0]), lib=library)
    operators = [getattr(getattr(torch.ops, NAMESPACE), f"of_chain{i}") for i in range(DEPTH)]

    def run(x):
        for operator in operators:
            x = operator([x, x])
        return x

    yield lambda: torch.compile(run, fullgraph=True)(torch.ones(3)).tolist()
    library._destroy()


@pytest.fixture
def texts(monkeypatch):
    """The texts that torch's own function has made."""
    made, stock = [], exc.OperatorIssue.operator_str

    def operator_str(*args):
        made.append(stock(*args))
        return made[-1]

    operator_str.__code__ = operator_str.__code__.replace(
        co_filename=stock.__code__.co_filename, co_firstlineno=stock.__code__.co_firstlineno
    )
    monkeypatch.setattr(exc.OperatorIssue, "operator_str", staticmethod(operator_str))
    return made


def test_without_the_patch_the_texts_are_made_exactly_where_the_gate_is_open(chain, texts, needed):
    assert chain() == [2.0**DEPTH] * 3
    assert len(texts) == (DEPTH if needed("lazy_operator_text") else 0)
    # Each text holds the one before it twice: the time is exponential in the depth.
    assert all(len(later) > 1.9 * len(earlier) for earlier, later in zip(texts[1:], texts[2:], strict=False))


def test_with_the_patch_none_is_made_and_after_it_the_method_is_the_same_object(chain, texts):
    before = vars(exc.OperatorIssue)["operator_str"]
    with applied("inductor"):
        assert chain() == [2.0**DEPTH] * 3
    assert texts == []
    assert vars(exc.OperatorIssue)["operator_str"] is before


def test_with_the_patch_a_user_who_logs_sees_the_text_and_an_exception_holds_it(chain, texts, caplog):
    caplog.set_level(logging.INFO, logger="torch._inductor.graph")
    with applied("inductor"):
        chain()
        error = exc.MissingOperatorWithoutDecomp("an operator", [1, 2], {})
    assert f"target: {NAMESPACE}.of_chain{DEPTH - 1}.default" in caplog.text
    assert "target: an operator\n  args[0]: 1\n  args[1]: 2" in str(error)
