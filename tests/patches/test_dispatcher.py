"""Two libraries over one entry: who was there first is named and given back, who comes later is an error."""

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

from pytest_batchinv import batch_invariant_mode
from pytest_batchinv.kernels import eager
from pytest_batchinv.mode import ModeError, is_on, stock_torch
from pytest_batchinv.patches.registry import Version, torch_version

A, B = torch.ones(2, 3, 4), torch.ones(2, 4, 5)
SEVEN = torch.full((2, 3, 5), 7.0)


def of_another(a, b):
    return SEVEN.clone()


@pytest.fixture
def another():
    """A library that may take entries of aten, and gives them up after the test."""
    library = torch.library.Library("aten", "IMPL")

    def take(name, function=of_another, key="CPU"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            library.impl(name, function, key, allow_override=True)
        return library

    yield take
    library._destroy()


def here() -> str:
    return __file__.rpartition("/")[2]


def test_an_earlier_owner_is_named_and_holds_the_entry_again_after(another):
    another("bmm")
    assert torch.equal(torch.bmm(A, B), SEVEN)
    with batch_invariant_mode() as mode:
        assert torch.equal(torch.bmm(A, B), torch.full((2, 3, 5), 4.0))
        (line,) = [line for line in mode.status() if line.startswith("given back on exit: aten::bmm on CPU")]
        assert here() in line
    assert torch.equal(torch.bmm(A, B), SEVEN)


def test_a_later_library_is_an_error_at_the_end_of_the_mode_and_named(another):
    with pytest.raises(ModeError, match=f"has taken aten::bmm on CPU, registered at .*{here()}") as raised:
        with batch_invariant_mode():
            another("bmm")
            assert torch.equal(torch.bmm(A, B), SEVEN)
    assert "may depend on the batch" in str(raised.value)
    assert not is_on()
    assert torch.equal(torch.bmm(A, B), SEVEN)  # theirs is left alone


def test_the_end_of_an_inner_block_tells_it_too(another):
    """A test inside a mode that lasts for the whole session is such a block."""
    with pytest.raises(ModeError, match="has taken aten::bmm"), batch_invariant_mode():
        with batch_invariant_mode():
            another("bmm")
        raise AssertionError("the inner block ended in silence")


def test_leaving_the_mode_for_stock_torch_does_not_hide_it(another):
    with pytest.raises(ModeError, match="has taken aten::bmm"), batch_invariant_mode():
        another("bmm")
        with stock_torch():
            pass


def test_an_error_of_the_tests_own_is_not_replaced(another):
    with pytest.raises(ZeroDivisionError), batch_invariant_mode():
        another("bmm")
        raise ZeroDivisionError
    assert not is_on()


def test_a_library_that_came_and_went_is_no_error():
    """It holds nothing any more; whoever compares bits compares those of the table."""
    with batch_invariant_mode():
        library = torch.library.Library("aten", "IMPL")
        library.impl("bmm", of_another, "CPU", allow_override=True)
        library._destroy()
        assert torch.equal(torch.bmm(A, B), torch.full((2, 3, 5), 4.0))


def test_entries_that_the_mode_does_not_hold_are_nobodys_business(another):
    with batch_invariant_mode():
        another("floor", lambda x: x)


@pytest.mark.parametrize(
    "name, key, function",
    [("linear", "CPU", lambda x, w, b=None: x), ("mm", "AutogradCPU", lambda a, b: a), ("mm", "Autograd", lambda a, b: a)],
)
def test_a_kernel_in_front_of_the_table_is_refused_at_entry_and_found_at_the_end(another, name, key, function):
    """linear at a backend key, as engines do it, or anything at an Autograd key: calls would never come down to us."""
    with pytest.raises(ModeError, match=f"has taken aten::{name} on {key}"), batch_invariant_mode():
        another(name, function, key)
    with pytest.raises(ModeError, match=f"cannot be entered: calls would reach aten::{name} on {key}, .*{here()}"):
        with batch_invariant_mode():
            pass
    assert not is_on()


def test_every_entry_is_watched():
    """Planted at each entry in turn, a later library is found: the account of the dispatcher is read for all of them."""
    entries = [(overload.name(), key) for overload, key, _ in eager._entries()]
    assert ("aten::bmm", "CPU") in entries
    assert len(entries) > 100
    with batch_invariant_mode():
        from pytest_batchinv.mode import _process

        assert _process.holding.taken() == []
        libraries = {name.partition("::")[0]: None for name, _ in entries}
        libraries = {namespace: torch.library.Library(namespace, "IMPL") for namespace in libraries}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for name, key in entries:
                    namespace, _, rest = name.partition("::")
                    libraries[namespace].impl(rest, lambda *args, **kwargs: None, key, allow_override=True)
            taken = {(registration.overload, registration.key) for registration in _process.holding.taken()}
        finally:
            for library in libraries.values():
                library._destroy()
        assert taken == set(entries)
        assert _process.holding.taken() == []


@pytest.mark.skipif(torch_version() < Version("2.13"), reason="torch registers kernels of its own in Python from 2.13 on")
def test_torchs_own_python_kernels_are_found_given_back_and_noticed_when_they_come_again():
    """Replays core's own conflict over aten::bmm: a kernel that torch._native registers, put on top of ours by its switch."""
    code = """
        import torch
        from torch._native import registry
        from pytest_batchinv import batch_invariant_mode
        from pytest_batchinv.mode import ModeError
        a, b = torch.ones(2, 3, 4), torch.ones(2, 4, 5)
        def always(*args):
            return True
        def native(*args):
            return torch.full((2, 3, 5), 7.0)
        registry.register_op_override("replayed", "aten", "bmm", "CPU", always, native)
        registry._register_all_overrides()
        assert torch.equal(torch.bmm(a, b), native())
        try:
            with batch_invariant_mode() as mode:
                assert torch.equal(torch.bmm(a, b), torch.full((2, 3, 5), 4.0))
                print([line for line in mode.status() if "aten::bmm" in line])
                registry.deregister_op_overrides(disable_dsl_names="replayed")
                registry.reenable_op_overrides(enable_dsl_names="replayed")
                print(torch.bmm(a, b)[0, 0, 0].item())
        except ModeError as error:
            print(error)
        """
    done = subprocess.run([sys.executable, "-P", "-W", "ignore", "-c", textwrap.dedent(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    named, value, error = done.stdout.splitlines()
    assert "given back on exit: aten::bmm on CPU" in named and "_native" in named
    assert value == "7.0"
    assert "has taken aten::bmm on CPU" in error and "_native" in error
