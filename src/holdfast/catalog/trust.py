"""Whom to believe: which keys may sign which runs, and what becomes of a checkpoint that none of them signed."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from holdfast.catalog.signatures import read_signatures
from holdfast.core.clock import SystemTime, TimeSource
from holdfast.core.errors import HoldfastError, MissingObject, NotFound, Untrusted
from holdfast.core.names import matches
from holdfast.format.manifest import Manifest, decode_manifest
from holdfast.format.signature import Signature, Statement
from holdfast.format.signing import PublicKey
from holdfast.stores import Store, name_of

__all__ = ["NOBODY", "Trust", "TrustedKey", "Verifying"]

logger = logging.getLogger("holdfast")

Verifying = Literal["require", "warn", "off"]


@dataclass(frozen=True, slots=True)
class TrustedKey:
    """A public key that is believed for runs whose URL, path or id matches one of `runs` (globs), and `until` a time
    (seconds since the Unix epoch) on this machine's clock."""

    key: PublicKey
    name: str
    runs: tuple[str, ...] = ("**",)
    until: float | None = None

    def may_sign(self, url: str, run: str) -> bool:
        """Return whether the key counts for a run."""
        return any(matches(name, self.runs) for name in (url, name_of(url), run))


@dataclass(frozen=True, slots=True)
class Trust:
    """How signatures are verified: "require" a good one, "warn" where there is none, or look at none ("off")."""

    mode: Verifying
    keys: tuple[TrustedKey, ...] = ()
    time: TimeSource = field(default_factory=SystemTime)

    def check(self, store: Store, key: str, manifest: Manifest, run: str) -> Statement | None:
        """Return what a trusted signer says of `manifest`, read from `key` in the store of a run with this id; None
        where that is not required and there is none.

        Raises:
            Untrusted: it is required, and no trusted key has signed these exact bytes.
            IntegrityError: it is required, and manifest or signatures do not verify.
        """
        if self.mode == "off":
            return None
        try:
            return self.vouched(store, key, manifest, run)
        except HoldfastError as e:
            if self.mode == "require":
                raise
            logger.warning("step %d is read although it is not trusted: %s", manifest.step, e)
            return None

    def vouched(self, store: Store, key: str, manifest: Manifest, run: str) -> Statement:
        """Return what a trusted signer says of a manifest, whatever the mode. Raises as `check` does."""
        try:
            raw = store.read(key)
        except NotFound as e:
            raise MissingObject(f"{key}: the manifest is gone") from e
        # What is used is `manifest`, read earlier: the signed bytes must say the same.
        if decode_manifest(raw, key) != manifest:
            raise Untrusted(f"{key}: its manifest was exchanged while it was read; read it again")
        if manifest.run != run:
            raise Untrusted(
                f"{key}: is a checkpoint of run {manifest.run}, and lies in run {run}; it was put there from elsewhere"
            )
        found = read_signatures(store, manifest.step, manifest.attempt)
        refused: list[str] = []
        for signature in found:
            why = self._refusal(signature, manifest, raw, store.url)
            if not why:
                return signature.statement
            refused.append(why)
        what = "; ".join(dict.fromkeys(refused)) or "it has no signature"
        raise Untrusted(
            f"step {manifest.step} of {store.url} is not trusted: {what}. If it is right, sign it (holdfast sign) or "
            "trust its signer's public key; nothing was changed"
        )

    def signers(self, store: Store, key: str, manifest: Manifest) -> dict[str, bool | None]:
        """Return the ids of the keys that say to have signed a manifest; of each whether it is trusted and did, None
        with nobody to trust. Raises IntegrityError when the signatures do not verify."""
        raw = store.read(key)
        found = read_signatures(store, manifest.step, manifest.attempt)
        return {
            s.statement.key: None if self.mode == "off" else not self._refusal(s, manifest, raw, store.url)
            for s in found
            if s.is_about(manifest, raw)
        }

    def _refusal(self, signature: Signature, manifest: Manifest, raw: bytes, url: str) -> str:
        """Return why a signature does not count; empty when it does."""
        said = signature.statement
        trusted = [t for t in self.keys if t.key.id == said.key]
        if not trusted:
            return f"it is signed by key {said.key!r:.60}, which is not trusted"
        if not signature.is_about(manifest, raw):
            return f"the signature of {trusted[0].name} is of other bytes"
        if not signature.is_by(trusted[0].key):
            return f"the signature of {trusted[0].name} does not match"
        for_this = [t for t in trusted if t.may_sign(url, manifest.run)]
        if not for_this:
            return f"{trusted[0].name} is not trusted with this run, but with {_listed(trusted[0].runs)}"
        if all(t.until is not None and t.until <= self.time.now() for t in for_this):
            return f"the trust in {for_this[0].name} has expired"
        return ""


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names) or "none"


NOBODY = Trust("off")
