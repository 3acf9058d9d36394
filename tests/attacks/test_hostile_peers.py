"""What strangers, liars and a man on the wire may try on a service of peers' memory: it costs their connection alone."""

from __future__ import annotations

import contextlib
import logging
import os
import random
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from holdfast.core.errors import (
    HoldfastError,
    InvalidFormat,
    OutOfSpace,
    PermissionDenied,
    PolicyError,
    StoreError,
)
from holdfast.stores import Stream, open_store
from holdfast.stores.peers import messages as m
from holdfast.stores.peers import service as service_module
from holdfast.stores.peers.address import PeerAddress, parse_peer
from holdfast.stores.peers.client import PeerStore
from holdfast.stores.peers.handshake import MAGIC, introduce
from holdfast.stores.peers.secret import FILE_VARIABLE, VARIABLE, Secret, find_secret, write_secret
from holdfast.stores.peers.service import MAX_STRANGERS, PeerService
from holdfast.stores.peers.wire import DATA, DOCUMENT, Channel
from patience import until

WORDS = "PLANTED s3cr3t of peers"
SECRET = Secret(WORDS)
LIMIT = 12 << 20
PATIENCE = 20.0  # of a test: nothing that works takes as long


@pytest.fixture
def service() -> Iterator[PeerService]:
    with PeerService(
        "127.0.0.1", 0, LIMIT, secret=SECRET, handshake_seconds=PATIENCE, frame_seconds=PATIENCE
    ) as service:
        store = PeerStore(service.address, secret=SECRET)
        store.create("precious", b"as it was")
        yield service
        assert store.read("precious") == b"as it was"  # whatever was tried, it serves, and holds what it held
        assert store.names("") == ["precious"]
        store.delete(["precious"])
        until(lambda: service.shelf.used_bytes == 0, "its memory to be free")


@contextlib.contextmanager
def hurried(service: PeerService, *, handshake: float = PATIENCE, frame: float = PATIENCE) -> Iterator[None]:
    """Give whoever comes now this little time; nobody who means well is to come meanwhile, however busy the machine."""
    service._seconds = (handshake, frame)
    try:
        yield
    finally:
        service._seconds = (PATIENCE, PATIENCE)


def knock(service: PeerService) -> socket.socket:
    sock = socket.create_connection((service.address.host, service.address.port), PATIENCE)
    sock.settimeout(PATIENCE)
    return sock


def enter(service: PeerService) -> Channel:
    channel, _ = introduce(knock(service), SECRET, seconds=PATIENCE, frame_seconds=PATIENCE)
    return channel


def is_hung_up(sock: socket.socket) -> bool:
    """Return whether the other side hangs up, after whatever it still says; raises TimeoutError when it does not."""
    sock.settimeout(PATIENCE)
    try:
        while sock.recv(65536):
            pass
    except ConnectionError:
        pass
    return True


# ---- strangers ------------------------------------------------------------------------------------------------------

GARBAGE = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 3,
    "tls": bytes.fromhex("16030100c8010000c40303") + b"\x11" * 300,
    "zeros": bytes(4096),
    "noise": random.Random(7).randbytes(100_000),
    "a hello and noise": MAGIC + random.Random(8).randbytes(32 + 32 + 500),
    "ones": b"\xff" * 1000,
}


@pytest.mark.parametrize("what", GARBAGE)
def test_garbage_is_hung_up_on(service: PeerService, what: str, caplog: pytest.LogCaptureFixture) -> None:
    with knock(service) as sock:
        with contextlib.suppress(OSError):
            sock.sendall(GARBAGE[what])
        if what == "nothing":
            sock.shutdown(socket.SHUT_WR)
        assert is_hung_up(sock)
    assert not [r for r in caplog.records if r.levelno > logging.WARNING]


@pytest.mark.parametrize("hello", [b"", MAGIC + b"x" * 10], ids=["nothing", "half a hello"])
def test_who_says_too_little_is_hung_up_on_in_time(service: PeerService, hello: bytes) -> None:
    with hurried(service, handshake=0.4), knock(service) as sock:
        sock.sendall(hello)
        assert is_hung_up(sock)


def test_a_stranger_who_dribbles_is_given_the_time_of_a_handshake_and_no_more(service: PeerService) -> None:
    hello = MAGIC + os.urandom(32)
    with hurried(service, handshake=0.4), knock(service) as sock:
        with pytest.raises(ConnectionError):
            for byte in hello * 1000:
                sock.sendall(bytes([byte]))
                time.sleep(0.05)


