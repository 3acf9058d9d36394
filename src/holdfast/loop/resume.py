"""From a run's history into live objects: pick a checkpoint, read and verify all of it, then place it."""

from __future__ import annotations

import contextlib
import errno
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import TypeAlias

from holdfast.catalog.history import History
from holdfast.catalog.ranks import View, view_of
from holdfast.catalog.trust import Trust
from holdfast.core.collector import collector_held
from holdfast.core.errors import IntegrityError, NoCheckpoint, NotFound, StateError, StoreError
from holdfast.core.names import matches
from holdfast.core.units import format_bytes
from holdfast.distributed.ranks import Ranks
from holdfast.format.manifest import Manifest
from holdfast.format.values import tensor_leaves
from holdfast.restoring.reader import Reader
from holdfast.restoring.remembered import Remembered
from holdfast.saving.arena import NOTHING_LENT, Lent
from holdfast.saving.environment import differences, fingerprint
from holdfast.saving.plan import RNG_PART
from holdfast.state.place import RestorePlan, materialize, plan_restore
from holdfast.state.reports import RestoreOptions, RestoreReport
from holdfast.state.restoring import BoxWanted
from holdfast.state.rng import fold_into_rng, restore_rng
from holdfast.state.tensors import HostTensor

__all__ = ["Restored", "is_damage", "mender", "restore_state"]

Fetch: TypeAlias = Callable[[Reader, Sequence[str], Mapping[str, BoxWanted]], dict[str, HostTensor]]
Picked: TypeAlias = Callable[[Manifest], object]
Mend: TypeAlias = Callable[[str], list[str]]

logger = logging.getLogger("holdfast")

