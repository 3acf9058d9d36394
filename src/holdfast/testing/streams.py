"""What every store must do with streams: objects that are made piece by piece, their first bytes last."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import pytest

from holdfast.core.errors import AlreadyExists, InvalidFormat
from holdfast.stores.base import Store, Stream

__all__ = ["StreamTests"]


class StreamTests:
    """The promises of `Store.write_streams`; `StoreTests` has them all."""

    def test_streams_are_written_with_their_heads_in_front(self, store: Store) -> None:
        store.write_streams([])
        large = bytes(range(256)) * (9 << 12)  # more than one part of a multipart upload
        store.write_streams([
            Stream("d/1", 5, [b"bo", memoryview(b"dy"), bytearray(b"")], lambda: b"head "),
            Stream("d/2", 4096, [large, b"the rest"], lambda: b"h" * 4096),
            Stream("d/3", 2, [], lambda: b"hh"),
            Stream("e/4", 0, [b"no head"], lambda: b""),
            Stream("e/5", 0, [], lambda: b""),
        ])  # fmt: skip
        assert store.read("d/1") == b"head body"
        assert store.read("d/2") == b"h" * 4096 + large + b"the rest"
        assert (store.read("d/3"), store.read("e/4"), store.read("e/5")) == (b"hh", b"no head", b"")
        assert store.info("d/2").size == 4096 + len(large) + 8
        assert [o.key for o in store.list("")] == ["d/1", "d/2", "d/3", "e/4", "e/5"]

    def test_streams_are_taken_in_order_and_each_head_after_its_body(self, store: Store) -> None:
        seen: list[str] = []

        def body(name: str) -> Iterator[bytes]:
            for n in range(3):
                seen.append(f"{name}{n}")
                yield b"%d" % n

        def head(name: str) -> bytes:
            seen.append(f"{name} head")
            return b"h"

        def streams() -> Iterator[Stream]:
            for name in "ab":
                seen.append(name)
                yield Stream(f"k/{name}", 1, body(name), partial(head, name))

        store.write_streams(streams())
        assert [s for s in seen if "head" not in s] == ["a", "a0", "a1", "a2", "b", "b0", "b1", "b2"]
        assert seen.index("a head") > seen.index("a2")
        assert seen.index("b head") > seen.index("b2")
        assert store.read("k/a") == store.read("k/b") == b"h012"

    @pytest.mark.parametrize("fails", ["body", "head", "stream", "size", "key", "taken"])
    def test_a_write_of_streams_that_fails_leaves_nothing(self, store: Store, fails: str) -> None:
        def give(what: str) -> bytes:
            if what == fails:
                raise RuntimeError(what)
            return b"xx"

        def streams() -> Iterator[Stream]:
            yield Stream("d/1", 2, [b"first"], lambda: b"hh")
            key = {"key": "d/../2", "taken": "c"}.get(fails, "d/2")
            yield Stream(
                key, 3 if fails == "size" else 2, (give(w) for w in ("fine", "body")), lambda: give("head")
            )
            give("stream")

        store.create("c", b"x")
        kinds = {"size": ValueError, "key": InvalidFormat, "taken": AlreadyExists}
        with pytest.raises(kinds.get(fails, RuntimeError)):
            store.write_streams(streams())
        assert [o.key for o in store.list("")] == ["c"]
        assert store.read("c") == b"x"
        store.write_streams([Stream("d/1", 1, [b"again"], lambda: b"h")])
        assert store.read("d/1") == b"hagain"

    def test_a_stream_goes_over_a_present_object_in_one_step_when_it_is_whole(self, store: Store) -> None:
        store.create("d/1", b"old")
        seen: list[bytes] = []

        def body() -> Iterator[bytes]:
            yield b"new " * 3_000_000  # more than one part of a multipart upload
            seen.append(store.read("d/1"))
            yield b"and the rest"

        store.write_streams([
            Stream("d/1", 2, body(), lambda: b"hh", over=True),
            Stream("d/2", 1, [b"free"], lambda: b"h", over=True),
            Stream("d/3", 1, [b"plain"], lambda: b"h"),
        ])  # fmt: skip
        assert seen == [b"old"]
        assert store.read("d/1") == b"hh" + b"new " * 3_000_000 + b"and the rest"
        assert (store.read("d/2"), store.read("d/3")) == (b"hfree", b"hplain")
        assert [o.key for o in store.list("")] == ["d/1", "d/2", "d/3"]

    @pytest.mark.parametrize("fails", ["body", "head", "size"])
    def test_a_stream_that_fails_to_go_over_an_object_leaves_it(self, store: Store, fails: str) -> None:
        store.create("d/1", b"old")

        def give(what: str) -> bytes:
            if what == fails:
                raise RuntimeError(what)
            return b"xx"

        size = 3 if fails == "size" else 2
        stream = Stream("d/1", size, (give(w) for w in ("fine", "body")), lambda: give("head"), over=True)
        with pytest.raises(ValueError if fails == "size" else RuntimeError):
            store.write_streams([stream])
        assert store.read("d/1") == b"old"
        assert [o.key for o in store.list("")] == ["d/1"]
