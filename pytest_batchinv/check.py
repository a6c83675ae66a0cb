"""The checks: generate batches, run each row alone and in its batch, compare bit for bit, shrink what differs.

Two subjects share them: an engine (a model with batch shapes) and a function of rows (``assert_batch_invariant``).
"""

import os
import shlex
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import hypothesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from torch import Tensor

from pytest_batchinv import census, explain, mode, progress, records, settings, strategies
from pytest_batchinv.compare import Difference, first_difference
from pytest_batchinv.engines import Engine, NotRun
from pytest_batchinv.kernels import counters
from pytest_batchinv.records import Record
from pytest_batchinv.shapes import TRIED_SIZES, BatchShape, Row, as_ranges

ALONE_CACHE_BYTES = 2 << 30


class BatchVarianceError(AssertionError):
    """A row's bits were not the same: alone and in a batch, in two runs, or in eager and compiled code.

    difference: the first element that differs. shape: the smallest batch that shows it (None for a function of rows).
    sizes: batch sizes at which the row's bits change.
    """

    def __init__(self, message: str, difference: Difference, shape: BatchShape | None, sizes: Sequence[int]) -> None:
        super().__init__(message)
        self.difference = difference
        self.shape = shape
        self.sizes = tuple(sizes)


def _hide_variance(info: Any) -> bool:
    """For ``__tracebackhide__``: pytest shows the user's frames of a variance, and all frames of any other error."""
    return info.errisinstance(BatchVarianceError)


# --- engines -----------------------------------------------------------------------------------------------------------


def check_engine(
    engine: Engine,
    *,
    relations: Sequence[str] = ("R", "I"),
    max_examples: int | None = None,
    shape: BatchShape | None = None,
) -> list[Record]:
    """Checks the relations in the order R, I, X, N and emits a record for each. ``shape`` replays that one batch alone.

    Raises BatchVarianceError at the first relation that does not hold, after its record has been emitted.
    """
    __tracebackhide__ = _hide_variance
    checks = {"R": _check_run_to_run, "I": _check_batches, "X": _check_eager_equals_compiled}
    _require_relations("check_engine", relations, (*checks, "N"))
    found = []
    for relation in (r for r in checks if r in relations):
        if relation == "X" and engine.compile_mode == "eager":
            continue  # eager against itself shows nothing
        ledger = _Ledger(engine)
        started = time.perf_counter()
        before = counters.hits()
        error: Exception | None = None
        try:
            checks[relation](engine, ledger, max_examples or settings.active.get().max_examples, shape)
            if not ledger.examples:
                raise NotRun(f"no batch could run, so nothing was compared: {ledger.skipped[0]['reason']}")
        except Exception as caught:
            error = caught
        record = ledger.record(relation, _verdict(error))
        record.seconds = time.perf_counter() - started
        record.hits = _grown(before)
        if isinstance(error, BatchVarianceError):
            record.difference = asdict(error.difference) | {"shape": error.shape.to_json(), "sizes": list(error.sizes)}
        elif error is not None:
            record.notes.append(f"{type(error).__name__}: {error}")
        records.emit(record)
        found.append(record)
        if error is not None:
            raise error
    if "N" in relations:
        found.append(check_negative_control(engine, max_examples=max_examples))
    return found


def _require_relations(who: str, asked: Sequence[str], known: Sequence[str]) -> None:
    unknown = sorted(set(asked) - set(known))
    if unknown or not asked:
        wrong = ", ".join(unknown) or "none at all"
        raise ValueError(f"{who} checks the relations {', '.join(known)}, not {wrong}")


