"""Every block of code in the README and in docs/ does what its page says.

The blocks of a page run in order, in one empty folder. By language:

* ``python``: run, or where the first line is ``# name.py`` written to that file;
* ``console``: each command after ``$`` is run by bash, and prints what follows it, where ``...`` stands for anything. It
  must succeed, and the last one fail where the block is marked ``console fails``;
* ``toml``, ``json``, ``yaml``: read; written to a file as Python is;
* ``sh``: commands that need a network, a GPU, a server or minutes: bash reads them, and their options exist;
* ``text``: output, and pictures in letters.
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from sybil import Document, Example, Region, Sybil
from sybil.parsers.markdown.lexers import RawFencedCodeBlockLexer

from pytest_batchinv.plugin.options import OPTIONS

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
LANGUAGES = {"python", "console", "toml", "json", "yaml", "sh", "text", "markdown"}
READERS = {"toml": tomllib.loads, "json": json.loads, "yaml": yaml.safe_load}
SECONDS = 300

_lexer = RawFencedCodeBlockLexer(re.compile(r"(?P<language>[^\s{]*)(?P<words>[^\n]*)\n"))


def blocks(document: Document):
    for region in _lexer(document):
        yield Region(region.start, region.end, region.lexemes, _evaluate)


def _evaluate(example: Example) -> None:
    language, source = example.parsed["language"], str(example.parsed["source"])
    place = f"{example.path}:{example.line}"
    if example.parsed["words"].startswith("{"):
        return  # a directive of the site
    assert language in LANGUAGES, f"{place}: a block of code has a language, one of {', '.join(sorted(LANGUAGES))}"
    folder, named = example.namespace["folder"], re.match(r"# ([\w.-]+\.\w+)\n", source)
    if language in READERS:
        READERS[language](source)
    if language == "sh":
        _read_by_bash(source, place)
    if named and language != "text":
        (folder / named[1]).write_text(source)
    elif language == "python":
        exec(compile(source, place, "exec"), example.namespace["names"])
    elif language == "console":
        *before, last = commands(source)
        for command, expected in before:
            _run(command, expected, False, folder, place)
        _run(*last, example.parsed["words"].strip() == "fails", folder, place)


def commands(source: str) -> list[tuple[str, str]]:
    """Each command, and what it prints."""
    parts = re.split(r"^\$ (.*(?:\\\n.*)*)\n", source, flags=re.MULTILINE)
    assert not parts[0].strip(), f"a console begins with a command after '$ ', not with {parts[0]!r}"
    return list(zip(parts[1::2], parts[2::2], strict=True))


def _run(command: str, expected: str, fails: bool, folder: Path, place: str) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    run = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, text=True, timeout=SECONDS,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert (run.returncode != 0) == fails, f"{place}: `{command}` ended with {run.returncode}\n{run.stdout}"
    assert matches(expected, run.stdout), f"{place}: `{command}` printed\n{run.stdout}\nand the page has\n{expected}"


def matches(expected: str, printed: str) -> bool:
    """``...`` is any text, over several lines where it stands alone; widths of pytest's rules follow the terminal's."""
    words = (re.sub(r"={3,}", "===", text).strip() for text in (expected, printed))
    wanted, given = ("\n".join(line.rstrip() for line in text.splitlines()) for text in words)
    return re.fullmatch(".*".join(map(re.escape, wanted.split("..."))), given, re.DOTALL) is not None


def _read_by_bash(source: str, place: str) -> None:
    read = subprocess.run(["bash", "-n"], input=source, text=True, capture_output=True)
    assert read.returncode == 0, f"{place}: {read.stderr}"
    unknown = set(re.findall(r"--batch[\w-]+", source)) - {option.flag for option in OPTIONS}
    assert not unknown, f"{place}: there are no options {unknown}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_of_a_page_does_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    document = Sybil(parsers=[blocks]).parse(page)
    document.namespace.update(folder=tmp_path, names={"__name__": page.stem})
    for example in document.examples():
        example.evaluate()


def test_a_page_may_leave_out_what_it_prints_and_nothing_else():
    assert matches("a\n...\nd\n", "a\nb\nc\nd\n") and matches("in ... s\n==== x ====", "in 1.5 s\n== x ==") is False
    assert matches("==== x ====", "====== x ===") and not matches("a\nc", "a\nb\nc")
