"""Which rows of ``gpu-matrix.json`` CI can run, for GITHUB_OUTPUT; the others are named "not run" in the run's summary.

A GPU's row needs a runner of one's own. The repository variable GPU_RUNNERS lists those there are, by commas:
a job for any other would wait in the queue for a day instead of saying that it has not run.
"""

import json
import os
from pathlib import Path


def main() -> None:
    there = {name.strip() for name in os.environ.get("GPU_RUNNERS", "").split(",")}
    rows = json.loads(Path(__file__).with_name("gpu-matrix.json").read_text())["include"]
    can_run = [row for row in rows if not row["gpu"] or row["runner"] in there]
    lines = ["| row | GPU | |", "|---|---|---|"]
    for row in rows:
        state = "runs" if row in can_run else f"**not run**: there is no runner {row['runner']}"
        lines.append(f"| {row['name']} | {row['gpu'] or '–'} | {state} |")
    _append("GITHUB_OUTPUT", "rows=" + json.dumps({"include": can_run}))
    _append("GITHUB_STEP_SUMMARY", "\n".join(lines))


def _append(variable: str, text: str) -> None:
    with open(os.environ[variable], "a") as file:
        file.write(text + "\n")


if __name__ == "__main__":
    main()