def check_negative_control(engine: Engine, *, max_examples: int | None = None) -> Record:
    """Searches a batch in which stock torch changes a row's bits, with the mode off. Emits and returns a record.

    Verdict "caught" with the batch, or "inconclusive" where none is found: then equal verdicts of the mode say little
    about this machine.
    """
    ledger = _Ledger(engine)
    started = time.perf_counter()
    record = None
    with mode.stock_torch():
        try:
            _check_batches(engine, ledger, max_examples or settings.active.get().max_examples, None)
        except BatchVarianceError as caught:
            record = ledger.record("N", "caught")
            record.difference = asdict(caught.difference) | {"shape": caught.shape.to_json(), "sizes": list(caught.sizes)}
    record = record or ledger.record("N", "inconclusive")
    record.seconds = time.perf_counter() - started
    records.emit(record)
    return record


def _check_run_to_run(engine: Engine, ledger: "_Ledger", max_examples: int, shape: BatchShape | None) -> None:
    __tracebackhide__ = _hide_variance
    _check_twice(engine, engine, ledger, "R", _first_batches(engine, shape))


def _check_eager_equals_compiled(engine: Engine, ledger: "_Ledger", max_examples: int, shape: BatchShape | None) -> None:
    __tracebackhide__ = _hide_variance
    _check_twice(engine.in_eager_mode(), engine, ledger, "X", _first_batches(engine, shape, every=3))


def _check_twice(first: Engine, second: Engine, ledger: "_Ledger", relation: str, batches: Iterable[BatchShape]) -> None:
    """The same batches by two engines, or by one engine twice."""
    __tracebackhide__ = _hide_variance
    for batch in batches:
        try:
            expected_rows, actual_rows = first.logprobs(batch), second.logprobs(batch)
        except NotRun as reason:
            ledger.not_run(batch, reason)
            continue
        ledger.example(batch)
        for position, (expected, actual) in enumerate(zip(expected_rows, actual_rows, strict=True)):
            difference = ledger.compare(expected, actual)
            if difference is not None:
                stopping = [] if relation == "R" else explain.ops_that_stop(lambda batch=batch: first.logprobs(batch))
                raise _variance(second, relation, batch, position, difference, stopping=stopping)


def _check_batches(engine: Engine, ledger: "_Ledger", max_examples: int, shape: BatchShape | None) -> None:
    __tracebackhide__ = _hide_variance
    if shape is not None:
        _check_batch(engine, ledger, shape)
        return
    swept = list(strategies.sweep(engine.layouts, engine.max_length, engine.max_tokens))
    for number, batch in enumerate(swept):
        progress.report(f"{engine.subject}: swept {number} of {len(swept)} batches")
        error = _variance_of(lambda batch=batch: _check_batch(engine, ledger, batch))
        if error is not None:
            smallest = _smallest(batch, _simpler_shapes, lambda b: _varies(engine, ledger, b))
            raise _variance_of(lambda batch=smallest: _check_batch(engine, ledger, batch)) or error
    random_batches = strategies.batch_shapes(max_length=engine.max_length, max_tokens=engine.max_tokens, layouts=engine.layouts)

    def check(batch: BatchShape) -> None:
        __tracebackhide__ = _hide_variance
        progress.report(f"{engine.subject}: {ledger.examples - len(swept)} of {max_examples} random batches")
        _check_batch(engine, ledger, batch)

    _search(check, random_batches, max_examples, f"{engine.subject}/{engine.dtype}/{engine.attn}/{engine.compile_mode}")


def _check_batch(engine: Engine, ledger: "_Ledger", batch: BatchShape) -> None:
    __tracebackhide__ = _hide_variance
    try:
        alone = [ledger.alone(row) for row in batch.rows]
        together = engine.logprobs(batch)
    except NotRun as reason:
        ledger.not_run(batch, reason)
        return
    ledger.example(batch)
    for position, (expected, actual) in enumerate(zip(alone, together, strict=True)):
        difference = ledger.compare(expected, actual)
        if difference is not None:
            raise _variance(engine, "I", batch, position, difference, _sizes_that_change(engine, ledger, batch, position))


