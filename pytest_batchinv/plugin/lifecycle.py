"""What happens around one test: its markers are read, the mode is entered and left, its records are gathered."""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_batchinv import markers
from pytest_batchinv.keys import RUN, SETTINGS, Run
from pytest_batchinv.settings import Settings, active

if TYPE_CHECKING:
    from pytest_batchinv.records import Record

NEEDS_OPTION = "needs --batch-invariant"
RECORD = "batchinv_record"  # the name of the user property that carries a record to the controller


def in_mode(item: Any) -> bool:
    """Whether this test runs in batch-invariant mode: it is marked so, or asks for the fixture."""
    return _marker(item, "batch_invariant") is not None or "batch_invariant" in getattr(item, "fixturenames", ())


def needs_option(item: Any) -> bool:
    """Whether this test is skipped without --batch-invariant."""
    return in_mode(item) or "batchinv_engine" in getattr(item, "fixturenames", ())


def check_markers(item: Any) -> None:
    """Raises ValueError for a marker that cannot be obeyed."""
    if mark := _marker(item, "batch_invariant"):
        markers.parse_batch_invariant(mark.args, mark.kwargs)
    if mark := _marker(item, "sm"):
        markers.parse_sm(mark.args, mark.kwargs)
    if in_mode(item) and _marker(item, "flaky"):
        raise ValueError(
            "a test in batch-invariant mode cannot be flaky: running it again until it passes hides "
            "what it looks for. Take the flaky marker off."
        )


def compile_modes(metafunc: Any) -> tuple[str, ...]:
    """The modes that this test's marker asks for; none without the marker."""
    mark = _marker(metafunc.definition, "compile_mode")
    if mark is None:
        return ()
    if "compile_mode" not in metafunc.fixturenames:
        raise ValueError("compile_mode has no effect: let the test request the fixture compile_mode or batchinv_engine")
    return markers.parse_compile_mode(mark.args, mark.kwargs)


def skip_on_other_gpus(item: Any) -> None:
    mark = _marker(item, "sm")
    if mark is None:
        return
    from pytest_batchinv import gpu

    wanted, has = markers.parse_sm(mark.args, mark.kwargs), gpu.capability()
    if has not in wanted:
        here = "this machine has no CUDA GPU" if has is None else f"this GPU is sm_{has}"
        pytest.skip(f"needs {' or '.join(f'sm_{capability}' for capability in wanted)}; {here}")


def begin(item: Any) -> None:
    """From here to ``end`` the test's settings are active, its records are kept, and it is in the mode if it asks."""
    from pytest_batchinv.progress import listening
    from pytest_batchinv.records import collecting

    run = item.stash[RUN] = Run(_settings(item))
    run.stack.enter_context(_active(run.settings))
    run.stack.enter_context(collecting(lambda record: _keep(item, record)))
    run.stack.enter_context(listening(lambda text: _show(item.config, text)))
    if in_mode(item):
        enter_mode(item)


def enter_mode(item: Any) -> Any:
    """The Mode that this test runs in, entered now unless it has been."""
    run = item.stash[RUN]
    if run.mode is None:
        resolve_device(run.settings)
        with heavy_imports():
            from pytest_batchinv.mode import ModeError, batch_invariant_mode

            try:
                run.mode = run.stack.enter_context(batch_invariant_mode())
            except ModeError as error:
                pytest.fail(str(error), pytrace=False)
        run.calls_before = _calls(run.mode)
    return run.mode


def end(item: Any) -> None:
    if RUN in item.stash:
        item.stash[RUN].stack.close()


def nothing_happened(item: Any) -> str:
    """Why a pass of this test proves nothing, as a sentence; empty where the mode did something, or is off."""
    run = item.stash.get(RUN, None)
    if run is None or run.mode is None or _calls(run.mode) > run.calls_before:
        return ""
    return (
        f"{item.nodeid} passed, but batch-invariant mode replaced no operation in it, so it proves nothing.\n"
        "Let it run an operation that the mode covers (a matmul, a softmax, a norm, a model), "
        "or take the marker batch_invariant off."
    )


def outcome(report: pytest.TestReport) -> list[str]:
    """What this report of one phase adds to the outcomes of the run."""
    if report.when == "call":
        return [report.outcome]
    return {"passed": [], "failed": ["error"], "skipped": ["skipped"]}[report.outcome]


def records(report: pytest.TestReport) -> list["Record"]:
    """The records of a test. The report of its teardown, which always comes, carries them all."""
    if report.when != "teardown":
        return []
    from pytest_batchinv.records import Record

    return [Record.from_json(text) for name, text in report.user_properties if name == RECORD]


@contextlib.contextmanager
def heavy_imports() -> Iterator[None]:
    """torch and transformers warn about themselves while they load: with -W error that would fail the first test."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)
        yield


def resolve_device(settings: Settings) -> str:
    from pytest_batchinv import gpu

    try:
        return gpu.resolve_device(settings.device)
    except ValueError as error:
        pytest.fail(str(error), pytrace=False)


def _settings(item: Any) -> Settings:
    settings, mark = item.config.stash[SETTINGS], _marker(item, "batch_invariant")
    return markers.parse_batch_invariant(mark.args, mark.kwargs).applied_to(settings) if mark else settings


@contextlib.contextmanager
def _active(settings: Settings) -> Iterator[None]:
    token = active.set(settings)
    try:
        yield
    finally:
        active.reset(token)


def _keep(item: Any, record: "Record") -> None:
    from pytest_batchinv.records import machine

    stamped = replace(record, nodeid=item.nodeid, machine=record.machine or machine())
    item.user_properties.append((RECORD, stamped.to_json()))


def _show(config: Any, text: str) -> None:
    """A line while the test runs; nowhere on xdist's workers, which have no terminal, nor with -q."""
    terminal = config.pluginmanager.get_plugin("terminalreporter")
    if terminal is None or config.get_verbosity() < 0:
        return
    capture = config.pluginmanager.get_plugin("capturemanager")
    with capture.global_and_fixture_disabled() if capture else contextlib.nullcontext():
        terminal.ensure_newline()
        terminal.write_line(text)


def _calls(mode: Any) -> int:
    return sum(mode.hits.values())


def _marker(item: Any, name: str) -> pytest.Mark | None:
    return item.get_closest_marker(name)
