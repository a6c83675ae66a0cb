"""What the scan measured of the operators outside the table: the data of this torch on this kind of device.

``python -m pytest_batchinv.coverage`` writes the files in ``scans/``. Where there is none for this torch and device, nothing is
known of any operator here, but of those that compute nothing.
"""

import json
import platform
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch._ops import OpOverload

FOLDER = Path(__file__).parent / "scans"
COMMAND = "python -m pytest_batchinv.coverage"

ROW_LOCAL, COVERED, REFUSED, VARIES, NO_ROWS, RAISES = "row-local", "covered", "refused", "varies", "no rows", "raises"
STATES = (COVERED, ROW_LOCAL, REFUSED, VARIES, NO_ROWS, RAISES)
"""covered: the table answered, and every row kept its bits. row-local: the same of torch's own kernel. refused: the mode
raised. The others leave an operator unverified: a row's bits changed; no dimension held rows; torch raised for the batches."""

COMPUTES_NOTHING = {
    # no value is computed: constants, memory as it is, metadata, a check, one number read
    "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided", "zeros", "ones", "full", "eye",
    "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones", "new_full", "scalar_tensor", "zero_", "fill_",
    "zero", "fill",
    # they count what is there: whole numbers, exact in any order, of all rows together
    "histc", "bincount", "count_nonzero",
    "_unsafe_view", "_reshape_copy", "squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "as_strided_",
    "resize_", "set_", "lift_fresh", "lift", "is_same_size", "_local_scalar_dense", "item", "_assert_async", "_assert_scalar",
    "_assert_tensor_metadata", "_has_compatible_shallow_copy_type", "sym_size", "sym_stride", "sym_numel", "record_stream",
}  # fmt: skip
"""Base names of aten operators that hold, move or check what is there. With the views they are all that is known by name."""

_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.complex128: "c128",
    torch.complex64: "c64",
    torch.complex32: "c32",
    torch.bool: "bool",
}


@dataclass(frozen=True)
class Scan:
    """One file. eager: operator -> state -> the dtypes of its cells in that state, apart by blanks.

    why: operator -> what was seen where its state leaves it unverified. functions: state -> how many whole samples, as
    functions of their rows, were in it. silent: samples that varied while no operator in them was unverified. not_run: samples
    without a result, and why.
    """

    torch: str
    device: str
    settings: dict[str, Any] = field(default_factory=dict)
    eager: dict[str, dict[str, str]] = field(default_factory=dict)
    why: dict[str, str] = field(default_factory=dict)
    functions: dict[str, int] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)
    not_run: list[str] = field(default_factory=list)

    def state(self, name: str, dtype: str) -> str | None:
        """The state of a cell; None where the scan did not see it."""
        cells = self.eager.get(name, {})
        return next((state for state, dtypes in cells.items() if dtype in dtypes.split()), None)

    def to_json(self) -> str:
        """One operator a line, sorted: two scans can be compared line by line, and equal ones are equal bytes."""
        parts = {name: json.dumps(getattr(self, name), sort_keys=True) for name in ("torch", "device", "settings", "functions")}
        parts |= {name: _lines(getattr(self, name)) for name in ("silent", "not_run", "eager", "why")}
        return "{" + ",\n".join(f"{json.dumps(name)}: {text}" for name, text in parts.items()) + "}\n"

    @classmethod
    def from_json(cls, text: str) -> "Scan":
        return cls(**json.loads(text))


def _lines(value: list[str] | dict[str, Any]) -> str:
    if isinstance(value, list):
        return "[" + ",".join(f"\n{json.dumps(entry)}" for entry in value) + "]"
    return "{" + ",".join(f"\n{json.dumps(name)}: {json.dumps(value[name])}" for name in sorted(value)) + "}"


def cell_name(overload: OpOverload, kwargs: dict[str, Any]) -> str:
    """The operator's name in the data. A sum with a factor is another function than one without, and has a name of its own."""
    has_factor = kwargs.get("alpha", 1) != 1 and overload._schema.name in ("aten::add", "aten::sub", "aten::rsub")
    return f"{overload.name()} with alpha" if has_factor else overload.name()


def dtype_name(dtype: torch.dtype) -> str:
    """The name of a dtype in the data. All integers are one, as no rounding tells them apart."""
    if dtype in _NAMES:
        return _NAMES[dtype]
    name = str(dtype).removeprefix("torch.")
    return "int" if name.removeprefix("u").startswith("int") else name


def dtype_of(values: Any) -> str:
    """The dtype of the first tensor of complex numbers, else of floats, else of the first tensor; "" without one."""
    tensors = [x for x in torch.utils._pytree.tree_leaves(values) if isinstance(x, torch.Tensor)]
    ranked = sorted(tensors, key=lambda x: 0 if x.is_complex() else 1 if x.is_floating_point() else 2)
    return dtype_name(ranked[0].dtype) if ranked else ""


def dtype_of_call(given: str, takes_floats: bool, out: Any) -> str:
    """The dtype of a call's cell. given: that of its inputs. "" for one that neither takes nor gives floats."""
    gives = dtype_of(out) if has_floats(out) else ""
    if gives.startswith("c") and not given.startswith("c"):  # a complex number beside a tensor of floats
        return gives
    return given if takes_floats else (given or gives) if gives else ""


def has_floats(values: Any) -> bool:
    """Whether there is a tensor of floats or complex numbers among them."""
    leaves = torch.utils._pytree.tree_leaves(values)
    return any(isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex()) for x in leaves)


def overload_named(name: str) -> OpOverload:
    """The overload of this cell ("aten::add.Tensor"). Raises AttributeError where this torch has none."""
    namespace, _, rest = name.partition(" ")[0].partition("::")
    packet, _, overload = rest.partition(".")
    return getattr(getattr(getattr(torch.ops, namespace), packet), overload or "default")


@cache
def device_kind(device: str) -> str:
    """What its kernels are chosen by: the CPU's instruction set, the GPU's compute capability."""
    if device == "cuda":
        return "cuda-sm{}{}".format(*torch.cuda.get_device_capability())
    machine = "" if platform.machine() == "x86_64" else f"{platform.machine()}-"
    return f"cpu-{machine}{torch.backends.cpu.get_cpu_capability().lower()}"


def path_of(device: str) -> Path:
    version = str(torch.__version__).partition("+")[0]
    return FOLDER / f"torch-{version}-{device_kind(device)}.json"


@cache
def scan_of(device: str) -> Scan | None:
    """The data for this torch and this kind of device; None where no scan was made."""
    path = path_of(device)
    return Scan.from_json(path.read_text()) if path.exists() else None


def what_is_missing(device: str) -> str:
    """A sentence where there is no data; "" where there is."""
    if scan_of(device) is not None:
        return ""
    version = str(torch.__version__).partition("+")[0]
    return (
        f"torch {version} on {device_kind(device)} has not been scanned, so every operator outside the table is unverified; "
        f"`{COMMAND} --device {device}` makes the data"
    )


def is_exact(overload: OpOverload, dtype: str) -> bool:
    """Whether a call of this dtype rounds nothing: it neither takes nor gives floats, and draws nothing at random."""
    return not dtype and torch.Tag.nondeterministic_seeded not in overload.tags


def computes_nothing(overload: OpOverload) -> bool:
    """Views by their schemas, and the operators that are listed above."""
    return overload.is_view or overload.namespace == "aten" and overload._schema.name.split("::", 1)[1] in COMPUTES_NOTHING
