"""Tags: named, movable pointers to checkpoints."""

from __future__ import annotations

import msgspec

from holdfast.catalog.keys import TAGS, tag_key
from holdfast.core.errors import InvalidFormat, NotFound
from holdfast.format.sealed import seal, unseal
from holdfast.stores import Store

__all__ = ["Tag", "delete_tag", "read_tags", "set_tag"]


class Tag(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tag and what it points to; `automatic` ones (such as "best") are moved by the run and protect nothing."""

    tag: str
    step: int
    attempt: str
    time: float
    automatic: bool = False


def read_tags(store: Store) -> dict[str, Tag]:
    """Return every tag of a run by name."""
    tags: dict[str, Tag] = {}
    for found in store.list(TAGS):
        try:
            tag = msgspec.json.decode(unseal(store.read(found.key), found.key), type=Tag)
        except NotFound:  # deleted while we read
            continue
        except (ValueError, RecursionError) as e:
            raise InvalidFormat(f"{found.key}: is not a tag: {e}") from e
        if found.key != f"{TAGS}/{tag.tag}.json":
            raise InvalidFormat(f"{found.key}: holds the tag {tag.tag[:80]!r}; files were swapped")
        tags[tag.tag] = tag
    return tags


def set_tag(store: Store, tag: Tag) -> None:
    """Point a tag at a checkpoint, moving it if it exists."""
    store.replace(tag_key(tag.tag), seal(msgspec.json.encode(tag)))


def delete_tag(store: Store, name: str) -> None:
    """Remove a tag; the checkpoint stays."""
    store.delete([tag_key(name)])
