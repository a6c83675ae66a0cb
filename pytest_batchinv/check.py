"""The check: one loop for every subject and relation, from the search to an immutable record."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from pytest_batchinv import context, mode, relations
from pytest_batchinv.diagnose import account, coverage
from pytest_batchinv.kernels import counters
from pytest_batchinv.kernels.aten.common import Refused
from pytest_batchinv.relations import Relation
from pytest_batchinv.report import message
from pytest_batchinv.report.record import Finding, Mode, OpCoverage, Record, Verdict, machine
from pytest_batchinv.search.find import Broken, Search
from pytest_batchinv.search.runs import SubjectRuns
from pytest_batchinv.shapes import BatchShape, chosen_evenly
from pytest_batchinv.subjects.base import NotRun, Subject
from pytest_batchinv.subjects.rows import RowsSubject


class BatchVarianceError(AssertionError):
    """A row's outputs were not the same on the two sides of a relation. ``record`` has all of it, ``finding`` the case."""

    __module__ = "pytest_batchinv"  # the name that it is imported by; pytest's summary has little room

    def __init__(self, record: Record) -> None:
        super().__init__(message.describe(record))
        assert record.finding is not None
        self.record, self.finding = record, record.finding

    @property
    def shape(self) -> BatchShape:
        """The smallest batch found that shows it."""
        return BatchShape.from_json(self.finding.case)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Batch sizes at which the row's bits are not those alone."""
        return self.finding.breakpoints.sizes if self.finding.breakpoints else ()


class UnverifiedError(RuntimeError):
    """Every row kept its bits, but operators ran that nobody vouches for, and the check is strict."""


def check_batch_invariant(
    subject: Subject,
    relations: Sequence[str] = ("R", "S", "I", "X"),
    *,
    max_examples: int | None = None,
    seed: int | None = None,
    case: BatchShape | None = None,
) -> list[Record]:
    """Checks the relations, in the order R, S, I, L, C, D, G, T, X, and then N, the negative control, if it is asked for.

    Each gives a record. ``case`` runs that one batch shape instead of a search, as ``--batchinv-shape`` does; ``seed`` fixes
    what is drawn (and turns the example database off). X is left out of a subject in eager mode. L, C, D and T are for models.

    Raises BatchVarianceError at the first relation that does not hold; what the subject raises; NotRun where no case could
    run. The record has been handed on before. Raises ValueError for an unknown relation.
    """
    __tracebackhide__ = True
    asked = [letter for letter in relations if letter != "N"]
    records = []
    if asked or not relations:
        records = _all_checked(_Given("check_batch_invariant", subject, asked, max_examples, seed, case))
    if "N" in relations:
        records.append(check_negative_control(subject, max_examples=max_examples, seed=seed))
    return records


def check_engine(
    engine: Subject,
    *,
    relations: Sequence[str] = ("R", "I"),
    max_examples: int | None = None,
    shape: BatchShape | None = None,
) -> list[Record]:
    """The name of ``check_batch_invariant`` up to 0.1; it will go."""
    __tracebackhide__ = True
    return check_batch_invariant(engine, relations, max_examples=max_examples, case=shape)


def assert_batch_invariant(
    fn: Callable[..., Any],
    *inputs: Any,
    batch_dim: int = 0,
    relations: Sequence[str] = ("R", "I"),
    compile_mode: str | None = None,
    max_examples: int | None = None,
    seed: int | None = None,
    case: BatchShape | None = None,
    collate: Callable[..., Any] | None = None,
) -> Record:
    """Asserts that ``fn`` gives each row the same bits alone and in any batch.

    inputs: tensors whose ``batch_dim`` indexes one pool of rows, or with ``collate`` lists of ragged rows (tensors,
    arrays of numpy, strings, lists, dicts), of which ``collate(rows, ...)`` makes the arguments of fn: a mapping goes to it by
    name, a tuple by position. ``fn(*batch)`` returns a tensor, or a tuple, dict or list of tensors, of
    which row i along ``batch_dim`` belongs to row i of the batch. Works with the mode on or off. compile_mode: runs
    ``torch.compile(fn)`` in this mode, which relation X compares with eager code. The rest: ``check_batch_invariant``.

    Returns the record of the last relation that was checked.
    """
    __tracebackhide__ = True
    if "X" in relations and compile_mode is None:
        compile_mode = "default"
    try:
        subject = RowsSubject(fn, inputs, batch_dim, compile_mode=compile_mode, collate=collate)
        given = _Given("assert_batch_invariant", subject, relations, max_examples, seed, case)
    except ValueError as error:
        raise error.with_traceback(_users_frames(error.__traceback__, is_a_sentence=True)) from None
    return _all_checked(given)[-1]


