"""Tests in batch-invariant mode: skipped without the option, in the mode with it, and not passing for nothing."""

import re

import pytest


def test_without_the_option_what_needs_the_mode_is_skipped(pytester, run):
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.batch_invariant
        def test_marked(): raise AssertionError("it ran")

        def test_with_the_fixture(batch_invariant): raise AssertionError("it ran")

        def test_with_the_engine(batchinv_engine): raise AssertionError("it ran")

        def test_that_asks_while_it_runs(request): request.getfixturevalue("batch_invariant")

        def test_of_somebody_else(): pass
        """
    )
    result = run("-rs")
    result.assert_outcomes(skipped=4, passed=1)
    assert sum(int(n) for n in re.findall(r"SKIPPED \[(\d)\].* needs --batch-invariant", result.stdout.str())) == 4


def test_the_mode_is_on_in_the_test_and_its_fixtures_and_off_elsewhere(pytester, run):
    pytester.makepyfile(
        """
        import pytest
        from conftest import Mode

        @pytest.fixture
        def depth_in_fixture():
            yield Mode.depth
            assert Mode.depth == 1

        @pytest.mark.batch_invariant
        def test_marked(depth_in_fixture, batch_invariant):
            batch_invariant.hits["aten::mm"] = 1
            assert depth_in_fixture == Mode.depth == 1

        def test_with_the_fixture(depth_in_fixture, batch_invariant):
            batch_invariant.hits["aten::mm"] = 1
            assert depth_in_fixture == Mode.depth == 1

        def test_that_asks_while_it_runs(request):
            request.getfixturevalue("batch_invariant").hits["aten::mm"] = 1
            assert Mode.depth == 1

        def test_of_somebody_else():
            assert Mode.depth == 0
        """
    )
    run("--batch-invariant").assert_outcomes(passed=4)


def test_the_mode_is_left_after_a_failure(pytester):
    pytester.makepyfile(
        """
        import pytest
        from conftest import Mode

        @pytest.fixture
        def broken(): raise RuntimeError

        @pytest.mark.batch_invariant
        def test_failing(): assert False

        @pytest.mark.batch_invariant
        def test_broken(broken): pass

        def test_after(): assert Mode.depth == 0
        """
    )
    pytester.runpytest_inprocess("--batch-invariant", "--batchinv-device=cpu").assert_outcomes(failed=1, errors=1, passed=1)


def test_a_test_whose_mode_did_nothing_fails(pytester, run):
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.batch_invariant
        def test_idle(): pass

        @pytest.mark.batch_invariant
        def test_skipped(): pytest.skip("it has a reason")

        @pytest.mark.batch_invariant
        @pytest.mark.xfail
        def test_xfailed(): assert False
        """
    )
    result = run("--batch-invariant")
    result.assert_outcomes(failed=1, skipped=1, xfailed=1)
    result.stdout.fnmatch_lines(["*test_idle passed, but batch-invariant mode replaced no operation in it and no check*so it*"])


def test_a_check_that_compared_something_is_proof_enough_and_one_that_did_not_is_none(pytester, run):
    pytester.makepyfile(
        """
        import pytest
        from conftest import emit
        from pytest_batchinv.report.record import Counts

        @pytest.mark.batch_invariant
        def test_of_an_own_kernel(): emit("I")

        @pytest.mark.batch_invariant
        def test_that_compares_nothing(batch_invariant):
            batch_invariant.hits["aten::mm"] = 1
            emit("I", "not_run", counts=Counts(), error="NotRun: there is no row 300 in a pool of 40")

        @pytest.mark.batch_invariant
        def test_that_builds_a_model_only(batchinv_engine): pass
        """
    )
    result = run("--batch-invariant")
    result.assert_outcomes(passed=1, failed=2)
    result.stdout.fnmatch_lines_random(
        [
            "*test_that_compares_nothing passed, but its checks compared nothing, so it proves nothing: *no row 300*",
            "*test_that_builds_a_model_only passed, but batch-invariant mode replaced no operation *so it proves nothing.",
        ]
    )


