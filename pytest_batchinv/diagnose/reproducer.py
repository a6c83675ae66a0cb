"""A script of one operator that gives a row other bits on two sides: it needs torch, and neither the model nor this package.

Its numbers are drawn from seeds where drawn numbers show the fault, too; else they are the finding's own bytes. What is given
out was run before, and showed the fault.
"""

from __future__ import annotations

import base64
import contextlib
import io
import math
import zlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch._ops import OpOverload

from pytest_batchinv import mode
from pytest_batchinv.compare import as_bits
from pytest_batchinv.diagnose.recorder import tensors_of
from pytest_batchinv.diagnose.rows import Match, Places
from pytest_batchinv.diagnose.trace import ALIGNMENT, extent_of
from pytest_batchinv.report.record import machine

MOST_BYTES = 512 << 10
"""Of a script. A finding whose numbers need more has none."""
_TRIES_OF_NOISE = 100

_SCRIPT = '''\
"""{title}

Exits with 1 while it does, with 0 when the bits are equal. Needs torch alone.
Found on: {machine}.
"""

import base64
import io
import sys
import zlib

import torch
{imports}

def tensor(shape, stride, dtype, offset, content, device):
    """A tensor that begins so many values past an alignment of {alignment} bytes. content: a seed, or bytes in base64."""
    extent = 1 + sum((size - 1) * step for size, step in zip(shape, stride)) if all(shape) else 0
    memory = torch.empty(offset + extent, dtype=dtype, device=device)
    if isinstance(content, int):
        drawn = torch.randn(extent, generator=torch.Generator().manual_seed(content), dtype=torch.float32)
        memory[offset:] = drawn.to(dtype).to(device)
    elif extent:
        raw = bytearray(zlib.decompress(base64.b85decode(content)))
        memory[offset:] = torch.frombuffer(raw, dtype=dtype).to(device)
    return memory.as_strided(shape, stride, offset)


def saved(content):
    """An object of one of torch's classes, such as packed weights, in base64."""
    return torch.load(io.BytesIO(zlib.decompress(base64.b85decode(content))), weights_only=False)


def part(x, places):
    """The row in a tensor: along each dimension all of it (None), a range (start, stop), or a list of places."""
    for dim, place in enumerate(places):
        if isinstance(place, tuple):
            x = x.narrow(dim, place[0], place[1] - place[0])
        elif place is not None:
            x = x.index_select(dim, torch.tensor(place, device=x.device))
    return x


def bits(x):
    return x.contiguous().view(torch.uint8) if x.dim() else x.reshape(1).view(torch.uint8)


def sides():
    """What the operator gives on the two sides. They have the row's bytes in common, in every input."""
{inputs}
    first = {operator}({first})
    second = {operator}({second})
    return first, second


def main():
    differ = 0
    for _ in range({tries}):
        for number, (first, second) in enumerate(zip(*map(listed, sides()))):
            places = OUTPUTS[number] if number < len(OUTPUTS) else None
            if places is not None:
                first, second = bits(part(first, places[0])), bits(part(second, places[1]))
                differ += int((first != second).sum())
    print(f"{{differ}} bytes of the row differ" if differ else "the row has equal bits")
    return int(differ > 0)


def listed(result):
    return [x for x in (result if isinstance(result, (tuple, list)) else [result]) if isinstance(x, torch.Tensor)]


OUTPUTS = {outputs}

if __name__ == "__main__":
    sys.exit(main())
'''


class Sides(NamedTuple):
    """A call on either side: its arguments, where the row lies in each of its tensors, and in each of its results."""

    operator: OpOverload
    first: tuple[tuple[Any, ...], dict[str, Any]]
    second: tuple[tuple[Any, ...], dict[str, Any]]
    inputs: tuple[Match, ...]
    outputs: tuple[Match, ...]
    title: str
    is_noise: bool = False


class Unwritable(Exception):
    """Why there is no script, as a sentence."""


def script(sides: Sides) -> str:
    """Raises Unwritable."""
    if sides.operator._schema.is_mutable:
        raise Unwritable("the call writes to what it is given")
    for drawn in (True, False):
        text = _text(sides, drawn)
        if len(text) <= MOST_BYTES and _shows_the_fault(text):
            return text
    raise Unwritable(f"alone, or in less than {MOST_BYTES >> 10} KiB, the operator of stock torch does not show it")


def _text(sides: Sides, drawn: bool) -> str:
    names: list[tuple[str, str]] = []
    lines: list[str] = []
    one, other = tensors_of(sides.first), tensors_of(sides.second)
    if len(one) != len(other) or len(one) > len(sides.inputs):
        raise Unwritable("the two sides take other tensors")
    for number, (x, y, match) in enumerate(zip(one, other, sides.inputs, strict=False)):
        names.append((f"x{number}", f"y{number}"))
        lines += _inputs(number, x, y, match, drawn and x.is_floating_point())
    first, second = (_arguments(*call, [pair[side] for pair in names]) for side, call in enumerate((sides.first, sides.second)))
    facts = machine()
    return _SCRIPT.format(
        title=sides.title,
        machine=", ".join(facts[key] for key in ("gpu", "cpu", "platform") if facts.get(key)) + f", torch {facts['torch']}",
        imports="".join(f"{line}\n" for line in _imports(sides.operator)) + _threads(one),
        alignment=ALIGNMENT,
        inputs="\n".join(f"    {line}" for line in lines),
        operator=f"torch.ops.{sides.operator}",
        first=first,
        second=second,
        tries=_TRIES_OF_NOISE if sides.is_noise else 1,
        outputs=[_both(match) for match in sides.outputs],
    )


