"""The options: one table that the command line, the environment and the ini file are all served from."""

import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from pytest_batchinv.letters import WORDS

RELATIONS = {**WORDS, "N": "stock torch is caught"}
_OF_TRANSFORMERS = (
    *("transformers", "transformers-generate", "transformers-sample", "transformers-assisted", "transformers-continuous"),
    "transformers-hidden",
)
ENGINES = (*_OF_TRANSFORMERS, "http", "http-chat", "vllm")
LOAD_A_MODEL = (*_OF_TRANSFORMERS, "vllm")
DEVICES = ("auto", "cpu", "cuda")
DTYPES = ("bf16", "fp16", "fp32", "fp64")
REPORTS = (".json", ".html")

_SWITCH = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


def one_of(choices: Iterable[str]) -> Callable[[str], str]:
    """A parser that takes these words and no others."""
    choices = tuple(choices)

    def parse(text: str) -> str:
        if text not in choices:
            raise ValueError(f"{text!r} is not among the choices: {', '.join(choices)}")
        return text

    return parse


def parse_dtype(text: str) -> str:
    return one_of(DTYPES)(text)


def parse_relations(text: str) -> tuple[str, ...]:
    """ "I,R" -> ("R", "I"): in the order in which they are checked, so that noise is not taken for variance."""
    asked = {name.strip() for name in text.split(",")}
    unknown = asked - RELATIONS.keys()
    theirs = _of_other_packages("RELATIONS", RELATIONS) if unknown else ()
    if unknown := unknown - set(theirs):
        known = ", ".join((*(f"{name} ({words})" for name, words in RELATIONS.items()), *theirs))
        raise ValueError(
            f"no such relation as {', '.join(map(repr, sorted(unknown)))}; ask for one or more of {known}, as in R,I"
        )
    return tuple(name for name in (*WORDS, *theirs, "N") if name in asked)


def parse_engine(text: str) -> str:
    """One of ours, or of another package, whose entry points are looked up only where the name is none of ours."""
    return text if text in ENGINES else one_of((*ENGINES, *_of_other_packages("ENGINES", ENGINES)))(text)


def _of_other_packages(kind: str, ours: Iterable[str]) -> tuple[str, ...]:
    from pytest_batchinv import extensions  # only where a name is none of ours

    return extensions.names(vars(extensions)[kind], tuple(ours))


def parse_count(text: str) -> int:
    if not text.strip().isdecimal() or int(text) < 1:
        raise ValueError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def parse_ranks(text: str) -> tuple[int, ...]:
    """ "1,2,4" -> (1, 2, 4)."""
    numbers = tuple(parse_count(part) for part in text.split(","))
    if len(set(numbers)) < len(numbers) or len(numbers) < 2:
        raise ValueError(f"{text!r} is not two or more different numbers of ranks, as in 1,2,4")
    return numbers


def parse_seed(text: str) -> int:
    if not text.strip().isdecimal():
        raise ValueError(f"{text!r} is not a whole number from 0 on")
    return int(text)


