"""``python -m pytest_batchinv.mutants``: how many planted faults are caught, located and convicted, and how soon."""

from __future__ import annotations

import sys

import torch

from pytest_batchinv import BatchVarianceError, check_batch_invariant
from pytest_batchinv.mutants import rows as planted
from pytest_batchinv.mutants.compiled import COMPILED
from pytest_batchinv.mutants.detection import SEED, power
from pytest_batchinv.mutants.faults import FAULTS
from pytest_batchinv.subjects.rows import RowsSubject


def main() -> int:
    torch.set_num_threads(1)
    powers, faults = [], [*FAULTS, *COMPILED]
    for fault in faults:
        found = power(fault)
        powers.append(found)
        caught = f"{found.caught_by or '-'} of {fault.relation}"
        words = ["located" * found.located, "convicted" * found.convicted]
        print(
            f"{fault.name:<52} {caught:<8} {found.batches:>5} batches {found.seconds:>5.1f} s  {', '.join(filter(None, words))}"
        )
    alarms = 0
    for name, make in planted.INVARIANT.items():
        fn, pool = make()
        try:
            check_batch_invariant(RowsSubject(fn, [pool]), ("R", "S", "I"), seed=SEED)
        except BatchVarianceError:
            alarms += 1
            print(f"false alarm: {name}")
    right = sum(found.caught_by == fault.relation for fault, found in zip(faults, powers, strict=True))
    located, convicted = sum(found.located for found in powers), sum(found.convicted for found in powers)
    print(f"{right} of {len(faults)} caught by their relation, {located} located, {convicted} convicted,", end=" ")
    print(f"{alarms} false alarms in {len(planted.INVARIANT)} controls, {sum(found.seconds for found in powers):.0f} s")
    return int(right < len(faults) or alarms > 0 or located < 0.95 * len(faults))


if __name__ == "__main__":
    sys.exit(main())
