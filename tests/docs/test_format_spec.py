"""The specification is enough: a reader written from `docs/format.md` alone sees what holdfast sees."""

from __future__ import annotations

import collections
import datetime
import decimal
import fractions
import math
import pathlib
import re
import shutil
import uuid
import zoneinfo
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from markdown_pages import DOCS, sections
from spec_reader import MANIFEST_MEMBERS, TYPES, Refused, SpecCheckpoint, SpecRun, cut, unpack

import holdfast
from distributed.side_by_side import side_by_side
from distributed.side_by_side import values as returned
from holdfast import Checkpointer, EarlyStopping, best, every, last
from holdfast.catalog.ranks import view_of
from holdfast.core.dtypes import CARRIERS, DTYPES
from holdfast.core.errors import HoldfastError
from holdfast.format import events, values
from holdfast.format.digest import cut_blocks
from holdfast.format.manifest import Derived, FileEntry, Manifest, Part
from holdfast.format.packed import Pack, declared_tail_bytes, decode_tail
from holdfast.replication.copying import copy_beside, copy_checkpoint
from holdfast.state.records import Record
from holdfast.stores import LocalStore, open_store

torch = pytest.importorskip("torch")
from torch import nn  # noqa: E402

SPEC = DOCS / "format.md"

VALUES: dict[str, object] = {
    "plain": [None, True, False, 0, -(2**63), 2**63 - 1, 0.1, -0.0, 1e300, 5e-324, "", "päth/$x"],
    "surrogates and wide": [{"\ud800": 1}, range(2**70)],
    "odd": [
        math.inf,
        -math.inf,
        2**63,
        -(10**40),
        "\ud800",
        1 + 2j,
        complex(math.inf, 0),
        b"\x00\xff",
        bytearray(b"ab"),
    ],
    "containers": [
        (1, (2,)),
        {3, 1},
        frozenset({"a"}),
        range(1, 9, 2),
        slice(None, 3),
        {1: "a", (2, 3): {"$b": 1}},
    ],
    "collections": [
        collections.OrderedDict([("b", 1), ("a", 2)]),
        collections.Counter("aab"),
        collections.deque([1, 2], maxlen=4),
        collections.deque(),
    ],
    "times": [
        datetime.datetime(2024, 2, 29, 12, 30, 0, 7, tzinfo=datetime.UTC),
        datetime.date(1970, 1, 1),
        datetime.time(23, 59),
        datetime.timedelta(days=-1, microseconds=3),
        datetime.datetime(2024, 10, 27, 2, 30, tzinfo=zoneinfo.ZoneInfo("Europe/Berlin"), fold=1),
        datetime.time(2, 30, fold=1),
    ],
    "exact": [
        decimal.Decimal("0.10"),
        fractions.Fraction(1, 3),
        uuid.UUID(int=7),
        pathlib.PurePosixPath("a/b"),
    ],
}


