"""Inductor's fallback list: no text where nobody logs, and the strides of eager code for every operator."""

import logging

import pytest
import torch
from pytest_batchinv.kernels import operators
from pytest_batchinv.patches import registry
from pytest_batchinv.patches.inductor_fallback_list import fast_namespaces
from pytest_batchinv.patches.registry import applied
from torch._inductor import exc

NAMESPACE = "batchinv_chain"
needs_the_patch = pytest.mark.skipif(
    not registry.torch_version() < registry.Version("2.13"), reason="torch 2.13 and later make the text only when it is logged"
)
pytestmark = pytest.mark.usefixtures("cold")


@pytest.fixture(scope="module")
def library():
    """Operators of a namespace of our own; each test defines what it needs."""
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    yield library
    library._destroy()


def chain(library, name, depth, *tags):
    """A function that calls ``depth`` different operators one after the other, each on the previous result twice."""
    for i in range(depth):
        library.define(f"{name}{i}(Tensor[] xs) -> Tensor", tags=tags)
        library.impl(f"{name}{i}", lambda xs: xs[0] + xs[1], "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}{i}", lambda xs: torch.empty_like(xs[0]), lib=library)
    operators = [getattr(getattr(torch.ops, NAMESPACE), f"{name}{i}") for i in range(depth)]

    def run(x):
        for operator in operators:
            x = operator([x, x])
        return x

    return run


@pytest.fixture
def written(monkeypatch):
    """How many operators were written out as text."""
    texts = []
    stock = exc.OperatorIssue.operator_str

    def operator_str(*args):
        texts.append(stock(*args))
        return texts[-1]

    monkeypatch.setattr(exc.OperatorIssue, "operator_str", staticmethod(operator_str))
    return texts


def test_without_the_patch_every_operator_is_written_exactly_where_the_gate_is_open(library, written, needed):
    depth = 5
    function = chain(library, "stock", depth)
    assert torch.equal(torch.compile(function, fullgraph=True)(torch.ones(3)), torch.full((3,), 2.0**depth))
    if needed("fallback_allow_list"):
        assert len(written) == depth
        sizes = [len(text) for text in written]
        # The text of each holds the text of the one before it twice: the cost is exponential in the depth.
        assert all(later > 1.9 * earlier for earlier, later in zip(sizes[1:], sizes[2:], strict=False))
    else:
        assert written == []


def test_with_the_patch_none_is_written_and_after_it_both_names_hold_the_same_object(library, written):
    from torch._inductor import graph, lowering

    before = lowering.FALLBACK_ALLOW_LIST
    assert graph.FALLBACK_ALLOW_LIST is before
    function = chain(library, "fast", 5)
    with applied("inductor"), fast_namespaces(NAMESPACE):
        assert torch.equal(torch.compile(function, fullgraph=True)(torch.ones(3)), torch.full((3,), 32.0))
    assert written == []
    assert lowering.FALLBACK_ALLOW_LIST is before
    assert graph.FALLBACK_ALLOW_LIST is before


@needs_the_patch
def test_the_operators_of_the_mode_are_on_the_list_and_namespaces_only_while_they_are_named(library, written):
    from torch._inductor import lowering

    operators.operators()
    stock = set(lowering.FALLBACK_ALLOW_LIST)
    with applied("inductor"):
        patched = lowering.FALLBACK_ALLOW_LIST
        assert "batchinv::mm" in patched
        assert f"{NAMESPACE}::fast0" not in patched
        with fast_namespaces(NAMESPACE), fast_namespaces(NAMESPACE):
            pass
        assert f"{NAMESPACE}::fast0" not in patched
        assert set(patched) == stock and len(patched) == len(stock)
        assert all(name in patched for name in stock)


def test_torchs_own_namespaces_cannot_be_named():
    for name in ("aten", "prims", "mylib::op"):
        with pytest.raises(ValueError, match="name namespaces of your own operators"), fast_namespaces(name):
            pass


def seen_strides(library, name, seen, *tags):
    """An operator that notes the strides it was given."""
    library.define(f"{name}(Tensor x) -> Tensor", tags=tags)
    library.impl(name, lambda x: (seen.append(x.stride()), x.clone())[1], "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda x: torch.empty_like(x), lib=library)
    operator = getattr(getattr(torch.ops, NAMESPACE), name)
    return lambda x: operator((x.t() * 2).contiguous())


class PlainProxy:
    """The list as it is proxied elsewhere: it says yes and leaves the layout to the fast path."""

    def __contains__(self, name):
        return str(name).startswith(f"{NAMESPACE}::")


def test_a_plain_proxy_gives_an_untagged_operator_other_strides_than_eager_code(library, monkeypatch):
    """The fault that ours must not have, on every torch: strides (1, 6) where eager code gives (5, 1)."""
    from torch._inductor import graph

    seen = []
    function = seen_strides(library, "of_a_plain_proxy", seen)
    function(torch.ones(5, 6))
    monkeypatch.setattr(graph, "FALLBACK_ALLOW_LIST", PlainProxy())
    torch.compile(function, fullgraph=True)(torch.ones(5, 6))
    assert seen == [(5, 1), (1, 6)]


@pytest.mark.parametrize("tags", [(), (torch.Tag.needs_fixed_stride_order,), (torch.Tag.flexible_layout,)], ids=str)
def test_an_operator_gets_the_strides_that_it_gets_without_the_patch(library, tags):
    seen = []
    name = "of_ours_" + (tags[0].name if tags else "untagged")
    stock = seen_strides(library, f"{name}_stock", seen, *tags)
    torch.compile(stock, fullgraph=True)(torch.ones(5, 6))
    function = seen_strides(library, name, seen, *tags)
    with applied("inductor"), fast_namespaces(NAMESPACE):
        torch.compile(function, fullgraph=True)(torch.ones(5, 6))
    torch._dynamo.reset()
    torch.compile(function, fullgraph=True)(torch.ones(5, 6))  # and after it
    assert len(seen) == 3
    assert len(set(seen)) == 1
    if torch.Tag.flexible_layout not in tags:
        assert seen[0] == (5, 1)


def test_no_other_place_in_torch_has_bound_the_list():
    """Else it would have to be among the patch's places."""
    import sys

    from torch._inductor import graph, lowering

    holders = {
        name
        for name, module in list(sys.modules.items())
        if name.startswith("torch") and any(value is lowering.FALLBACK_ALLOW_LIST for value in list(vars(module).values()))
    }
    assert holders == {lowering.__name__, graph.__name__}
    assert {place.rpartition(".")[0] for place in registry._patches["fallback_allow_list"].places} == holders


@needs_the_patch
def test_a_user_who_logs_sees_what_torch_logs_about_other_operators(library, caplog):
    function = chain(library, "logged", 1)
    caplog.set_level(logging.INFO, logger="torch._inductor.graph")
    with applied("inductor"):
        torch.compile(function, fullgraph=True)(torch.ones(3))
    assert "Creating implicit fallback" in caplog.text
