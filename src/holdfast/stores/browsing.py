"""What lies below a place in an object store, level by level, as one looks through directories."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import obstore

from holdfast.stores.address import Address, is_prefix, shown
from holdfast.stores.foreign import translated
from holdfast.stores.services import Client, open_client

__all__ = ["find_prefixes"]

LIST_SECONDS = 30.0


def find_prefixes(address: Address, name: str, depth: int) -> Iterator[Address]:
    """Yield the prefixes directly under which an object of a name lies: the address itself, or those up to `depth`
    levels below. Below one that has it nothing is looked for.

    It takes a request for each prefix that is looked at, however much lies below it.

    Raises:
        StoreError: the store cannot be listed.
    """
    look = _Look(open_client(address, request_seconds=LIST_SECONDS), address, name)
    for found in look.below("", depth):
        yield replace(address, prefix="/".join(part for part in (address.prefix, found) if part))


@dataclass(frozen=True, slots=True)
class _Look:
    client: Client
    address: Address
    name: str

    def below(self, prefix: str, depth: int) -> Iterator[str]:
        place = "/".join(part for part in (shown(self.address.url), prefix) if part)
        with translated("list", place):
            level = obstore.list_with_delimiter(self.client, prefix or None)
        if any(o["path"].rpartition("/")[2] == self.name for o in level["objects"]):
            yield prefix
            return
        for deeper in sorted(level["common_prefixes"]) if depth > 0 else ():
            if is_prefix(deeper):
                yield from self.below(deeper, depth - 1)