class Net(nn.Module):
    """Tied weights, a frozen part that is never written twice, buffers, odd element types."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.head = nn.Linear(16, 50, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Parameter(torch.randn(300, 100), requires_grad=False)
        self.norm = nn.BatchNorm1d(16)
        self.thin = nn.Parameter(torch.randn(3, 5).bfloat16())
        self.register_buffer("flipped", torch.arange(12.0).reshape(3, 4).t())
        self.register_buffer("pairs", torch.randn(2, 3, dtype=torch.complex128))
        self.register_buffer("none", torch.empty(0, 4))

    def forward(self, x: Any) -> Any:
        return self.head(self.norm(self.embed(x)))


def nested() -> dict[object, object]:
    """Tensors at every kind of place that a tensor can stand at, one of them at two."""
    one = np.arange(3.0)
    return {
        "list": [np.zeros(2), [np.ones(2)]], "tuple": (np.zeros(1), {"": np.ones(1)}), 5: {"x": np.full(2, 5)}, "5": np.full(2, 6),
        (1, 2): np.full(2, 7), "deque": collections.deque([np.full(2, 8)]), "ordered": collections.OrderedDict(a=np.full(2, 9)),
        "a/b": np.full(2, 10), "a": {"b": np.full(2, 11)}, "tied": one, "tied again": one,
    }  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with most of what there can be: best, tags, a rollback, late metrics, references, an ordinal."""
    torch.manual_seed(0)
    place = tmp_path_factory.mktemp("spec") / "run"
    net = Net()
    optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
    tiny = {f"t{i:04d}": np.full(i % 7, i, np.float32) for i in range(400)}
    state = {
        "model": net,
        "optimizer": optimizer,
        "values": dict(VALUES),
        "tiny": tiny,
        "big": np.arange(100_000, dtype=np.int64),
        "ü ber": np.float16([1, 2]),
        "nested": nested(),
        "noise": {
            "floats": np.random.default_rng(0).standard_normal(2000),
            "ids": np.random.default_rng(1).integers(0, 2**40, 2000),
            "bytes": np.random.default_rng(2).integers(0, 256, 2000, np.uint8),
        },
    }
    with Checkpointer(
        place,
        state,
        save=every(steps=2) | best("loss", mode="min"),
        keep=last(4) | best("loss", mode="min"),
        stop=EarlyStopping("loss", mode="min", patience=50),
    ) as ckpt:
        back = False
        for step in ckpt.steps(12):
            loss = net(torch.randint(0, 50, (8,))).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            ckpt.log(loss=loss, noise=math.nan)
            if step == 8 and not back:
                back = True
                ckpt.restore(6)
            if step == 9:
                ckpt.save(tag="chosen")
    holdfast.Run(place).observe("chosen", "score", 0.5)
    net.thin.data += 1
    holdfast.save(place, state, step=12)  # a later state of a step
    return place


def test_every_tensor_and_value_is_the_same(root: Path) -> None:
    run, mine = holdfast.Run(root), SpecRun(root)
    assert list(mine.manifest_keys()) == run.steps
    for step in run.steps:
        ours, theirs = run[step], SpecCheckpoint(mine, step)
        assert list(theirs.parts) == ours.parts
        names = [*ours.tensors]
        assert len(names) > 400
        for name in names:
            assert_same_array(ours[name].read(), theirs.tensor(name), name)
            file, short = theirs.place(name)
            assert file.by_name[short].type == ours[name].dtype
        loaded = ours.values(as_="numpy")
        for part in ours.parts:
            assert_same(loaded[part], theirs.value(part), part)


