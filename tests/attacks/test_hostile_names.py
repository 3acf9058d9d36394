"""Names from outside never become places outside: every parser and every store, with the same corpus."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Iterator

import msgspec
import numpy as np
import pytest
from forge import MANIFESTS, bounded, check_refused, edit, file_entry, put, reseal, run, state
from hostile_names import CONTROL, DEVICES, NO_KEYS
from hypothesis import given, settings
from hypothesis import strategies as st

import holdfast
from holdfast import Run
from holdfast.catalog.keys import data_prefix, log_key, signature_key, tag_key, trash_key
from holdfast.catalog.lease import holder
from holdfast.catalog.signatures import read_signatures
from holdfast.core.errors import HoldfastError, InvalidFormat, PermissionDenied, PolicyError, StoreError
from holdfast.core.names import check_key, check_path, check_tag, file_stems, is_key
from holdfast.format.sealed import seal
from holdfast.replication.record import read_mirrors
from holdfast.stores import LocalStore, MemoryStore, Store, Stream, open_store
from holdfast.stores.urls import _memory
from holdfast.stores.wrappers import Prefixed

# ---- stores ---------------------------------------------------------------------------------------------------------


def object_store(tmp_path: pathlib.Path) -> Store:
    """One whose server is not there: a name that gets that far is a failure of another kind."""
    return open_store("s3://bucket/prefix?endpoint=http://127.0.0.1:1")


STORES: dict[str, Callable[[pathlib.Path], Store]] = {
    "local": lambda tmp: LocalStore(tmp / "run"),
    "memory": lambda tmp: MemoryStore("names"),
    "a prefix of local": lambda tmp: Prefixed(LocalStore(tmp), "run"),
    "s3": object_store,
}

ACTS: dict[str, Callable[[Store, str], object]] = {
    "write": lambda s, k: s.write(k, [b"x"]),
    "write_streams": lambda s, k: s.write_streams([Stream(k, 1, [b"x"], lambda: b"h")]),
    "write over": lambda s, k: s.write_streams([Stream(k, 1, [b"x"], lambda: b"h", over=True)]),
    "create": lambda s, k: s.create(k, b"x"),
    "replace": lambda s, k: s.replace(k, b"x"),
    "append": lambda s, k: s.append(k, b"x"),
    "read": lambda s, k: s.read(k),
    "a range": lambda s, k: s.read(k, 0, 1),
    "read_into": lambda s, k: s.read_into(k, 0, memoryview(bytearray(1))),
    "info": lambda s, k: s.info(k),
    "delete": lambda s, k: s.delete([k]),
    "list": lambda s, k: s.list(k),
    "names": lambda s, k: s.names(k),
}


def files_below(path: pathlib.Path) -> dict[str, bytes]:
    return {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@pytest.fixture
def outside(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    """What lies beside a store and must stay as it is; the working directory is there too."""
    (tmp_path / "x").write_bytes(b"mine")
    (tmp_path / "b").mkdir()
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    assert (tmp_path / "x").read_bytes() == b"mine"


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("kind", STORES)
def test_no_store_takes_a_hostile_name(kind: str, act: str, outside: pathlib.Path) -> None:
    store = STORES[kind](outside)
    if act == "append" and not store.appendable:
        pytest.skip("this store does not append")
    before = files_below(outside)
    with bounded():
        for name in NO_KEYS:
            if name == "" and act in ("list", "names"):
                continue  # the whole store
            with pytest.raises(InvalidFormat):
                ACTS[act](store, name)
                pytest.fail(f"{act} took {name[:80]!r}")
    assert files_below(outside) == before


@given(st.text(max_size=40) | st.text(alphabet="./\\ a~:%\x00\u2025\uff0e", max_size=12))
@settings(max_examples=400, deadline=None)
def test_what_is_a_key_stays_inside(name: str) -> None:
    store = LocalStore("/nowhere/run")
    try:
        path = store.path(name)
    except InvalidFormat:
        assert not is_key(name)
        return
    assert is_key(name)
    assert os.path.normpath(path) == path
    assert path.startswith("/nowhere/run/")
    assert os.path.relpath(path, "/nowhere/run") == name


@pytest.mark.parametrize("name", [n for n in NO_KEYS if n])
def test_no_prefix_of_a_store_is_left_by_its_name(name: str) -> None:
    with pytest.raises((InvalidFormat, StoreError, PolicyError)):
        Prefixed(MemoryStore("x"), name)


# ---- links ----------------------------------------------------------------------------------------------------------

WRITES = ["write", "write_streams", "write over", "create", "replace", "append", "delete", "list", "names"]


@pytest.mark.parametrize("act", WRITES)
@pytest.mark.parametrize("where", ["data", "data/a"])
def test_nothing_is_written_listed_or_deleted_through_a_linked_directory(
    act: str, where: str, tmp_path: pathlib.Path
) -> None:
    store, elsewhere = LocalStore(tmp_path / "run"), tmp_path / "elsewhere"
    (elsewhere / "a").mkdir(parents=True)
    for key in ("k", "a/k"):
        (elsewhere / key).write_bytes(b"mine")
    link = tmp_path / "run" / where
    link.parent.mkdir(parents=True)
    link.symlink_to(elsewhere)
    before = files_below(elsewhere)
    key = (
        "data/a" if act in ("list", "names") else "data/a/k" if act in ("delete", "append") else "data/a/new"
    )
    with pytest.raises(PermissionDenied, match="is a symbolic link"):
        ACTS[act](store, key)
    assert files_below(elsewhere) == before


@pytest.mark.parametrize("to", ["a file", "nothing", "a pipe"])
def test_nothing_is_appended_through_a_link(to: str, tmp_path: pathlib.Path) -> None:
    """A log segment is the one object that grows in place: a link there would have us write to any file of its owner."""
    store, target = LocalStore(tmp_path / "run"), tmp_path / "profile"
    store.append("log/a", b"x")
    if to == "a file":
        target.write_bytes(b"mine")
    pathlib.Path(store.path("log/a")).unlink()
    if to == "a pipe":
        os.mkfifo(store.path("log/a"))
    else:
        pathlib.Path(store.path("log/a")).symlink_to(target)
    with pytest.raises(StoreError):
        store.append("log/a", b"x")
    assert (target.read_bytes() if target.exists() else b"mine") == b"mine"


@pytest.mark.parametrize("act", ["create", "replace", "write", "write over"])
def test_a_link_in_the_place_of_an_object_is_not_written_through(act: str, tmp_path: pathlib.Path) -> None:
    store, target = LocalStore(tmp_path / "run"), tmp_path / "target"
    target.write_bytes(b"mine")
    store.create("tags/other", b"x")
    link = pathlib.Path(store.path("tags/k"))
    link.symlink_to(target)
    try:
        ACTS[act](store, "tags/k")
    except StoreError:
        assert link.is_symlink()
    assert target.read_bytes() == b"mine"


def test_a_run_may_be_reached_by_a_link_as_a_whole(tmp_path: pathlib.Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    holdfast.save(tmp_path / "link/run", state(1), step=1)
    Run(tmp_path / "link/run").remove([1], force=True)
    assert (tmp_path / "disk/run/run.json").exists()


def test_a_run_whose_data_leads_out_is_neither_written_nor_reclaimed(tmp_path: pathlib.Path) -> None:
    holdfast.save(tmp_path / "run", state(1), step=1)
    outside = tmp_path / "outside"
    (tmp_path / "run/data").rename(outside)
    (outside / "000000000009-aaaaaaaa").mkdir()
    (outside / "000000000009-aaaaaaaa/model.safetensors").write_bytes(b"someone else's")
    (tmp_path / "run/data").symlink_to(outside)
    before = files_below(outside)
    assert holdfast.load(tmp_path / "run", as_="numpy")["b"]["text"] == "hello"  # type: ignore[index]
    with pytest.raises(HoldfastError, match="symbolic link"):
        holdfast.save(tmp_path / "run", state(2), step=2)
    with pytest.raises(HoldfastError, match="symbolic link"):
        Run(tmp_path / "run").remove([1], force=True)
    assert files_below(outside) == before


# ---- parsers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [n for n in NO_KEYS if "\ud800" not in n and "\udcff" not in n])
def test_no_manifest_refers_to_a_hostile_file(name: str) -> None:
    for key in (name, f"data/{name}"):
        if is_key(key):
            continue  # "data/" and a plain name
        store = run()
        edit(store, MANIFESTS[2], lambda d, key=key: file_entry(d, "a").update(key=key))
        check_refused(store, InvalidFormat)


@pytest.mark.parametrize(
    "name", [*(n for n in NO_KEYS if "\ud800" not in n and "\udcff" not in n), "a/b", "a.b"]
)
def test_no_attempt_is_a_path(name: str) -> None:
    """An attempt becomes part of keys: of the trash, of signatures, of data that is freed."""
    if name in ("-rf", "--", "-"):
        return  # plain characters, and never in front
    store = run()
    edit(store, MANIFESTS[2], lambda d: d.update(attempt=name))
    check_refused(store, InvalidFormat)
    store = run()
    edit(store, "tags/t1.json", lambda d: d.update(attempt=name))
    assert Run(store).tags == {"t2": 2}


@pytest.mark.parametrize("name", NO_KEYS)
def test_no_tag_is_a_hostile_name(name: str) -> None:
    with pytest.raises(PolicyError):
        check_tag(name)
    with pytest.raises(PolicyError):
        tag_key(name)
    store = run()
    with pytest.raises(HoldfastError):
        Run(store).tag(name, 1)
    with pytest.raises(HoldfastError):
        _ = Run(store)[name]
    assert [o.key for o in store.list("tags")] == ["tags/t1.json", "tags/t2.json"]


@pytest.mark.parametrize("name", [n for n in NO_KEYS if "\ud800" not in n and "\udcff" not in n])
def test_a_tag_document_of_a_hostile_name_is_left_out(name: str) -> None:
    store = run()
    edit(store, "tags/t1.json", lambda d: d.update(tag=name))
    assert Run(store).tags == {"t2": 2}


@pytest.mark.parametrize("name", CONTROL)
def test_no_tensor_and_no_part_has_a_name_that_cannot_be_shown(name: str) -> None:
    if name in ("a\u2028b", "\ufeffa", "a\u202eb", "a\u2066b"):
        check_path(name)  # text, if odd; whoever prints it has to mind
        return
    with pytest.raises(InvalidFormat):
        check_path(name)


@pytest.mark.parametrize("part", [*NO_KEYS, *DEVICES, "x.", "X", "x", "part-0"])
def test_no_part_names_its_file_unless_that_is_plain_everywhere(part: str) -> None:
    stems = file_stems([part, "model", "MODEL"])
    assert stems["model"] != "model"  # another differs in case alone
    for stem in stems.values():
        check_key(f"data/{stem}.safetensors")
        assert len({s.lower() for s in stems.values()}) == 3
    if part not in ("X", "x"):
        assert stems[part] == "part-0"


@pytest.mark.parametrize("device", DEVICES)
def test_a_part_may_be_called_like_a_device(device: str, tmp_path: pathlib.Path) -> None:
    holdfast.save(tmp_path / "run", {device: {"w": np.ones(3)}}, step=1)
    (file,) = tmp_path.glob("run/data/*/*")
    assert file.name == "part-0.safetensors"
    assert holdfast.load(tmp_path / "run", as_="numpy")[device]["w"].tolist() == [1.0] * 3  # type: ignore[index]


@pytest.mark.parametrize("name", [n for n in NO_KEYS if n])
def test_keys_that_are_made_are_checked_where_they_are_used(name: str, tmp_path: pathlib.Path) -> None:
    store = LocalStore(tmp_path / "run")
    made = [
        trash_key(1, name),
        signature_key(1, name),
        log_key(name, 0),
        f"{data_prefix(1, name)}/x.safetensors",
    ]
    for key in made:
        if is_key(key):
            assert os.path.normpath(store.path(key)).startswith(str(tmp_path / "run") + "/")
        else:
            with pytest.raises(InvalidFormat):
                store.replace(key, b"x")
    if not is_key(signature_key(1, name)):
        with pytest.raises(InvalidFormat):
            read_signatures(store, 1, name)


# ---- what numbers may be --------------------------------------------------------------------------------------------

HUGE = [10**12, 2**63, 10**30, -1, -(2**63)]


@pytest.mark.parametrize("number", HUGE)
@pytest.mark.parametrize("field", ["step", "generation", "new_bytes", "world_size"])
def test_a_manifest_holds_no_number_beyond_its_range(field: str, number: int) -> None:
    if number == 10**12 and field != "step":
        return
    store = run()
    edit(store, MANIFESTS[2], lambda d: d.update({field: number}))
    check_refused(store, InvalidFormat)


@pytest.mark.parametrize("time", [1e300, -1e300, 1e12])
def test_no_time_is_beyond_every_calendar(time: float) -> None:
    store = run()
    edit(store, MANIFESTS[2], lambda d: d.update(time=time))
    check_refused(store, InvalidFormat)
    store = run()
    edit(store, "tags/t1.json", lambda d: d.update(time=time))
    assert Run(store).tags == {"t2": 2}
    store = run()
    edit(store, "run.json", lambda d: d.update(created=time))
    with pytest.raises(InvalidFormat):
        Run(store)


LEASES: dict[str, Callable[[dict], object]] = {
    "a huge process": lambda d: d.update(pid=2**70), "a negative process": lambda d: d.update(pid=-1),
    "a huge writer": lambda d: d.update(writer=2**40), "for ever": lambda d: d.update(expires=1e300),
    "a long host": lambda d: d.update(host="x" * 2000), "a huge generation": lambda d: d.update(generation=10**12),
}  # fmt: skip


@pytest.mark.parametrize("attack", LEASES)
def test_a_lease_that_names_what_cannot_be_is_refused(attack: str) -> None:
    store = run()
    (lease,) = store.list("lease")
    edit(store, lease.key, LEASES[attack])
    with bounded(), pytest.raises(InvalidFormat):
        holder(store)


@pytest.mark.parametrize(
    "name", ["zzz.json", "9999999999999.json", "000000000001.json.bak", "x/000000000009.json"]
)
def test_another_file_beside_the_leases_makes_nobody_an_owner(name: str) -> None:
    store = run()
    store.create(f"lease/{name}", b"whatever")
    assert Run(store).writer is None
    holdfast.save(store, state(3), step=3)
    assert Run(store).steps == [1, 2, 3]


# ---- each key once --------------------------------------------------------------------------------------------------

TWICE = {
    "run.json": b'"created":', "tags/t1.json": b'"step":', "lease": b'"pid":', "checkpoints/000000000002.json": b'"generation":',
}  # fmt: skip


@pytest.mark.parametrize("document", TWICE)
def test_a_key_that_occurs_twice_is_refused(document: str) -> None:
    store = run()
    key = store.list("lease")[0].key if document == "lease" else document
    member = TWICE[document]

    def doubled(body: bytes) -> bytes:
        assert body.count(member) == 1
        return body.replace(member, member + b"1," + member)

    reseal(store, key, doubled)
    if document == "tags/t1.json":
        assert Run(store).tags == {"t2": 2}
    elif document.startswith("checkpoints"):
        check_refused(store, InvalidFormat)
    else:
        with pytest.raises(InvalidFormat, match="twice"):
            _ = Run(store).writer


MIRRORS = {
    "twice": b'{"format":1,"run":"%b","mirrors":[],"mirrors":[{"url":"memory://evil"}]}', "too many": b'{"format":1,"run":"%b","mirrors":[' + b",".join([b'{"url":"memory://evil"}'] * 101) + b"]}",
    "nesting": b'{"format":1,"run":"%b","mirrors":' + b"[" * 50_000 + b"]" * 50_000 + b"}", "a negative number": b'{"format":1,"run":"%b","mirrors":[{"url":"memory://evil","bandwidth":-1}]}',
}  # fmt: skip


@pytest.mark.parametrize("attack", MIRRORS)
def test_a_hostile_list_of_mirrors_is_refused(attack: str) -> None:
    store = run()
    put(store, "mirrors.json", seal(MIRRORS[attack].replace(b"%b", Run(store).id.encode())))
    with bounded(), pytest.raises(InvalidFormat):
        read_mirrors(store, Run(store).id)


def test_loading_goes_to_no_place_that_a_file_names(tmp_path: pathlib.Path) -> None:
    """A list of mirrors is for the verbs that are about mirrors. Lesson of CVE-2025-12058."""
    store = run()
    for url in ("memory://planted-place", (tmp_path / "planted").as_uri()):
        body = b'{"format":1,"run":"%b","mirrors":[{"url":"%u"}]}'
        body = body.replace(b"%b", Run(store).id.encode()).replace(b"%u", url.encode())
        put(store, "mirrors.json", seal(body))
        assert [m.url for m in read_mirrors(store, Run(store).id)] == [url]
        holdfast.load(store, as_="numpy")
        holdfast.load(store, into=state(0))
        Run(store).verify()
        with holdfast.Checkpointer(store, state(0)) as ckpt:
            ckpt.restore()
            list(ckpt.steps(ckpt.step + 1))
    assert "planted-place" not in _memory
    assert list(tmp_path.iterdir()) == []
    list_of = open_store("memory://planted-place")  # this is what would have been seen
    assert "planted-place" in _memory
    assert list_of.list("") == []


def test_an_event_with_a_key_twice_is_left_out(caplog: pytest.LogCaptureFixture) -> None:
    store = run()
    before = len(Run(store).events())
    line = b'{"event":"verified","time":1.0,"step":1,"step":2,"attempt":"aa"}'
    put(store, "log/evil-000000.jsonl", seal(line, 16))
    assert len(Run(store).events()) == before
    assert "twice" in caplog.text
    put(store, "log/evil-000000.jsonl", seal(line.replace(b'"step":1,', b""), 16))
    assert len(Run(store).events()) == before + 1


@given(
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats()
        | st.text(max_size=20)
        | st.sampled_from(NO_KEYS[:40]),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
        max_leaves=8,
    ),
    st.sampled_from(
        ["step", "attempt", "time", "generation", "parts", "metrics", "clock", "parent", "loop", "run"]
    ),
)
@settings(max_examples=150, deadline=None)
def test_a_manifest_with_any_value_in_any_place_is_read_or_refused_by_us(value: object, field: str) -> None:
    store = run()
    try:
        edit(store, MANIFESTS[2], lambda d: d.update({field: value}))
    except (UnicodeEncodeError, msgspec.ValidationError):
        return
    with bounded():
        try:
            Run(store).verify()
            Run(store).records()
            holdfast.load(store, step=2, as_="numpy")
        except HoldfastError:
            pass
