"""Signed records: what is refused, and why. Keys are made by the machine's own ssh-keygen."""

import json
import re
import subprocess
from datetime import timedelta

import pytest
from saved_runs import record, run

from pytest_batchinv import sources
from pytest_batchinv.report import __main__ as command
from pytest_batchinv.report import json as json_report
from pytest_batchinv.report import saved, signing

PASSED = {"exit_status": 0, "passed": 3, "skipped": 1}


def made(**words):
    """A run that passed, with the mode's sources as they are here."""
    words.setdefault("receipt", {"sources": sources.of_the_mode()})
    return run(record("R", **words), record("I", **words), outcome=PASSED)


def new_key(folder, name):
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", str(folder / name)], check=True)
    return folder / name


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A record, a key, its public half among the allowed signers, and sources that the run tested."""
    monkeypatch.chdir(tmp_path)
    json_report.write_saved(made(), tmp_path / "run.json")
    key = new_key(tmp_path, "gpu-host")
    (tmp_path / "signers").write_text(f"gpu-host {key.with_suffix('.pub').read_text()}")
    (tmp_path / "src").mkdir()
    (tmp_path / "src" / "kernel.py").write_text("BLOCK_M = 64\n")
    return tmp_path


def sign(folder, key="gpu-host", over=("src",)):
    return signing.sign(folder / "run.json", saved.read(folder / "run.json"), folder / key, over)


def reasons(folder, **words):
    """Why the record is refused; none where it is taken."""
    try:
        signing.verify(folder / "run.json", saved.read(folder / "run.json"), folder / "signers", **words)
    except signing.Refused as refused:
        return list(refused.reasons)
    return []


def test_a_signed_record_is_taken_where_all_is_as_it_was(folder):
    sign(folder)
    told = signing.verify(folder / "run.json", made(), folder / "signers", baseline=made(), max_age=timedelta(days=1))
    assert told.startswith("signed by gpu-host at ")
    assert reasons(folder, require={"torch": "2.13.0"}) == []


def edit_the_record(folder):
    text = (folder / "run.json").read_text()
    (folder / "run.json").write_text(text.replace('"examples": 412', '"examples": 413'))


def edit_the_statement(folder):
    path = folder / "run.statement.json"
    path.write_text(path.read_text().replace('"over"', '"over" '))


def sign_by_another_key(folder):
    new_key(folder, "stranger")
    sign(folder, "stranger")


def sign_for_another_purpose(folder):
    statement = folder / "run.statement.json"
    (folder / "run.statement.json.sig").unlink()
    subprocess.run(["ssh-keygen", "-q", "-Y", "sign", "-f", str(folder / "gpu-host"), "-n", "git", str(statement)], check=True)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (edit_the_record, "run.json is not the file that was signed"),
        (edit_the_statement, "has no good signature by a key in"),
        (sign_by_another_key, "has no good signature by a key in"),
        (sign_for_another_purpose, "has no good signature by a key in"),
        (lambda folder: (folder / "run.statement.json.sig").unlink(), "there is no signature"),
        (lambda folder: (folder / "run.statement.json").unlink(), "there is no statement"),
        (lambda folder: (folder / "src" / "kernel.py").write_text("BLOCK_M = 128\n"), "src was [0-9a-f]{12} when"),
        (lambda folder: (folder / "src" / "new.py").write_text(""), "src was [0-9a-f]{12} when"),
        (lambda folder: (folder / "src" / "kernel.py").unlink(), "src was .* and is not there: run the tests again"),
    ],
)
def test_what_was_edited_or_is_stale_is_refused(folder, change, reason):
    sign(folder)
    change(folder)
    (found,) = reasons(folder)
    assert re.search(reason, found), found


@pytest.mark.parametrize(
    ("saved_run", "words", "reason"),
    [
        (lambda: made(receipt={"sources": "0" * 12}), {}, "the record is of the mode's sources 000000000000, and those here"),
        (lambda: run(record("I", verdict="differs"), outcome=PASSED), {}, "m, relation I: DIFFERS"),
        (lambda: run(record("N", verdict="inconclusive"), outcome=PASSED), {}, "m, relation N: INCONCLUSIVE"),
        (lambda: run(*made().records, outcome={"exit_status": 1}), {}, "the run did not pass: its exit status is 1"),
        (lambda: run(*made().records, outcome={"exit_status": None}), {}, "the run did not pass: its exit status is None"),
        (lambda: run(outcome=PASSED), {}, "the record holds no check"),
        (made, {"require": {"torch": "2.12.1"}}, "made with torch 2.13.0, and 2.12.1 is required"),
        (made, {"require": {"gpu": "NVIDIA H100"}}, "made with gpu that it does not name, and NVIDIA H100 is required"),
        (made, {"baseline": run(*made().records, record("X"))}, "worse than the baseline: m .*is missing"),
        (made, {"baseline": run(*made().records, outcome={"skipped": 0})}, "1 test skipped, and 0 in the baseline"),
    ],
)
def test_what_proves_less_than_is_asked_is_refused(folder, monkeypatch, saved_run, words, reason):
    monkeypatch.setattr(signing, "_sources_in", lambda saved: sources.of_the_mode())  # sign it all the same
    json_report.write_saved(saved_run(), folder / "run.json")
    sign(folder)
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    assert any(re.search(reason, found) for found in reasons(folder, **words)), reasons(folder, **words)


def test_an_old_signature_is_refused_where_an_age_is_asked_for(folder, monkeypatch):
    path = sign(folder)
    statement = json.loads(path.read_text())
    for year, reason in (("2020", "days ago, and 7 are allowed"), ("2999", "not come yet")):
        path.write_text(json.dumps(statement | {"signed": f"{year}-01-01T00:00:00+00:00"}))
        (folder / "run.statement.json.sig").unlink()
        subprocess.run(
            ["ssh-keygen", "-q", "-Y", "sign", "-f", str(folder / "gpu-host"), "-n", signing.NAMESPACE, str(path)], check=True
        )
        (found,) = reasons(folder, max_age=timedelta(days=7))
        assert reason in found


def test_the_commands_sign_and_verify_and_say_why_not(folder, capsys):
    assert command.main(["sign", "run.json", "--key", "gpu-host", "--over", "src"]) == 0
    assert "run.statement.json.sig" in capsys.readouterr().out
    arguments = ["verify", "run.json", "--signers", "signers", "--baseline", "run.json"]
    arguments += ["--require", "torch=2.13", "--max-age", "1"]
    assert command.main(arguments) == 0
    assert "signed by gpu-host at" in capsys.readouterr().out
    edit_the_record(folder)
    assert command.main(arguments) == 1
    assert "run.json is refused:\n  run.json is not the file that was signed" in capsys.readouterr().out.replace(
        f"{folder}/", ""
    )


def test_bad_input_is_told_in_a_sentence(folder, capsys):
    assert command.main(["sign", "run.json", "--key", "no-key"]) == 2
    assert "no-key" in capsys.readouterr().err
    assert command.main(["sign", "run.json", "--key", "gpu-host", "--over", "nowhere"]) == 2
    assert "nowhere is no file, and no folder that holds one" in capsys.readouterr().err
    json_report.write_saved(made(receipt={"sources": "0" * 12}), folder / "run.json")
    assert command.main(["sign", "run.json", "--key", "gpu-host"]) == 2
    assert "sign a run of these" in capsys.readouterr().err


def test_a_machine_without_openssh_is_told_so(folder, monkeypatch):
    monkeypatch.setenv("PATH", str(folder))
    with pytest.raises(ValueError, match="there is no ssh-keygen on this machine; install OpenSSH"):
        sign(folder)
