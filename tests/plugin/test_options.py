"""Options: what is said of bad values, what the header and the help show, and that nothing is paid while off."""

import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest

from pytest_batchinv import hub

USAGE = pytest.ExitCode.USAGE_ERROR


@pytest.mark.parametrize(
    "option, says",
    [
        ("--batchinv-dtype=int8", "--batchinv-dtype: 'int8' is not among the choices: auto, bf16, fp16, fp32, fp64"),
        (
            "--batchinv-engine=no-such-engine",
            "--batchinv-engine: 'no-such-engine' is not among the choices: transformers, *, http-chat, vllm",
        ),
        ("--batchinv-engine=http", "--batchinv-engine: http asks a server; give its address with --batchinv-url"),
        ("--batchinv-url=http://me:key@host", "--batchinv-url: an address holds no user, key or query*"),
        ("--batchinv-device=tpu", "--batchinv-device: 'tpu' is not among the choices: auto, cpu, cuda"),
        ("--batchinv-relations=R,Z", "--batchinv-relations: no such relation as 'Z'; ask for one or more of R *"),
        ("--batchinv-max-examples=many", "--batchinv-max-examples: 'many' is not a whole number from 1 on"),
        ("--batchinv-shape={", "--batchinv-shape: not a batch shape: *It looks like *"),
        (
            "--batchinv-report=x.xml",
            "--batchinv-report: 'x.xml' cannot be written; the name of a report ends in .json or .html",
        ),
        ("--batchinv-report=/proc/x/y.json", "--batchinv-report: /proc/x/y.json cannot be written: *"),
        ("--batchinv-model=tiny-bert", "--batchinv-model: there is no model 'tiny-bert'*tiny-llama, tiny-qwen3,*"),
        ("--batchinv-model=bert", "--batchinv-model: there is no model 'bert'*tiny-llama, tiny-qwen3,*"),
        ("--batchinv-url=http://localhost", "--batchinv-url: the engine transformers loads the model itself*"),
    ],
)
def test_a_bad_value_is_a_usage_error_that_lists_the_right_ones(pytester, option, says):
    result = pytester.runpytest_inprocess("--batch-invariant", option)
    assert result.ret == USAGE
    result.stderr.fnmatch_lines([f"ERROR: {says}"])
    result.stderr.no_fnmatch_line("*Traceback*")


@pytest.mark.parametrize("words", [(), ("-n", "2")], ids=["plain", "xdist"])
def test_a_report_that_nobody_will_write_is_told(pytester, words):
    pytester.makepyfile("def test_nothing(): pass")
    result = pytester.runpytest_inprocess("--batchinv-report=x.json", *words)
    assert result.ret == 0 and not pytester.path.joinpath("x.json").exists()
    assert str(result.stdout).count("--batchinv-report has no effect without --batch-invariant: nothing is checked") == 1


def test_the_source_of_a_bad_value_is_named(pytester, monkeypatch):
    pytester.makeini("[pytest]\nbatchinv_dtype = int4\n")
    pytester.runpytest_inprocess().stderr.fnmatch_lines(["ERROR: ini option batchinv_dtype: 'int4' is not *"])
    monkeypatch.setenv("BATCHINV_DTYPE", "int8")
    pytester.runpytest_inprocess().stderr.fnmatch_lines(["ERROR: BATCHINV_DTYPE: 'int8' is not *"])


def test_a_misspelt_name_is_a_usage_error_also_while_off(pytester, monkeypatch):
    pytester.makeini("[pytest]\nbatchinv_enable = true\n")
    result = pytester.runpytest_inprocess()
    assert result.ret == USAGE
    result.stderr.fnmatch_lines(["ERROR: there is no ini option batchinv_enable; there are *batchinv_enabled, *"])
    pytester.makeini("[pytest]\n")
    assert pytester.runpytest_inprocess("-o", "batchinv_enable=1").ret == USAGE
    monkeypatch.setenv("BATCHINV_ENABLE", "1")
    result = pytester.runpytest_inprocess()
    assert result.ret == USAGE
    result.stderr.fnmatch_lines(["ERROR: there is no environment variable BATCHINV_ENABLE; there are *BATCHINV_ENABLED, *"])


def test_a_hub_id_that_cannot_be_had_is_a_usage_error_of_one_sentence(pytester, monkeypatch, tmp_path):
    """Nobody answers at this address: it is kept for documentation."""
    for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://192.0.2.1")
    monkeypatch.setattr("pytest_batchinv.hub.SECONDS", 0.2)
    result = pytester.runpytest_inprocess("--batch-invariant", "--batchinv-model=nobody/has-this")
    assert result.ret == USAGE
    result.stderr.fnmatch_lines(["ERROR: --batchinv-model: *nobody/has-this*in the local cache, and http://192.0.2.1 cannot*"])
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = pytester.runpytest_inprocess("--batch-invariant", "--batchinv-model=nobody/has-this")
    result.stderr.fnmatch_lines(["ERROR: --batchinv-model: *not in the local cache, and HF_HUB_OFFLINE is set*"])


