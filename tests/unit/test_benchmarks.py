"""The benchmarks, on a CPU and on tiny sizes: what they compute from times, and what they say about what they left out.

No time is compared with anything here.
"""

import contextlib
import dataclasses
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pytest_batchinv.kernels import cpu

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.append(str(BENCHMARKS))  # where run.py finds its modules; last, so that none hides another of the same name

import cases  # noqa: E402
import measurements  # noqa: E402
import run  # noqa: E402
import targets  # noqa: E402
import timing  # noqa: E402
import tune  # noqa: E402
from measurements import OURS, STOCK, Budget, Point, Result  # noqa: E402
from timing import Contender, Stopwatch, Timing  # noqa: E402

property_test = settings(deadline=None, derandomize=True, max_examples=200)
CPU = torch.device("cpu")


def timing_of(us: float) -> Timing:
    return Timing(us, us, us, 20, 4)


def product(ratio: float, M: int = 1, dtype: str = "bf16") -> Point:
    return Point("mm", dtype, {"K": 8, "N": 8, "M": M}, {STOCK: timing_of(10.0), OURS: timing_of(10.0 * ratio)})


def verdicts(result: Result) -> dict[str, str]:
    return {figure.what: figure.verdict(result) for figure in targets.figures(result)}


def got(result: Result, what: str) -> float | None:
    [figure] = [figure for figure in targets.figures(result) if figure.what == what]
    return figure.got


# --- tuning ---------------------------------------------------------------------------------------------------------


def test_tuning_keeps_what_it_did_not_measure_and_drops_tiles_whose_bits_differ():
    tall, wide, plain, slow = (tune.Tile(64 * i, 64, 64, 4, 3, tma=i != 3) for i in (1, 2, 3, 4))
    measured = [{"tile": list(tile), "us": us} for us, tile in enumerate((wide, tall, plain, slow))]
    before = {
        (8, 8): {1: (tall, plain), 2: (wide, plain)},
        (8, 16): {1: (slow, plain), 2: (wide, plain)},
        (9, 9): {1: (wide, plain)},
    }
    found = tune.table([{"K": 8, "N": 16, "M": 1, "tiles": measured}], {wide}, before)
    assert found == {(8, 8): {1: (tall, plain)}, (8, 16): {1: (tall, plain)}}
    assert before[8, 16][1] == (slow, plain)


# --- figures --------------------------------------------------------------------------------------------------------


@property_test
@given(st.lists(st.floats(0.01, 100.0), min_size=1, max_size=40))
def test_the_geometric_mean_of_ratios_is_the_one_whose_logarithm_is_the_mean(ratios):
    result = Result("gemm", points=[product(ratio) for ratio in ratios])
    expected = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
    assert got(result, "time / cuBLAS, bf16, geometric mean") == pytest.approx(expected, rel=1e-9)
    assert got(result, "time / cuBLAS, bf16, worst") == pytest.approx(max(ratios), rel=1e-9)


def test_twice_as_slow_and_twice_as_fast_make_one():
    result = Result("gemm", points=[product(2.0), product(0.5)])
    assert got(result, "time / cuBLAS, bf16, geometric mean") == pytest.approx(1.0)


def test_the_figure_for_few_rows_leaves_out_many_rows_and_other_dtypes():
    points = [product(0.9, M=8), product(0.9, M=32), product(1.4, M=33), product(3.0, M=1, dtype="fp32")]
    result = Result("gemm", points=points)
    assert got(result, "time / cuBLAS, bf16, M <= 32, geometric mean") == pytest.approx(0.9)
    assert got(result, "time / cuBLAS, fp32, worst") == pytest.approx(3.0)
    assert verdicts(result)["time / cuBLAS, fp32, worst"] == ""


def test_the_share_of_the_copy_is_the_lowest_of_the_sizes_beyond_the_cache():
    def rows(ours_us: float, beyond_cache: bool) -> Point:
        timings = {STOCK: timing_of(9.0), OURS: timing_of(ours_us), "copy": timing_of(8.0)}
        return Point("softmax", "bf16", {}, timings, bytes_moved=10**6, beyond_cache=beyond_cache)

    result = Result("rows", points=[rows(10.0, True), rows(8.0, True), rows(80.0, False)])
    assert got(result, "softmax, bf16, share of the copy's GB/s, lowest of the large sizes") == pytest.approx(0.8)
    assert result.points[0].gigabytes_per_second(OURS) == pytest.approx(100.0)  # 1 MB in 10 us