ALONE = Ranks()
NONE_LEFT_OUT: Mapping[int, str] = MappingProxyType({})
_UNREADABLE = {  # what a file system says of a file, whenever it is asked
    errno.EIO, errno.EBADMSG, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP,
    getattr(errno, "EUCLEAN", errno.EIO),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Restored:
    """What a restore gave: checkpoint as it was saved, report, new values for immutable ones, and whether the `whole`
    of it was read from the store. Of several ranks: whether one left something of its `own`, which was not as rank 0
    had it, and whether it looked at what others had too: `wide`."""

    manifest: Manifest
    report: RestoreReport
    replaced: dict[str, object]
    whole: bool
    own: bool = False
    wide: bool = False


def nobody_to_tell(manifest: Manifest) -> None:
    """Tell no one that a checkpoint is tried."""


def restore_state(
    history: History,
    state: Mapping[str, object],
    which: int | str,
    options: RestoreOptions,
    *,
    trust: Trust,
    rng: bool = True,
    mend: Mend | None = None,
    ranks: Ranks = ALONE,
    left_out: Mapping[int, str] = NONE_LEFT_OUT,
    fetch: Fetch = Reader.read,
    picked: Picked = nobody_to_tell,
    lent: Lent = NOTHING_LENT,
) -> Restored:
    """Put a checkpoint into live objects. Nothing live is touched before every byte that is needed was verified.

    "latest" takes the newest checkpoint that verifies and can be resumed from, and says which newer ones it left. One
    that is not trusted is not passed over: whether to go back behind it is for a person to say. Neither is one whose
    place does not answer: it may be whole. Where one does not verify `mend`, if given, is told the key of its manifest
    and may mend it, and returns what it did, in words. Steps that are `left_out` are not taken, for the reasons given.
    `fetch` reads in the place of `Reader.read`, once it is known that all fits; `picked` is told of each checkpoint
    that is tried, before anything of it is read. `lent` is memory that snapshots are copied into: what still lies there
    is not read again, and the rest is read into it.

    Raises:
        NoCheckpoint: there is none.
        Untrusted: no trusted key has signed it.
        IntegrityError: the one that was asked for does not verify.
        StateError: it does not fit the live objects; the message names every path.
        StoreError: its place does not answer.
    """
    history.refresh()
    passed_over: dict[int, str] = dict(left_out)

    def restore(view: View, wanted: RestoreOptions) -> Restored:
        with collector_held():  # until all that was read is let go
            return _restore_one(history, view, state, wanted, passed_over, rng=rng, fetch=fetch, lent=lent)

    def attempt(one: int | str) -> Restored:
        entry, manifest = history.resolve(one)
        trust.check(history.store, entry.key, manifest, history.run)
        picked(manifest)
        restored, view = _restore_seen(history, manifest, options, ranks, restore)
        if ranks.rank >= manifest.world_size and RNG_PART in view.manifest.parts and rng:
            fold_into_rng(ranks.rank)  # so that no two ranks draw the same
        restored.report.notes[:0] = view.notes
        left = {path.partition("/")[0] for path in restored.report.elsewhere}
        own = any(view.manifest.parts[key] is not manifest.parts.get(key) for key in left)
        return replace(restored, manifest=manifest, own=own, wide=view.merged)

    if which == "latest":
        return _newest(history, attempt, mend, passed_over)
    return _mended(history, which, attempt, mend)


def _newest(
    history: History, attempt: Callable[[int | str], Restored], mend: Mend | None, passed_over: dict[int, str]
) -> Restored:
    """Restore the newest checkpoint that can be resumed from. Steps that are `passed_over` are not tried; what is
    found wrong is added to them."""
    for step in sorted({*history.manifests, *history.broken} - passed_over.keys(), reverse=True):
        try:
            if step not in history.broken and history.summary(step).demoted:
                passed_over[step] = "holds weights only"
                continue
            return _mended(history, step, attempt, mend)
        except (IntegrityError, StoreError, NoCheckpoint) as e:
            if not is_damage(e):
                raise StoreError(
                    f"step {step} cannot be read now: {e}; start again when its place answers, or restore an older "
                    "step by its number"
                ) from e
            passed_over[step] = str(e)
            logger.warning("step %d does not verify, falling back to an older checkpoint: %s", step, e)
    what = "; ".join(f"step {s}: {why}" for s, why in passed_over.items())
    raise NoCheckpoint(f"{history.store.url} has no checkpoint to resume from{': ' + what if what else ''}")


def is_damage(error: Exception) -> bool:
    """Return whether a restore that failed says something of the checkpoint, and not of its place or of this process
    alone: what a disk cannot read is lost, and what a server does not send now may come later."""
    if isinstance(error, StoreError):
        return isinstance(error, NotFound) or error.errno in _UNREADABLE
    return isinstance(error, (IntegrityError, NoCheckpoint))  # the last: it was deleted just now


def mender(history: History, mend: Mend) -> Callable[[int], list[str]]:
    """Return what mends the checkpoint of a step, and says what was done."""

    def mend_step(step: int) -> list[str]:
        key = history.key_of(step)
        return mend(key) if key is not None else []

    return mend_step


def _mended(
    history: History, which: int | str, attempt: Callable[[int | str], Restored], mend: Mend | None
) -> Restored:
    """Restore a checkpoint; one that does not verify once more, if it could be mended."""
    try:
        return attempt(which)
    except (IntegrityError, StoreError):
        key = history.key_of(which)
        notes = mend(key) if mend is not None and key is not None else []
        if not notes:
            raise
    history.refresh()
    restored = attempt(which)
    restored.report.notes += notes
    return restored


def _restore_seen(
    history: History,
    manifest: Manifest,
    options: RestoreOptions,
    ranks: Ranks,
    restore: Callable[[View, RestoreOptions], Restored],
) -> tuple[Restored, View]:
    """Have a checkpoint restored as this process sees it; or, as one of as many ranks as then that lacks something,
    with what others had beside it: what one stage of a pipeline had another one has now."""
    shared = replace(options, shared=ranks.several)
    view = view_of(history.store, manifest, ranks.rank, ranks.world)
    if view.merged or not ranks.several:
        return restore(view, shared), view
    with contextlib.suppress(StateError):
        return restore(view, shared), view
    wide = view_of(history.store, manifest, ranks.rank, ranks.world, wide=True)
    with contextlib.suppress(StateError):
        return restore(wide, shared), wide
    return restore(view, options), view  # which says all that does not fit of the checkpoint as it was saved


def _restore_one(
    history: History,
    view: View,
    state: Mapping[str, object],
    options: RestoreOptions,
    passed_over: dict[int, str],
    *,
    rng: bool,
    fetch: Fetch,
    lent: Lent,
) -> Restored:
    manifest = view.manifest
    with_rng = rng and RNG_PART in manifest.parts and (not options.only or matches(RNG_PART, options.only))
    parts = [p for p in manifest.parts if p != RNG_PART or with_rng]
    if manifest.demoted:
        _refuse_demoted(manifest, state, options)
    reader = Reader(history.store, manifest, parts, own=view.own, mine=view.mine)
    rng_tree = reader.tree.pop(RNG_PART, None)
    plan: RestorePlan = plan_restore(state, reader.tree, reader.specs, reader.aliases, options=options)
    wanted = plan.needed | {reader.aliases.get(t.name, t.name) for t in tensor_leaves(rng_tree)}
    kept = lent.image_of(manifest.attempt)
    if kept is not None:
        reader.remember(Remembered((part.tensors, part.data) for part in kept.parts.values()))
    else:
        reader.lend(lent.spare(), plan.passing)
    # Every byte is verified here, before anything live changes. In stored order, which sorts and remembers best.
    tensors = fetch(reader, [name for name in reader.specs if name in wanted], plan.parts)
    plan.apply(tensors)
    for note in differences(manifest.environment, fingerprint()):
        plan.report.notes.append(note)
    if not manifest.exact:
        plan.report.notes.append(
            f"step {manifest.step} was saved after an exception: the resume is not bit-exact"
        )
    for step, why in passed_over.items():
        plan.report.notes.append(f"passed over step {step}: {why}")
    if rng_tree is not None:
        plan.report.notes += restore_rng(materialize(rng_tree, tensors, as_="numpy"))
    if reader.from_memory:
        logger.info("step %d: %s of it were still in memory", manifest.step, format_bytes(reader.from_memory))
    whole = wanted.issuperset(reader.specs) and not (
        plan.parts or reader.from_memory or manifest.world_size > 1
    )
    return Restored(manifest, plan.report, plan.replaced, whole)


def _refuse_demoted(manifest: Manifest, state: Mapping[str, object], options: RestoreOptions) -> None:
    lost = [p for p in state if p not in manifest.parts and (not options.only or matches(p, options.only))]
    if lost and not all(matches(p, options.missing) for p in lost):
        raise StateError(
            f"step {manifest.step} was demoted to its weights by the retention rule and has no {', '.join(lost)}; "
            f"restore it with only={[f'{p}/**' for p in manifest.parts]}"
        )
