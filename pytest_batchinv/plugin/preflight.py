"""What has to hold before a run in batch-invariant mode begins. Each check raises ValueError with a sentence."""

import os
import re
from pathlib import Path
from typing import Any

from pytest_batchinv import gpu, hub
from pytest_batchinv.plugin.settings import Settings
from pytest_batchinv.report import html

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def check(settings: Settings, config: Any) -> None:
    no_reruns(config)
    if settings.loads_a_model:  # what a model is to another engine, that engine says
        model_can_be_meant(settings.model)
    device_is_there(settings.device)
    for path in settings.report:
        can_be_written(path)


def no_reruns(config: Any) -> None:
    if any(_counts(config, name) for name in ("reruns", "force_reruns", "force_flaky")):
        raise ValueError(
            "--batch-invariant and reruns exclude each other: a test that is run again until it passes hides what this "
            "mode looks for. Take --reruns (or its ini option) away for this run."
        )


def model_can_be_meant(model: str) -> None:
    """Presets are known by name; anything else must be a path that exists, or look like a hub id that can be loaded."""
    if model == "auto":
        return
    from pytest_batchinv.subjects.presets import UnknownModel, is_preset

    try:
        if not is_preset(model) and not Path(model).exists() and not _HUB_ID.fullmatch(model):
            raise UnknownModel(model)
        if not is_preset(model) and not Path(model).exists() and (why := hub.out_of_reach(model)):
            raise UnknownModel(model, why)
    except UnknownModel as error:
        raise ValueError(f"--batchinv-model: {error}") from None


def device_is_there(device: str) -> None:
    if device != "cuda":
        return
    if why := gpu.missing():
        raise ValueError(f"--batchinv-device: cuda was asked for, but {why}. Use auto or cpu.")
    gpu.resolve_device(device)


def can_be_written(path: Path) -> None:
    if path.suffix == ".html" and (why := html.missing()):
        raise ValueError(
            f"--batchinv-report: {path.name} {why} Or ask for a .json, and make the page of it elsewhere with "
            "python -m pytest_batchinv.report html."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--batchinv-report: {path} cannot be written: {error}") from None
    if path.is_dir() or not os.access(path.parent, os.W_OK):
        raise ValueError(f"--batchinv-report: {path} cannot be written: it is a folder, or its folder is read-only")


def _counts(config: Any, name: str) -> bool:
    """Whether an option of a rerun plugin is set, on the command line or, where it has one, in the ini file."""
    given = config.getoption(name, default=None)
    if given is None:
        try:
            given = config.getini(name)
        except (KeyError, ValueError):
            return False
    return str(given or 0) not in ("0", "False", "None")
