"""Tags: named, movable pointers to checkpoints."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from holdfast.catalog.bounded import read_document
from holdfast.catalog.keys import TAGS, tag_key
from holdfast.core.errors import IntegrityError, InvalidFormat, NotFound, PolicyError
from holdfast.format.documents import Attempt, Moment, Name, StepNumber, decode_document
from holdfast.format.sealed import seal, unseal
from holdfast.stores import Store

__all__ = ["Tag", "decode_tag", "delete_tag", "find_tag", "read_tags", "set_tag"]


class Tag(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tag and what it points to; an `automatic` one, such as "best", is moved by the run itself."""

    tag: Name
    step: StepNumber
    attempt: Attempt
    time: Moment
    automatic: bool = False


def read_tags(store: Store, broken: Callable[[IntegrityError], None] | None = None) -> dict[str, Tag]:
    """Return every tag of a run by name. One that does not verify is told to `broken` and left out, or raised."""
    tags: dict[str, Tag] = {}
    for found in store.list(TAGS):
        try:
            tag = _read_tag(store, found.key)
        except NotFound:  # deleted while we read
            continue
        except IntegrityError as e:
            if broken is None:
                raise
            broken(e)
            continue
        tags[tag.tag] = tag
    return tags


def find_tag(store: Store, name: str) -> Tag | None:
    """Return a tag, or None when there is none of this name that verifies."""
    try:
        return _read_tag(store, tag_key(name))
    except (NotFound, IntegrityError, PolicyError):
        return None


def _read_tag(store: Store, key: str) -> Tag:
    return decode_tag(read_document(store, key), key)


def decode_tag(raw: bytes, key: str) -> Tag:
    """Return the tag that a document says, verified; `key` is where it lies.

    Raises:
        IntegrityError: it is cut off, changed, or another tag's.
    """
    body = unseal(raw, key)
    tag = decode_document(body, Tag, key, "a tag")
    if key != f"{TAGS}/{tag.tag}.json":
        raise InvalidFormat(f"{key}: holds the tag {tag.tag[:80]!r}; files were swapped")
    return tag


def set_tag(store: Store, tag: Tag) -> None:
    """Point a tag at a checkpoint, moving it if it exists."""
    store.replace(tag_key(tag.tag), seal(msgspec.json.encode(tag)))


def delete_tag(store: Store, name: str) -> None:
    """Remove a tag; the checkpoint stays."""
    store.delete([tag_key(name)])