def _inputs(number: int, x: Tensor, y: Tensor, match: Match, drawn: bool) -> Iterator[str]:
    """Lines that make an input of either side. Drawn ones get the row's values in common."""
    if match.selection is None:
        raise Unwritable("the row was not found in all inputs")
    yield f"x{number} = {_made(x, 2 * number if drawn else None)}"
    yield f"y{number} = {_made(y, 2 * number + 1 if drawn else None)}"
    if drawn:
        one, other = _both(match)  # type: ignore[misc]
        lists = [dim for dim, place in enumerate(other) if isinstance(place, list)]
        if len(lists) > 1:
            raise Unwritable("the row lies in places of no order along two dimensions")
        if not lists:
            yield f"part(y{number}, {other}).copy_(part(x{number}, {one}))"
        else:
            (dim,) = lists
            ranges = [None if i == dim else place for i, place in enumerate(other)]
            places = f"torch.tensor({other[dim]}, device=y{number}.device)"
            yield f"part(y{number}, {ranges}).index_copy_({dim}, {places}, part(x{number}, {one}))"


def _made(x: Tensor, seed: int | None) -> str:
    extent = extent_of(x)
    offset = x.data_ptr() % ALIGNMENT // x.itemsize
    content = repr(seed)
    if seed is None:
        memory = as_bits(x.as_strided((extent,), (1,)).cpu()) if extent else torch.empty(0)
        if memory.nbytes > 16 * MOST_BYTES:
            raise Unwritable(f"its numbers are {memory.nbytes >> 20} MiB")
        content = _packed(memory.numpy().tobytes())
    return f"tensor({list(x.shape)}, {list(x.stride())}, {x.dtype}, {offset}, {content}, {x.device.type!r})"


def _packed(content: bytes) -> str:
    return repr(base64.b85encode(zlib.compress(content, 9)).decode())


def _both(match: Match) -> tuple[list[Any], list[Any]] | None:
    if match.selection is None:
        return None
    if match.selection.blocks is not None:
        raise Unwritable("the row lies in several blocks of columns")
    return [_place(x) for x, _ in match.selection.dims], [_place(y) for _, y in match.selection.dims]


def _place(places: Places) -> Any:
    """A range, None for a whole dimension, or a list."""
    if isinstance(places, slice):
        return None if places == slice(None) else (places.start, places.stop)
    return list(places)


def _arguments(args: tuple[Any, ...], kwargs: dict[str, Any], names: list[str]) -> str:
    left = iter(names)
    written = [_source(arg, left) for arg in args]
    written += [f"{name}={_source(value, left)}" for name, value in kwargs.items()]
    return ", ".join(written)


def _source(value: Any, names: Iterator[str]) -> str:
    if isinstance(value, Tensor):
        return next(names)
    if isinstance(value, (list, tuple)):
        inside = ", ".join(_source(part, names) for part in value)
        return f"[{inside}]"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, torch.device):
        return f"torch.device({str(value)!r})"
    if isinstance(value, torch.ScriptObject):
        return f"saved({_packed(_serialized(value))})"
    if value is None or isinstance(value, (bool, int, float, str, torch.dtype, torch.layout, torch.memory_format)):
        return repr(value)
    raise Unwritable(f"an argument of type {type(value).__name__} cannot be written down")


def _serialized(value: torch.ScriptObject) -> bytes:
    file = io.BytesIO()
    try:
        torch.save(value, file)
    except RuntimeError as error:
        raise Unwritable(f"an argument of type {value._type()} cannot be saved: {error}") from error
    return file.getvalue()


def _imports(operator: OpOverload) -> Iterator[str]:
    """What registers an operator of another library."""
    name = operator._schema.name
    if operator.namespace in ("aten", "prims"):
        return
    definition = OPDEFS.get(name)
    if definition is not None:
        yield f"import {definition._init_fn.__module__}  # registers {name}"
        return
    yield f"# Import here what registers {name}; where it was found these libraries were loaded:"
    yield from (f"# torch.ops.load_library({path!r})" for path in sorted(torch.ops.loaded_libraries))


def _threads(tensors: list[Tensor]) -> str:
    on_cpu = all(x.device.type == "cpu" for x in tensors)
    return f"\ntorch.set_num_threads({torch.get_num_threads()})\n" if on_cpu else ""


def _shows_the_fault(text: str) -> bool:
    names: dict[str, Any] = {"__name__": "reproducer"}
    with contextlib.redirect_stdout(io.StringIO()), torch.no_grad(), mode.stock_torch():  # the script has no mode
        exec(compile(text, "<reproducer>", "exec"), names)
        return bool(names["main"]())
