"""The power is cut at any moment of an operation: what was acknowledged is there, and nothing is half.

By the model, every image that POSIX allows (all of them where they are few, samples beyond), and on a real ext4, shut
down as a dying machine would, where root allows it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import pytest

from crash import ledger
from crash.copies import COPIES
from crash.operations import LARGE, OPERATIONS, Operation, state
from holdfast import HoldfastError
from holdfast.core.names import is_key
from holdfast.stores import LocalStore, MemoryStore
from holdfast.testing import (
    Crash,
    Fault,
    FaultDisk,
    FaultPlan,
    PowerLossDisk,
    forget_this_process,
    invariants,
    lay_out,
)
from holdfast.testing.power import Image

CHANGING = [
    o for o in [*OPERATIONS, *COPIES] if o.calls != "*" and o.name not in ("async save (thread)", "repair")
]
MODEL, EXT4 = "power cut (every legal image, sampled beyond 64)", "power cut (real ext4, shut down)"

SHARED_MEMORY = "/dev/shm" if os.path.isdir("/dev/shm") else None

CELLS = [(MODEL, o.name) for o in CHANGING] + [(EXT4, o.name) for o in CHANGING]


def as_store(image: Image) -> MemoryStore:
    """Return what a store would find in an image: temporary files are none of its objects."""
    store = MemoryStore()
    for path, content in image.items():
        key = path.removeprefix("run/")
        if is_key(key):
            store.create(key, content)
    return store


def check_image(image: Image, operation: Operation, *, done: bool) -> None:
    store = as_store(image)
    acknowledged = dict(operation.acknowledged)
    if done and operation.commits is not None:
        acknowledged[operation.commits] = operation.truth[operation.commits]
    invariants.old_stays_readable(store, acknowledged, id="I3")
    if store.names("checkpoints"):
        invariants.no_half_commit(store, operation.truth)
        invariants.needed_exists(store)


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A directory in memory, where there is one: the model says what a disk would keep of it."""
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as made:
        yield Path(made)


@pytest.mark.parametrize("operation", CHANGING, ids=lambda o: o.name)
def test_images(operation: Operation, scratch: Path) -> None:
    operation.prepare(LocalStore(scratch / "run"))
    disk = PowerLossDisk(scratch)
    operation.act(LocalStore(scratch / "run", disk))
    disk.mark("returned")
    seen: set[tuple[object, ...]] = set()
    recovered = 0
    for moment in disk.moments():
        for number, image in enumerate(moment.images(ledger.budget(6, 60))):
            identity = (bool(moment.marks), frozenset((p, hash(c)) for p, c in image.items()))
            if identity in seen:
                continue
            seen.add(identity)
            try:
                check_image(image, operation, done=bool(moment.marks))
                if len(seen) % ledger.budget(15, 5) == 1:
                    check_recovery(image, operation)
                    recovered += 1
            except (AssertionError, HoldfastError):
                print(
                    f"{operation.name}: power cut after {moment.last} (call {moment.position}), image {number}"
                )
                raise
    assert recovered
    ledger.count(MODEL, operation.name, len(seen))


def check_recovery(image: Image, operation: Operation) -> None:
    """With the power back, the same operation and the next save work."""
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as found:
        lay_out(image, found)
        forget_this_process()
        operation.act(LocalStore(f"{found}/run"))
        invariants.recovers(f"{found}/run", 9, state(9))


# ---- a real file system -----------------------------------------------------------------------------------------------

FS_IOC_SHUTDOWN, NO_LOG_FLUSH = 0x8004587D, struct.pack("I", 2)
MEGABYTES = 24


def ran(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False)


class Ext4:
    """An ext4 in a file, mounted by a loop device; `cut` makes it drop all that is not in its journal."""

    def __init__(self, scratch: Path) -> None:
        self.image, self.saved, self.mount = scratch / "image", scratch / "saved", scratch / "mount"
        self.mount.mkdir()
        with self.image.open("wb") as f:
            f.truncate(MEGABYTES << 20)

    def make(self) -> str:
        """Return why there is no such thing here, "" where there is."""
        for command in (["mkfs.ext4", "-q", "-F", str(self.image)], self._mounting()):
            done = ran(*command)
            if done.returncode:
                return f"{command[0]}: {done.stderr.strip()}"
        return ""

    def _mounting(self) -> list[str]:
        return ["mount", "-o", "loop", str(self.image), str(self.mount)]

    def save(self) -> None:
        self.unmount()
        shutil.copyfile(self.image, self.saved)

    def fresh(self) -> None:
        shutil.copyfile(self.saved, self.image)
        self.remount()

    def remount(self) -> None:
        assert ran(*self._mounting()).returncode == 0

    def unmount(self) -> None:
        done = ran("umount", str(self.mount))
        assert done.returncode == 0, done.stderr

    def cut(self) -> NoReturn:
        fd = os.open(self.mount, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, FS_IOC_SHUTDOWN, NO_LOG_FLUSH)
        finally:
            os.close(fd)
        raise Crash


@pytest.fixture
def ext4() -> Iterator[Ext4]:
    if os.getuid() != 0:
        pytest.skip("mounting a file system takes root")
    if shutil.which("mkfs.ext4") is None:
        pytest.skip("there is no mkfs.ext4")
    with tempfile.TemporaryDirectory(dir=SHARED_MEMORY) as scratch:
        made = Ext4(Path(scratch))
        why = made.make()
        if why:
            pytest.skip(f"no loop mount here: {why}")
        try:
            yield made
        finally:
            ran("umount", str(made.mount))


@pytest.mark.parametrize(
    "operation", [*CHANGING, LARGE] if ledger.BROAD else [CHANGING[0], LARGE], ids=lambda o: o.name
)
def test_a_real_file_system(operation: Operation, ext4: Ext4) -> None:
    root = ext4.mount / "run"
    operation.prepare(LocalStore(root))
    ext4.save()
    cases, at, stride = 0, 1, ledger.budget(3, 1)
    while True:
        ext4.fresh()
        plan = FaultPlan(Fault("kill", at), die=ext4.cut)
        finished = False
        try:
            operation.act(LocalStore(root, FaultDisk(plan)))
            finished = True
            ext4.cut()
        except Crash:
            forget_this_process()
        ext4.unmount()
        ext4.remount()
        acknowledged = dict(operation.acknowledged)
        if finished and operation.commits is not None:
            acknowledged[operation.commits] = operation.truth[operation.commits]
        invariants.old_stays_readable(root, acknowledged, id="I3")
        invariants.no_half_commit(root, operation.truth)
        invariants.needed_exists(root)
        operation.act(LocalStore(root))
        if operation is not LARGE:
            invariants.recovers(root, 9, state(9))
        ext4.unmount()
        cases, at = cases + 1, at + stride
        if finished:
            break
    assert cases > 3
    ledger.count(EXT4, operation.name, cases)
