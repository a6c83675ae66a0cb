"""The JSON report described from its own structs, so that the description cannot fall behind them."""

from __future__ import annotations

import inspect
import types
import typing
from collections.abc import Iterator
from typing import Any, Literal, Union

import msgspec

from pytest_batchinv.report import record
from pytest_batchinv.report.saved import Saved

_ALIASES = {record.Verdict: "Verdict", record.Mode: "Mode", record.Badge: "Badge", record.Agreement: "Agreement"}


def json_schema() -> str:
    """The JSON Schema of a report, as text."""
    return msgspec.json.format(msgspec.json.encode(msgspec.json.schema(Saved)), indent=2).decode()


def markdown() -> str:
    """A section for each struct that a report can hold, from the outside in: its docstring, and its fields as a table."""
    return "\n".join(line for struct in structs() for line in _section(struct)).rstrip("\n")


def structs() -> list[type[msgspec.Struct]]:
    """All structs of a report; each after the one in whose fields it is first named."""
    found: list[type[msgspec.Struct]] = [Saved]
    for struct in found:
        for field in msgspec.structs.fields(struct):
            found += [named for named in _structs_in(field.type) if named not in found]
    return found


def _structs_in(kind: Any) -> Iterator[type[msgspec.Struct]]:
    if isinstance(kind, type) and not typing.get_args(kind) and issubclass(kind, msgspec.Struct):
        yield kind
    for part in typing.get_args(kind):
        yield from _structs_in(part)


def _section(struct: type[msgspec.Struct]) -> Iterator[str]:
    yield f"### {struct.__name__}"
    yield ""
    yield from inspect.cleandoc(struct.__doc__ or "").splitlines()
    yield ""
    yield "| field | type | where it is left out |"
    yield "|---|---|---|"
    for field in msgspec.structs.fields(struct):
        yield f"| `{field.encode_name}` | {_words(field.type)} | {_default(field)} |"
    yield ""


def _default(field: msgspec.structs.FieldInfo) -> str:
    if field.required:
        return "never"
    if field.default_factory is not msgspec.NODEFAULT:
        return _value(field.default_factory())
    return _value(field.default)


def _value(value: Any) -> str:
    if isinstance(value, msgspec.Struct):
        return "all of its defaults"
    return f"`{msgspec.json.encode(value).decode()}`"


def _words(kind: Any) -> str:
    """A type as JSON has it: "array of string", "Verdict", "integer or null"."""
    if kind in _ALIASES:
        return f"{_ALIASES[kind]}: {', '.join(f'`{word}`' for word in typing.get_args(kind))}"
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return ", ".join(f"`{word}`" for word in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(_words(part) for part in parts)
    if origin is tuple and parts[-1] is Ellipsis:
        return f"array of {_words(parts[0])}"
    if origin is tuple:
        return f"[{', '.join(_words(part) for part in parts)}]"
    if origin is dict:
        return f"object of {_words(parts[1])}"
    if isinstance(kind, type) and issubclass(kind, msgspec.Struct):
        return f"[{kind.__name__}](#{kind.__name__.lower()})"
    names = {str: "string", int: "integer", float: "number", bool: "boolean", type(None): "null", Any: "any"}
    return names[kind]
