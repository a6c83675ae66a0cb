"""Prints the state of the patches, Inductor's settings and the dispatcher here: ``python -m pytest_batchinv.patches``."""

from importlib import metadata

from pytest_batchinv.patches import inductor_config, registry


def main() -> None:
    version = registry.torch_version()
    print(f"torch {version}, pytest-batchinv {metadata.version('pytest-batchinv')}\n\npatches")
    for row in registry.status():
        print(f"  {row.name}: {row.state}\n      {row.why}")
        versions = f"torch {row.torch}" + (f", vLLM {row.vllm}" if row.vllm else "")
        print(f"      Target {row.target}, {versions}. Upstream: {row.upstream or '-'}")
    print("\nInductor's settings in batch-invariant mode")
    for setting in inductor_config.SETTINGS:
        print(f"  {setting.name}: {repr(setting.value) if setting.exists_in(version) else 'not there'}")
        print(f"      {setting.reason}{setting.torch and f' (torch {setting.torch})'}")
    print("\ndispatcher entries of the table that others hold")
    from pytest_batchinv.kernels.eager import entries_of_others

    for registration in entries_of_others() or ["none"]:
        print(f"  {registration}")
    inductor_config.check(version)


if __name__ == "__main__":
    main()
