"""Prints what the patches, the rules and the dispatcher come to on this torch: ``python -m pytest_batchinv.patches``."""

import textwrap
from importlib import metadata

from pytest_batchinv.patches import registry, rules


def main() -> None:
    version = registry.torch_version()
    print(f"torch {version}, pytest-batchinv {metadata.version('pytest-batchinv')}\n\npatches")
    for row in registry.status():
        _print(
            f"  {row.name}", row.state, f"{row.why}. Target {row.target}, torch {row.torch}. Upstream: {row.upstream or '-'}"
        )
    print("\nInductor's settings in batch-invariant mode")
    for rule in rules.RULES:
        state = repr(rule.value) if rule.exists_in(version) else "not there"
        _print(f"  {rule.name}", state, rule.reason + (f" (torch {rule.torch})" if rule.torch else ""))
    for name, reason in rules.LEFT_ALONE.items():
        _print(f"  {name}", "left alone", reason)
    print("\ndispatcher entries of the table that others hold")
    from pytest_batchinv.kernels.eager import entries_of_others

    for registration in entries_of_others() or ["none"]:
        print(f"  {registration}")
    rules.check(version)


def _print(name: str, state: str, why: str) -> None:
    print(f"{name}: {state}")
    print(textwrap.fill(why, 100, initial_indent="      ", subsequent_indent="      "))


if __name__ == "__main__":
    main()
