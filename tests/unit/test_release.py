"""What a release needs is there, and says the same everywhere."""

import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def test_the_version_is_the_same_wherever_it_is_written():
    version = PYPROJECT["project"]["version"]
    assert PYPROJECT["tool"]["towncrier"]["version"] == version
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == version


def test_every_fragment_of_the_changelog_is_of_a_known_kind_and_says_something():
    kinds = {kind["directory"] for kind in PYPROJECT["tool"]["towncrier"]["type"]}
    for path in (ROOT / "changes").glob("*"):
        _, kind, suffix = path.name.rsplit(".", 2)
        assert kind in kinds and suffix == "md", path
        assert path.read_text().strip(), path


def test_every_package_of_the_sources_is_in_the_wheel():
    """setuptools is given a list, since kernels and patches lie outside of the package."""
    listed = set(PYPROJECT["tool"]["setuptools"]["packages"])
    roots = {"pytest_batchinv": ROOT / "pytest_batchinv", "pytest_batchinv.kernels": ROOT / "kernels"}
    roots["pytest_batchinv.patches"] = ROOT / "patches"
    for name, root in roots.items():
        folders = {path.parent for path in root.rglob("*.py")}
        found = {".".join([name, *folder.relative_to(root).parts]) for folder in folders}
        assert found <= listed, found - listed


def test_the_classifiers_name_the_pythons_that_are_allowed():
    low, high = (part.split(".")[1] for part in PYPROJECT["project"]["requires-python"].removeprefix(">=").split(",<"))
    named = {line.rpartition(" ")[2] for line in PYPROJECT["project"]["classifiers"] if "Python :: 3." in line}
    assert named == {f"3.{minor}" for minor in range(int(low), int(high))}