def _varies(engine: Engine, ledger: "_Ledger", batch: BatchShape) -> bool:
    try:
        pairs = zip([ledger.alone(row) for row in batch.rows], engine.logprobs(batch), strict=True)
        return any(first_difference(expected, actual) is not None for expected, actual in pairs)
    except NotRun:
        return False


def _first_batches(engine: Engine, shape: BatchShape | None, every: int = 11) -> Iterable[BatchShape]:
    """A few batches spread over the sweep, or the one that is replayed."""
    if shape is not None:
        return [shape]
    return list(strategies.sweep(engine.layouts, engine.max_length, engine.max_tokens))[::every]


def _sizes_that_change(engine: Engine, ledger: "_Ledger", batch: BatchShape, position: int) -> list[int]:
    """Batch sizes up to 65 at which the failing row changes, with the batch's own rows as neighbours, repeated."""
    row = batch.rows[position]
    others = [r for i, r in enumerate(batch.rows) if i != position] or [row]
    changed = []
    for n_rows in TRIED_SIZES:
        neighbours = [others[i % len(others)] for i in range(n_rows - 1)]
        place = min(position, n_rows - 1)
        candidate = batch.with_rows(*neighbours[:place], row, *neighbours[place:])
        if candidate.tokens > engine.max_tokens:
            break
        try:
            if first_difference(ledger.alone(row), engine.logprobs(candidate)[place]) is not None:
                changed.append(n_rows)
        except NotRun:
            break
    return changed


@dataclass
class _Ledger:
    """What a check has run and compared, and each row's logprobs alone, so that a row is run alone only once."""

    engine: Engine
    examples: int = 0
    rows: int = 0
    compared_bytes: int = 0
    nan_rows: int = 0
    skipped: list[dict[str, str]] = field(default_factory=list)
    _alone: OrderedDict[Row, Tensor] = field(default_factory=OrderedDict)
    _alone_bytes: int = 0

    def alone(self, row: Row) -> Tensor:
        if row not in self._alone:
            logprobs = self.engine.logprobs(BatchShape((row,)))[0]
            self._alone[row] = logprobs
            self._alone_bytes += logprobs.nbytes
            while self._alone_bytes > ALONE_CACHE_BYTES and len(self._alone) > 1:
                self._alone_bytes -= self._alone.popitem(last=False)[1].nbytes
            return logprobs
        self._alone.move_to_end(row)
        return self._alone[row]

    def example(self, batch: BatchShape) -> None:
        self.examples += 1
        self.rows += len(batch)

    def not_run(self, batch: BatchShape, reason: Exception) -> None:
        self.skipped.append({"shape": batch.to_json(), "reason": str(reason)})

    def compare(self, expected: Tensor, actual: Tensor) -> Difference | None:
        self.compared_bytes += expected.nbytes
        self.nan_rows += bool(expected.isnan().any())
        return first_difference(expected, actual)

    def record(self, relation: str, verdict: str) -> Record:
        engine = self.engine
        return Record(
            subject=engine.subject,
            relation=relation,
            verdict=verdict,
            engine=engine.name,
            device=engine.device,
            dtype=engine.dtype,
            attn=engine.attn,
            compile_mode=engine.compile_mode,
            examples=self.examples,
            rows=self.rows,
            compared_bytes=self.compared_bytes,
            nan_rows=self.nan_rows,
            not_run=self.skipped,
            unclassified_ops=self._unclassified_ops() if relation == "I" else [],
            machine=records.machine(),
        )

    def _unclassified_ops(self) -> list[str]:
        try:
            eager = self.engine.in_eager_mode()
            return census.unclassified_ops(lambda: eager.logprobs(BatchShape((Row(0, 5), Row(1, 3)))))
        except NotRun:
            return []


_MEANING = {
    "R": "the same batch gave other bits when it was run again (relation R, run-to-run)",
    "I": "a row has other bits in a batch than alone (relation I, batch size, composition and position)",
    "X": "compiled code gives other bits than eager code (relation X)",
}


