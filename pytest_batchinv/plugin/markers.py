"""The markers: their help lines, and strict parsers that raise ValueError with a sentence."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from pytest_batchinv.plugin.options import DTYPES, RELATIONS, parse_dtype, parse_ranks, parse_relations

COMPILE_MODES = ("eager", "default", "dynamic", "fullgraph", "reduce-overhead", "max-autotune")
GPU_COMPILE_MODES = ("reduce-overhead", "max-autotune")

HELP = (
    "batch_invariant(relations=..., max_examples=..., dtype=..., ranks=...): run this test in batch-invariant mode; it is "
    "skipped without --batch-invariant, and fails if the mode replaced nothing. The arguments override the options of their "
    f"names. relations: from {', '.join(RELATIONS)}, as 'R,I'. dtype: {', '.join(DTYPES)}. "
    "ranks: as '1,2,4'.",
    f"compile_mode(*modes): run this test once for each mode of {', '.join(COMPILE_MODES)}. The test asks for the "
    f"fixture compile_mode or batchinv_engine. {' and '.join(GPU_COMPILE_MODES)} are skipped where there is no GPU.",
    "sm(*capabilities): run this test only on GPUs of these compute capabilities, such as sm(80, 90); it is skipped elsewhere.",
)


def parse_batch_invariant(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that the marker changes."""
    parsers: dict[str, Callable[[Any], Any]] = {
        "relations": _relations,
        "max_examples": _max_examples,
        "dtype": _dtype,
        "ranks": _ranks,
    }
    if args:
        raise ValueError(f"batch_invariant takes {_words(parsers, 'and')} by name only, not {args[0]!r}")
    for name in kwargs:
        if name not in parsers:
            raise ValueError(f"batch_invariant takes no argument {name!r}; it takes {_words(parsers, 'and')}")
    try:
        return {name: parsers[name](value) for name, value in kwargs.items()}
    except ValueError as error:
        raise ValueError(f"batch_invariant: {error}") from None


def parse_compile_mode(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[str, ...]:
    if kwargs:
        raise ValueError(f"compile_mode takes no argument {next(iter(kwargs))!r}, only the names of modes")
    if not args:
        raise ValueError(f"compile_mode names no mode; name one or more of {', '.join(COMPILE_MODES)}")
    for mode in args:
        if mode not in COMPILE_MODES:
            raise ValueError(f"compile_mode: no such mode as {mode!r}; name one or more of {', '.join(COMPILE_MODES)}")
    if len(set(args)) < len(args):
        raise ValueError(f"compile_mode names a mode twice: {', '.join(args)}")
    return args


def parse_sm(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, ...]:
    if kwargs:
        raise ValueError(f"sm takes no argument {next(iter(kwargs))!r}, only compute capabilities, as in sm(80, 90)")
    if not args:
        raise ValueError("sm names no compute capability; write sm(80) for an A100, sm(90) for an H100 or H200")
    from pytest_batchinv.gpu import LOWEST_CAPABILITY

    for capability in args:
        if type(capability) is not int or capability < LOWEST_CAPABILITY:
            raise ValueError(
                f"sm: {capability!r} is not a whole number from {LOWEST_CAPABILITY} on; "
                "write 80 for an A100, 90 for an H100 or H200"
            )
    return args


def _relations(value: Any) -> tuple[str, ...]:
    return parse_relations(value if isinstance(value, str) else ",".join(map(str, _iterable("relations", value))))


def _ranks(value: Any) -> tuple[int, ...]:
    return parse_ranks(value if isinstance(value, str) else ",".join(map(str, _iterable("ranks", value))))


def _max_examples(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(f"max_examples={value!r} is not a whole number from 1 on")
    return value


def _dtype(value: Any) -> str:
    return parse_dtype(value if isinstance(value, str) else repr(value))


def _iterable(name: str, value: Any) -> Iterable[Any]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{name}={value!r} is neither a string such as 'R,I' nor a tuple such as ('R', 'I')")
    return value


def _words(names: Iterable[str], last: str) -> str:
    *head, tail = names
    return f"{', '.join(head)} {last} {tail}"