def check_negative_control(
    subject: Subject, relation: str = "I", *, max_examples: int | None = None, seed: int | None = None
) -> Record:
    """The same search under stock torch: it must find a batch that breaks the relation.

    Verdict "caught" with the batch, or "inconclusive" where none is found: then equal verdicts of the mode say little about
    this machine. Raises what the subject raises.
    """
    __tracebackhide__ = True
    given = _Given("check_negative_control", subject, (relation,), max_examples, seed, None)
    if subject.info.elsewhere:
        raise ValueError(f"{subject.info.name} is computed by {subject.info.device}, where stock_torch() changes nothing")
    with mode.stock_torch():
        record, error = _check(given, given.relations[0], control=True)
    context.current().emit(record)
    if error is not None and not isinstance(error, BatchVarianceError):
        raise error.with_traceback(_users_frames(error.__traceback__))
    return record


class _Given:
    """What a check was asked for, with the defaults filled in."""

    def __init__(
        self,
        who: str,
        subject: Subject,
        letters: Sequence[str],
        max_examples: int | None,
        seed: int | None,
        case: BatchShape | None,
    ) -> None:
        surrounding = context.current()
        if max_examples is not None and (type(max_examples) is not int or max_examples < 1):
            raise ValueError(f"{who}: max_examples={max_examples!r} is not a whole number from 1 on")
        if case is not None and not isinstance(case, BatchShape):
            raise ValueError(f"{who}: case={case!r} is no BatchShape; BatchShape.from_json() makes one of a replay line's text")
        self.relations = relations.chosen(letters, who)
        self.subject = subject
        self.max_examples = max_examples or surrounding.max_examples
        self.seed = surrounding.seed if seed is None else seed
        self.case = case or surrounding.case
        self.case_is_own = case is not None


def _all_checked(given: _Given) -> list[Record]:
    __tracebackhide__ = True
    records = []
    for relation in given.relations:
        if relation.applies(given.subject):
            record, error = _check(given, relation)
            context.current().emit(record)
            if error is not None:
                raise error.with_traceback(_users_frames(error.__traceback__))
            records.append(record)
    return records


def _users_frames(traceback: TracebackType | None, is_a_sentence: bool = False) -> TracebackType | None:
    """A traceback without our own frames, but for those in which the error was raised: a fault of ours stays visible.

    is_a_sentence: where it is about what the user gave, these say nothing, either.
    """
    frames = []
    while traceback is not None:
        frames.append(traceback)
        traceback = traceback.tb_next
    ours = [frame.tb_frame.f_code.co_filename.startswith(_OURS) for frame in frames]
    if not frames or ours[-1] and not is_a_sentence:
        return frames[0] if frames else None
    kept = None
    for frame, is_ours in zip(reversed(frames), reversed(ours), strict=True):
        if not is_ours:
            kept = TracebackType(kept, frame.tb_frame, frame.tb_lasti, frame.tb_lineno)
    return kept


_OURS = str(Path(__file__).parent)