def test_decode_is_compared_with_the_fastest_backend():
    timings = {"flash": timing_of(12.0), "cudnn": timing_of(10.0), OURS: timing_of(11.0)}
    result = Result("attention", points=[Point("decode", "bf16", {}, timings, baseline="cudnn")])
    assert got(result, "decode / the fastest of SDPA, bf16, worst") == pytest.approx(1.1)


def test_launch_counts_microseconds_above_stock():
    point = Point("mm", "bf16", {"what": "eager call"}, {STOCK: timing_of(5.0), OURS: timing_of(12.5)})
    assert got(Result("launch", points=[point]), "mm at M=1, host us of a call over stock") == pytest.approx(7.5)


def test_a_bound_is_met_or_missed_by_all_points_only():
    met, missed = product(1.0), product(1.5)
    worst = "time / cuBLAS, bf16, worst"
    assert verdicts(Result("gemm", points=[met]))[worst] == "met"
    assert verdicts(Result("gemm", points=[met, missed]))[worst] == "missed"
    for left_out in ({"cut": ["a"]}, {"not_run": ["a"]}, {"errors": ["a"]}):
        assert verdicts(Result("gemm", points=[met], **left_out))[worst] == "incomplete"
        assert verdicts(Result("gemm", points=[missed], **left_out))[worst] == "missed"
    assert verdicts(Result("gemm", points=[met], reduced="--quick"))[worst] == "not judged: --quick"
    assert verdicts(Result("gemm"))[worst] == "not measured"


# --- how calls are timed --------------------------------------------------------------------------------------------


