"""Settings: what the options come to, resolved once. Command line > environment > ini file > default."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pytest_batchinv.plugin.options import LOAD_A_MODEL, OPTIONS, Option, names_in_ini

if TYPE_CHECKING:
    from pytest_batchinv.shapes import BatchShape


@dataclass(frozen=True)
class Settings:
    """One field for each option. device, dtype and attn may be "auto": what that means is asked when a test runs."""

    enabled: bool
    model: str
    engine: str
    url: str | None
    device: str
    dtype: str
    attn: str
    relations: tuple[str, ...]
    ranks: tuple[int, ...]
    max_examples: int
    seed: int | None
    shape: "BatchShape | None"
    strict: bool
    report: tuple[Path, ...]
    resume: Path | None

    @property
    def loads_a_model(self) -> bool:
        """Whether the engine loads it, so that the model is a preset, a path or a hub id."""
        return self.engine in LOAD_A_MODEL


DEFAULTS = Settings(**{option.name: option.default for option in OPTIONS})


def resolve(config: Any, environ: Mapping[str, str] = os.environ) -> Settings:
    """The settings of a pytest config. Raises ValueError that names the source of a bad value."""
    _refuse_unknown_names(config, environ)
    settings = Settings(**{option.name: _value(option, config, environ) for option in OPTIONS})
    if settings.url is not None and settings.loads_a_model:
        raise ValueError(f"--batchinv-url: the engine {settings.engine} loads the model itself and takes no URL")
    if settings.url is None and settings.engine in ("http", "http-chat"):
        raise ValueError(f"--batchinv-engine: {settings.engine} asks a server; give its address with --batchinv-url")
    return settings


def _value(option: Option, config: Any, environ: Mapping[str, str]) -> Any:
    for source, given in _sources(option, config, environ):
        if given is not None:
            try:
                return _parse(option, given)
            except ValueError as error:
                raise ValueError(f"{source}: {error}") from None
    return option.default


def _sources(option: Option, config: Any, environ: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    yield option.flag, config.getoption(option.ini)
    text = environ.get(option.env) or None
    yield option.env, text.split(os.pathsep) if text and option.form == "list" else text
    try:
        yield f"ini option {option.ini}", config.getini(option.ini)
    except (TypeError, ValueError) as error:
        raise ValueError(f"ini option {option.ini}: {error}") from None


def _parse(option: Option, given: Any) -> Any:
    if isinstance(given, list):
        return tuple(option.parse(text) for text in given)
    return option.parse(given) if isinstance(given, str) else given


OTHER_VARIABLES = ("BATCHINV_CACHE_DIR", "BATCHINV_API_KEY", "BATCHINV_RANK_SECONDS", "BATCHINV_VLLM")
"""Read elsewhere: where the CPU's kernels are kept, the key of a served model, how long ranks may take to answer, and whether
vLLM's processes enter the mode."""


def _refuse_unknown_names(config: Any, environ: Mapping[str, str]) -> None:
    """A name of ours that nobody reads is a typo, and would be obeyed by nobody."""
    known = {"environment variable": {*(option.env for option in OPTIONS), *OTHER_VARIABLES}}
    known["ini option"] = {option.ini for option in OPTIONS}
    given = {"environment variable": environ, "ini option": names_in_ini(config)}
    for kind, prefix in (("environment variable", "BATCHINV_"), ("ini option", "batchinv_")):
        unknown = sorted(name for name in given[kind] if name.startswith(prefix) and name not in known[kind])
        if unknown:
            raise ValueError(f"there is no {kind} {', '.join(unknown)}; there are {', '.join(sorted(known[kind]))}")