def test_a_hub_that_answers_is_in_reach(monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:  # it answers 501
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert hub.out_of_reach("nobody/has-this") == ""
        server.shutdown()


def test_a_gpu_that_was_asked_for_and_is_not_there_is_a_usage_error(pytester, monkeypatch):
    monkeypatch.setattr("pytest_batchinv.gpu.missing", lambda: "torch finds no CUDA GPU on this machine")
    result = pytester.runpytest_inprocess("--batch-invariant", "--batchinv-device=cuda")
    assert result.ret == USAGE
    result.stderr.fnmatch_lines(["ERROR: --batchinv-device: cuda was asked for, but torch finds no CUDA GPU*"])
    assert pytester.runpytest_inprocess("--batchinv-device=cuda").ret == pytest.ExitCode.NO_TESTS_COLLECTED


def test_a_gpu_that_is_too_old_is_a_usage_error(pytester, monkeypatch):
    monkeypatch.setattr("pytest_batchinv.gpu.missing", lambda: "")
    monkeypatch.setattr("pytest_batchinv.gpu.capability", lambda: 75)
    result = pytester.runpytest_inprocess("--batch-invariant", "--batchinv-device=cuda")
    assert result.ret == USAGE
    result.stderr.fnmatch_lines(["ERROR: the GPU here is sm_75; batch-invariant mode needs sm_80 (A100) or later.*"])


def test_the_environment_and_the_ini_file_turn_the_mode_on(pytester, monkeypatch):
    pytester.makepyfile("def test_it(batch_invariant): batch_invariant.hits['aten::mm'] = 1")
    monkeypatch.setenv("BATCHINV_DEVICE", "cpu")
    pytester.runpytest_inprocess().assert_outcomes(skipped=1)
    pytester.makeini("[pytest]\nbatchinv_enabled = true\n")
    pytester.runpytest_inprocess().assert_outcomes(passed=1)
    monkeypatch.setenv("BATCHINV_ENABLED", "off")
    pytester.runpytest_inprocess().assert_outcomes(skipped=1)


def test_the_header_has_what_is_needed_to_repeat_the_run(pytester, monkeypatch):
    on = ["--batch-invariant", "--batchinv-device=cpu", "--batchinv-dtype=bf16", "--batchinv-max-examples=7"]
    result = pytester.runpytest_inprocess(*on)
    result.stdout.fnmatch_lines(
        [
            "batch invariance: on; auto (transformers), device cpu, dtype bf16, attention auto",
            "batch invariance: relations R,S,I,L,C,D,G,T,X,N; 7 examples each, drawn at random; torch *, triton *",
        ]
    )
    monkeypatch.setenv("CI", "1")
    pytester.runpytest_inprocess(*on).stdout.fnmatch_lines(["*7 examples each, derandomised, as CI is set*"])
    pytester.runpytest_inprocess().stdout.no_fnmatch_line("batch invariance*")


def test_markers_and_help_tell_all(pytester):
    markers = pytester.runpytest_inprocess("--markers").stdout
    markers.fnmatch_lines_random(
        [
            "@pytest.mark.batch_invariant(relations=..., max_examples=..., dtype=..., ranks=...): *",
            "@pytest.mark.compile_mode(?modes): *eager, default, dynamic, fullgraph, reduce-overhead, max-autotune*",
            "@pytest.mark.sm(?capabilities): *",
        ]
    )
    text = pytester.runpytest_inprocess("--help").stdout.str()
    from pytest_batchinv.plugin.options import OPTIONS

    for option in OPTIONS:
        assert option.flag in text and option.env in text and f"{option.ini} (" in text


def test_while_off_nothing_heavy_is_loaded(pytester):
    pytester.makeconftest("")
    pytester.makepyfile(
        """
        import sys

        def test_it():
            ours = {name for name in sys.modules if name.startswith("pytest_batchinv.")}
            assert "pytest_batchinv.plugin" in ours
            assert not {"torch", "triton", "transformers", "hypothesis"} & set(sys.modules)
            needed = {f"plugin.{name}" for name in ("fixtures", "lifecycle", "markers", "options", "stash")}
            assert ours == {f"pytest_batchinv.{name}" for name in {"letters", "plugin", *needed}}
        """
    )
    pytester.runpytest_subprocess().assert_outcomes(passed=1)


def test_the_public_names_load_on_first_use():
    code = "import sys, pytest_batchinv as b; print('torch' in sys.modules, b.BatchShape, {*b.__all__} <= {*dir(b)})"
    shown = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown == "False <class 'pytest_batchinv.shapes.BatchShape'> True\n"


def test_the_plugin_can_be_turned_off(pytester):
    pytester.makeconftest("")
    pytester.makepyfile("def test_it(): pass")
    result = pytester.runpytest_subprocess("-p", "no:batchinv", "--strict-config")
    result.assert_outcomes(passed=1)
    assert pytester.runpytest_subprocess("-p", "no:batchinv", "--batch-invariant").ret == USAGE
