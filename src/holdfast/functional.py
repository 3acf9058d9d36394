"""Save and load in one call each, without a training loop."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Literal, overload

from holdfast.catalog.keyfiles import KeySource, TrustSource, read_signing_key
from holdfast.catalog.trust import Verifying
from holdfast.checkpoint import Checkpoint
from holdfast.core.clock import Clock, SystemTime, check_count
from holdfast.core.errors import HoldfastError, StateError
from holdfast.loop.resume import restore_state
from holdfast.loop.session import SaveOrder, Session
from holdfast.loop.tracker import metric_number
from holdfast.run import Run
from holdfast.saving.arena import Arena
from holdfast.saving.plan import RNG_PART
from holdfast.saving.snapshot import take_snapshot
from holdfast.state.registry import jax_is_loaded
from holdfast.state.reports import RestoreOptions, RestoreReport
from holdfast.stores import Store, open_store

__all__ = ["load", "open", "save"]


def save(
    url: str | os.PathLike[str] | Store,
    state: Mapping[str, object],
    *,
    step: int | None = None,
    metrics: Mapping[str, float] | None = None,
    tag: str | None = None,
    rng: bool = False,
    self_contained: bool = False,
    sign: KeySource | None = None,
) -> Checkpoint:
    """Save a state as a checkpoint of the run at `url`, and return it when it is durable.

    `step` is by default one after the newest. With `rng` the random generators are saved too; with
    `self_contained` nothing is referred to that an earlier checkpoint holds. `sign` is the private key that signs it,
    as for `Checkpointer`.

    Raises:
        UnsupportedValue: something cannot be stored without running code at load; nothing was written.
        LeaseHeld: a training process writes the run.
    """
    if step is not None:
        check_count("step", step)
    key = read_signing_key(sign) if sign is not None else None
    snapshot = take_snapshot(state, Arena(), rng=rng)
    session = Session(open_store(url), SystemTime(), key=key)
    try:
        steps = session.history.steps
        at = step if step is not None else (steps[-1] + 1 if steps else 0)
        order = SaveOrder(
            Clock(step=at),
            {k: metric_number(k, v) for k, v in (metrics or {}).items()},
            ("asked for",),
            (tag,) if tag else (),
            self_contained=self_contained,
        )
        saved = Checkpoint(session.store, session.persist(snapshot.image, order))
    except BaseException:
        with contextlib.suppress(HoldfastError):  # what failed first is what is said
            session.close()
        raise
    session.close()
    return saved


def open(
    url: str | os.PathLike[str] | Store,
    step: int | str = "latest",
    *,
    trusted: TrustSource | None = None,
    verify: Verifying | None = None,
) -> Checkpoint:
    """Open a checkpoint of the run at `url` lazily: a step, "latest", or a tag.

    Needs neither torch nor the model's class. Only the manifest is read; tensors are read when they are indexed.
    `trusted` and `verify` are as for `Checkpointer`.

    Raises:
        NotARun, NoCheckpoint, IntegrityError, UnsupportedVersion: there is nothing sound to open.
        Untrusted: no trusted key has signed it.
    """
    return Run(url, trusted=trusted, verify=verify)[step]


@overload
def load(
    url: str | os.PathLike[str] | Store,
    *,
    into: Mapping[str, object],
    step: int | str = ...,
    only: Sequence[str] = ...,
    missing: Sequence[str] = ...,
    unexpected: Sequence[str] = ...,
    cast: Sequence[str] = ...,
    rng: bool = ...,
    trusted: TrustSource | None = ...,
    verify: Verifying | None = ...,
) -> RestoreReport: ...
@overload
def load(
    url: str | os.PathLike[str] | Store,
    *,
    into: None = ...,
    step: int | str = ...,
    only: Sequence[str] = ...,
    rng: bool = ...,
    trusted: TrustSource | None = ...,
    verify: Verifying | None = ...,
    as_: Literal["numpy", "torch", "jax"] | None = ...,
) -> dict[str, object]: ...


def load(
    url: str | os.PathLike[str] | Store,
    *,
    into: Mapping[str, object] | None = None,
    step: int | str = "latest",
    only: Sequence[str] = (),
    missing: Sequence[str] = (),
    unexpected: Sequence[str] = (),
    cast: Sequence[str] = (),
    rng: bool = False,
    trusted: TrustSource | None = None,
    verify: Verifying | None = None,
    as_: Literal["numpy", "torch", "jax"] | None = None,
) -> dict[str, object] | RestoreReport:
    """Return a checkpoint's values, or put them into live objects.

    Without `into`: a dictionary of new values by top-level key; tensors come back as torch tensors or jax arrays where
    they were and torch is imported (`as_="torch"`), both as jax arrays where only jax is (`as_="jax"`), else as numpy
    arrays (`as_="numpy"`). With `into`: the live objects are
    filled, and the report of it is returned. `only`, `missing`, `unexpected`, `cast` are globs over tree paths.
    `trusted` and `verify` are as for `Checkpointer`.

    Raises:
        IntegrityError: a byte is not what was committed; nothing live was changed.
        Untrusted: no trusted key has signed it; nothing live was changed.
        StateError: checkpoint and live objects do not fit; the message names every path.
    """
    run = Run(url, trusted=trusted, verify=verify)
    options = RestoreOptions(tuple(only), tuple(missing), tuple(unexpected), tuple(cast))
    if into is not None:
        return _load_into(run, into, step, options, rng=rng)
    checkpoint = run[step]
    parts = [p for p in checkpoint.parts if rng or p != RNG_PART]
    return checkpoint.values(parts, only=tuple(only), as_=as_ or _default_kind())


def _load_into(
    run: Run, into: Mapping[str, object], step: int | str, options: RestoreOptions, *, rng: bool
) -> RestoreReport:
    if not isinstance(into, MutableMapping):
        raise StateError(
            f"`into` is a {type(into).__name__}, which cannot take new values for what cannot be changed in place, "
            "such as numbers; pass a dict"
        )
    restored = restore_state(run.history, into, step, options, trust=run.trust, rng=rng)
    into.update(restored.replaced)
    return restored.report


def _default_kind() -> Literal["numpy", "torch", "jax"]:
    return "torch" if "torch" in sys.modules else "jax" if jax_is_loaded() else "numpy"