@pytest.mark.parametrize("order", [1, -1])
def test_wider_fixtures_are_built_outside_of_the_mode_whoever_asks_first(pytester, run, order):
    tests = [
        """
        @pytest.mark.batch_invariant
        def test_marked(depths, request, function, batch_invariant):
            batch_invariant.hits["aten::mm"] = 1
            assert (depths, function, Mode.depth) == ({"session": 0, "module": 0}, 1, 1)
            assert request.getfixturevalue("asked_for_late") == 0
            assert Mode.depth == 1
        """,
        """
        def test_plain(depths, asked_for_late, function):
            assert (depths, asked_for_late, function, Mode.depth) == ({"session": 0, "module": 0}, 0, 0, 0)
        """,
    ]
    pytester.makepyfile(
        """
        import pytest
        from conftest import Mode

        @pytest.fixture(scope="session", autouse=True)
        def session(): return Mode.depth

        @pytest.fixture(scope="module")
        def depths(session): return {"session": session, "module": Mode.depth}

        @pytest.fixture(scope="class")
        def asked_for_late(): return Mode.depth

        @pytest.fixture
        def function(): return Mode.depth
        """
        + "".join(tests[::order])
    )
    run("--batch-invariant").assert_outcomes(passed=2)


def test_a_test_alone_draws_what_it_drew_among_others(pytester, run):
    pytester.makepyfile(
        """
        import random
        import pytest

        DRAWN = random.random()

        @pytest.fixture(scope="session")
        def session(): return random.random()

        @pytest.fixture(scope="module")
        def module(): return random.random()

        @pytest.fixture
        def function(): return random.random()

        @pytest.mark.parametrize("i", range(3))
        def test_it(session, module, function, i):
            drawn = (DRAWN, session, module, function, random.random())
            assert len({session, module, function}) == 3
            with open(f"drawn-{i}", "a") as file:
                file.write(f"{drawn}\\n")
        """
    )
    for more in ([], ["-k", "test_it and 2"], ["--batchinv-seed=5"], ["--batchinv-seed=5", "-k", "test_it and 2"]):
        run("--batch-invariant", *more)
    drawn = [path.read_text().splitlines() for path in sorted(pytester.path.glob("drawn-*"))]
    assert drawn[0] == drawn[1] == [drawn[2][0], drawn[2][2]]
    assert drawn[2][0] == drawn[2][1] != drawn[2][2] == drawn[2][3]


def test_a_mode_that_refuses_is_an_error_of_one_sentence(pytester):
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.batch_invariant
        def test_it(): pass
        """
    )
    pytester.makeconftest(
        pytester.path.joinpath("conftest.py").read_text()
        + """
def refuse(): raise ModeError("another library holds aten::mm")

sys.modules["pytest_batchinv.mode"].batch_invariant_mode = refuse
"""
    )
    result = pytester.runpytest_inprocess("--batch-invariant", "--batchinv-device=cpu")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["another library holds aten::mm"])
    result.stdout.no_fnmatch_line("*Traceback*")
    result.stdout.no_fnmatch_line("*lifecycle.py*")


@pytest.mark.parametrize(
    "marker, says",
    [
        ("batch_invariant('R')", "batch_invariant takes relations, max_examples, dtype and ranks by name only, not 'R'"),
        ("batch_invariant(relation='R')", "takes no argument 'relation'; it takes relations, max_examples, dtype and ranks"),
        ("batch_invariant(relations='R,Q')", "no such relation as 'Q'; ask for one or more of R (run to run), S*I*X*N*"),
        ("batch_invariant(relations=7)", "relations=7 is neither a string such as 'R,I' nor a tuple*"),
        ("batch_invariant(dtype='int8')", "'int8' is not among the choices: bf16, fp16, fp32, fp64"),
        ("batch_invariant(max_examples=0)", "batch_invariant: max_examples=0 is not a whole number from 1 on"),
        ("batch_invariant(max_examples='3')", "max_examples='3' is not a whole number from 1 on"),
        ("compile_mode()", "compile_mode names no mode; name one or more of eager, default,*"),
        ("compile_mode('fast')", "no such mode as 'fast'; name one or more of eager, default,*"),
        ("compile_mode('eager', 'eager')", "compile_mode names a mode twice*"),
        ("compile_mode(mode='eager')", "compile_mode takes no argument 'mode', only the names of modes"),
        ("sm()", "sm names no compute capability; write sm(80)*"),
        ("sm('80')", "sm: '80' is not a whole number from 80 on; write 80 for an A100*"),
        ("sm(75)", "sm: 75 is not a whole number from 80 on*"),
        ("sm(capability=80)", "sm takes no argument 'capability'*"),
    ],
)
def test_a_wrong_marker_is_named_with_what_is_right(pytester, marker, says):
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.{marker}
        def test_it(compile_mode): pass
        """
    )
    result = pytester.runpytest_inprocess()
    assert result.ret == pytest.ExitCode.INTERRUPTED
    escaped = says.replace("[", "[[]")
    result.stdout.fnmatch_lines([f"*test_it: *{escaped}*"])
    result.stdout.no_fnmatch_line("*markers.py*")