@pytest.fixture(scope="module")
def packed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run as a mirror has it that asks for packed files."""
    place = tmp_path_factory.mktemp("packed") / "run"
    source, target = LocalStore(root), LocalStore(place)
    copy_beside(source, target)
    for key in source.names("checkpoints"):
        copy_checkpoint(source, target, key, pack=Pack())
    return place


def test_packed_files_hold_the_same(root: Path, packed: Path) -> None:
    """Decoded by the page alone, bit for bit the plain files, of all kinds of elements."""
    files = sorted(packed.glob("data/*/*"))
    assert files
    assert all(f.name.endswith(".safetensors.zst") for f in files)
    for file in files:
        assert unpack(file.read_bytes()) == (root / file.relative_to(packed)).with_suffix("").read_bytes()
    for step, plain in ((s, SpecCheckpoint(SpecRun(root), s)) for s in SpecRun(root).manifest_keys()):
        theirs = SpecCheckpoint(SpecRun(packed), step)
        for part in plain.parts:
            assert_same(plain.value(part), theirs.value(part), part)


def test_packed_files_have_what_the_page_speaks_of(packed: Path) -> None:
    """Frames and raw planes, turned and not, of every width; else nothing was compared."""
    found: set[tuple[int, bool, str]] = set()
    for file in packed.glob("data/*/*.zst"):
        raw = file.read_bytes()
        for chunk in decode_tail(raw[len(raw) - declared_tail_bytes(raw, file.name) :], file.name).chunks:
            kinds = {"frame" if f else "raw" for f in chunk.frames}
            found.add((chunk.kind.width, chunk.kind.turned, " and ".join(sorted(kinds))))
    assert {(4, True, "frame and raw"), (8, False, "frame and raw"), (8, True, "frame and raw")} <= found, (
        found
    )
    assert {width for width, _, _ in found} == {1, 2, 4, 8}
    assert any(kinds == "raw" for _, _, kinds in found)


def test_what_a_manifest_says_is_the_same(root: Path) -> None:
    run, mine = holdfast.Run(root), SpecRun(root)
    assert mine.identity["run"] == run.id
    for step in run.steps:
        ours, theirs = run[step], mine.manifest(step)
        assert tuple(theirs["clock"]) == tuple(getattr(ours.clock, n) for n in ours.clock.__slots__)
        assert_same(ours.metrics, {k: float(v) for k, v in theirs["metrics"].items()}, "metrics")
        assert tuple(theirs["reasons"]) == ours.reasons
        assert theirs["environment"] == ours.environment
    assert {n: t["step"] for n, t in mine.tags().items()} == run.tags
    assert "best" in run.tags
    assert mine.tags()["best"]["automatic"]
    assert mine.holder()["released"]


def test_what_is_in_the_trash_is_the_same(root: Path) -> None:
    ours, theirs = holdfast.Run(root).trash(), SpecRun(root).trash()
    assert ours
    assert [(d.step, d.attempt) for d in ours] == sorted(
        (m["step"], m["attempt"]) for _, m in theirs.values()
    )
    assert {d.time for d in ours} == {document["deleted"] for document, _ in theirs.values()}
    assert {d.reasons for d in ours} == {tuple(document["reasons"]) for document, _ in theirs.values()}
    assert all(document["key"].startswith("checkpoints/") for document, _ in theirs.values())


def test_the_log_is_the_same(root: Path) -> None:
    run, mine = holdfast.Run(root), SpecRun(root)
    ours = [type(e).__struct_config__.tag for e in run.events()]
    assert [e["event"] for e in mine.timeline()] == ours
    assert {"started", "resumed", "observed", "saved", "removed"} <= set(ours)
    observed = [e for e in mine.timeline() if e["event"] == "observed" and e["attempt"] is None]
    seen = [(e["clock"][0], float(v)) for e in observed for m, v in e["metrics"].items() if m == "loss"]
    assert seen == [(o.clock.step, o.value) for o in run.observations() if o.metric == "loss"]
    assert [s for s, _ in seen] == list(range(1, 13))


def test_the_run_has_what_the_page_speaks_of(root: Path) -> None:
    """The comparison above is worth something only if the run is not too simple."""
    mine = SpecRun(root)
    newest = SpecCheckpoint(mine, 12)
    assert mine.manifest_keys()[12].endswith("-0001.json")
    assert newest.aliases
    assert len(newest.parts["model"]["files"]) == 2, "an unchanged tensor is referred to"
    assert newest.parts["ü ber"]["files"][0]["key"].endswith("/part-5.safetensors")
    assert list((root / "trash").iterdir())
    file, _ = newest.place("tiny/t0001")
    assert len(file.tensors) == 400
    assert len(file.blocks) == 1
    assert newest.place("model/pairs")[0].by_name["pairs"].type == "complex128"
    assert b'"t0001":{"$t":"n"}' in tree_of(root, "tiny")
    assert b"$tensor" in tree_of(root, "nested"), "a tied tensor, and one under a key that no name is made of"
    assert newest.place("model/flipped")[0].by_name["flipped"].stride == [1, 4]


def tree_of(root: Path, part: str) -> bytes:
    return bytes(holdfast.open(root, 12).manifest.parts[part].tree)


@pytest.mark.parametrize(
    "pattern",
    [
        "run.json",
        "checkpoints/*12-0001.json",
        "data/*12-*/model.safetensors",
        "tags/best.json",
        "log/g*1-*.jsonl",
    ],
)
def test_both_refuse_any_changed_byte(root: Path, tmp_path: Path, pattern: str) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(root, damaged)
    victim = sorted(damaged.glob(pattern))[-1]
    sound = victim.read_bytes()
    places = {0, len(sound) // 3, len(sound) - 40, len(sound) - 1}
    for at in places:
        victim.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        if pattern.startswith("log") and at == len(sound) - 1:
            continue  # without its newline the last line counts as cut off
        with pytest.raises((Refused, ValueError)):
            read_all_by_spec(damaged)
        with pytest.raises(HoldfastError):
            read_all(damaged)


def test_both_refuse_any_changed_byte_of_a_packed_file(packed: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "run"
    shutil.copytree(packed, damaged)
    victim = sorted(damaged.glob("data/*12-*/model.safetensors.zst"))[-1]
    sound = victim.read_bytes()
    for at in {0, 9, 17, 25, 33, 41, len(sound) // 2, len(sound) - 40, len(sound) - 1}:
        victim.write_bytes(sound[:at] + bytes([sound[at] ^ 1]) + sound[at + 1 :])
        with pytest.raises((Refused, ValueError)):
            read_all_by_spec(damaged)
        with pytest.raises(HoldfastError):
            read_all(damaged)


def read_all_by_spec(root: Path) -> None:
    run = SpecRun(root)
    run.tags()
    run.events()
    checkpoint = SpecCheckpoint(run, 12)
    for part in checkpoint.parts:
        checkpoint.value(part)


def read_all(root: Path) -> None:
    run = holdfast.Run(root)
    for problem in run.verify_beside():  # tags and log are reported by name; a run goes on without them
        raise HoldfastError(problem.message)
    run[12].values()


def test_the_highest_ordinal_is_the_checkpoint(tmp_path: Path) -> None:
    """A crash between the commit of a later state and the removal of the one before leaves both."""
    holdfast.save(tmp_path, {"x": np.zeros(3)}, step=7)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    holdfast.save(tmp_path, {"x": np.ones(3)}, step=7)
    for path, content in before.items():
        if path.parts[-2] == "checkpoints" or "data" in path.parts:
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
    assert SpecCheckpoint(SpecRun(tmp_path), 7).tensor("x")[0] == 1
    assert holdfast.open(tmp_path, 7)["x"][0] == 1


def test_the_first_listed_file_has_the_newest_version(tmp_path: Path) -> None:
    """Two states of a step: the attempt ids in the files' names are random and say nothing of their age."""
    for trial in range(20):
        place = tmp_path / str(trial)
        frozen, moved = np.arange(9000.0), np.zeros(9000)
        holdfast.save(place, {"m": {"frozen": frozen, "moved": moved}}, step=1)
        holdfast.save(place, {"m": {"frozen": frozen, "moved": moved + 1}}, step=1)
        holdfast.save(place, {"m": {"frozen": frozen, "moved": moved + 1}}, step=2)
        assert SpecCheckpoint(SpecRun(place), 2).tensor("m/moved")[0] == 1
        assert holdfast.open(place, 2)["m/moved"][0] == 1


