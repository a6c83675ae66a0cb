"""What batch-invariant mode sets in Inductor, in which versions of torch, and why: the one place that says so.

``in_force`` holds the rules for one compilation. A rule whose setting should exist in this torch and does not is an error,
and so is one that exists before its range begins: torch renames settings, and a rule must not lapse in silence.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import Version

INDUCTOR = "torch._inductor.config"
FUNCTORCH = "torch._functorch.config"


class RuleError(RuntimeError):
    """torch's settings are not the ones that the rules were written for."""


@dataclass(frozen=True)
class Rule:
    """One setting. torch: PEP 440 range of the versions that have it; empty: all that the project supports."""

    name: str
    value: Any
    reason: str
    torch: str = ""
    module: str = INDUCTOR

    def exists_in(self, version: Version) -> bool:
        return SpecifierSet(self.torch).contains(version, prereleases=True)


_ORDER = "no order of a sum may follow the batch; no reduction on floats is left to Inductor, and this stands behind that"
_TIMED = "nothing is chosen by a timing, which differs from run to run"

RULES = (
    Rule("emulate_precision_casts", True, "bf16 and fp16 are rounded where eager code rounds; Triton fuses no a * b + c"),
    Rule("eager_numerics.division_rounding", True, "division as eager code divides; Triton's default is an approximation"),
    Rule("eager_numerics.disable_ftz", True, "denormals as eager code keeps them"),
    Rule("eager_numerics.use_pytorch_libdevice", True, "eager code's transcendental functions", torch=">=2.12"),
    Rule("use_fast_math", False, "eager code's functions, and no approximations of them"),
    Rule("cpp.enable_floating_point_contract_flag", "off", "C++ fuses no a * b + c either"),
    Rule("cpp.enable_unsafe_math_opt_flag", False, "C++ changes the order of no operation"),
    Rule("deterministic", True, _TIMED),
    Rule("batch_invariant", True, "persistent reductions of one size class", torch=">=2.13"),
    Rule("split_reductions", False, _ORDER),
    Rule("dynamic_scale_rblock", False, _ORDER),
    Rule("triton.cooperative_reductions", False, _ORDER),
    Rule("triton.mix_order_reduction", False, _ORDER),
    Rule("triton.nested_reduction", False, _ORDER, torch=">=2.13"),
    Rule("triton.multi_kernel", 0, _TIMED),
    Rule("shape_padding", False, "no matrix is padded, after a timing, for a product of its own order"),
    Rule("coordinate_descent_tuning", False, _TIMED + "; with it a product with M = 1 is taken apart into mul and sum"),
    Rule("benchmark_epilogue_fusion", False, _TIMED, torch="<2.15"),
    Rule("benchmark_template_fusion", False, _TIMED + "; the new name of benchmark_epilogue_fusion", torch=">=2.15"),
    Rule("cpp_wrapper", False, "operators are called through Python, where the table's implementations live"),
    Rule(
        "force_non_lazy_backward_lowering",
        True,
        "the backward graph is compiled together with the forward one, under these rules, and not at its first call",
        module=FUNCTORCH,
    ),
)

# What could be thought of as a rule and is none, with the reason.
LEFT_ALONE = {
    "max_autotune": "products are the table's operators, which Inductor calls and does not tune; pointwise code has the "
    "same bits in every configuration",
    "matmul decompositions for M = 1 and K = 1": "the table stands in front of torch's decompositions, so none is reached",
    "cpp.threads": "it splits only reductions, and none is left",
    "caches": "the fingerprint in torch.compiler.config.cache_key_tag keeps the mode's code apart",
    "numerics (torch 2.15)": "its strict setting is made of settings that are rules here",
}


@contextlib.contextmanager
def in_force(version: Version) -> Iterator[None]:
    """All rules of this version of torch, set for this thread."""
    with contextlib.ExitStack() as stack:
        for module in (INDUCTOR, FUNCTORCH):
            values = {rule.name: rule.value for rule in RULES if rule.module == module and rule.exists_in(version)}
            stack.enter_context(import_module(module).patch(values))
        yield


def check(version: Version) -> None:
    """Raises RuleError where this torch has a setting that it should not have, or lacks one that it should have."""
    for rule in RULES:
        expected = rule.exists_in(version)
        if not expected and "<" in rule.torch:
            continue  # renamed: the old name may live on for a while, and warns when it is looked at
        there = _has(import_module(rule.module), rule.name)
        if there != expected:
            raise RuleError(
                f"{rule.module} of torch {version} {'has a' if there else 'has no'} setting {rule.name}, but the rule for it "
                f"says {rule.torch or 'every version has it'}: find out what became of it, and correct RULES in {__name__}."
            )


def _has(config: Any, name: str) -> bool:
    for part in name.split("."):
        if not hasattr(config, part):
            return False
        config = getattr(config, part)
    return True
