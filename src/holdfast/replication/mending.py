"""What a repair did, would do, and could not do; and its hands: every change of a store goes through them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from holdfast.catalog.verify import Problem
from holdfast.core.errors import AlreadyExists, NotFound
from holdfast.stores import Store

__all__ = ["Hands", "Mended", "RepairReport"]


@dataclass(frozen=True, slots=True)
class Mended:
    """An object that was mended: what was wrong with it, and where what it is now came from."""

    key: str
    was: str
    origin: str


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What a repair came to. `mended` is what was done, or would be (`dry_run`); `lost` is what is whole nowhere, and
    was not touched; `left` is what has to wait, because the run is being written. `checked` files were read in full."""

    run: str
    dry_run: bool
    checked: int
    checked_bytes: int
    mended: tuple[Mended, ...]
    lost: tuple[Problem, ...]
    left: tuple[Problem, ...]

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong any more."""
        return not self.lost and not self.left and not (self.dry_run and self.mended)


@dataclass(slots=True)
class Hands:
    """Changes a store, or only says what would be changed. While `busy` says that someone writes the run, nothing is
    touched but data files, which nobody ever writes again."""

    target: Store
    dry_run: bool
    busy: str = ""
    mended: list[Mended] = field(default_factory=list)
    lost: list[Problem] = field(default_factory=list)
    left: list[Problem] = field(default_factory=list)

    def place(self, key: str, raw: bytes, was: str, origin: str, *, new: bool = False) -> bool:
        """Put a sound document in the place of one that is not, or where it is missing. Return whether it is, or would
        be, there now."""
        if self.busy:
            self.left.append(Problem(key, f"{was}; {self.busy}"))
            return False
        if not self.dry_run:
            try:
                # durability: the old document, or none, until the new one is whole
                (self.target.create if new else self.target.replace)(key, raw)
            except AlreadyExists:  # somebody else brought it back
                return self.target.read(key) == raw
        self.mended.append(Mended(key, was, origin))
        return True

    def remove(self, key: str, was: str) -> None:
        """Remove a damaged cache: whoever writes next makes it anew."""
        if self.busy:
            self.left.append(Problem(key, f"{was}; {self.busy}"))
            return
        if not self.dry_run:
            self.target.delete([key])
        self.mended.append(Mended(key, was, "it is made anew"))

    def give_up(self, key: str, was: str, reasons: Iterable[str] = ()) -> None:
        """Say that an object cannot be mended, and leave it as it is."""
        told = "; ".join([was, *(reasons or ["no other place has it"])])
        self.lost.append(Problem(key, told))

    def read(self, store: Store, key: str) -> bytes | None:
        """Return an object, None where there is none."""
        try:
            return store.read(key)
        except NotFound:
            return None
