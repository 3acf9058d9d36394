"""What several ranks cost does not grow where it need not: counted in the simulator, which runs the real code of all ranks
against a model of a store. No time is judged here."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

pytest.importorskip("greenlet")
sys.path.insert(0, str(Path(__file__).parents[2]))

from bench.scale.hub import Account
from bench.scale.restore import generators_of, restored
from bench.scale.run import Launch, Phase
from bench.scale.services import PARALLEL_FS, S3, Service
from bench.scale.state import Held, State

from holdfast.catalog.verify import verify_manifest
from holdfast.core.errors import MissingObject
from holdfast.distributed import meeting
from holdfast.distributed.ownership import divide
from holdfast.distributed.ranks import Ranks
from holdfast.distributed.rollcall import AGAIN_SECONDS, hello_key
from holdfast.distributed.speech import put_word
from holdfast.distributed.words import Hello, Process
from holdfast.state.tensors import TensorSpec
from holdfast.stores.base import ObjectInfo

SMALL = 4 << 10
DIGITS = 24  # bytes by which a word may be longer that speaks of larger numbers
SOME = 5  # a rank that is neither first nor last


def launched(
    world: int, parameters: int, *, share_bytes: int = SMALL, service: Service = S3
) -> tuple[Launch, list[Phase]]:
    """Let ranks meet and save twice; return the launch and its phases: meeting, first and second save."""
    launch = Launch(State(world, parameters, share_bytes), service, count_cpu=False)
    phases = [launch.open()]
    launch.plan()
    return launch, [*phases, launch.save(1), launch.save(2)]


@pytest.fixture(scope="module")
def few() -> tuple[Launch, list[Phase]]:
    return launched(8, 66)


@pytest.fixture(scope="module")
def many() -> tuple[Launch, list[Phase]]:
    return launched(64, 66)


def alike(one: Account, other: Account) -> None:
    """The same requests, and bytes but for a few digits."""
    assert one.answered == other.answered
    for bytes_of in ("written_bytes", "word_bytes", "read_bytes"):
        assert getattr(one, bytes_of) == pytest.approx(getattr(other, bytes_of), abs=DIGITS), bytes_of


@pytest.mark.parametrize("save", [1, 2])
def test_a_rank_does_no_more_among_64_than_among_8(
    few: tuple[Launch, list[Phase]], many: tuple[Launch, list[Phase]], save: int
) -> None:
    one, other = few[1][save].accounts[SOME], many[1][save].accounts[SOME]
    alike(one, other)
    assert one.answered == {"get": 2, "put": 4}  # what rank 0 saw and said; three files and a record
    assert one.word_bytes < 1_000


def test_all_ranks_but_the_first_do_the_same(many: tuple[Launch, list[Phase]]) -> None:
    for account in many[1][2].accounts[2:]:
        alike(account, many[1][2].accounts[1])


def test_the_first_rank_reads_one_record_of_each(
    few: tuple[Launch, list[Phase]], many: tuple[Launch, list[Phase]]
) -> None:
    assert few[1][1].accounts[0].requests["get"] == 7
    assert many[1][1].accounts[0].requests["get"] == 63
    others = [
        {k: n for k, n in phases[1].accounts[0].answered.items() if k != "get"} for _, phases in (few, many)
    ]
    assert others[0] == others[1]


def test_what_the_first_rank_does_does_not_grow_with_tensors() -> None:
    _, some = launched(8, 20)
    _, more = launched(8, 400)
    for phase in (1, 2):
        one, other = some[phase].accounts[0], more[phase].accounts[0]
        assert one.answered == other.answered
        assert one.word_bytes == other.word_bytes
        assert one.read_bytes == pytest.approx(other.read_bytes, abs=8 * DIGITS)


def test_a_manifest_grows_by_a_few_hundred_bytes_a_rank(
    few: tuple[Launch, list[Phase]], many: tuple[Launch, list[Phase]]
) -> None:
    sizes = [launch.store.info(launch.base.key).size for launch, _ in (few, many) if launch.base is not None]
    assert (sizes[1] - sizes[0]) / 56 < 700


@pytest.mark.parametrize("service", [S3, PARALLEL_FS], ids=lambda service: service.name)
def test_who_comes_reads_of_256_ranks_at_most(service: Service) -> None:
    read = []
    for world in (300, 900):
        launch = Launch(State(world, 1, SMALL), service, count_cpu=False)
        read.append(launch.open().accounts[SOME])
        assert all(there.generation == 1 for there in launch.meetings)
    assert read[0].answered == read[1].answered
    assert 256 * 24 < read[1].read_bytes < 256 * 32
    assert read[1].read_bytes == pytest.approx(read[0].read_bytes, abs=DIGITS)


class Coarse(Launch):
    """A launch on a store whose listings do not tell when something was written."""

    def __init__(self, state: State) -> None:
        super().__init__(state, S3, count_cpu=False)
        plain = self.store.list
        self.store.list = lambda prefix: [ObjectInfo(o.key, 400, 0.0) for o in plain(prefix)]  # type: ignore[method-assign]


@pytest.mark.parametrize(("kind", "within"), [(Launch, AGAIN_SECONDS), (Coarse, 2 * AGAIN_SECONDS)])
def test_a_word_of_a_launch_that_was_given_up_keeps_nobody_away(kind: type[Launch], within: float) -> None:
    state = State(8, 1, SMALL)
    launch = kind(state) if kind is Coarse else kind(state, S3, count_cpu=False)
    put_word(launch.store, hello_key(SOME), Hello(SOME, 8, "an older one", Process(1, "", "")))
    late = launch.meetings[SOME]
    join = late.join

    def later() -> object:
        launch.hub.sleep(3.0)
        return join()

    late.join = later  # type: ignore[method-assign, assignment]
    phase = launch.open()
    assert all(there.generation == 1 for there in launch.meetings)
    assert phase.seconds < within


def test_who_waits_looks_less_often_the_more_there_are() -> None:
    for world, least in ((8, 0.5), (16_384, 6.0)):
        pauses = list(itertools.islice(meeting._pauses(Ranks(world - 1, world)), 40))
        assert least <= max(pauses) <= 2 * least
        assert world / min(max(p, 0.5) for p in pauses[8:]) <= 3_000


# ---- restoring ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("world", "then"), [(8, 8), (8, 6), (8, 11), (8, 1)])
def test_what_was_saved_is_restored_to_the_byte(world: int, then: int) -> None:
    launch = Launch(State(world, 3, 96 << 10, real=True), S3, count_cpu=False)
    launch.open()
    launch.plan()
    launch.save(1)
    for save in (2, 3):  # of the second nothing has changed, and it refers to the first
        for rank in range(then):
            _, found = restored(launch, rank, then)
            for spec in launch.state.specs(rank, then):
                assert spec.shard is not None
                row = spec.nbytes // spec.shape[0]
                first = spec.shard.box[0][0] * row
                assert (
                    bytes(found[spec.name].data)
                    == launch.state.content(spec.name)[first : first + spec.nbytes]
                )
            if then == world:
                held = Held(launch.state, rank)
                assert generators_of(found) == held.own_bytes
        launch.save(save)


def test_a_committed_save_verifies(many: tuple[Launch, list[Phase]]) -> None:
    launch, _ = many
    assert launch.manifest is not None
    assert launch.manifest.world_size == 64
    assert list(verify_manifest(launch.store, launch.manifest)) == []


def test_a_restore_opens_the_files_that_hold_what_it_wants(
    few: tuple[Launch, list[Phase]], many: tuple[Launch, list[Phase]]
) -> None:
    for others, most in ((0, 8), (2, 16)):
        one = restored(few[0], SOME, 8 - others)[0].requests
        other = restored(many[0], SOME, 64 - 8 * others)[0].requests
        assert one["head"] == other["head"] <= most
        assert one["get"] == other["get"]


def test_what_did_not_change_is_found_in_the_same_few_files() -> None:
    launch = Launch(State(64, 2, 96 << 10, real=True), S3, count_cpu=False)
    launch.open()
    launch.plan()
    launch.save(1)
    fresh = restored(launch, SOME, 64)[0].requests, restored(launch, SOME, 48)[0].requests
    launch.save(2)
    launch.save(3)
    assert launch.manifest is not None
    assert {file.key[:17] for file in launch.manifest.parts["model"].files} == {"data/000000000001"}
    assert (restored(launch, SOME, 64)[0].requests, restored(launch, SOME, 48)[0].requests) == fresh


def test_another_ranks_lost_file_harms_only_who_wants_of_it() -> None:
    launch, _ = launched(8, 2)
    launch.store.delete([k for k in launch.store.names("data") if "00000002-" in k and "-00006-of-" in k])
    restored(launch, SOME, 8)
    for rank, world in ((6, 8), (5, 6)):
        with pytest.raises(MissingObject, match="-00006-of-00008"):
            restored(launch, rank, world)


# ---- what is the same everywhere ------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 16, 200])
def test_what_all_hold_is_written_once_by_no_more_than_is_worth_it(world: int) -> None:
    specs = [TensorSpec(f"model/{i}", "float32", (4096, 4096)) for i in range(3)]
    specs += [TensorSpec(f"model/small{i}", "float32", (16,)) for i in range(5)]
    same = {spec.name: ("all", range(world)) for spec in specs}
    rows: dict[str, list[tuple[int, int]]] = {spec.name: [] for spec in specs}
    writers = 0
    for rank in range(world):
        tensors = [t for sheet in divide(specs, same, ["model"], rank).sheets.values() for t in sheet]
        writers += bool(tensors)
        for t in tensors:
            first = t.box[0][0] if t.box is not None else 0
            rows[f"model/{t.name}"].append((first, first + t.shape[0]))
            assert t.box is None or t.nbytes >= 8 << 20 or first + t.shape[0] == 4096
    for spec in specs:
        found = sorted(rows[spec.name])
        assert found[0][0] == 0
        assert found[-1][1] == spec.shape[0]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(found))
    assert min(world, 8) <= writers <= 16
