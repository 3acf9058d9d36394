"""Who can say what belongs to a run: its own store and the copies. What is bad or missing there is looked for here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from msgspec import structs

from holdfast.catalog.checkpoints import newest_states
from holdfast.catalog.identity import read_identity
from holdfast.catalog.keys import CHECKPOINTS, RUN, data_prefix, parse_manifest_key
from holdfast.catalog.verify import Problem
from holdfast.core.errors import HoldfastError, IntegrityError, InvalidFormat, NotARun, NotFound, StateError
from holdfast.format.events import Event, Removed, Resumed, Started
from holdfast.format.manifest import Manifest, Part
from holdfast.replication.copying import check_is_of, read_manifest
from holdfast.replication.desired import Past
from holdfast.replication.looking import past_of
from holdfast.stores import Store

__all__ = ["Found", "Sought", "Witnesses", "may_replace", "was_given_up"]

_ATTEMPT = re.compile(rb'"attempt":"([0-9A-Za-z]+)"')


@dataclass(frozen=True, slots=True)
class Found:
    """A manifest that is to be put in place: its bytes, where they are from, and what is there (or `missing`) now."""

    key: str
    raw: bytes
    manifest: Manifest
    was: str
    origin: str
    missing: bool


@dataclass(slots=True)
class Sought:
    """The manifests of a run: those that are sound where they are, those that were found elsewhere, and the lost."""

    sound: dict[str, Manifest] = field(default_factory=dict)
    found: list[Found] = field(default_factory=list)
    lost: list[Problem] = field(default_factory=list)

    @property
    def all(self) -> list[Manifest]:
        """Every manifest that is there or can be, the sound ones first."""
        return [*self.sound.values(), *(f.manifest for f in self.found)]

    @property
    def needed_here(self) -> set[str]:
        """The data files that listed checkpoints need, sound or broken."""
        here = [*self.sound.values(), *(f.manifest for f in self.found if not f.missing)]
        return {key for manifest in here for key in manifest.file_keys}


@dataclass(slots=True)
class Witnesses:
    """A run's own store and copies of it, all of the same identity. `identity` is the bytes of a sound `run.json`, and
    `wrong` what is wrong with the run's own, if something is."""

    target: Store
    sources: Sequence[Store]
    run: str
    identity: bytes
    origin: str = ""
    wrong: str = ""

    @staticmethod
    def of(target: Store, sources: Sequence[Store]) -> Witnesses:
        """Find out which run this is.

        Raises:
            NotARun: a source is none, or nothing of a run is at the target.
            StateError: the places do not hold the same run.
        """
        named = [(source, read_identity(source).run) for source in sources]
        try:
            run, own, wrong = read_identity(target).run, target, ""
        except (NotARun, IntegrityError) as e:
            if not named or (isinstance(e, NotARun) and not target.names(CHECKPOINTS)):
                raise
            own, run, wrong = named[0][0], named[0][1], str(e)
            check_is_of(target, run, own)
        for source, name in named:
            if name != run:
                raise StateError(
                    f"{source.url} is run {name}, and {target.url} is run {run}; a run is mended from its own copies"
                )
        return Witnesses(target, sources, run, own.read(RUN), own.url, wrong)

    def seek(self, events: Sequence[Event], *, bring_back: bool) -> Sought:
        """Read every manifest of the target, and find those that are bad or missing in the sources. `events` are those
        of the whole log."""
        sought = Sought()
        keys = [key for key in self.target.names(CHECKPOINTS) if parse_manifest_key(key) is not None]
        bad: dict[str, str] = {}
        for key in keys:
            try:
                sought.sound[key] = self._read(self.target, key)[1]
            except IntegrityError as e:
                if key in self.target.names(CHECKPOINTS):
                    bad[key] = str(e)
        if not bad and not bring_back:
            return sought
        turns = [e for e in events if isinstance(e, (Started, Resumed, Removed))]
        past = past_of(turns, self.target)
        for key, was in bad.items():
            found, reasons = self._find(key, was, past, missing=False)
            if found is not None and may_replace(self.target, key, found.manifest):
                sought.found.append(found)
            else:
                reasons = reasons or ["the copy elsewhere is of another attempt"]
                sought.lost.append(Problem(key, "; ".join([was, *reasons])))
        if bring_back:
            sought.found += self._missing(keys, past)
        return sought

    def _missing(self, present: Sequence[str], past: Past) -> list[Found]:
        """Return the checkpoints that only sources list, without those that were given up on purpose."""
        newest = newest_states(present)
        everywhere = newest_states(k for source in self.sources for k in source.names(CHECKPOINTS))
        found: list[Found] = []
        for step, entry in everywhere.items():
            if step not in newest:
                one, _ = self._find(entry.key, "the manifest is gone", past, missing=True)
                found += [] if one is None else [one]
        return found

    def _find(self, key: str, was: str, past: Past, *, missing: bool) -> tuple[Found | None, list[str]]:
        """Return a sound manifest for a key, the newest where sources differ; and why others do not do."""
        found: list[Found] = []
        reasons: list[str] = []
        for source in self.sources:
            try:
                raw, manifest = self._read(source, key)
            except HoldfastError as e:
                reasons.append(str(e))
                continue
            if was_given_up(past, manifest):
                reasons.append(f"{source.url}: has attempt {manifest.attempt}, which was removed on purpose")
            else:
                found.append(Found(key, raw, manifest, was, source.url, missing))
        return max(found, key=lambda f: (f.manifest.generation, f.manifest.time), default=None), reasons

    def _read(self, store: Store, key: str) -> tuple[bytes, Manifest]:
        raw, manifest = read_manifest(store, key)
        if manifest.run != self.run:
            raise InvalidFormat(
                f"{store.url}/{key}: is a checkpoint of run {manifest.run}; files were swapped"
            )
        parts = {name: Part(files=part.files) for name, part in manifest.parts.items()}
        return raw, structs.replace(manifest, parts=parts)  # the trees of a long history are much


def may_replace(store: Store, key: str, manifest: Manifest) -> bool:
    """Return whether the damaged manifest at a key is not seen to be of another attempt, whose data is there."""
    try:
        own = set(_ATTEMPT.findall(store.read(key)))
    except NotFound:
        return True
    if not own or manifest.attempt.encode() in own:
        return True
    return not any(store.names(data_prefix(manifest.step, attempt.decode())) for attempt in own)


def was_given_up(past: Past, manifest: Manifest) -> bool:
    """Return whether a checkpoint was removed or set aside, or training went on from an earlier step after it."""
    attempt = manifest.attempt
    return attempt in past.departed or past.left_behind(
        manifest.step, attempt, manifest.generation, manifest.time
    )