def test_the_safetensors_library_reads_the_data_files(root: Path) -> None:
    safetensors = pytest.importorskip("safetensors")
    mine = SpecCheckpoint(SpecRun(root), 12)
    for name in ("model/frozen", "big", "tiny/t0013"):
        file, short = mine.place(name)
        read = dict(safetensors.deserialize(file.raw))
        assert set(read) == set(file.by_name)
        assert bytes(read[short]["data"]) == mine.tensor(name).tobytes()


sizes = st.one_of(
    st.integers(0, 64), st.integers(65_500, 65_600), st.integers(0, 1 << 21), st.integers(1 << 26, 1 << 28)
)


@example([(32_768, 1, True)] * 33, 2)  # a group that is exactly full
@example([(65_535, 1, True), (1, 1, True), (65_536, 1, True), (1, 1, False)], 2)
@example([((1 << 26), 3, True), ((1 << 26) + 1, 3, True), ((1 << 25) + 1, 5, True)], 1)
@example([((1 << 22), 3, True), ((1 << 22) + 1, 3, True), ((1 << 21) + 1, 5, True)], 2)
@given(st.lists(st.tuples(sizes, st.integers(1, 9), st.booleans()), max_size=60), st.sampled_from([1, 2]))
@settings(max_examples=300, deadline=None)
def test_blocks_are_cut_by_the_rule(found: list[tuple[int, int, bool]], version: int) -> None:
    tensors = [(row * rows, [rows, row] if shaped else [row * rows]) for row, rows, shaped in found]
    tensors = [(n, [] if n == 1 else shape) for n, shape in tensors]
    ours = [(b.start, b.end) for b in cut_blocks([(n, tuple(shape)) for n, shape in tensors], version)]
    assert cut(tensors, version) == ours


