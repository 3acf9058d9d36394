"""Reading documents whose size is known to be small: what is larger is refused before it is read."""

from __future__ import annotations

from holdfast.core.errors import InvalidFormat
from holdfast.stores import Store

__all__ = ["SMALL_BYTES", "read_document"]

SMALL_BYTES = 1 << 20


def read_document(store: Store, key: str, limit: int = SMALL_BYTES) -> bytes:
    """Return a document of at most `limit` bytes. Raises NotFound, InvalidFormat when it is larger."""
    size = store.info(key).size
    if size > limit:
        raise InvalidFormat(
            f"{key}: has {size} bytes, which no document of a run has; at most {limit} are read"
        )
    return store.read(key)  # whole: it may have been replaced, by one of another size, meanwhile