def test_a_wrong_marker_is_named_under_xdist_and_on_a_testcase(pytester, run):
    pytester.makepyfile(
        test_function="""
        import pytest

        @pytest.mark.sm(7)
        def test_it(): pass
        """,
        test_case="""
        import pytest, unittest

        class TestCase(unittest.TestCase):
            @pytest.mark.sm(7)
            def test_in_a_case(self): pass
        """,
    )
    result = run("--continue-on-collection-errors")
    result.assert_outcomes(errors=2)
    result.stdout.fnmatch_lines_random(["*test_it: sm: 7 is not a whole number*", "sm: 7 is not a whole number*"])


def test_compile_mode_gives_one_item_for_each_mode(pytester, run):
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.compile_mode("eager", "default", "max-autotune")
        def test_it(compile_mode, request):
            assert compile_mode in request.node.name

        def test_without_the_marker(compile_mode):
            assert compile_mode == "eager"
        """
    )
    result = run("-v", "-rs")
    result.assert_outcomes(passed=3, skipped=1)
    result.stdout.fnmatch_lines_random(
        [
            "*test_it?eager? *",
            "*test_it?default? *",
            "*compile mode max-autotune needs a CUDA GPU; this run is on the cpu",
        ]
    )


def test_compile_mode_without_its_fixture_is_an_error(pytester):
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.compile_mode("eager")
        def test_it(): pass
        """
    )
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["*test_it: compile_mode has no effect: let the test request the fixture compile_mode or*"])


def test_sm_skips_with_what_is_needed_and_what_is_there(pytester, monkeypatch):
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.sm(80, 90)
        def test_it(): pass
        """
    )
    monkeypatch.setattr("pytest_batchinv.gpu.capability", lambda: None)
    result = pytester.runpytest_inprocess("-rs")
    result.assert_outcomes(skipped=1)
    result.stdout.fnmatch_lines(["*needs sm_80 or sm_90; this machine has no CUDA GPU"])
    monkeypatch.setattr("pytest_batchinv.gpu.capability", lambda: 89)
    pytester.runpytest_inprocess("-rs").stdout.fnmatch_lines(["*needs sm_80 or sm_90; this GPU is sm_89"])
    monkeypatch.setattr("pytest_batchinv.gpu.capability", lambda: 90)
    pytester.runpytest_inprocess("-rs").assert_outcomes(passed=1)


@pytest.mark.parametrize("marker, option", [("", "--reruns=2"), ("@pytest.mark.flaky(reruns=2)", "-v")])
def test_reruns_are_refused(pytester, marker, option):
    pytester.makeconftest(
        pytester.path.joinpath("conftest.py").read_text()
        + """
def pytest_addoption(parser):  # as pytest-rerunfailures has it
    parser.addoption("--reruns", type=int)

def pytest_configure(config):
    config.addinivalue_line("markers", "flaky(reruns): run again")
"""
    )
    pytester.makepyfile(
        f"""
        import pytest

        @pytest.mark.batch_invariant
        {marker}
        def test_it(batch_invariant): batch_invariant.hits["aten::mm"] = 1
        """
    )
    result = pytester.runpytest_inprocess("--batch-invariant", "--batchinv-device=cpu", option)
    assert result.ret in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.INTERRUPTED)
    assert "until it passes hides" in result.stdout.str() + result.stderr.str()
    without = "" if marker else "--reruns=0"
    if without:
        pytester.runpytest_inprocess("--batch-invariant", "--batchinv-device=cpu", without).assert_outcomes(passed=1)


def test_all_of_it_works_with_warnings_as_errors_and_strict_markers(pytester, run):
    pytester.makepyfile(
        """
        import pytest

        @pytest.mark.batch_invariant(relations="R", max_examples=3)
        @pytest.mark.compile_mode("eager", "default")
        def test_it(batch_invariant, batchinv_engine): batch_invariant.hits["aten::mm"] = 1
        """
    )
    run("--batch-invariant", "-W", "error", "--strict-markers", "--strict-config").assert_outcomes(passed=2)