def _variance(
    engine: Engine,
    relation: str,
    batch: BatchShape,
    position: int,
    difference: Difference,
    sizes: Sequence[int] = (),
    stopping: Sequence[str] = (),
) -> BatchVarianceError:
    row = batch.rows[position]
    token, vocabulary = difference.index
    lines = [
        f"{engine.subject} ({engine.dtype}, attention {engine.attn}, {engine.compile_mode}, {engine.device}): "
        f"{_MEANING[relation]}.",
        f"  row         id {row.id}, {row.length} tokens, {row.content}; at position {position} of {len(batch)}, "
        + ("packed" if batch.layout == "packed" else f"{batch.layout} padding to {batch.width} columns"),
        f"  difference  {difference.n_differ} of {difference.n_total} logprobs; the first at token {token}, "
        f"vocabulary index {vocabulary}:",
        f"              {difference.expected} ({difference.expected_hex}) against "
        f"{difference.actual} ({difference.actual_hex})" + ("" if difference.ulp is None else f", {difference.ulp} ulp apart"),
    ]
    if relation == "I":
        lines.append(f"  sizes       {_sizes_in_words(sizes)}")
    if relation == "X":
        lines.append(f"  operators   compiled alone, other bits than in eager code: {_listed(stopping)}")
    lines += [f"  batch       {batch.to_json()}", f"  replay      {_replay_command(engine, batch)}"]
    return BatchVarianceError("\n".join(lines), difference, batch, sizes)


def _sizes_in_words(sizes: Sequence[int]) -> str:
    changing = as_ranges(sizes, TRIED_SIZES)
    return f"bits change at batch sizes {changing}; {len(TRIED_SIZES)} sizes from 1 to {TRIED_SIZES[-1]} were tried"


def _listed(words: Iterable[object]) -> str:
    return ", ".join(map(str, words)) or "none"


def _replay_command(engine: Engine, batch: BatchShape) -> str:
    nodeid = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" (")[0]
    words = ["pytest", "--batch-invariant", "--batchinv-model", engine.subject, "--batchinv-shape", batch.to_json(), nodeid]
    return shlex.join(word for word in words if word)


def _verdict(error: Exception | None) -> str:
    if error is None:
        return "equal"
    return "differs" if isinstance(error, BatchVarianceError) else "error"


def _grown(before: dict[str, int]) -> dict[str, int]:
    return {name: n - before.get(name, 0) for name, n in counters.hits().items() if n > before.get(name, 0)}


# --- functions of rows -------------------------------------------------------------------------------------------------


def assert_batch_invariant(
    fn: Callable[..., Any],
    *inputs: Tensor,
    batch_dim: int = 0,
    relations: Sequence[str] = ("R", "I"),
    max_examples: int | None = None,
    seed: int | None = None,
) -> Record:
    """Asserts that ``fn`` gives each row the same bits alone and in any batch.

    inputs: tensors whose ``batch_dim`` indexes one pool of rows. ``fn(*batch)`` returns a tensor, or a tuple or dict of
    tensors, of which row i along ``batch_dim`` belongs to row i of the batch. Batches up to twice the pool (at most 300)
    are drawn from it: which rows, in which order, repeats allowed. Works with the mode on or off. ``seed`` fixes the draws
    (and turns the example database off: a seed repeats the failure by itself).

    Returns the record. Raises BatchVarianceError with the smallest batch found, and ValueError for inputs that are no
    pool of rows, or an unknown relation.
    """
    __tracebackhide__ = _hide_variance
    _require_relations("assert_batch_invariant", relations, ("R", "I"))
    name = getattr(fn, "__qualname__", type(fn).__name__)
    return check_rows(name, fn, inputs, batch_dim, relations, max_examples or settings.active.get().max_examples, seed)


