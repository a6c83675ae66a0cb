"""What the fixtures give: the settings with the marker's arguments, and engines that are built once a session."""


def test_the_engine_has_the_settings_the_compile_mode_and_the_marker_s_dtype(pytester, run):
    pytester.makepyfile(
        """
        import pytest

        def test_plain(batchinv_engine):
            assert batchinv_engine.words == {"model": "tiny-llama", "device": "cpu", "dtype": "fp32", "attn": "sdpa"}
            assert batchinv_engine.compile_mode == "eager"

        @pytest.mark.batch_invariant(dtype="bf16")
        @pytest.mark.compile_mode("default")
        def test_marked(batchinv_engine, batch_invariant):
            batch_invariant.hits["aten::mm"] = 1
            assert (batchinv_engine.words["dtype"], batchinv_engine.compile_mode) == ("bf16", "default")
        """
    )
    run("--batch-invariant", "--batchinv-model=tiny-llama", "--batchinv-attn=sdpa").assert_outcomes(passed=2)


def test_a_model_is_loaded_once_for_all_its_compile_modes_and_is_in_the_mode_only_by_the_marker(pytester):
    pytester.makepyfile(
        """
        import pytest
        from conftest import Mode, TransformersSubject

        @pytest.mark.parametrize("again", range(3))
        @pytest.mark.compile_mode("eager", "default")
        def test_it(batchinv_engine, again):
            assert Mode.depth == 0

        @pytest.mark.batch_invariant(dtype="bf16")
        def test_another(batchinv_engine, batch_invariant):
            assert Mode.depth == 1
            batch_invariant.hits["aten::mm"] = 1

        def test_two_were_built():
            assert [words["dtype"] for words in TransformersSubject.built] == ["fp32", "bf16"]
        """
    )
    pytester.runpytest_inprocess("--batch-invariant", "--batchinv-device=cpu").assert_outcomes(passed=8)


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
        from pytest_batchinv import context

        @pytest.mark.batch_invariant(relations="I,R", max_examples=3)
        def test_marked(batchinv_settings, batch_invariant):
            batch_invariant.hits["aten::mm"] = 1
            assert batchinv_settings.relations == ("R", "I")
            assert batchinv_settings.max_examples == 3
            assert batchinv_settings.model == "auto"
            assert context.current().max_examples == 3

        def test_plain(batchinv_settings):
            assert batchinv_settings.relations == ("R", "X")
            assert context.current().case == batchinv_settings.shape
            assert len(batchinv_settings.shape) == 1
            assert (context.current().max_examples, context.current().seed) == (100, 7)
        """
    )
    shape = '{"rows":[{"id":0,"length":5}]}'
    run("--batch-invariant", "--batchinv-relations=X,R", "--batchinv-seed=7", f"--batchinv-shape={shape}").assert_outcomes(
        passed=2
    )
