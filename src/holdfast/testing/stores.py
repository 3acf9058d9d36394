"""What every store must do, as tests to inherit.

    class TestMyStore(StoreTests):
        @pytest.fixture
        def store(self) -> Store:
            return MyStore(...)  # empty, and of this test alone

Needs pytest. A store that passes can hold runs; `appendable = False` ones skip what they do not offer.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from functools import partial

import pytest

from holdfast.core.errors import AlreadyExists, HoldfastError, InvalidFormat, NotFound, StoreError, Truncated
from holdfast.stores.base import Store
from holdfast.testing.streams import StreamTests

__all__ = ["BAD_KEYS", "StoreTests", "at_once"]

BAD_KEYS = (
    "", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", ".hidden", "a/.tmp-1", "a\\b", "a b", "a\n",
    "a\0b", "~", "é", "C:", "-a", "a" * 256, "data/a\u202eb",
)  # fmt: skip
RIVALS = 16


def at_once(acts: Sequence[Callable[[], object]]) -> list[object]:
    """Run the acts at the same moment in a thread each; return what each returned or the exception it raised."""
    start = threading.Barrier(len(acts))
    outcomes: list[object] = [None] * len(acts)

    def run(index: int, act: Callable[[], object]) -> None:
        start.wait()
        try:
            outcomes[index] = act()
        except Exception as e:  # noqa: BLE001 - an outcome like any other; the test looks at it
            outcomes[index] = e

    threads = [threading.Thread(target=run, args=item) for item in enumerate(acts)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes


class StoreTests(StreamTests):
    """The promises of `holdfast.stores.Store`. Inherit, and give a fixture `store`."""

    @pytest.fixture
    def store(self) -> Store:
        raise NotImplementedError("give a fixture `store` that returns an empty store")

    # ---- writing and reading back ---------------------------------------------------------------------------------

    def test_each_way_of_writing_gives_the_bytes_back(self, store: Store) -> None:
        data = bytes(range(256)) * 5
        store.write("d/written", [data[:100], memoryview(data)[100:101], bytearray(data[101:])])
        store.create("d/created", data)
        store.replace("d/replaced", memoryview(data))
        for key in ("d/written", "d/created", "d/replaced"):
            assert store.read(key) == data
            assert type(store.read(key)) is bytes
            assert store.info(key).size == len(data)

    def test_empty_objects_are_objects(self, store: Store) -> None:
        store.write("w", [])
        store.create("c", b"")
        store.replace("r", b"")
        assert [(o.key, o.size) for o in store.list("")] == [("c", 0), ("r", 0), ("w", 0)]
        assert store.read("w") == store.read("c", 0, 0) == b""

    def test_what_was_given_may_change_afterwards(self, store: Store) -> None:
        data = bytearray(b"before")
        store.create("c", data)
        store.replace("r", data)
        store.write("w", [data])
        data[:] = b"after!"
        assert {store.read(key) for key in "crw"} == {b"before"}

    def test_ranges(self, store: Store) -> None:
        store.create("k", b"0123456789")
        assert store.read("k", 3) == b"3456789"
        assert store.read("k", 3, 5) == b"34"
        assert store.read("k", 0, 10) == b"0123456789"
        assert store.read("k", 10, 10) == store.read("k", 4, 4) == store.read("k", 10) == b""
        target = bytearray(b"........")
        store.read_into("k", 2, memoryview(target)[1:5])
        assert target == b".2345..."

    @pytest.mark.parametrize(("start", "end"), [(0, 11), (9, 11), (10, 11), (50, 60)])
    def test_a_short_read_is_truncated_never_short(self, store: Store, start: int, end: int) -> None:
        store.create("k", b"0123456789")
        with pytest.raises(Truncated, match="k"):
            store.read("k", start, end)
        with pytest.raises(Truncated, match="k"):
            store.read_into("k", start, memoryview(bytearray(end - start)))

    def test_what_is_missing_is_not_found(self, store: Store) -> None:
        store.create("dir/k", b"x")
        for key in ("absent", "dir/absent", "dir", "absent/k"):
            for act in (
                lambda key=key: store.read(key),
                lambda key=key: store.read(key, 0, 1),
                lambda key=key: store.info(key),
                lambda key=key: store.read_into(key, 0, memoryview(bytearray(1))),
            ):
                with pytest.raises(NotFound) as raised:
                    act()
                assert isinstance(raised.value, FileNotFoundError)
                assert key in str(raised.value)

    # ---- objects whose first bytes come last ------------------------------------------------------------------------

    # ---- create and replace ---------------------------------------------------------------------------------------

    def test_create_never_overwrites(self, store: Store) -> None:
        store.create("a/k", b"first")
        with pytest.raises(AlreadyExists) as raised:
            store.create("a/k", b"second")
        assert isinstance(raised.value, FileExistsError)
        assert store.read("a/k") == b"first"
        assert [o.key for o in store.list("")] == ["a/k"]
        store.delete(["a/k"])
        store.create("a/k", b"third")
        assert store.read("a/k") == b"third"

    def test_write_never_overwrites(self, store: Store) -> None:
        store.write("k", [b"first"])
        with pytest.raises(AlreadyExists):
            store.write("k", [b"second"])
        assert store.read("k") == b"first"

    def test_create_has_exactly_one_winner(self, store: Store) -> None:
        for turn in range(5):
            key = f"race/{turn}/k"
            outcomes = at_once([partial(store.create, key, b"%d" % i * 1000) for i in range(RIVALS)])
            winners = [i for i, outcome in enumerate(outcomes) if outcome is None]
            assert len(winners) == 1
            assert sum(isinstance(outcome, AlreadyExists) for outcome in outcomes) == RIVALS - 1
            assert store.read(key) == b"%d" % winners[0] * 1000
            assert [o.key for o in store.list(f"race/{turn}")] == [key]

    def test_replace_is_seen_whole_or_not_at_all(self, store: Store) -> None:
        versions = [bytes([65 + i]) * (1000 + 700 * i) for i in range(8)]
        store.replace("k", versions[0])
        seen: list[bytes] = []

        def write() -> None:
            for version in versions * 3:
                store.replace("k", version)

        def read() -> None:
            for _ in range(40):
                seen.append(store.read("k", 0, 500) + store.read("k", 500, 1000))

        outcomes = at_once([write, write, read, read])
        assert outcomes == [None] * 4
        assert {part for piece in seen for part in (piece[:500], piece[500:])} <= {v[:500] for v in versions}
        assert store.read("k") == versions[-1]

    def test_an_object_that_is_replaced_meanwhile_is_read_whole(self, store: Store) -> None:
        versions = [bytes([65 + i]) * (100 + 7000 * (i % 2) + i) for i in range(6)]
        store.replace("k", versions[0])
        seen: list[bytes] = []

        def write() -> None:
            for version in versions * 10:
                store.replace("k", version)

        def read() -> None:
            for _ in range(150):
                seen.append(store.read("k"))

        assert at_once([write, read, read]) == [None] * 3
        assert set(seen) <= set(versions)

    # ---- append ---------------------------------------------------------------------------------------------------

    def test_append_adds_at_the_end(self, store: Store) -> None:
        if not store.appendable:
            pytest.skip("this store does not append")
        for i in range(20):
            store.append("log/a", b"%d\n" % i)
        assert store.read("log/a") == b"".join(b"%d\n" % i for i in range(20))
        assert store.info("log/a").size == len(store.read("log/a"))

    # ---- list and delete ------------------------------------------------------------------------------------------

    def test_list_is_sorted_and_stays_below_its_prefix(self, store: Store) -> None:
        keys = [
            "a",
            "a-b",
            "a.b/x",
            "ab/c",
            "b/2",
            "b/10",
            "b/c/d/e",
            "b/c/d-e",
            "b/c-d",
            "b+/x",
            "B/x",
            "z/0",
        ]
        for key in keys:
            store.create(key, key.encode())
        assert [o.key for o in store.list("")] == sorted(keys)
        assert [o.key for o in store.list("b")] == sorted(k for k in keys if k.startswith("b/"))
        assert [o.key for o in store.list("b/c")] == ["b/c/d-e", "b/c/d/e"]
        assert [(o.size, store.info(o.key)) for o in store.list("b")] == [
            (len(o.key), o) for o in store.list("b")
        ]

    def test_names_are_the_keys_of_the_list(self, store: Store) -> None:
        keys = ["a", "b/1", "b/1-0001", "b/1.json", "b/2/deep", "b/3", "b-/x", "c"]
        for key in keys:
            store.create(key, b"x")
        for prefix in ("", "b", "b/2", "nothing"):
            listed = [o.key for o in store.list(prefix)]
            assert store.names(prefix) == listed
            for after in ("", "a", "b/1", "b/1-", "b/2", "b/3", "zz"):
                assert store.names(prefix, after) == [key for key in listed if key > after]

    def test_list_of_nothing_is_empty(self, store: Store) -> None:
        assert store.list("") == store.list("nothing/here") == []
        store.create("a/k", b"x")
        assert store.list("a/k") == store.list("a/k/deeper") == store.list("b") == []
        store.delete(["a/k"])
        assert store.list("") == store.list("a") == []

    def test_listed_times_are_of_the_last_change(self, store: Store) -> None:
        before = time.time() - 2
        store.create("k", b"x")
        assert before <= store.info("k").modified <= time.time() + 2
        assert store.list("")[0].modified == store.info("k").modified

    def test_delete_removes_just_what_it_is_told(self, store: Store) -> None:
        for key in ("a/1", "a/2", "a/b/3", "c"):
            store.create(key, b"x")
        store.delete(["a/1", "a/b/3"])
        assert [o.key for o in store.list("")] == ["a/2", "c"]
        store.delete([])
        store.delete(["a"])  # a prefix is no object
        assert [o.key for o in store.list("")] == ["a/2", "c"]

    def test_delete_of_what_is_gone_is_no_error(self, store: Store) -> None:
        store.create("a/k", b"x")
        for _ in range(2):
            store.delete(["a/k", "never/there", "a/k"])
        assert store.list("") == []
        assert at_once([lambda: store.delete(["a/k"])] * 4) == [None] * 4

    def test_a_place_is_usable_again_after_it_was_emptied(self, store: Store) -> None:
        for turn in range(3):
            for act in (store.create, store.replace, lambda key, data: store.write(key, [data])):
                act("deep/er/still/k", b"%d" % turn)
                assert store.read("deep/er/still/k") == b"%d" % turn
                store.delete(["deep/er/still/k"])

    def test_emptying_a_place_does_not_disturb_who_writes_there(self, store: Store) -> None:
        def come_and_go(name: str) -> None:
            for turn in range(25):
                store.create(f"tags/{name}", b"%d" % turn)
                assert store.read(f"tags/{name}") == b"%d" % turn
                store.delete([f"tags/{name}"])

        assert at_once([lambda name=f"n{i}": come_and_go(name) for i in range(4)]) == [None] * 4  # type: ignore[misc]
        assert store.list("tags") == []

    def test_sweeping_removes_no_object(self, store: Store) -> None:
        for key in ("a", "b/c", "data/1/m"):
            store.create(key, b"x")
        store.append("log/x", b"x") if store.appendable else store.create("log/x", b"x")
        store.sweep(time.time() + 1000)
        assert [o.key for o in store.list("")] == ["a", "b/c", "data/1/m", "log/x"]

    # ---- keys -----------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("key", BAD_KEYS)
    def test_keys_that_are_no_plain_names_are_refused(self, store: Store, key: str) -> None:
        acts: list[Callable[[], object]] = [
            lambda: store.write(key, [b"x"]), lambda: store.create(key, b"x"), lambda: store.replace(key, b"x"),
            lambda: store.read(key), lambda: store.read_into(key, 0, memoryview(bytearray(1))), lambda: store.info(key),
            lambda: store.delete([key]),
        ]  # fmt: skip
        if store.appendable:
            acts.append(lambda: store.append(key, b"x"))
        if key:
            acts += [lambda: store.list(key), lambda: store.names(key)]
        for act in acts:
            with pytest.raises(InvalidFormat):
                act()
        assert store.list("") == []

    def test_long_and_odd_but_plain_keys_are_taken(self, store: Store) -> None:
        keys = [
            "a" * 255,
            "/".join(["deep"] * 40),
            "A.b_c-d+e=f@g",
            "_x/0",
            "a..b",
            "data/000000000007-ab12cd34/m.safetensors",
        ]
        for key in keys:
            store.create(key, b"x")
        assert [o.key for o in store.list("")] == sorted(keys)

    # ---- errors ---------------------------------------------------------------------------------------------------

    def test_store_errors_are_ours_and_the_operating_systems(self, store: Store) -> None:
        with pytest.raises(StoreError) as raised:
            store.read("absent")
        assert isinstance(raised.value, HoldfastError)
        assert isinstance(raised.value, OSError)
        assert str(raised.value)
