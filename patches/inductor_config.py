"""Inductor config: what batch-invariant mode sets in Inductor, in which versions of torch, and why.

``in_force`` holds the settings for one compilation. A setting that this torch should have and lacks is an error, and so is one
that exists before its range begins: torch renames settings, and none may lapse in silence.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from operator import attrgetter
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

INDUCTOR = "torch._inductor.config"
FUNCTORCH = "torch._functorch.config"


class SettingError(RuntimeError):
    """torch does not have the settings that SETTINGS was written for."""


@dataclass(frozen=True)
class Setting:
    """One setting. torch: PEP 440 range of the versions that have it; empty: all that the project supports."""

    name: str
    value: Any
    reason: str
    torch: str = ""
    module: str = INDUCTOR

    def exists_in(self, version: Version) -> bool:
        return SpecifierSet(self.torch).contains(version, prereleases=True)


_ORDER = "the order of a sum must not follow the batch; a second guard, as no float reduction is left to Inductor"
_TIMED = "nothing is chosen by a timing, which differs from run to run"
_BACKWARD = "the backward graph is compiled with the forward one, under these settings, and not at its first call"

SETTINGS = (
    Setting("emulate_precision_casts", True, "bf16 and fp16 are rounded where eager code rounds; Triton fuses no a * b + c"),
    Setting("eager_numerics.division_rounding", True, "division as in eager code; Triton's default is an approximation"),
    Setting("eager_numerics.disable_ftz", True, "denormals are kept, as in eager code"),
    Setting("eager_numerics.use_pytorch_libdevice", True, "eager code's transcendental functions", torch=">=2.12"),
    Setting("use_fast_math", False, "eager code's functions, and no approximations of them"),
    Setting("cpp.enable_floating_point_contract_flag", "off", "C++ fuses no a * b + c either"),
    Setting("cpp.enable_unsafe_math_opt_flag", False, "C++ reorders no operation"),
    Setting("deterministic", True, _TIMED),
    Setting("batch_invariant", True, "persistent reductions of one size class", torch=">=2.13"),
    Setting("split_reductions", False, _ORDER),
    Setting("dynamic_scale_rblock", False, _ORDER),
    Setting("triton.cooperative_reductions", False, _ORDER),
    Setting("triton.mix_order_reduction", False, _ORDER),
    Setting("triton.nested_reduction", False, _ORDER, torch=">=2.13"),
    Setting("triton.multi_kernel", 0, _TIMED),
    Setting(
        "shape_padding", False, "no matrix is padded, which a timing would decide and which changes the order of the product"
    ),
    Setting("coordinate_descent_tuning", False, _TIMED + "; it also turns a product with M = 1 into mul and sum"),
    Setting("benchmark_epilogue_fusion", False, _TIMED, torch="<2.15"),
    Setting("benchmark_template_fusion", False, _TIMED + "; the new name of benchmark_epilogue_fusion", torch=">=2.15"),
    Setting("cpp_wrapper", False, "operators are called through Python, where the table's implementations live"),
    Setting("force_non_lazy_backward_lowering", True, _BACKWARD, module=FUNCTORCH),
)


@contextlib.contextmanager
def in_force(version: Version) -> Iterator[None]:
    """All settings of this version of torch, for this thread."""
    with contextlib.ExitStack() as stack:
        for module in (INDUCTOR, FUNCTORCH):
            values = {s.name: s.value for s in SETTINGS if s.module == module and s.exists_in(version)}
            stack.enter_context(import_module(module).patch(values))
        yield


def check(version: Version) -> None:
    """Raises SettingError if this torch has a setting that it should not have, or lacks one that it should have."""
    for setting in SETTINGS:
        expected = setting.exists_in(version)
        if not expected and "<" in setting.torch:
            continue  # renamed: the old name may live on for a while, and warns when it is looked at
        try:
            attrgetter(setting.name)(import_module(setting.module))
            there = True
        except AttributeError:
            there = False
        if there != expected:
            raise SettingError(
                f"{setting.module} of torch {version} has {'a' if there else 'no'} setting {setting.name}, but {__name__} says "
                f"{setting.torch or 'every version has it'}: find out what became of it, and correct SETTINGS there."
            )