def check_rows(
    name: str,
    fn: Callable[..., Any],
    inputs: Sequence[Tensor],
    batch_dim: int = 0,
    relations: Sequence[str] = ("R", "I"),
    max_examples: int = 100,
    seed: int | None = None,
) -> Record:
    """``assert_batch_invariant`` under a name of the caller's."""
    __tracebackhide__ = _hide_variance
    from pytest_batchinv.engines.module import ModuleEngine

    subject = ModuleEngine(fn, inputs, batch_dim)
    alone = _AloneOutputs(subject)
    tally = Record(subject=name, relation="".join(relations), verdict="equal", engine="module", machine=records.machine())
    started, before = time.perf_counter(), counters.hits()

    def check(rows: list[int]) -> None:
        __tracebackhide__ = _hide_variance
        expected = [alone[row] for row in rows]
        batch = subject.outputs(rows)
        tally.examples += 1
        tally.rows += len(rows)
        for position, parts in enumerate(batch):
            for part, (a, b) in enumerate(zip(expected[position], parts, strict=True)):
                tally.compared_bytes += a.nbytes
                tally.nan_rows += bool(a.isnan().any())
                difference = first_difference(a, b)
                if difference is not None:
                    raise _row_variance(name, subject, alone, rows, position, part, difference)

    def varies(rows: list[int]) -> bool:
        pairs = zip([alone[row] for row in rows], subject.outputs(rows), strict=True)
        return any(first_difference(a, b) is not None for one, many in pairs for a, b in zip(one, many, strict=True))

    try:
        if "R" in relations:
            _check_rows_run_to_run(name, subject, tally)
        if "I" in relations:
            for rows in _swept_rows(subject.pool):
                error = _variance_of(lambda rows=rows: check(rows))
                if error is not None:
                    smallest = _smallest(rows, _simpler_rows, varies)
                    raise _variance_of(lambda rows=smallest: check(rows)) or error
            most = min(300, max(2 * subject.pool, 2))
            choices = strategies.row_choices(subject.pool, most)
            _search(check, choices, max_examples, f"rows/{name}", seed)
    except BatchVarianceError as error:
        tally.verdict = "differs"
        tally.difference = asdict(error.difference) | {"sizes": list(error.sizes)}
        raise
    finally:
        tally.seconds, tally.hits = time.perf_counter() - started, _grown(before)
        records.emit(tally)
    return tally


class _AloneOutputs(dict):
    """Each row's outputs alone, computed at the first look."""

    def __init__(self, subject) -> None:
        super().__init__()
        self._subject = subject

    def __missing__(self, row: int) -> tuple[Tensor, ...]:
        self[row] = self._subject.outputs([row])[0]
        return self[row]


def _check_rows_run_to_run(name: str, subject, tally: Record) -> None:
    __tracebackhide__ = _hide_variance
    for rows in ([0], list(range(subject.pool))):
        for position, (first, second) in enumerate(zip(subject.outputs(rows), subject.outputs(rows), strict=True)):
            for part, (a, b) in enumerate(zip(first, second, strict=True)):
                tally.compared_bytes += a.nbytes
                difference = first_difference(a, b)
                if difference is not None:
                    message = (
                        f"{name}: {_MEANING['R']}.\n  rows        {rows}\n  row         {rows[position]}, output {part}\n"
                        f"  difference  {difference}"
                    )
                    raise BatchVarianceError(message, difference, None, ())


def _swept_rows(pool: int) -> Iterator[list[int]]:
    """Every swept size, with row 0 first, last, at 15 and at 31; the other rows in turn as neighbours."""
    for n_rows in strategies.SWEPT_SIZES:
        for position in sorted({p % n_rows for p in strategies.SWEPT_POSITIONS if -n_rows <= p < n_rows}):
            neighbours = [(1 + i) % pool for i in range(n_rows - 1)]
            yield [*neighbours[:position], 0, *neighbours[position:]]