@property_test
@given(st.integers(1, 1 << 36), st.integers(1, 1 << 28))
def test_no_set_of_inputs_is_in_the_cache_when_its_turn_comes_again(set_bytes, cache_bytes):
    plan = timing.rotation(set_bytes, cache_bytes)
    assert plan.sets >= 1 and plan.rounds >= 1
    assert plan.sets * set_bytes > cache_bytes or plan.rounds == 1
    enough = min(timing._MAX_CALLS, -(-timing._REPLAY_BYTES // set_bytes))
    assert enough <= plan.sets * plan.rounds <= 2 * enough


@pytest.mark.parametrize("set_bytes", [1 << 11, 1 << 20, 1 << 25, 1 << 31])
def test_a_replay_moves_more_than_the_cache_holds_or_begins_with_an_empty_one(set_bytes):
    stopwatch = Stopwatch(CPU)
    plan = stopwatch.rotation(set_bytes)
    stopwatch.flush()
    assert stopwatch._flush.nbytes > stopwatch.cache_bytes > 0
    assert plan.rounds == 1 or plan.sets * set_bytes > stopwatch.cache_bytes


def test_contenders_take_turns_over_all_sets_after_a_flush_each(monkeypatch):
    stopwatch, seen = Stopwatch(CPU, quick=True), []
    monkeypatch.setattr(stopwatch, "flush", lambda: seen.append("flush"))

    def contender(name: str) -> Contender:
        return Contender(name, lambda x: seen.append((name, int(x))) or x)

    found = stopwatch.measure([contender("a"), contender("b")], [(torch.tensor(1),), (torch.tensor(2),)], 2)
    turn = [*["flush"], *[("a", 1), ("a", 2)] * 2, "flush", *[("b", 1), ("b", 2)] * 2]
    warm_up = [("a", 1), ("a", 2), ("b", 1), ("b", 2)]
    assert seen == warm_up + turn * 3
    assert {name: (timed.repeats, timed.calls) for name, timed in found.timings.items()} == {"a": (3, 4), "b": (3, 4)}


def test_a_timing_is_of_one_call():
    assert Timing.of([100.0, 200.0, 300.0, 400.0, 500.0], calls=10) == Timing(30.0, 20.0, 40.0, 5, 10)


def test_who_refuses_is_noted_and_who_must_run_raises():
    def refuse(x):
        raise ValueError("not this shape\nand more")

    stopwatch, inputs = Stopwatch(CPU, quick=True), [(torch.ones(2),)]
    runs = Contender("a", lambda x: x)
    found = stopwatch.measure([runs, Contender("b", refuse, required=False)], inputs, 1)
    assert (list(found.timings), found.refused) == (["a"], {"b": "ValueError: not this shape"})
    with pytest.raises(ValueError, match="not this shape"):
        stopwatch.measure([runs, Contender("b", refuse)], inputs, 1)


def test_distances_are_taken_within_one_work():
    stopwatch = Stopwatch(CPU, quick=True)
    several = [
        Contender("p", lambda x: x, work="one"),
        Contender("q", lambda x: (1.5 * x, None), work="one"),
        Contender("r", lambda x: 0 * x, work="two"),
    ]
    assert stopwatch.measure(several, [(torch.ones(4),)], 1).distances == pytest.approx({"p": 0, "q": 0.5, "r": 0})


class FakeGraph:
    """Records what is captured by running it, as a CUDA graph does; a replay is counted."""

    log: list[str] = []

    def capture_begin(self, pool=None):
        self.log.append("begin")

    def capture_end(self):
        self.log.append("end")

    def replay(self):
        self.log.append("replay")


class FakeEvent:
    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        FakeEvent.now += 1.0
        self.at = FakeEvent.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


@pytest.fixture
def gpu_stopwatch(monkeypatch):
    """A stopwatch that takes the GPU's way, with graphs and events that do nothing."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: FakeGraph.log.append("wait"))
    monkeypatch.setattr(FakeGraph, "log", [])
    stopwatch = Stopwatch(CPU)
    stopwatch.on_gpu, stopwatch.cache_bytes = True, 1 << 10
    return stopwatch


def test_on_a_gpu_replays_are_queued_without_waiting_in_between(gpu_stopwatch):
    both = [Contender(name, lambda x: x + 1) for name in "ab"]
    found = gpu_stopwatch.measure(both, [(torch.ones(2),)], 3)
    assert FakeGraph.log[:6] == ["begin", "end", "begin", "end", "replay", "replay"]
    assert [entry for entry in FakeGraph.log[4:] if entry == "wait"] == ["wait"] * 2  # after the warm-up, and at the end
    assert FakeGraph.log[6] == FakeGraph.log[-1] == "wait"
    repeats = found.timings["a"].repeats
    assert timing.MIN_REPEATS <= repeats <= timing.MAX_REPEATS
    assert FakeGraph.log.count("replay") == 2 + 2 * repeats
    assert found.timings["a"].median_us == pytest.approx(1000 / 3)  # 1 ms a replay of 3 calls


@pytest.mark.parametrize("case", sorted(cases.SECONDS))
def test_the_gpu_way_through_a_case(case, gpu_stopwatch):
    options = cases.Options(CPU, quick=True, model="tiny-qwen3", compiled=False)
    result = Result(case)
    with torch.no_grad():
        gpu_stopwatch.rotation = lambda set_bytes: timing.Rotation(2, 2)
        cases.module_of(case).run(cases.Bench(options, gpu_stopwatch, Budget(600), result))
    assert (result.errors, result.cut) == ([], [])
    assert all({point.baseline, OURS} <= point.timings.keys() for point in result.points) and result.points


def test_attention_is_compared_with_the_backend_found_fastest(gpu_stopwatch, monkeypatch):
    found = timing.Measured({"flash": timing_of(12.0), "math": timing_of(10.0), OURS: timing_of(11.0)}, {}, {OURS: 0.0})
    monkeypatch.setattr(gpu_stopwatch, "measure", lambda *args: found)
    monkeypatch.setattr(gpu_stopwatch, "rotation", lambda set_bytes: timing.Rotation(1, 1))
    result = Result("attention")
    cases.module_of("attention").run(cases.Bench(cases.Options(CPU, quick=True), gpu_stopwatch, Budget(600), result))
    decode = [point for point in result.points if point.work == "decode"]
    assert {point.baseline for point in decode} == {"math"} and decode[0].ratio() == pytest.approx(1.1)


# --- the budget -----------------------------------------------------------------------------------------------------


@property_test
@given(st.lists(st.floats(0.1, 10), max_size=20), st.floats(0, 60))
def test_what_no_time_is_left_for_is_named_in_order(costs, seconds):
    now = [0.0]
    result, done = Result("gemm"), []
    budget = Budget(seconds, clock=lambda: now[0])
    for index in budget.affordable(range(len(costs)), result):
        done.append(index)
        now[0] += costs[index]
    assert sorted([*done, *map(int, result.cut)]) == list(range(len(costs)))
    assert [int(name) for name in result.cut] == sorted(map(int, result.cut))
    if done:  # what was begun had the time of the longest before it
        before = costs[: done[-1]]
        assert sum(costs[i] for i in done[:-1]) + max((costs[i] for i in done[:-1]), default=0) <= seconds, before


def test_without_time_every_point_is_named_as_cut(tmp_path, capsys):
    arguments = ["--device", "cpu", "--quick", "--no-compile", "--seconds", "0", "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    printed = capsys.readouterr().out
    results = measurements.read(tmp_path)
    assert {result.case for result in results} == set(cases.SECONDS)
    for result in results:
        assert not result.points and result.cut
        for label in result.cut:
            assert f"{result.case}: cut, as the time ran out: {label}" in printed
    assert "met" not in printed.split()


def test_an_error_ends_one_point_and_not_the_case(tmp_path, monkeypatch, capsys):
    gemm = cpu.gemm

    def fails_for_one_size(a, b, *args):
        if a.shape[-1] == 100:
            raise RuntimeError("no tile for this size")
        return gemm(a, b, *args)

    monkeypatch.setattr(cpu, "gemm", fails_for_one_size)
    assert run.main(["--device", "cpu", "--quick", "--only", "gemm", "--out", str(tmp_path)]) == 1
    [result] = measurements.read(tmp_path)
    assert [point.sizes["K"] for point in result.points] == [64, 64]
    assert len(result.errors) == 2 and "no tile for this size" in result.errors[0]
    assert "error: mm bf16 K=100 N=77 M=1: RuntimeError: no tile" in capsys.readouterr().out


def test_a_wrong_kernel_is_an_error_however_fast(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu, "row_rms_norm", lambda x, weight, eps: (torch.zeros_like(x), None))
    assert run.main(["--device", "cpu", "--quick", "--only", "rows", "--out", str(tmp_path)]) == 1
    [result] = measurements.read(tmp_path)
    assert len(result.errors) == 4 and all(error.startswith("rms_norm") for error in result.errors)


def test_nan_is_wrong_too():
    result = Result("gemm")
    cases.Bench(None, None, None, result).check("mm", "bf16", math.nan)
    assert len(result.errors) == 1


@pytest.mark.parametrize("case", ["forward", "launch"])
def test_a_mode_that_does_nothing_is_an_error(case, tmp_path, monkeypatch):
    @contextlib.contextmanager
    def idle():
        yield SimpleNamespace(hits={})

    monkeypatch.setattr(cases.module_of(case), "batch_invariant_mode", idle)
    arguments = ["--device", "cpu", "--quick", "--no-compile", "--only", case, "--out", str(tmp_path)]
    assert run.main(arguments) == 1
    [result] = measurements.read(tmp_path)
    assert result.errors and all("ModeDidNothing" in error for error in result.errors)


# --- files and the table --------------------------------------------------------------------------------------------

words = st.text(max_size=8)
numbers = st.floats(0, 1e9)
timings = st.builds(Timing, numbers, numbers, numbers, st.integers(1, 99), st.integers(1, 99))
points = st.builds(
    Point,
    work=words,
    dtype=words,
    sizes=st.dictionaries(words, st.integers() | words, max_size=3),
    timings=st.dictionaries(words, timings, max_size=3),
    bytes_moved=st.integers(0, 1 << 40),
    beyond_cache=st.booleans(),
    distance=numbers,
    refused=st.dictionaries(words, words, max_size=2),
    notes=st.lists(words, max_size=2),
)
results = st.builds(
    Result,
    case=st.sampled_from(sorted(cases.SECONDS)),
    reduced=words,
    points=st.lists(points, max_size=3),
    cut=st.lists(words, max_size=2),
    not_run=st.lists(words, max_size=2),
    errors=st.lists(words, max_size=2),
    machine=st.dictionaries(words, words, max_size=2),
    command=words,
    seconds=numbers,
)


@property_test
@given(results)
def test_json_there_and_back(result):
    assert Result.from_json(result.to_json()) == result


@pytest.mark.parametrize(
    "text, says",
    [("[]", "lacks the field 'benchmark'"), ("{}", "lacks the field"), ('{"benchmark": "gemm", "schema": 99}', "schema 99")],
)
def test_json_of_something_else_is_refused(text, says):
    with pytest.raises(ValueError, match=says):
        Result.from_json(text)


@pytest.mark.parametrize("case", sorted(cases.SECONDS))
def test_every_case_runs_on_a_cpu_and_shows_what_it_wrote(case, tmp_path, capsys):
    arguments = ["--device", "cpu", "--quick", "--no-compile", "--only", case, "--out", str(tmp_path)]
    assert run.main(arguments) == 0
    [first, *table] = capsys.readouterr().out.splitlines()
    assert first.startswith(f"{case}: ")
    [result] = measurements.read(tmp_path)
    assert result.points and not result.errors and not result.cut
    assert all({point.baseline, OURS} <= point.timings.keys() for point in result.points)
    assert {"torch", "python", "device"} <= result.machine.keys()

    (tmp_path / "of-somebody-else.json").write_text('{"cases": {}}')
    assert run.main(["--show", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == table


def test_the_csv_has_a_line_for_each_contender(tmp_path):
    result = Result("gemm", points=[product(2.0), product(0.5, M=8)], machine={"gpu": "G", "driver": "1"})
    measurements.write(result, tmp_path)
    header, *lines = (tmp_path / "gemm.csv").read_text().splitlines()
    assert len(lines) == 4
    first = dict(zip(header.split(","), lines[0].split(","), strict=True))
    assert (first["contender"], first["M"], first["ours_over_contender"], first["gpu"]) == (STOCK, "1", "2.0000", "G")


def test_the_table_tells_bound_reached_and_verdict(tmp_path, capsys):
    result = Result("gemm", points=[product(1.3), product(0.9, M=8)], cut=["mm bf16 K=1"], machine={"gpu": "G", "torch": "2"})
    measurements.write(result, tmp_path)
    assert run.main(["--show", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "G, torch 2"
    [worst] = [line for line in lines if "worst" in line]
    assert worst.split() == ("gemm time / cuBLAS, bf16, worst <= 1.20 1.300 2 missed; at mm bf16 K=8 N=8 M=1".split())
    assert lines[-1] == "gemm: cut, as the time ran out: mm bf16 K=1"


def test_a_missed_bound_is_no_failure_of_the_run(tmp_path, monkeypatch):
    def slow(bench):
        bench.result.points.append(product(9.0))

    monkeypatch.setattr(cases.module_of("gemm"), "run", slow)
    monkeypatch.setattr(run, "_reduced", lambda case, options: "")
    assert run.main(["--device", "cpu", "--only", "gemm", "--out", str(tmp_path)]) == 0
    [result] = measurements.read(tmp_path)
    assert verdicts(result)["time / cuBLAS, bf16, worst"] == "missed"


def test_an_empty_folder_is_said_to_be_empty(tmp_path, capsys):
    assert run.main(["--show", str(tmp_path)]) == 1
    assert "there are no results in" in capsys.readouterr().err


def test_an_unknown_case_and_an_unknown_forward_are_refused(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run.main(["--out", str(tmp_path), "--only", "gem"])
    assert "unknown: gem; choose from gemm" in capsys.readouterr().err
    arguments = ["--device", "cpu", "--quick", "--only", "forward", "--forwards", "decode-9", "--out", str(tmp_path)]
    assert run.main(arguments) == 1
    [result] = measurements.read(tmp_path)
    assert "there is no forward decode-9; --forwards takes prefill, decode-2" in result.errors[0]


# --- peers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body, runs", [("return a @ b", True), ("raise ValueError('not on a CPU')", False)])
def test_an_installed_peer_is_timed_or_its_refusal_noted(body, runs, tmp_path, monkeypatch):
    package = tmp_path / "site" / "batch_invariant_ops"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "batch_invariant_ops.py").write_text(f"def matmul_persistent(a, b):\n    {body}\n")
    monkeypatch.syspath_prepend(package.parent)
    try:
        assert run.main(["--device", "cpu", "--quick", "--only", "gemm", "--out", str(tmp_path)]) == 0
    finally:
        for name in [name for name in sys.modules if name.startswith("batch_invariant_ops")]:
            del sys.modules[name]
    [result] = measurements.read(tmp_path)
    assert all(("batch_invariant_ops" in point.timings) == runs for point in result.points)
    assert all(("batch_invariant_ops" in point.refused) != runs for point in result.points)


# --- pictures -------------------------------------------------------------------------------------------------------


def test_every_case_has_its_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="pictures need matplotlib")
    import plot

    run.main(["--device", "cpu", "--quick", "--no-compile", "--out", str(tmp_path)])
    assert plot.main([str(tmp_path)]) == 0
    assert (
        {path.stem for path in tmp_path.glob("*.png")} == {path.stem for path in tmp_path.glob("*.svg")} == set(cases.SECONDS)
    )


def test_a_record_of_another_schema_is_not_taken_for_one(tmp_path):
    text = json.loads(Result("gemm").to_json())
    (tmp_path / "gemm.json").write_text(json.dumps({**text, "schema": measurements.SCHEMA + 1}))
    with pytest.raises(ValueError, match="schema"):
        measurements.read(tmp_path)


def test_options_of_the_full_run_are_those_of_the_promise():
    options = cases.Options(torch.device("cuda", 0))
    assert dataclasses.asdict(options) | {"device": None} == {
        "device": None,
        "dtypes": ("bf16",),
        "quick": False,
        "model": "random:qwen3-8b",
        "layers": None,
        "compiled": True,
        "forwards": (),
    }
    assert run._reduced("forward", options) == ""
    assert run._reduced("forward", dataclasses.replace(options, layers=4)) == "--layers 4"