def test_a_table_of_which_rows_changed_is_put_together(tmp_path: Path) -> None:
    table = np.arange(3_000_000, dtype=np.float32).reshape(-1, 1000)
    kept = []
    for step, rows in enumerate(([], [0, 2999], [1500, 1501], [0])):
        table[rows] = -step
        holdfast.save(tmp_path, {"m": {"table": table, "b": np.ones(3)}}, step=step)
        kept.append(table.copy())
    for step, expected in enumerate(kept):
        found = SpecCheckpoint(SpecRun(tmp_path), step)
        assert np.array_equal(found.tensor("m/table"), expected)
    assert len(found.places("m/table")[0]) == 3, "the first is not needed any more"
    assert [f.by_name["table"].rows for f in found.places("m/table")[0]][2] == [[0, 1048], [2096, 3000]]


# ---- the page names everything there is -------------------------------------------------------------


def table_column(text: str, column: int = 0) -> set[str]:
    """The words in backticks in one column of the tables of a section."""
    found: set[str] = set()
    for line in text.splitlines():
        if line.startswith("|"):
            cells = line.strip("|").split("|")
            if column < len(cells):
                found |= set(re.findall(r"`([^`]+)`", cells[column]))
    return found


def test_tensors_that_follow_from_others_are_made_alike(tmp_path: Path) -> None:
    master = torch.randn(200, 300)
    master[0, :4] = torch.tensor([math.nan, math.inf, -math.inf, 1 + 2**-8])
    weight = master.bfloat16()
    weight.view(torch.int16)[0, 0] = 0x7FC0
    state = {
        "m": {"w": weight, "tied": weight, "turned": weight.t().contiguous().t()},
        "o": {"master": master},
    }
    with Checkpointer(tmp_path, state, derive=True, save=every(steps=1)) as ckpt:
        for _ in ckpt.steps(1):
            pass
    theirs = SpecCheckpoint(SpecRun(tmp_path), 1)
    assert set(theirs.derived) == {"m/w", "m/turned"}
    mine = holdfast.open(tmp_path)
    for name in ("m/w", "m/tied", "m/turned"):
        assert np.array_equal(theirs.tensor(name), mine[name].read().view(np.uint16))
    path = tmp_path / SpecRun(tmp_path).manifest_keys()[1]
    path.write_bytes(path.read_bytes().replace(b'"format":2', b'"format":1'))
    with pytest.raises(Refused):
        SpecCheckpoint(SpecRun(tmp_path), 1)


def test_the_tables_of_members_are_complete() -> None:
    second, third = sections(SPEC, 2), sections(SPEC, 3)
    manifest = table_column(second["The manifest"].split("### Parts")[0])
    assert manifest == set(Manifest.__struct_fields__) == MANIFEST_MEMBERS
    assert table_column(third["Parts"]) == {*Part.__struct_fields__, *FileEntry.__struct_fields__}
    assert table_column(third["Derived tensors"]) == set(Derived.__struct_fields__)
    kinds = {
        e.__struct_config__.tag: e.__struct_fields__
        for e in vars(events).values()
        if isinstance(e, type) and e.__module__ == events.__name__ and hasattr(e, "__struct_fields__")
    }
    rows = {
        row.split("|")[1].strip(" `"): table_column(row, 1)
        for row in second["The run log"].splitlines()
        if row.startswith("| `")
    }
    rows.pop("event", None)
    assert rows == {kind: set(fields) for kind, fields in kinds.items()}