def _row_variance(name, subject, alone, rows, position, part, difference) -> BatchVarianceError:
    row = rows[position]
    sizes = []
    for n_rows in TRIED_SIZES:
        others = [r for i, r in enumerate(rows) if i != position] or [row]
        place = min(position, n_rows - 1)
        candidate = [others[i % len(others)] for i in range(n_rows - 1)]
        candidate.insert(place, row)
        if first_difference(alone[row][part], subject.outputs(candidate)[place][part]) is not None:
            sizes.append(n_rows)
    message = (
        f"{name}: {_MEANING['I']}.\n"
        f"  row         {row}, at position {position} of {len(rows)}, output {part}\n"
        f"  difference  {difference}\n"
        f"  sizes       {_sizes_in_words(sizes)}\n"
        f"  batch       rows {rows}\n"
        f"  replay      batch = [x.index_select({subject.batch_dim}, torch.tensor({rows})) for x in inputs]"
    )
    return BatchVarianceError(message, difference, None, sizes)


# --- shrinking what the sweep found; Hypothesis shrinks its own ------------------------------------------------------


def _variance_of(check: Callable[[], None]) -> BatchVarianceError | None:
    try:
        check()
    except BatchVarianceError as error:
        return error.with_traceback(None)  # it is raised again by the caller, whose frames are the ones to show
    return None


def _smallest(case: Any, simpler: Callable[[Any], Iterable[Any]], fails: Callable[[Any], bool]) -> Any:
    """Takes the first simpler case that fails too, until there is none."""
    while (found := next((c for c in simpler(case) if fails(c)), None)) is not None:
        case = found
    return case


def _simpler_rows(rows: Sequence[Any]) -> Iterator[list[Any]]:
    """Without a block of rows: large blocks first, the last ones first."""
    block = len(rows) // 2
    while block:
        for start in range(len(rows) - block, -1, -block):
            yield [*rows[:start], *rows[start + block :]]
        block //= 2


def _simpler_shapes(shape: BatchShape) -> Iterator[BatchShape]:
    for rows in _simpler_rows(shape.rows):
        yield shape.with_rows(*rows)
    for simple in (BatchShape(shape.rows), BatchShape(shape.rows, shape.layout)):
        if (strategies.LAYOUTS.index(simple.layout), simple.extra_padding) < (
            strategies.LAYOUTS.index(shape.layout),
            shape.extra_padding,
        ):
            yield simple
    alike = shape.with_rows(*[Row(0)] * len(shape))
    if shape != alike:
        yield alike
    for position, row in enumerate(shape.rows):
        for simple in (Row(0), Row(row.id), Row(row.id, 1, row.content), Row(row.id, row.length)):
            if (simple.length, simple.content != "random", simple.id) < (row.length, row.content != "random", row.id):
                yield shape.with_rows(*shape.rows[:position], simple, *shape.rows[position + 1 :])


# --- search ------------------------------------------------------------------------------------------------------------


def _search(
    check: Callable[[Any], None], strategy: st.SearchStrategy, max_examples: int, key: str, seed: int | None = None
) -> None:
    """Runs ``check`` on drawn examples, first those that failed before; raises its error on the smallest failing example.

    Hypothesis' own profile decides on database and derandomisation: in CI it draws the same examples every time.
    """
    __tracebackhide__ = _hide_variance

    @hypothesis.settings(
        max_examples=max_examples,
        deadline=None,
        phases=(Phase.reuse, Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
        report_multiple_bugs=False,
        print_blob=False,
    )
    @hypothesis.given(strategy)
    def example(batch):
        __tracebackhide__ = _hide_variance
        check(batch)

    # One database entry a subject: the key of Hypothesis is this function's source, the same for all of them.
    example.hypothesis.inner_test._hypothesis_internal_add_digest = key.encode()
    if seed is not None:
        example = hypothesis.seed(seed)(example)
    example()