def test_very_many_who_say_nothing_keep_nobody_out(service: PeerService) -> None:
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(knock(service)) for _ in range(MAX_STRANGERS + 86)]
        store = PeerStore(service.address, secret=SECRET)
        for n in range(5):
            store.create(f"k{n}", b"x")
        store.delete([f"k{n}" for n in range(5)])
        hung_up = select.poll()
        for sock in silent:
            hung_up.register(sock, select.POLLIN)
        until(lambda: len(hung_up.poll(0)) >= 86, "the oldest of them to be hung up on")


def test_who_finds_every_connection_taken_is_named_in_the_log(
    service: PeerService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(service_module, "MAX_CONNECTIONS", 1)  # which the fixture has
    for _ in range(2):
        with pytest.raises(StoreError, match="if it is one, its log says why"):
            PeerStore(service.address, secret=SECRET).room()
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1
    assert "127.0.0.1: turned away: 1 connections are open" in warnings[0]


def test_another_secret_is_refused_on_both_sides(service: PeerService) -> None:
    store = PeerStore(service.address, secret=Secret("another secret of peers"))
    for act in (lambda: store.read("precious"), lambda: store.create("k", b"x"), lambda: store.names("")):
        with pytest.raises(PermissionDenied, match="different secrets"):
            act()


def test_a_service_that_does_not_know_the_secret_is_told_nothing() -> None:
    heard = bytearray()

    def impostor(sock: socket.socket) -> None:
        heard.extend(sock.recv(1000))
        sock.sendall(MAGIC + os.urandom(32))
        heard.extend(sock.recv(1000))
        sock.sendall(os.urandom(16 + 32))
        heard.extend(sock.recv(1000))

    with listening(impostor) as address:
        store = PeerStore(address, secret=SECRET)
        with pytest.raises(PermissionDenied, match="does not know the secret"):
            store.create("a-key-of-mine", b"what I would store")
    assert b"a-key-of-mine" not in heard
    assert b"what I would store" not in heard


def test_a_proof_that_is_sent_back_proves_nothing() -> None:
    """Who answers with the very bytes that it was sent knows nothing by that."""

    def mirror(sock: socket.socket) -> None:
        hello = sock.recv(1000)
        sock.sendall(hello)
        proof = sock.recv(1000)
        sock.sendall(os.urandom(16) + proof)
        sock.recv(1000)

    with listening(mirror) as address, pytest.raises(PermissionDenied, match="does not know the secret"):
        PeerStore(address, secret=SECRET).create("k", b"x")


@contextlib.contextmanager
def listening(act: Callable[[socket.socket], None]) -> Iterator[PeerAddress]:
    """Do something with each connection to an address, on a thread of its own."""
    present: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve(sock: socket.socket) -> None:
        with sock, contextlib.suppress(OSError):
            sock.settimeout(PATIENCE)
            act(sock)

    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    present.append(server.accept()[0])
                    threads.append(threading.Thread(target=serve, args=(present[-1],)))
                    threads[-1].start()

        accepting = threading.Thread(target=accept)
        accepting.start()
        try:
            yield PeerAddress("127.0.0.1", server.getsockname()[1])
        finally:
            for sock in (server, *present):
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
            for thread in (accepting, *threads):
                thread.join(PATIENCE)
                assert not thread.is_alive()


# ---- a man on the wire ----------------------------------------------------------------------------------------------


class Wire:
    """Passes bytes on between a user and a service, after `change` had them: with the side and how many came before on
    the connection. `heard` is what the newest connection said."""

    def __init__(self, service: PeerService, change: Callable[[str, int, bytes], bytes]) -> None:
        self.heard: dict[str, bytearray] = {"user": bytearray(), "service": bytearray()}
        self._service = service
        self._change = change

    def __call__(self, sock: socket.socket) -> None:
        heard = self.heard = {"user": bytearray(), "service": bytearray()}
        with knock(self._service) as other:
            back = threading.Thread(target=self._pass, args=("service", other, sock, heard))
            back.start()
            self._pass("user", sock, other, heard)
            back.join()

    def _pass(
        self, side: str, source: socket.socket, target: socket.socket, heard: dict[str, bytearray]
    ) -> None:
        try:
            while raw := source.recv(65536):
                at = len(heard[side])
                heard[side] += raw
                target.sendall(self._change(side, at, raw))
        except OSError:
            pass
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)


HANDSHAKE = {"user": len(MAGIC) + 32 + 32, "service": len(MAGIC) + 32 + 16 + 32}


