"""Kill a process at the n-th changing call of a scenario, for every n, and check what is left. Run as a script, so that
forking happens in a process without threads."""

from __future__ import annotations

import pathlib
import sys
import tempfile

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import scenarios

import holdfast
from holdfast.catalog import tidiness
from holdfast.format.manifest import decode_manifest
from holdfast.stores import LocalStore
from holdfast.testing import Fault, FaultDisk, FaultPlan, kill_process


def must_survive(name: str) -> set[int]:
    """The acknowledged checkpoints that no crash of this scenario may take away."""
    return {"save": {1, 2}, "train": set(), "remove": {2}}[name]


def left_over(root: pathlib.Path) -> set[str]:
    """The data files that no manifest needs."""
    store = LocalStore(root)
    manifests = [*store.names("checkpoints"), *store.names("trash")]
    return set(store.names("data")).difference(
        *(decode_manifest(store.read(m), m).file_keys for m in manifests)
    )


def run(name: str, when: str) -> int:
    scenario = scenarios.SCENARIOS[name]
    with tempfile.TemporaryDirectory() as scratch:
        base, root = pathlib.Path(scratch, "base"), pathlib.Path(scratch, "run")
        scenarios.prepare(base)
        n = 0
        while True:
            n += 1
            scenarios.fresh_copy(base, root)
            call = "write" if when == "torn" else ""
            disk = FaultDisk(FaultPlan(Fault("kill", n, when, call), die=kill_process))
            status = scenarios.run_in_child(root, disk, scenario)
            if status == 0:
                return n - 1
            assert scenarios.killed(status), (
                f"{name}: ended with {status} instead of being killed at call {n} ({when})"
            )
            try:
                steps = scenarios.check_run(root)
                assert must_survive(name) <= set(steps), f"lost a checkpoint: {steps}"
                assert steps, "nothing is left"
                if name == "train":
                    assert max(steps) >= 2, f"went back to {steps}"
                scenario(LocalStore(root))  # the next attempt works, without manual steps
                after = scenarios.check_run(root)
                holdfast.save(root, scenarios.state(9), step=9)
                assert 9 in scenarios.check_run(root)
                assert must_survive(name) <= set(after)
                left = [p.name for p in root.rglob("*") if p.name.startswith(".tmp-")]
                assert not left_over(root), "what the dead one left is not freed"
                assert len(left) <= 1, f"temporary files stay behind: {left}"
            except BaseException:
                print(
                    f"scenario {name}: killed {when} call {n} ({sorted(p.name for p in root.rglob('*.json'))})"
                )
                raise


if __name__ == "__main__":
    tidiness.MARK_FROM = 0  # the mark of a long run must not hide what a dead writer left
    print(run(sys.argv[1], sys.argv[2]))