def _check(given: _Given, relation: Relation, control: bool = False) -> tuple[Record, BaseException | None]:
    """One relation: search, diagnosis, record. What was found, or raised, comes back as an error, and is in the record."""
    obstacle = relation.obstacle(given.subject)
    runs = SubjectRuns(given.subject if obstacle else relation.subject_of(given.subject))
    search = Search(relation, runs, given.max_examples, given.seed)
    before = Counter(counters.hits())
    case = None if control else given.case
    error: BaseException | None = None
    try:
        if obstacle:
            raise NotRun(obstacle)
        if case is not None:
            search.replay(case)
        else:
            search.find()
        if not runs.stats.examples:
            raise NotRun(f"no batch could run, so nothing was compared: {runs.stats.skipped[0].reason}")
        if not runs.stats.compared_bytes and search.broken is None:
            raise NotRun("the outputs hold no values, so nothing was compared")
    except BaseException as caught:  # an interruption, too, has a record
        error = caught
    broken = search.broken
    # Before the diagnosis, which runs the subject again.
    counts, hits = runs.stats.counts(), dict(Counter(counters.hits()) - before)
    notes = _notes(given, case)
    if runs.subject is not given.subject:
        notes += runs.subject.notes()
    verdict = _verdict(broken, error, control)
    finding, ops = None, None
    try:
        if broken is not None:
            finding = account.bare(broken, relation, runs)
            finding = finding if error is not None else account.explained(finding, broken, relation, runs)
        ops = _op_coverage(runs.subject, relation, error)
        if verdict == "equal" and ops is not None and ops.bypassed:
            error = mode.ModeError(
                f"batch-invariant mode was on, but {', '.join(ops.bypassed)} ran past the table, so equal bits prove nothing "
                "about it. Look for what redirects these operators: stock_torch(), another library's mode, a dispatch key."
            )
            verdict = "error"
        elif verdict == "equal" and context.current().strict and (doubt := _doubt(ops)):
            error, verdict = UnverifiedError(doubt), "error"
    except KeyboardInterrupt as interruption:
        error = interruption
    record = Record(
        subject=runs.subject.info,
        relation=relation.letter,
        verdict=verdict,
        mode="elsewhere" if runs.subject.info.elsewhere else _mode(control),
        control=control,
        counts=counts,
        covered=("the one batch that was given",) if case is not None else search.coverage.words(),
        finding=finding,
        error="" if error is None else f"{type(error).__name__}: {error}".rstrip(": "),
        case=_case_of(finding, error, runs.last),
        replayed=case is not None,
        ops=ops,
        hits=hits,
        not_run=tuple(runs.stats.skipped),
        notes=notes,
        seed=given.seed,
        machine=machine(),
        fingerprint=mode.fingerprint(),
        receipt=mode.receipt(),
    )
    if isinstance(error, NotRun) and (obstacle or case is not None and not given.case_is_own):
        return record, None  # the case is another subject's of this test, or the relation has nothing to ask here
    return record, BatchVarianceError(record) if finding is not None and error is None else error


def _verdict(broken: Broken | None, error: BaseException | None, control: bool) -> Verdict:
    if broken is not None:
        differs: Verdict = "shape_differs" if broken.found.difference.kind == "shape" else "differs"
        return "caught" if control else differs
    if error is None:
        return "inconclusive" if control else "equal"
    if _is_refusal(error):
        return "refused"
    if isinstance(error, NotRun):
        return "not_run"
    return "error" if isinstance(error, Exception) else "interrupted"


def _is_refusal(error: BaseException | None) -> bool:
    """Also where Dynamo, autograd or the user have wrapped it."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, Refused):
            return True
        error = getattr(error, "inner_exception", None) or error.__cause__ or error.__context__
    return False


def _doubt(ops: OpCoverage | None) -> str:
    """Why the mode does not vouch for all that ran; "" where it does, or where it is off and vouches for nothing."""
    if ops is None:
        return ""
    if ops.error:
        return f"it is not known which operators ran ({ops.error}), and --batchinv-strict asks for all of them to be known."
    if not ops.unverified:
        return ""
    what_to_do = (
        ops.not_scanned or "docs/coverage.md says what the scan saw of them. Use others, or leave --batchinv-strict out"
    )
    return (
        f"{', '.join(ops.unverified)} ran, which are neither in the table nor known to keep the bits of a row, and "
        f"--batchinv-strict allows no such operator: {what_to_do}."
    )


def _mode(control: bool) -> Mode:
    return "stock" if control else "on" if mode.is_on() else "off"


def _op_coverage(subject: Subject, relation: Relation, error: BaseException | None) -> OpCoverage | None:
    """Which operators ran; None with the mode off, which vouches for none."""
    if not mode.is_on() or error is not None or subject.info.elsewhere:
        return None
    space = subject.space
    try:
        in_steps = [case for case in relation.cases(space).first if case.steps]  # a cache has operators of its own
        plain = (BatchShape(space.palette[:1]), BatchShape(space.palette[:3]))
        return coverage.op_coverage(subject, (*plain, *chosen_evenly(in_steps, 3)))
    except Exception as why:
        return OpCoverage(error=f"{type(why).__name__}: {why}")


def _case_of(finding: Finding | None, error: BaseException | None, last: BatchShape | None) -> str:
    if finding is not None:
        return finding.case
    return last.to_json() if error is not None and last is not None else ""


def _notes(given: _Given, case: BatchShape | None) -> tuple[str, ...]:
    left_out = (*given.subject.space.left_out, *given.subject.notes())
    if case is None or not case.pool or case.pool == (now := given.subject.digest()):
        return left_out
    return (
        *left_out,
        f"the rows are not those of the finding (pool {case.pool} then, {now} now): the test draws other numbers. Seed them, "
        "or find it with --batch-invariant, which starts every test from one seed",
    )