@pytest.mark.parametrize("side", ["user", "service"])
@pytest.mark.parametrize("position", [0, 20, 60, 90, 96, 98, 104, 112, 118, 125, 128])
def test_a_byte_that_is_changed_on_the_way_is_never_believed(
    service: PeerService, side: str, position: int
) -> None:
    def change(who: str, at: int, raw: bytes) -> bytes:
        if who != side or not at <= position < at + len(raw):
            return raw
        changed = bytearray(raw)
        changed[position - at] ^= 0x40
        return bytes(changed)

    wire = Wire(service, change)
    with listening(wire) as address:
        store = PeerStore(address, secret=SECRET)
        with pytest.raises((StoreError, InvalidFormat)):
            store.read("precious", 0, 4)
            store.read("precious", 4, 9)
    assert len(wire.heard[side]) > position


def test_a_recorded_conversation_cannot_be_played_again(service: PeerService) -> None:
    wire = Wire(service, lambda side, at, raw: raw)
    with listening(wire) as address:
        PeerStore(address, secret=SECRET).create("once", b"x")
    PeerStore(service.address, secret=SECRET).delete(["once"])
    with knock(service) as sock:
        sock.sendall(bytes(wire.heard["user"]))
        assert is_hung_up(sock)


@pytest.mark.parametrize("trick", ["twice", "left out", "swapped"])
def test_a_frame_that_comes_twice_or_not_or_too_soon_ends_the_connection(
    service: PeerService, trick: str
) -> None:
    sent: list[bytes] = []

    def change(side: str, at: int, raw: bytes) -> bytes:
        if side == "user" and at >= HANDSHAKE["user"]:
            sent.append(raw)
            if len(sent) == 2:  # the second append
                return {"twice": raw + raw, "left out": b"", "swapped": sent[0]}[trick]
            if trick == "left out" and len(sent) == 3:
                return raw
        return raw

    with listening(Wire(service, change)) as address:
        channel, _ = introduce(
            socket.create_connection((address.host, address.port), PATIENCE),
            SECRET, seconds=PATIENCE, frame_seconds=PATIENCE,
        )  # fmt: skip
        answers = 0
        with contextlib.suppress(OSError):
            for n in range(3):
                channel.send(DOCUMENT, [m.encode(m.Put("log", "append", os.urandom(16), b"%d" % n))])
                if not (trick == "left out" and n == 1):
                    channel.receive_document(PATIENCE)
                    answers += 1
        channel.close()
    store = PeerStore(service.address, secret=SECRET)
    assert store.read("log") == {"twice": b"01", "left out": b"0", "swapped": b"0"}[trick]
    assert answers <= 2
    store.delete(["log"])


# ---- those who know the secret --------------------------------------------------------------------------------------


def test_a_frame_longer_than_any_ends_the_connection(service: PeerService) -> None:
    for size in (2**32 - 1, (1 << 20) + 1):
        channel = enter(service)
        channel.socket.sendall(struct.pack("<IB3x", size, DOCUMENT) + bytes(16) + b"x" * 100)
        assert is_hung_up(channel.socket)
        channel.close()


def test_a_frame_that_does_not_end_is_not_waited_for(service: PeerService) -> None:
    with hurried(service, frame=0.6):
        channel = enter(service)
        with pytest.raises(ConnectionError):
            for _ in range(10_000):
                channel.socket.sendall(b"\0")
                time.sleep(0.05)
    channel.close()


def test_data_where_a_request_belongs_ends_the_connection(service: PeerService) -> None:
    channel = enter(service)
    channel.send(DATA, [b"x" * 1000])
    assert is_hung_up(channel.socket)
    channel.close()


HOSTILE_KEYS = [
    "",
    "/etc/passwd",
    "../x",
    "a/../b",
    "a//b",
    ".tmp",
    "a\0b",
    "é",
    "a" * 256,
    "a/" * 1000,
]


@pytest.mark.parametrize("key", HOSTILE_KEYS)
def test_keys_are_checked_by_the_service_itself(service: PeerService, key: str) -> None:
    requests: list[m.Request] = [
        m.Put(key, "create", b"", b"x"), m.Begin(key, "create", b"", 0, 3, exact=True), m.Read(key, 0, None), m.Info(key), m.Delete([key]),
        m.List(key or "/", ""),
    ]  # fmt: skip
    channel = enter(service)
    for request in requests:
        channel.send(DOCUMENT, [m.encode(request)])
        answer = m.decode_answer(channel.receive_document(PATIENCE))
        assert isinstance(answer, m.Failed), request
        assert answer.error in ("InvalidFormat", "NotFound")
    channel.close()