def parse_report(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    if path.suffix not in REPORTS:
        raise ValueError(f"{text!r} cannot be written; the name of a report ends in {' or '.join(REPORTS)}")
    return path


def parse_record(text: str) -> Path:
    path = Path(text).expanduser().absolute()
    if not path.is_file():
        raise ValueError(f"there is no file {text}")
    return path


def parse_shape(text: str) -> Any:
    from pytest_batchinv.shapes import BatchShape

    return BatchShape.from_json(text)


def parse_switch(text: str) -> bool:
    if text.lower() not in _SWITCH:
        raise ValueError(f"{text!r} is neither on nor off; write one of {', '.join(_SWITCH)}")
    return _SWITCH[text.lower()]


def parse_url(text: str) -> str:
    from pytest_batchinv.urls import checked_url

    return checked_url(text)


def parse_name(text: str) -> str:
    if not text.strip():
        raise ValueError("the name is empty")
    return text


class Option:
    """One setting with its three sources: ``--batchinv-NAME``, ``BATCHINV_NAME`` and the ini option ``batchinv_name``.

    parse: text -> value; raises ValueError with a sentence. form: "value", "switch" (no argument), "list" (repeatable).
    No dataclass: those take a millisecond to define, in every pytest run.
    """

    def __init__(
        self,
        name: str,
        parse: Callable[[str], Any],
        default: Any,
        help: str,
        metavar: str = "...",
        form: str = "value",
        flag: str = "",
    ) -> None:
        self.name, self.parse, self.default, self.help = name, parse, default, help
        self.metavar, self.form = metavar, form
        self.flag = flag or f"--batchinv-{name.replace('_', '-')}"
        self.ini, self.env = f"batchinv_{name}", f"BATCHINV_{name.upper()}"


OPTIONS = (
    Option(
        "enabled",
        parse_switch,
        False,
        "Turn batch-invariant mode on for the tests marked batch_invariant; without it they are skipped.",
        form="switch",
        flag="--batch-invariant",
    ),
    Option(
        "model",
        parse_name,
        "auto",
        "The causal language model under test: a preset (tiny-qwen3, random:qwen3-0.6b, ...), a local path, or a hub "
        "id such as org/name. auto is tiny-qwen3 on the CPU and wide-qwen3 on a GPU; the packaged suite adds a llama.",
        "NAME",
    ),
    Option(
        "engine",
        parse_engine,
        "transformers",
        f"What runs the model: {', '.join(ENGINES)}, or an engine that another package gives.",
        "NAME",
    ),
    Option(
        "url",
        parse_url,
        None,
        "The address of a served model, for an engine that asks one, such as http://localhost:8000/v1. Its key, where it has "
        "one, is in BATCHINV_API_KEY.",
        "URL",
    ),
    Option(
        "device",
        one_of(DEVICES),
        "auto",
        f"Where it runs: {', '.join(DEVICES)}. auto is the GPU where there is one, else the CPU.",
        "NAME",
    ),
    Option(
        "dtype",
        one_of(("auto", *DTYPES)),
        "auto",
        f"The model's dtype: auto, {', '.join(DTYPES)}. auto is bf16 on a GPU and fp32 on the CPU.",
        "NAME",
    ),
    Option(
        "attn",
        parse_name,
        "auto",
        "The attention implementation, by its name in transformers (eager, sdpa, ...), or batch_invariant. auto leaves "
        "it to the engine.",
        "NAME",
    ),
    Option(
        "relations",
        parse_relations,
        tuple(RELATIONS),
        "What to check, of " + ", ".join(f"{name} ({words})" for name, words in RELATIONS.items()) + ".",
        "R,I,...",
    ),
    Option(
        "ranks",
        parse_ranks,
        (1, 2),
        "Numbers of ranks of tensor parallel that relation T compares; the first one with the others. Where there are several, "
        "each rank is a process, and on GPUs has one of its own.",
        "1,2,...",
    ),
    Option(
        "max_examples",
        parse_count,
        100,
        "Batch shapes to draw, after the sweep, for relation I; R, S, G and X draw one for ten of them, T one for twenty.",
        "N",
    ),
    Option(
        "seed",
        parse_seed,
        None,
        "With --batch-invariant every test starts from this seed (torch, random, numpy; 0 if it is not given). It also fixes "
        "which batch shapes are drawn.",
        "N",
    ),
    Option(
        "shape",
        parse_shape,
        None,
        "Check this one batch shape and no other: the JSON that a failure prints.",
        "JSON",
    ),
    Option(
        "strict",
        parse_switch,
        False,
        "An operator that nobody vouches for is an error: one that ran in a check and is neither in the table nor row-local by "
        "the scan of this torch and device.",
        form="switch",
    ),
    Option(
        "report",
        parse_report,
        (),
        f"Write the record of the run to this file, or a page of it, also when tests fail ({', '.join(REPORTS)}; repeatable).",
        "PATH",
        form="list",
    ),
    Option(
        "resume",
        parse_record,
        None,
        "Leave out the tests that an interrupted run of the same command has proven, by the file that it left beside its "
        "report (X.unfinished.json), and put their records into this run's report.",
        "PATH",
    ),
)


def declare(parser: Any) -> None:
    """Adds the table to pytest's parser. Texts stay texts: ``settings.resolve`` parses all of them alike."""
    group = parser.getgroup("batchinv", "batch invariance", after="general")
    for option in OPTIONS:
        action = {
            "value": {"metavar": option.metavar},
            "switch": {"action": "store_true"},
            "list": {"action": "append", "metavar": option.metavar},
        }[option.form]
        default = "" if option.default in (None, (), False) else f" Default: {_text(option.default)}."
        group.addoption(
            option.flag,
            dest=option.ini,
            default=None,
            help=f"{option.help}{default} Also {option.env} in the environment.",
            **action,
        )
        kind = {"value": "string", "switch": "bool", "list": "linelist"}[option.form]
        parser.addini(option.ini, f"The ini form of {option.flag}.", type=kind, default=None)


def any_given(config: Any, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether the command line, the environment or the ini file has any word of ours, a misspelt one included."""
    return (
        any(config.getoption(option.ini) is not None for option in OPTIONS)
        or any(name.startswith("BATCHINV_") for name in environ)
        or any(name.startswith("batchinv_") for name in names_in_ini(config))
    )


def names_in_ini(config: Any) -> Iterable[str]:
    """pytest 9 keeps them in ``_inicfg`` and warns at ``inicfg``, in which pytest 8 keeps them."""
    return getattr(config, "_inicfg" if hasattr(config, "_inicfg") else "inicfg", ())


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
