"""What the fixtures give: the settings with the marker's arguments, and engines that are built once a session."""


def test_the_engine_has_the_settings_the_compile_mode_and_the_marker_s_dtype(pytester, run):
    pytester.makepyfile(
        """
        import pytest

        def test_plain(batchinv_engine):
            assert vars(batchinv_engine) == {
                "model": "tiny-llama", "device": "cpu", "dtype": "fp32", "attn": "sdpa", "compile_mode": "eager"
            }

        @pytest.mark.batch_invariant(dtype="bf16")
        @pytest.mark.compile_mode("default")
        def test_marked(batchinv_engine, batch_invariant):
            batch_invariant.hits["aten::mm"] = 1
            assert (batchinv_engine.dtype, batchinv_engine.compile_mode) == ("bf16", "default")
        """
    )
    run("--batch-invariant", "--batchinv-model=tiny-llama", "--batchinv-attn=sdpa").assert_outcomes(passed=2)


def test_engines_are_kept_for_the_session_and_are_in_the_mode_only_by_the_marker(pytester):
    pytester.makepyfile(
        """
        import pytest
        from conftest import Mode, TransformersEngine

        @pytest.mark.parametrize("again", range(3))
        @pytest.mark.compile_mode("eager", "default")
        def test_it(batchinv_engine, again):
            assert Mode.depth == 0

        def test_two_were_built():
            assert len(TransformersEngine.built) == 2
        """
    )
    pytester.runpytest_inprocess("--batch-invariant", "--batchinv-device=cpu").assert_outcomes(passed=7)


def test_an_engine_that_cannot_be_built_is_an_error_of_one_sentence(pytester, run):
    pytester.makepyfile("def test_it(batchinv_engine): pass")
    result = run("--batch-invariant", "--batchinv-attn=unheard-of")
    result.assert_outcomes(errors=1)
    result.stdout.fnmatch_lines(["no such attention as 'unheard-of'; use eager or sdpa"])
    result.stdout.no_fnmatch_line("*fixtures.py*")


def test_settings_of_the_marker_come_before_those_of_the_options(pytester, run):
    pytester.makepyfile(
        """
        import pytest
        from pytest_batchinv.settings import active

        @pytest.mark.batch_invariant(relations="I,R", max_examples=3)
        def test_marked(batchinv_settings, batch_invariant):
            batch_invariant.hits["aten::mm"] = 1
            assert batchinv_settings.relations == ("R", "I")
            assert batchinv_settings.max_examples == 3
            assert batchinv_settings.model == "tiny-qwen3"
            assert active.get() is batchinv_settings

        def test_plain(batchinv_settings):
            assert batchinv_settings.relations == ("R", "X")
            assert len(batchinv_settings.shape) == 1
        """
    )
    shape = '{"rows":[{"id":0,"length":5}]}'
    run("--batch-invariant", "--batchinv-relations=X,R", f"--batchinv-shape={shape}").assert_outcomes(passed=2)