def test_requests_that_are_none_end_the_connection_and_nothing_else(service: PeerService) -> None:
    rng = random.Random(11)
    good = [
        m.encode(r) for r in (m.Put("k", "create", b"t", b"x"), m.Read("k", 0, 5), m.Delete(["k"]), m.Room())
    ]
    for turn in range(150):
        raw = bytearray(rng.choice(good))
        for _ in range(rng.randint(1, 4)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        if turn % 10 == 0:
            raw = bytearray(b"\x91" * 100_000)  # nested beyond any depth
        channel = enter(service)
        channel.send(DOCUMENT, [bytes(raw)])
        with contextlib.suppress(OSError):
            m.decode_answer(channel.receive_document(PATIENCE))
        channel.close()
    store = PeerStore(service.address, secret=SECRET)
    store.delete([k for k in store.names("") if k != "precious"])


@pytest.mark.parametrize("size", [LIMIT + 1, 2**40, 2**61])
def test_a_size_beyond_the_memory_is_refused_before_any_is_taken(service: PeerService, size: int) -> None:
    channel = enter(service)
    for request in (
        m.Begin("k", "create", b"", 0, size, exact=True),
        m.Begin("k", "create", b"", size, 1, exact=True),
    ):
        before = service.shelf.used_bytes
        channel.send(DOCUMENT, [m.encode(request)])
        answer = m.decode_answer(channel.receive_document(PATIENCE))
        assert isinstance(answer, m.Failed)
        assert answer.error == "OutOfSpace"
        assert service.shelf.used_bytes == before
    channel.close()


def test_more_or_less_than_was_announced_is_no_object(service: PeerService) -> None:
    for sent in (0, 99, 101, 5000):
        channel = enter(service)
        channel.send(DOCUMENT, [m.encode(m.Begin("k", "create", b"", 0, 100, exact=True))])
        assert m.decode_answer(channel.receive_document(PATIENCE)) == m.Fine()
        channel.send(DATA, [b"x" * sent])
        channel.send(DOCUMENT, [m.encode(m.End())])
        answer = m.decode_answer(channel.receive_document(PATIENCE))
        assert isinstance(answer, m.Failed), sent
        channel.close()


def test_an_object_that_outgrows_the_memory_is_refused_while_it_comes_and_nothing_stays(
    service: PeerService,
) -> None:
    taken = 0

    def endless() -> Iterator[bytes]:
        nonlocal taken
        for _ in range(1000):
            taken += 1
            yield b"x" * (1 << 20)

    store = PeerStore(service.address, secret=SECRET)
    with pytest.raises(OutOfSpace, match="its memory is full"):
        store.write_streams([Stream("k", 0, endless(), lambda: b"")])
    assert taken < 1000
    store.create("k", b"x" * (1 << 20))  # the connection is still of use, and the memory free
    store.delete(["k"])


def test_the_memory_of_a_refused_object_is_free_before_its_sender_ends_it(service: PeerService) -> None:
    before = service.shelf.used_bytes
    channel = enter(service)
    channel.send(DOCUMENT, [m.encode(m.Begin("k", "create", b"", 0, None, exact=False))])
    assert isinstance(m.decode_answer(channel.receive_document(PATIENCE)), m.Fine)
    for _ in range(LIMIT + 1 >> 20):
        channel.send(DATA, [b"x" * (1 << 20)])
    channel.send(DATA, [b"x" * (1 << 20)])
    assert isinstance(m.decode_answer(channel.receive_document(PATIENCE)), m.Failed)
    until(lambda: service.shelf.used_bytes == before, "its memory to be free")
    channel.send(DOCUMENT, [m.encode(m.End(whole=True))])
    channel.close()


def test_an_object_whose_sender_goes_away_is_forgotten(service: PeerService) -> None:
    channel = enter(service)
    channel.send(DOCUMENT, [m.encode(m.Begin("k", "create", b"", 0, 3 << 20, exact=True))])
    channel.receive_document(PATIENCE)
    channel.send(DATA, [b"x" * 100_000])
    assert service.shelf.used_bytes >= 3 << 20
    channel.close()


def test_lies_of_a_service_are_errors_of_the_store(service: PeerService) -> None:
    """A service that knows the secret and answers anything: nothing but our errors comes of it."""
    rng = random.Random(5)
    answers: list[m.Answer] = [
        m.Fine(), m.Sized(5), m.Sized(2**61), m.Listed([]), m.Listed([], more=True), m.Listed([("k", 1, 0.0)], more=False),
        m.Failed("SystemExit", "no"), m.Failed("NotFound", "\x1b[31mred"), m.Failed("HoldfastError", "x" * 5000),
    ]  # fmt: skip

    def liar(sock: socket.socket) -> None:
        from holdfast.stores.peers.handshake import answer as shake

        channel = shake(sock, SECRET, b"i" * 16, seconds=PATIENCE, frame_seconds=PATIENCE)
        while True:
            channel.receive_document(PATIENCE)
            channel.send(DOCUMENT, [m.encode(rng.choice(answers))])

    with listening(liar) as address:
        for turn in range(40):
            store = PeerStore(address, secret=SECRET, answer_seconds=0.2)
            target = memoryview(bytearray(5))
            acts: list[Callable[[], object]] = [
                lambda: store.read("k"), lambda: store.read_into("k", 0, target), lambda: store.info("k"),  # noqa: B023
                lambda: store.create("k", b"x"), lambda: store.delete(["k"]), lambda: store.room(),  # noqa: B023
            ]  # fmt: skip
            said = ""
            try:
                acts[turn % len(acts)]()
            except HoldfastError as e:
                said = str(e)
            assert "\x1b" not in said
            assert len(said) < 1000


# ---- the secret -----------------------------------------------------------------------------------------------------


def told(act: Callable[[], object]) -> str:
    try:
        return repr(act())
    except Exception as e:  # noqa: BLE001 - whatever it is, it is looked through
        return repr([e, str(e), e.__cause__, e.__context__])


def test_the_secret_comes_out_nowhere(
    service: PeerService, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv(VARIABLE, WORDS)
    place = service.address.place
    shown = [
        told(find_secret), told(lambda: PeerStore(service.address)), told(lambda: PeerStore(service.address).read("absent")),
        told(lambda: Secret("PLANTED")), told(lambda: open_store(f"peer://{place}/run").names("")),
        told(lambda: open_store(f"peer://user:PLANTED@{place}/run")), told(lambda: open_store(f"peer://{place}/run?secret=PLANTED")),
        told(lambda: open_store(f"peer://{place}/run#PLANTED")), told(lambda: __import__("pickle").dumps(SECRET)),
    ]  # fmt: skip
    PeerStore(service.address, secret=Secret("another secret of peers")).url
    assert not [text for text in (*shown, caplog.text) if "PLANTED" in text or "s3cr3t" in text]


@pytest.mark.parametrize(
    "url",
    [
        "peer://", "peer:///run", "peer://host:99999/run", "peer://host:x/run", "peer://ho st/run", "peer://h/../run", "peer://h/a//b", "peer://-h/run",
        "peer://[::1/run", "peer://h:1:2/run",
    ],
)  # fmt: skip
def test_urls_that_name_no_peer_are_refused(url: str) -> None:
    with pytest.raises((StoreError, ValueError)) as raised:
        parse_peer(url)
    assert isinstance(raised.value, StoreError)


def test_a_url_is_read_as_it_is_written() -> None:
    for url in ("peer://host:7071/runs/a", "peer://[::1]:7070/a", "peer://10.0.0.1:1"):
        assert parse_peer(url).url == url
    assert parse_peer("peer://host/run") == PeerAddress("host", 7070, "run")


def test_a_secret_that_others_can_read_or_guess_is_refused(tmp_path: Path) -> None:
    write_secret(tmp_path / "s")
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
    found = find_secret({FILE_VARIABLE: str(tmp_path / "s")})
    assert found.derive("a") == Secret((tmp_path / "s").read_text()).derive("a")
    (tmp_path / "s").chmod(0o640)
    with pytest.raises(PermissionDenied, match="chmod 600"):
        find_secret({FILE_VARIABLE: str(tmp_path / "s")})
    for environment in ({}, {VARIABLE: "short"}, {VARIABLE: ""}):
        with pytest.raises(PolicyError):
            find_secret(environment)
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(PermissionDenied):
            find_secret({FILE_VARIABLE: str(path)})
    with pytest.raises(PermissionDenied):
        write_secret(tmp_path / "s")


def test_documents_hold_what_they_say(service: PeerService) -> None:
    """A page of the longest keys fits into a frame."""
    keys = ["k" * m.KEY_CHARS] * m.PAGE_KEYS
    assert len(m.encode(m.Delete(keys))) < 1 << 20
    assert len(m.encode(m.Listed([(k, 2**60, 1.0) for k in keys], more=True))) < 1 << 20
    with pytest.raises(ConnectionError):
        m.decode_request(msgspec.msgpack.encode({"type": "Delete", "keys": ["k"] * (m.PAGE_KEYS + 1)}))