def test_the_table_of_value_types_is_complete() -> None:
    assert table_column(sections(SPEC, 2)["Values"]) == {*values._DECODERS}


def test_the_table_of_element_types_is_complete() -> None:
    assert TYPES.keys() == DTYPES.keys()
    for name, (size, carrier, pairs, _) in TYPES.items():
        d = DTYPES[name]
        assert (d.itemsize, d.carrier, d.carrier_per_element) == (size, carrier, pairs)
    table = sections(SPEC, 3)["Element types"]
    assert table_column(table, 0) | table_column(table, 4) >= DTYPES.keys()
    assert table_column(table, 2) | table_column(table, 6) >= CARRIERS.keys()


# ---- comparing --------------------------------------------------------------------------------------


def assert_same_array(ours: Any, theirs: Any, where: str) -> None:
    assert ours.shape == theirs.shape, where
    assert ours.tobytes() == theirs.tobytes(), where


def assert_same(ours: Any, theirs: Any, where: str) -> None:
    """Compare a value that holdfast gave back with what the spec's reader made of it."""
    if isinstance(ours, np.ndarray):
        assert_same_array(ours, theirs, where)
    elif isinstance(ours, Record):
        assert theirs[0] == ours.type, where
    elif isinstance(ours, float):
        assert type(theirs) is float, where
        assert np.float64(ours).tobytes() == np.float64(theirs).tobytes(), where
    elif isinstance(ours, dict):
        assert type(ours) is type(theirs), where
        assert list(ours) == list(theirs), where
        for key in ours:
            assert_same(ours[key], theirs[key], f"{where}/{key}")
    elif isinstance(ours, (list, tuple, collections.deque)):
        assert type(ours) is type(theirs), where
        assert len(ours) == len(theirs), where
        for i, (a, b) in enumerate(zip(ours, theirs, strict=True)):
            assert_same(a, b, f"{where}/{i}")
        assert getattr(ours, "maxlen", None) == getattr(theirs, "maxlen", None), where
    else:
        assert type(ours) is type(theirs), where
        assert ours == theirs, where
        if isinstance(ours, (datetime.datetime, datetime.time)):
            assert repr(ours) == repr(theirs), where


def test_a_checkpoint_of_several_ranks_is_what_each_of_them_had(tmp_path: Path) -> None:
    had: dict[tuple[int, int], dict[str, Any]] = {}

    def launch(step: int, replicated: list[str]) -> None:
        def body(rank: int) -> None:
            state: dict[str, Any] = {
                "m": {"w": np.zeros((300, 40)), "tied": None, "rank": rank},
                "own": {"u": np.full(20_000, 7.0 + rank), "small": np.arange(3) + rank},
            }
            state["m"]["tied"] = state["m"]["w"]
            if rank == 1:
                state["only"] = {"z": np.ones(3)}
            how: dict[str, Any] = {"replicated": replicated, "save": every(steps=1), "writer": "thread"}
            with Checkpointer(str(tmp_path / "run"), state, ranks=(rank, 2, 30), **how) as ckpt:
                for n in ckpt.steps(step):
                    state["m"]["w"][n % 300] = n + 1  # one row, so that only a part of it is written
            had[step, rank] = state

        returned(side_by_side(2, body))

    launch(1, [])
    launch(2, ["m/**"])  # what each had for itself is shared now
    launch(4, ["m/**"])
    run = SpecRun(tmp_path / "run")
    store = open_store(str(tmp_path / "run"))
    for (step, rank), state in had.items():
        theirs = SpecCheckpoint(run, step, rank)
        view = view_of(store, holdfast.open(str(tmp_path / "run"), step).manifest, rank, 2)
        assert sorted(theirs.state) == sorted([*state, "rng"]) == sorted(view.manifest.parts)
        for part, held in state.items():
            found = theirs.value(part)
            assert set(found) == set(held)
            for name, value in held.items():
                assert np.array_equal(found[name], value), (step, rank, part, name)
    assert SpecCheckpoint(run, 4).state == ["m", "own", "rng"]
