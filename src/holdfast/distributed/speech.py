"""Words in a store: sealed documents that ranks put where others look for them, many of them at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

import msgspec

from holdfast.core.errors import NotFound
from holdfast.core.workers import Workers
from holdfast.format.documents import decode_document
from holdfast.format.sealed import seal, unseal
from holdfast.stores import Store

__all__ = ["drop_all", "look_for", "look_for_all", "put_all", "put_word"]

Word = TypeVar("Word")

AT_ONCE = 64  # requests: enough to wait for the store's rate and not for its latency
DROPPED_KEYS = 1_000  # in one request


def put_word(store: Store, key: str, word: object) -> None:
    """Publish a word, over the one that is there."""
    store.replace(key, seal(msgspec.json.encode(word)))


def put_all(store: Store, words: Mapping[str, object]) -> None:
    """Publish words by key."""
    with Workers(AT_ONCE, "holdfast-words") as pool:
        for _ in pool.map(lambda item: put_word(store, *item), list(words.items())):
            pass


def look_for(store: Store, key: str, kind: type[Word]) -> Word | None:
    """Return the word at a key, None where there is none.

    Raises:
        IntegrityError: it does not verify, or is another kind of word.
    """
    try:
        raw = store.read(key)  # which no store does of more than a document may have
    except NotFound:
        return None
    return decode_document(unseal(raw, key), kind, key, "a word of a rank")


def look_for_all(store: Store, keys: Sequence[str], kind: type[Word]) -> list[Word | None]:
    """Return the words at some keys, in their order, as `look_for` does each."""
    if len(keys) < 2:
        return [look_for(store, key, kind) for key in keys]
    with Workers(AT_ONCE, "holdfast-words") as pool:
        return list(pool.map(lambda key: look_for(store, key, kind), keys))


def drop_all(store: Store, keys: Sequence[str]) -> None:
    """Free words that nobody looks for any more."""
    some = [keys[at : at + DROPPED_KEYS] for at in range(0, len(keys), DROPPED_KEYS)]
    if len(some) < 2:
        store.delete(keys)
        return
    with Workers(AT_ONCE, "holdfast-words") as pool:
        for _ in pool.map(store.delete, some):
            pass
