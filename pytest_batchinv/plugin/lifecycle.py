"""What happens around one test: its markers are read, its checks get their context, the mode is entered and left."""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from pytest_batchinv.plugin import markers
from pytest_batchinv.plugin.stash import RESULTS, RUN, SETTINGS, Run

if TYPE_CHECKING:
    from pytest_batchinv.mode import Mode
    from pytest_batchinv.plugin.settings import Settings
    from pytest_batchinv.report.record import Record
    from pytest_batchinv.shapes import BatchShape
    from pytest_batchinv.subjects.base import SubjectInfo

NEEDS_OPTION = "needs --batch-invariant"
RECORD = "batchinv_record"  # the name of the user property that carries a record from a worker to the controller


def enabled(config: Any) -> bool:
    return SETTINGS in config.stash and config.stash[SETTINGS].enabled


def settings_of(config: Any) -> Settings:
    """Those of this run; the defaults where nothing of ours was given."""
    from pytest_batchinv.plugin.settings import DEFAULTS

    settings: Settings = config.stash.get(SETTINGS, DEFAULTS)
    return settings


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
    """From here to ``end`` the checks of this test have its settings, and their records are kept."""
    from pytest_batchinv import context
    from pytest_batchinv.plugin import progress

    settings = _settings(item)
    run = item.stash[RUN] = Run(settings)
    surrounding = context.Context(
        max_examples=settings.max_examples,
        case=settings.shape,
        seed=settings.seed,
        ranks=settings.ranks,
        strict=settings.strict,
        emit=lambda record: _keep(item, record),
        progress=run.stack.enter_context(progress.told(item)),
        replay=lambda info, case: replay_command(item, info, case),
    )
    run.stack.enter_context(context.surrounding(surrounding))


def end(item: Any) -> None:
    if RUN in item.stash:
        item.stash[RUN].stack.close()


@contextlib.contextmanager
def building_wider_fixture(item: Any, name: str) -> Iterator[None]:
    """With the mode off, and from random numbers of its own: whichever test asks for it first, it is the same."""
    from pytest_batchinv.plugin import seeds

    with contextlib.ExitStack() as stack:
        if is_in_mode_now(item):
            from pytest_batchinv.mode import stock_torch

            stack.enter_context(stock_torch())
        stack.enter_context(seeds.apart(item.config.stash[SETTINGS].seed, name))
        yield


@contextlib.contextmanager
def mode_of(item: Any) -> Iterator[Mode]:
    """The Mode that this test runs in, entered now unless it has been."""
    run = item.stash[RUN]
    if run.mode is not None:
        yield run.mode
        return
    from pytest_batchinv.plugin.seeds import heavy_imports

    resolve_device(run.settings)
    with heavy_imports():
        from pytest_batchinv.mode import ModeError, batch_invariant_mode
    try:
        with batch_invariant_mode() as mode:
            run.mode = mode
            yield mode
    except ModeError as error:  # on the way in, or out
        pytest.fail(str(error), pytrace=False)


def is_in_mode_now(item: Any) -> bool:
    """Whether this test has entered the mode."""
    return item is not None and RUN in item.stash and item.stash[RUN].mode is not None


def nothing_happened(item: Any) -> str:
    """Why a pass of this test proves nothing, as a sentence; empty where a check or the mode did something, or is off."""
    run = item.stash.get(RUN, None)
    if run is None:
        return ""
    if run.records and not any(record.compared_something for record in run.records):
        reasons = "; ".join(dict.fromkeys(record.error or record.verdict for record in run.records))
        return f"{item.nodeid} passed, but its checks compared nothing, so it proves nothing: {reasons}."
    if run.mode is None or run.records or sum(run.mode.hits.values()) > 0:
        return ""
    return (
        f"{item.nodeid} passed, but batch-invariant mode replaced no operation in it and no check compared anything, so it "
        "proves nothing.\nLet it run an operation that the mode covers (a matmul, a softmax, a norm, a model), or check your "
        "own kernel with assert_batch_invariant, or take the marker batch_invariant off."
    )


def outcome(report: pytest.TestReport) -> list[str]:
    """What this report of one phase adds to the outcomes of the run."""
    if report.when == "call":
        return [report.outcome]
    return {"passed": [], "failed": ["error"], "skipped": ["skipped"]}[report.outcome]


def records(report: pytest.TestReport) -> list[Record]:
    """The records that a worker sent. The report of a test's teardown, which always comes, carries them all."""
    if report.when != "teardown":
        return []
    sent = [text for name, text in report.user_properties if name == RECORD]
    if not sent:
        return []
    report.user_properties = [(name, text) for name, text in report.user_properties if name != RECORD]  # not for JUnit's file
    from pytest_batchinv.report.record import Record

    return [Record.from_json(str(text)) for text in sent]


def kept(item: Any) -> list[Record]:
    """The records of this test so far."""
    return item.stash[RUN].records if RUN in item.stash else []


def resolve_device(settings: Settings) -> str:
    from pytest_batchinv import gpu

    try:
        return gpu.resolve_device(settings.device)
    except ValueError as error:
        pytest.fail(str(error), pytrace=False)


def replay_command(item: Any, info: SubjectInfo, case: BatchShape) -> str:
    """The line that repeats a finding in a fresh process, from the folder in which pytest was started."""
    from pytest_batchinv.plugin.settings import DEFAULTS

    given = vars(item.stash[RUN].settings)
    repeated = {name: given[name] for name in _REPEATED}
    if info.kind == "transformers":
        device = info.device.partition(":")[0]
        repeated |= {"model": info.name, "device": device, "dtype": info.dtype, "attn": info.attention}
    words = ["pytest", "--batch-invariant"]
    for name, value in repeated.items():
        if value != vars(DEFAULTS)[name]:
            words += [f"--batchinv-{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value)]
    return shlex.join([*words, "--batchinv-shape", case.to_json(), _path_and_name(item)])


_REPEATED = ("model", "engine", "url", "device", "dtype", "attn", "ranks", "seed")


def _path_and_name(item: Any) -> str:
    """The node id with a path that is right where pytest was started: its own one begins at the root of the run."""
    path = os.path.relpath(item.path, item.config.invocation_params.dir)
    return "::".join([path, *item.nodeid.split("::")[1:]])


def _settings(item: Any) -> Settings:
    settings: Settings = item.config.stash[SETTINGS]
    mark = _marker(item, "batch_invariant")
    return replace(settings, **markers.parse_batch_invariant(mark.args, mark.kwargs)) if mark else settings


def _keep(item: Any, record: Record) -> None:
    import msgspec

    record = msgspec.structs.replace(record, nodeid=item.nodeid)
    item.stash[RUN].records.append(record)
    if RESULTS in item.config.stash:
        item.config.stash[RESULTS].records.append(record)
    else:
        item.user_properties.append((RECORD, record.to_json()))


def _marker(item: Any, name: str) -> pytest.Mark | None:
    mark: pytest.Mark | None = item.get_closest_marker(name)
    return mark
