"""Which rows of ``gpu-matrix.json`` CI can run; the others are named "not run" in the run's summary.

A GPU's row needs a runner of one's own. GPU_RUNNERS (GitHub: a repository variable; Buildkite: the environment) lists those
there are, by commas: a job for any other would wait in the queue for a day instead of saying that it has not run.

``rows.py`` writes the rows to GITHUB_OUTPUT and the table to GITHUB_STEP_SUMMARY; ``rows.py --buildkite`` prints a pipeline,
for ``buildkite-agent pipeline upload``, with the same commands.
"""

import json
import os
import sys
from pathlib import Path

Row = dict[str, str]


def main(arguments: list[str]) -> None:
    there = {name.strip() for name in os.environ.get("GPU_RUNNERS", "").split(",")}
    rows = json.loads(Path(__file__).with_name("gpu-matrix.json").read_text())["include"]
    can_run = [row for row in rows if not row["gpu"] or row["runner"] in there]
    if arguments == ["--buildkite"]:
        print(json.dumps(_pipeline(rows, can_run), indent=1))
        return
    lines = ["| row | GPU | |", "|---|---|---|"]
    for row in rows:
        lines.append(f"| {row['name']} | {row['gpu'] or '–'} | {'runs' if row in can_run else _why_not(row)} |")
    _append("GITHUB_OUTPUT", "rows=" + json.dumps({"include": can_run}))
    _append("GITHUB_STEP_SUMMARY", "\n".join(lines))


def _why_not(row: Row) -> str:
    return f"**not run**: there is no runner {row['runner']}"


def _pipeline(rows: list[Row], can_run: list[Row]) -> dict[str, list[dict[str, object]]]:
    """A step for each row, skipped with the reason where it cannot run."""
    return {"steps": [_step(row, "" if row in can_run else _why_not(row).replace("*", "")) for row in rows]}


def _step(row: Row, skip: str) -> dict[str, object]:
    settings = f"TORCH={row['torch']} TRANSFORMERS={row['transformers']} PYTHON=python{row['python']}"
    commands = [f"make test {settings}"]
    if row["gpu"]:
        commands.append(f"make verify {settings} CAPABILITY={row['capability']} REPORT=record-{row['name']}.json")
        commands.append(f".venv/bin/python benchmarks/class_check.py --seconds 1200 --out class-check-{row['name']}.json")
    step: dict[str, object] = {
        "label": row["name"],
        "agents": {"queue": row["runner"]},
        "commands": commands,
        "timeout_in_minutes": 90,
        "artifact_paths": ["record-*.json", "class-check-*.json"],
    }
    return step | ({"skip": skip} if skip else {})


def _append(variable: str, text: str) -> None:
    with open(os.environ[variable], "a") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
