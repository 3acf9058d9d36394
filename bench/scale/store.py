"""A store in memory whose requests take their time on a hub's clock, and are counted on the account of who asks."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from bench.scale.hub import Account, Hub
from bench.scale.services import Service
from holdfast.core.buffers import Buffer
from holdfast.core.errors import AlreadyExists, NotFound, Truncated
from holdfast.stores.base import ObjectInfo, Stream

__all__ = ["ModelStore"]

KEPT_BYTES = (
    64 << 10
)  # of a longer body nothing is kept but its length and its last byte, where all are equal
THREADS = 4  # that read for a rank; see `restoring.staging`
PUTS, GETS = "puts", "gets"


@dataclass(slots=True)
class _Object:
    data: bytes  # the first bytes
    size: int
    modified: float
    fill: bytes = b"\0"  # each of those that follow


class ModelStore:
    """The objects of one run. A "miss" is a request for what is not there. `magnify`: how many bytes each byte of a
    tensor stands for. With `keeps` it keeps all that is written, else only short bodies; all bytes of a long one must
    be equal."""

    def __init__(self, hub: Hub, service: Service, *, magnify: int = 1, keeps: bool = False) -> None:
        self.url = f"model://{service.name}"
        self.appendable = service.appendable
        self.hub, self.service = hub, service
        self._owed = 0.0  # seconds of requests that threads of the present task have sent, for it to wait out
        self._magnify, self._keeps = magnify, keeps
        self._folders: dict[str, dict[str, _Object]] = {}
        self._free = {PUTS: 0.0, GETS: 0.0}  # from when on the next request is taken
        self._pipe = 0.0  # from when on there is bandwidth that nobody has yet
        self._lock = threading.Lock()

    # ---- writing -------------------------------------------------------------------------------------------------

    def write(self, key: str, data: Sequence[Buffer]) -> None:
        self.write_streams([Stream(key, 0, data, bytes)])

    def write_streams(self, streams: Iterable[Stream]) -> None:
        for stream in streams:
            kept, size, fill = bytearray(), 0, b"\0"
            for piece in stream.body:
                size += len(piece)
                fill = bytes(piece[-1:]) or fill
                if self._keeps or size <= KEPT_BYTES:
                    kept += piece
            head = bytes(stream.head())
            data = head + bytes(kept if self._keeps or size <= KEPT_BYTES else b"")
            self._upload(stream.key, len(head) + self._magnified(stream.key, size))
            self._put(stream.key, _Object(data, len(head) + size, self.hub.time, fill))

    def _upload(self, key: str, nbytes: int) -> None:
        whole = self.service.whole_bytes
        parts = 1
        if whole is not None and nbytes > whole:
            parts = 3 + -(-nbytes // self.service.part_bytes)  # a look at the key, the beginning, the end
        self._ask("put", key, nbytes, parts, together=True)

    def create(self, key: str, data: Buffer) -> None:
        self._ask("put", key, len(data))
        if self._find(key) is not None:
            raise AlreadyExists(f"{self.url}: object {key!r} exists already")
        self._put(key, _Object(bytes(data), len(data), self.hub.time))

    def replace(self, key: str, data: Buffer) -> None:
        self._ask("put", key, len(data))
        self._put(key, _Object(bytes(data), len(data), self.hub.time))

    def append(self, key: str, data: Buffer) -> None:
        self._ask("put", key, len(data))
        there = self._find(key)
        whole = (there.data if there is not None else b"") + bytes(data)
        self._put(key, _Object(whole, len(whole), self.hub.time))

    # ---- reading -------------------------------------------------------------------------------------------------

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        found = self._find(key)
        size = 0 if found is None else (found.size if end is None else end) - start
        self._ask("get" if found is not None else "miss", key, size)
        if found is None:
            raise self._missing(key)
        end = found.size if end is None else end
        if end > found.size:
            raise Truncated(f"{key}: ends after {found.size} bytes; expected {end}")
        return found.data[start:end].ljust(end - start, found.fill)

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        found = self._get(key)
        self._ask("get", key, self._magnified(key, len(target)))
        if start + len(target) > found.size:
            raise Truncated(f"{key}: ends after {found.size} bytes; expected {start + len(target)}")
        target[:] = found.data[start : start + len(target)].ljust(len(target), found.fill)

    def info(self, key: str) -> ObjectInfo:
        self._ask("head", key)
        found = self._get(key)
        return ObjectInfo(key, found.size, found.modified)

    def names(self, prefix: str, after: str = "") -> list[str]:
        return [o.key for o in self._listed(prefix, after)]

    def _listed(self, prefix: str, after: str) -> list[ObjectInfo]:
        with self.hub.outside():
            found = sorted((key, o) for key, o in self._below(prefix) if key > after)
        self._ask("list", prefix, 0, max(1, -(-len(found) // self.service.keys_a_page)))
        return [ObjectInfo(key, o.size, o.modified) for key, o in found]

    def list(self, prefix: str) -> list[ObjectInfo]:
        return self._listed(prefix, "")

    def _below(self, prefix: str) -> Iterator[tuple[str, _Object]]:
        for name, folder in self._folders.items():
            if not prefix or name == prefix or name.startswith(f"{prefix}/"):
                yield from folder.items()

    def room(self) -> int | None:
        return None

    def sweep(self, before: float) -> None:
        """Do nothing: nothing is half-made here."""

    def delete(self, keys: Sequence[str]) -> None:
        if keys:
            self._ask("delete", keys[0], 0, -(-len(keys) // self.service.keys_a_delete))
        for key in keys:
            self._folders.get(key.rpartition("/")[0], {}).pop(key, None)

    def moment(self, key: str) -> float:
        """Return when an object became what it is."""
        return self._get(key).modified

    def settle(self) -> None:
        """Wait until what threads of the present task have asked for is there."""
        owed, self._owed = self._owed, 0.0
        self.hub.sleep(owed / THREADS)

    # ---- the model -----------------------------------------------------------------------------------------------

    def _ask(self, kind: str, key: str, nbytes: int = 0, count: int = 1, *, together: bool = False) -> None:
        """Let a request, or so many one after the other, take its time. Those `together` go at once."""
        hub, service = self.hub, self.service
        account = hub.task.account if hub.task is not None else Account()
        with self._lock:
            account.requests[kind] += count
            if kind == "put":
                account.written_bytes += nbytes
                account.word_bytes += nbytes if key.startswith("ranks/") else 0
            else:
                account.read_bytes += nbytes
        if not hub.is_here:
            self._owed += self._alone(kind, nbytes, count)
            return
        with hub.outside():
            rate, rates = (
                (PUTS, service.puts_a_second) if kind in ("put", "delete") else (GETS, service.gets_a_second)
            )
            latency = {
                "put": service.put_seconds,
                "delete": service.delete_seconds,
                "list": service.list_seconds,
            }
            asked = hub.monotonic()
            taken = max(asked, self._free[rate])
            self._free[rate] = taken + count / rates
            answered = self._free[rate] + latency.get(kind, service.get_seconds) * (1 if together else count)
            if nbytes:
                self._pipe = max(self._pipe, taken) + nbytes / service.total_bytes_a_second
                answered = max(answered + nbytes / service.rank_bytes_a_second, self._pipe)
            owed, self._owed = self._owed, 0.0
            hub.wait(answered + owed / THREADS)

    def _alone(self, kind: str, nbytes: int, count: int) -> float:
        """Return how long requests take with nobody else about."""
        service = self.service
        return count * service.get_seconds + nbytes / service.rank_bytes_a_second * THREADS

    def _magnified(self, key: str, nbytes: int) -> int:
        return nbytes * self._magnify if key.startswith("data/") and nbytes > KEPT_BYTES else nbytes

    def _find(self, key: str) -> _Object | None:
        return self._folders.get(key.rpartition("/")[0], {}).get(key)

    def _get(self, key: str) -> _Object:
        found = self._find(key)
        if found is None:
            raise self._missing(key)
        return found

    def _missing(self, key: str) -> NotFound:
        return NotFound(f"{self.url}: no object {key!r}")

    def _put(self, key: str, made: _Object) -> None:
        self._folders.setdefault(key.rpartition("/")[0], {})[key] = made
