"""What a peer's URL says: host, port and prefix, and nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from holdfast.core.errors import StoreError
from holdfast.core.names import is_key
from holdfast.stores.address import shown

__all__ = ["PORT", "PeerAddress", "RingAddress", "parse_bind", "parse_peer", "parse_ring"]

PORT = 7070
COPIES = 2
MOST_HOSTS = 32
_PLACE = re.compile(r"([A-Za-z0-9_](?:[A-Za-z0-9._-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\])(?::(\d{1,5}))?")


@dataclass(frozen=True, slots=True)
class PeerAddress:
    """A service, and the prefix under which a run lies there."""

    host: str
    port: int
    prefix: str = ""

    @property
    def place(self) -> str:
        """Host and port as text."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def url(self) -> str:
        """The address as text; `parse_peer` gives the same address again."""
        return f"peer://{self.place}/{self.prefix}".rstrip("/")


def parse_peer(url: str) -> PeerAddress:
    """Return what a `peer://HOST[:PORT]/PREFIX` URL names.

    Raises:
        StoreError: it holds what does not belong there; the message never repeats that.
    """
    try:
        parts = urlsplit(url)
    except ValueError as e:  # of brackets alone
        raise StoreError(
            f"the URL of a peer cannot be read: {e}; expected peer://HOST[:PORT]/PREFIX"
        ) from None
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise StoreError(
            f"{shown(url)}: the URL of a peer is peer://HOST[:PORT]/PREFIX and nothing else; the secret comes from "
            "the environment, never from a URL"
        )
    prefix = unquote(parts.path).strip("/")
    if prefix and not is_key(prefix):
        raise StoreError(f"{shown(url)}: the prefix is not made of plain names")
    host, port = _split(parts.netloc, shown(url))
    return PeerAddress(host, port, prefix)


@dataclass(frozen=True, slots=True)
class RingAddress:
    """Several services, and the name of a run in the ring that they are. Large objects have `copies`."""

    hosts: tuple[PeerAddress, ...]
    prefix: str
    copies: int = 2

    @property
    def url(self) -> str:
        """The address as text; `parse_ring` gives the same address again."""
        copies = "" if self.copies == COPIES else f"?copies={self.copies}"
        return f"peers://{','.join(host.place for host in self.hosts)}/{self.prefix}{copies}"


def parse_ring(url: str) -> RingAddress:
    """Return what a `peers://HOST[:PORT],HOST[:PORT],.../NAME[?copies=N]` URL names.

    Raises:
        StoreError: it holds what does not belong there; the message never repeats that.
    """
    form = "expected peers://HOST[:PORT],HOST[:PORT],HOST[:PORT]/NAME[?copies=2]; the secret comes from the environment"
    netloc, _, rest = url.removeprefix("peers://").partition("/")
    path, _, query = rest.partition("?")
    prefix, copies = unquote(path).strip("/"), re.fullmatch(r"copies=([1-9])", query) if query else None
    if "@" in url or "#" in url or (query and copies is None) or not is_key(prefix):
        raise StoreError(f"the URL of a ring of peers is not understood; {form}")
    # In whatever order they are given: it is one ring.
    places = sorted(_split(place, "a host in the URL of a ring of peers") for place in netloc.split(","))
    found = RingAddress(
        tuple(PeerAddress(*place) for place in places), prefix, int(copies[1]) if copies else COPIES
    )
    if len(set(places)) != len(places) or not 3 <= len(places) <= MOST_HOSTS or found.copies > len(places):
        raise StoreError(
            f"a ring of peers takes 3 to {MOST_HOSTS} different hosts, so that a majority is left when one is lost, "
            f"and at most as many copies; {form}"
        )
    return found


def parse_bind(text: str) -> tuple[str, int]:
    """Return the host and port of "HOST[:PORT]"; port 0 is any free one.

    Raises:
        StoreError: the text is something else.
    """
    return _split(text, text)


def _split(place: str, whole: str) -> tuple[str, int]:
    found = _PLACE.fullmatch(place)
    if found is None or int(found[2] or PORT) > 65535:
        raise StoreError(f"{whole}: names no peer; expected HOST, HOST:PORT or [IPV6]:PORT")
    return found[1].strip("[]").lower(), int(found[2] or PORT)
