"""An object store (S3 and what speaks like it, Google Cloud Storage, Azure) as a store, over obstore.

A put is whole or not there, and durable when it was answered. `create` is a conditional put; whether the server heeds
the condition is found out by `stores.probe`.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError

from holdfast.core.buffers import Buffer
from holdfast.core.errors import AlreadyExists, HoldfastError, InvalidFormat, NotFound, StoreError, Truncated
from holdfast.core.names import check_key, is_key
from holdfast.core.units import format_count
from holdfast.core.workers import Workers
from holdfast.stores.address import Address, shown
from holdfast.stores.base import MAX_WHOLE_BYTES, ObjectInfo, Stream
from holdfast.stores.foreign import is_out_of_range, is_unsupported, translated
from holdfast.stores.probe import PROBES
from holdfast.stores.services import Client, open_client
from holdfast.stores.uploads import abort_uploads

__all__ = ["ObjectStore"]

logger = logging.getLogger("holdfast")

WHOLE_BYTES = 8 << 20  # and less goes up in one put, which also finds out whether the key is free
PART_BYTES = 8 << 20
UNKNOWN_PART_BYTES = 16 << 20  # of a body that nobody knows the length of
MAX_PARTS = 9_000  # services take 10 000
UPLOAD_BYTES = 64 << 20  # in memory, of one object on its way
UPLOADS = 3  # objects at once
RANGE_BYTES = 8 << 20
RANGES = 8
QUICK_SECONDS = 30.0  # for a request that moves few bytes
BULK_SECONDS = 300.0
CROSSINGS = 5  # times that a create is sent again because other writes crossed it
CROSSING_SECONDS = 0.05
MARK = "holdfastcreate"  # the metadata that tells our own object from a rival's

_process = [0]  # the one that obstore's threads live in


class ObjectStore:
    """A bucket, or what lies under a prefix in it.

    Thread-safe. Not usable in a forked child: obstore's threads stay behind in the parent, and a request would wait
    for ever, so it is refused.
    """

    appendable = False

    def __init__(self, address: Address) -> None:
        self.address = address
        self.url = address.url
        self.single_writer = address.single_writer
        self._quick: Client = open_client(address, request_seconds=QUICK_SECONDS)
        self._bulk: Client = open_client(address, request_seconds=BULK_SECONDS)
        _process[0] = _process[0] or os.getpid()

    def __repr__(self) -> str:
        return f"ObjectStore({self.url!r})"

    # ---- writing --------------------------------------------------------------------------------------------------

    def write(self, key: str, data: Sequence[Buffer]) -> None:
        self.write_streams([Stream(key, 0, data, bytes)])

    def write_streams(self, streams: Iterable[Stream]) -> None:
        """Send objects up in parts, several at once.

        A body whose head comes last is taken whole before its upload begins: obstore sends a multipart upload from the
        front. Its pieces stay where they are, so that costs no memory. Of a body without a head no more is held than
        the parts that are under way.
        """
        sent, begun = list[Future[None]](), list[str]()
        try:
            with Workers(UPLOADS, "holdfast-upload") as pool:
                for stream in streams:
                    check_key(stream.key)
                    if stream.head_bytes == 0 and not isinstance(stream.body, Sequence):
                        self._send(replace(stream, body=_headless(stream)), begun)
                    else:
                        body = list(stream.body)
                        pieces = [stream.head(), *body]
                        whole = replace(stream, body=pieces, body_bytes=sum(map(len, pieces)))
                        sent.append(pool.submit(self._send, whole, begun))
                    if any(s.done() and s.exception() for s in sent):
                        break
                for send in sent:
                    send.result()
        except BaseException:
            with contextlib.suppress(HoldfastError):  # what stays is reclaimed by the next owner of the run
                self.delete(begun)
            raise

    def _send(self, stream: Stream, begun: list[str]) -> None:
        """Store one object, in one put if it is small; a new one is noted as ours to take back."""
        first: list[memoryview] = []
        pieces, read = _views(stream.body), 0
        for piece in pieces:
            first.append(piece)
            read += len(piece)
            if read > WHOLE_BYTES:
                break
        if read <= WHOLE_BYTES:
            (self.replace if stream.over else self.create)(stream.key, b"".join(first))
        elif not stream.over:
            self._refuse_taken(stream.key)
        if not stream.over:
            begun.append(stream.key)
        if read > WHOLE_BYTES:
            self._send_parts(stream.key, itertools.chain(first, pieces), _part_bytes(stream.body_bytes))

    def _send_parts(self, key: str, pieces: Iterable[memoryview], part_bytes: int) -> None:
        """Upload an object in parts; obstore aborts the upload when it fails."""
        failure: list[BaseException] = []

        def taken() -> Iterator[memoryview]:
            try:
                yield from pieces
            except BaseException as e:
                failure.append(e)  # not the store's, whatever its kind
                raise

        client, together = self._client(self._bulk), max(1, UPLOAD_BYTES // part_bytes)
        with self._doing("write", key):
            try:
                obstore.put(
                    client, key, taken(), use_multipart=True, chunk_size=part_bytes, max_concurrency=together
                )
            except BaseException:
                if not failure:
                    raise
        if failure:
            raise failure[0]

    def create(self, key: str, data: Buffer) -> None:
        """Store an object at a key that is free.

        A request whose answer was lost is sent again, by obstore or by a proxy, and then finds its own object. A mark
        that is stored with the object tells it from a rival's, so that AlreadyExists is always a rival's.
        """
        check_key(key)
        if self.single_writer:
            self._refuse_taken(key)
        mark = secrets.token_hex(16)
        with self._doing("create", key):
            for again in range(CROSSINGS):
                if self._put_new(key, data, mark):
                    return
                time.sleep(CROSSING_SECONDS * 2**again)
        raise StoreError(
            f"could not create {self._shown(key)}: the server says that other writes are under way there, and none "
            "of them lands; try again later"
        )

    def _put_new(self, key: str, data: Buffer, mark: str) -> bool:
        """Put an object where none is. Return False where the server refused although none is there: writes that cross
        each other may all be refused (S3's 409 ConditionalRequestConflict), and are to be sent again."""
        try:
            self._put(self._client_for(data), key, data, mark)  # durability: the commit
        except AlreadyExistsError:
            found = self._mark_of(key)
            if found is None:
                return False
            if found != mark:
                raise
        except BaseError:  # no answer, or a bad one: what can be read is durable
            with contextlib.suppress(BaseError):
                if self._mark_of(key) == mark:
                    return True
            raise
        return True

    def _put(self, client: Client, key: str, data: Buffer, mark: str) -> None:
        marks = {MARK: mark}
        try:
            obstore.put(client, key, _flat(data), mode="create", use_multipart=False, attributes=marks)
        except BaseError as e:
            if not (self.single_writer and is_unsupported(e)):
                raise
            obstore.put(client, key, _flat(data), use_multipart=False, attributes=marks)

    def _mark_of(self, key: str) -> str | None:
        """Return the mark of the object at a key, "" for one without, None where there is none."""
        try:
            found = obstore.get(self._client(self._quick), key, options={"head": True})
        except FileNotFoundError:
            return None
        return str({str(k).lower(): v for k, v in found.attributes.items()}.get(MARK, ""))

    def _refuse_taken(self, key: str) -> None:
        with contextlib.suppress(NotFound):
            self.info(key)
            raise AlreadyExists(f"{self._shown(key)} exists already")

    def replace(self, key: str, data: Buffer) -> None:
        check_key(key)
        with self._doing("replace", key):
            obstore.put(
                self._client_for(data), key, _flat(data), use_multipart=False
            )  # durability: the switch

    def append(self, key: str, data: Buffer) -> None:
        check_key(key)
        raise StoreError(f"could not append to {self._shown(key)}: objects of {self.url} cannot grow")

    # ---- reading --------------------------------------------------------------------------------------------------

    def read(self, key: str, start: int = 0, end: int | None = None) -> bytes:
        if end is None:
            return self._read_to_end(key, start)
        if end - start > RANGE_BYTES:
            target = bytearray(end - start)
            self.read_into(key, start, memoryview(target))
            return bytes(target)
        if end <= start:
            self._check_length(key, end)
            return b""
        return bytes(self._range(key, start, end))

    def _read_to_end(self, key: str, start: int) -> bytes:
        check_key(key)
        with self._doing("read", key):
            try:
                found = obstore.get(
                    self._client(self._bulk), key, options={"range": {"offset": start}} if start else None
                )
            except BaseError as e:
                if not is_out_of_range(e):
                    raise
            else:
                size = found.meta["size"]
                if size > MAX_WHOLE_BYTES:
                    raise InvalidFormat(f"{key}: has {size} bytes, which no document of a run has")
                data = bytes(found.bytes())
                if len(data) != size - start:
                    raise Truncated(f"{key}: ends after {start + len(data)} bytes; expected {size}")
                return data
        self._check_length(key, start)
        return b""

    def _check_length(self, key: str, end: int) -> None:
        size = self.info(key).size
        if end > size:
            raise Truncated(f"{key}: ends after {size} bytes; expected {end}")

    def _range(self, key: str, start: int, end: int) -> memoryview:
        check_key(key)
        with self._doing("read", key):
            try:
                found = obstore.get_range(self._client(self._bulk), key, start=start, end=end)
            except BaseError as e:
                if is_out_of_range(e):
                    raise Truncated(f"{key}: ends before byte {start}; expected {end} bytes") from None
                raise
        data = memoryview(found)
        if len(data) != end - start:  # a range that reaches beyond the end comes short, without an error
            raise Truncated(f"{key}: ends after {start + len(data)} bytes; expected {end}")
        return data

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        if not len(target):
            return self._check_length(key, start)

        def fill(at: int) -> None:
            part = target[at : at + RANGE_BYTES]
            part[:] = self._range(key, start + at, start + at + len(part))

        if len(target) <= RANGE_BYTES:
            return fill(0)
        with Workers(RANGES, "holdfast-range") as pool:
            for _ in pool.map(fill, range(0, len(target), RANGE_BYTES)):
                pass
        return None

    def info(self, key: str) -> ObjectInfo:
        check_key(key)
        with self._doing("look at", key):
            found = obstore.head(self._client(self._quick), key)
        return ObjectInfo(key, found["size"], float(int(found["last_modified"].timestamp())))

    # ---- listing and deleting -------------------------------------------------------------------------------------

    def names(self, prefix: str, after: str = "") -> list[str]:
        return [o.key for o in self._listed(prefix, after)]

    def _listed(self, prefix: str, after: str = "") -> list[ObjectInfo]:
        """Return what lies under a prefix; what is no key was not written by us. A listing gives times to the
        millisecond, and a look at one object to the second: whole seconds here and there."""
        if prefix:
            check_key(prefix)
        with self._doing("list", prefix):
            found = obstore.list(self._client(self._quick), prefix or None, offset=after or None).collect()
        out = [
            ObjectInfo(o["path"], o["size"], float(int(o["last_modified"].timestamp())))
            for o in found
            if is_key(o["path"]) and o["path"] > after
        ]
        return sorted(out, key=lambda o: o.key)

    def list(self, prefix: str) -> list[ObjectInfo]:
        return self._listed(prefix)

    def room(self) -> int | None:
        return None

    def sweep(self, before: float) -> None:
        """Abort multipart uploads that were begun before a time and never ended, and remove what probes left."""
        self.delete([o.key for o in self._listed(PROBES) if o.modified < before])
        try:
            aborted = abort_uploads(self.address, before)
        except StoreError as e:  # it may be forbidden, or unknown there; nothing is lost but money
            logger.info(
                "%s. A lifecycle rule of the bucket should abort them: see docs/how-to/object-stores.md", e
            )
        else:
            if aborted:
                logger.info(
                    "aborted %s that dead writers had begun in %s", format_count(aborted, "upload"), self.url
                )

    def delete(self, keys: Sequence[str]) -> None:
        left = sorted({check_key(key) for key in keys})
        if not left:
            return
        with self._doing("delete", left[0] if len(left) == 1 else f"{len(left)} objects"):
            try:
                obstore.delete(self._client(self._quick), left)
            except FileNotFoundError:  # some services stop at one that is gone already
                for key in left:
                    with contextlib.suppress(FileNotFoundError):
                        obstore.delete(self._client(self._quick), key)

    # ---- ourselves ------------------------------------------------------------------------------------------------

    def _client(self, client: Client) -> Client:
        if _process[0] != os.getpid():
            raise StoreError(
                f"{self.url} was opened before this process was forked, and cannot be used after that. Open it only in "
                "the child, or start processes by spawn"
            )
        return client

    def _client_for(self, data: Buffer) -> Client:
        return self._client(self._bulk if len(data) > WHOLE_BYTES else self._quick)

    def _shown(self, key: str) -> str:
        return f"{shown(self.url)}/{key}" if key else shown(self.url)

    def _doing(self, what: str, key: str) -> contextlib.AbstractContextManager[None]:
        return translated(what, self._shown(key))


def _flat(data: Buffer) -> memoryview:
    return memoryview(data).cast("B")


def _headless(stream: Stream) -> Iterator[Buffer]:
    yield from stream.body
    stream.head()


def _part_bytes(size: int | None) -> int:
    """Return how large the parts of an upload are, so that there are not too many of them."""
    return UNKNOWN_PART_BYTES if size is None else max(PART_BYTES, -(-size // MAX_PARTS))


def _views(pieces: Iterable[Buffer]) -> Iterator[memoryview]:
    return (view for view in map(_flat, pieces) if len(view))
