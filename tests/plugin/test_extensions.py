"""Engines and relations of other packages: the example in tests/examples runs as an installed package would."""

import importlib
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from openai_server import serving

from pytest_batchinv import extensions
from pytest_batchinv.plugin import options

EXAMPLE = Path(__file__).parents[1] / "examples" / "batchinv_example"


def install(folder: Path, name: str, entries: dict[str, dict[str, str]]) -> None:
    """What an installer leaves of a package: its metadata, with the entry points."""
    metadata = folder / f"{name}-0.1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0.1\n")
    groups = (
        "\n".join([f"[{group}]", *(f"{key} = {value}" for key, value in given.items())]) for group, given in entries.items()
    )
    (metadata / "entry_points.txt").write_text("\n".join(groups) + "\n")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Installs packages that this process finds, and forgets them."""
    monkeypatch.syspath_prepend(tmp_path)
    extensions.found.cache_clear()

    def of(name, **entries):
        install(tmp_path, name, {f"pytest_batchinv.{group}": given for group, given in entries.items()})
        importlib.invalidate_caches()
        extensions.found.cache_clear()

    yield of
    extensions.found.cache_clear()


TESTS = """
import pytest
from pytest_batchinv import check_batch_invariant


@pytest.mark.batch_invariant
def test_it(batchinv_engine, batchinv_settings):
    check_batch_invariant(batchinv_engine, batchinv_settings.relations)
"""


def test_the_example_gives_an_engine_and_a_relation_that_finds_its_fault(pytester, monkeypatch):
    pytester.makeconftest("")
    (pytester.path / "batchinv_example.py").write_text((EXAMPLE / "batchinv_example.py").read_text())
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())["project"]
    install(pytester.path, "batchinv_example", project["entry-points"])
    pytester.makepyfile(TESTS)
    monkeypatch.setenv("PYTHONPATH", str(pytester.path))

    def run(model):
        words = ["--batch-invariant", "--batchinv-device=cpu", "--batchinv-engine=smoothing", "--batchinv-relations=O,R"]
        command = [sys.executable, "-P", "-m", "pytest", "-p", "no:logging", *words, f"--batchinv-model={model}"]
        return subprocess.run(command, cwd=pytester.path, capture_output=True, text=True).stdout

    said = run("steady")
    assert "1 passed" in said
    assert "0 bits differ in R, O: 1 subject" in said
    said = run("first-row-counts-more")
    assert "a row has other bits where the batch stands in the opposite order (relation O, order)" in said
    assert "--batchinv-engine smoothing" in said.partition("replay")[2].partition("\n")[0]


def test_a_served_model_is_asked_by_its_address_and_a_finding_is_replayed_there(pytester, monkeypatch):
    pytester.makeconftest("")
    pytester.makepyfile(TESTS)
    monkeypatch.setenv("BATCHINV_API_KEY", "sk-very-secret")
    with serving("follows its batch") as server:
        engine = ["--batch-invariant", "--batchinv-engine=http-chat", f"--batchinv-url={server.url}"]
        command = [sys.executable, "-P", "-m", "pytest", "-p", "no:logging", *engine, "--batchinv-max-examples=5"]
        said = subprocess.run([*command, "--batchinv-relations=I"], cwd=pytester.path, capture_output=True, text=True).stdout
        replay = next(line.partition("replay")[2].strip() for line in said.splitlines() if "replay  " in line)
        assert f"--batchinv-url {server.url}" in replay
        assert "secret" not in said
        again = [sys.executable, "-P", "-m", *shlex.split(replay), "-p", "no:logging", "--batchinv-relations=I"]
        said = subprocess.run(again, cwd=pytester.path, capture_output=True, text=True).stdout
    assert "1 failed" in said
    assert "relation I" in said
    assert "load: up to 3 requests" in " ".join(said.split())


def test_names_of_other_packages_are_taken_by_the_options_and_listed(installed):
    installed("one", engines={"mine": "one:Engine"}, relations={"Q": "one:Q"})
    assert options.parse_engine("mine") == "mine"
    assert options.parse_relations("N,Q,I") == ("I", "Q", "N")
    with pytest.raises(ValueError, match="'other' is not among the choices: transformers.*, mine"):
        options.parse_engine("other")
    with pytest.raises(ValueError, match="no such relation as 'Z'.*, Q, as in R,I"):
        options.parse_relations("Z")


def test_a_name_of_ours_and_one_that_two_packages_give_are_refused(installed):
    installed("one", engines={"transformers": "one:Engine", "mine": "one:Engine"})
    with pytest.raises(ValueError, match=r"one \(one:Engine\) gives 'transformers' in .*which pytest-batchinv has itself"):
        options.parse_engine("mine")
    installed("two", engines={"mine": "two:Engine"})
    with pytest.raises(ValueError, match="both give 'mine' in pytest_batchinv.engines; uninstall one of them"):
        options.parse_engine("mine")


def test_a_package_that_cannot_be_loaded_is_named_with_the_reason(installed):
    from pytest_batchinv import relations

    installed("broken", relations={"Q": "no_such_module_at_all:Q", "Y": "json:JSONEncoder"})
    with pytest.raises(ValueError, match=r"'Q' of broken \(no_such_module_at_all:Q\) cannot be loaded: ModuleNotFoundError"):
        relations.of_letter("Q")
    with pytest.raises(
        ValueError, match="'Y' of pytest_batchinv.relations gives .*; it gives a class or an object of .*Relation"
    ):
        relations.of_letter("Y")
