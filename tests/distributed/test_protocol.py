"""Ranks as real processes without torch: whoever is killed whenever, nobody hangs and the old checkpoint stays; what
differs between ranks is decided alike."""

from __future__ import annotations

import signal
from pathlib import Path

import numpy as np
import pytest

import holdfast
from distributed.launching import LONE, each, results


def order(run: Path, name: str, **more: object) -> dict[str, object]:
    return {"run": str(run), "steps": 9, "out": str(run.parent), "name": name, **more}


def test_ranks_resume_and_each_has_its_own(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert [code for code, _ in each(3, order(run, "first", steps=5), LONE)] == [0, 0, 0]
    assert [code for code, _ in each(3, order(run, "then"), LONE)] == [0, 0, 0]
    assert [code for code, _ in each(3, order(tmp_path / "whole", "whole"), LONE)] == [0, 0, 0]
    for then, whole in zip(results(tmp_path, "then", 3), results(tmp_path, "whole", 3), strict=True):
        assert then["done"] == [5, 6, 7, 8]
        assert (then["w"], then["own"]) == (whole["w"], whole["own"])
    latest = holdfast.Run(str(run)).latest
    assert list(latest.verify()) == []
    assert latest.manifest.world_size == 3
    assert not list((run / "ranks").rglob("*-seen/*.json"))[1:]  # what was heard is freed


@pytest.mark.parametrize("writer", ["process", "thread"])
@pytest.mark.parametrize(
    ("point", "dead"),
    [
        ("snapshot", 0), ("snapshot", 1), ("begun", 0), ("begun-follower", 1), ("writing", 0), ("writing", 1),
        ("record", 0), ("record", 1), ("gathering", 0), ("whole", 0), ("commit", 0), ("committed", 0), ("done", 1),
    ],
)  # fmt: skip
def test_a_rank_killed_in_any_phase_is_no_hang_and_no_half(
    tmp_path: Path, point: str, dead: int, writer: str
) -> None:
    if writer == "process" and point in ("writing", "record", "gathering", "whole", "commit", "committed"):
        pytest.skip("these lines run in the writer process, which outlives its trainer")
    run = tmp_path / "run"
    ended = each(2, order(run, "x", kill=[dead], point=point, at=4, seconds=60, writer=writer), LONE)
    assert ended[dead][0] == -signal.SIGKILL
    alive, words = ended[1 - dead]
    step = holdfast.Run(str(run)).latest.step
    assert step in (2, 4)
    assert list(holdfast.Run(str(run)).latest.verify()) == []
    if alive != 0:
        assert f"rank {dead}" in words, words
    else:  # what it had to do with the others was done
        assert step == 4
    # And the next launch goes on without anybody's help.
    assert [code for code, _ in each(2, order(run, "again"), LONE)] == [0, 0]
    assert [r["step"] for r in results(tmp_path, "again", 2)] == [9, 9]
    assert results(tmp_path, "again", 2)[0]["done"][0] == step


@pytest.mark.slow
@pytest.mark.parametrize(("point", "dead"), [("writing", 1), ("gathering", 0), ("commit", 0), ("done", 1)])
def test_a_rank_killed_in_any_phase_under_a_process_group(tmp_path: Path, point: str, dead: int) -> None:
    pytest.importorskip("torch.distributed")
    run = tmp_path / "run"
    killed = order(run, "x", kill=[dead], point=point, at=4, seconds=60, writer="thread", gloo=True)
    ended = each(2, killed, LONE)
    assert ended[dead][0] == -signal.SIGKILL
    alive, words = ended[1 - dead]
    assert alive == 0 or f"rank {dead}" in words, words
    step = holdfast.Run(str(run)).latest.step
    assert step in (2, 4)
    assert list(holdfast.Run(str(run)).latest.verify()) == []
    assert [code for code, _ in each(2, order(run, "again", gloo=True), LONE)] == [0, 0]
    assert results(tmp_path, "again", 2)[0]["done"][0] == step


def test_all_trainers_are_killed_and_their_writers_finish(tmp_path: Path) -> None:
    run = tmp_path / "run"
    ended = each(2, order(run, "x", kill=[0, 1], point="done-both", at=4, writer="process"), LONE)
    assert [code for code, _ in ended] == [-signal.SIGKILL] * 2
    assert [code for code, _ in each(2, order(run, "again"), LONE)] == [0, 0]
    assert results(tmp_path, "again", 2)[0]["done"][0] == 4


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
def test_a_signal_to_one_rank_makes_all_save_at_one_step(tmp_path: Path, number: str) -> None:
    run = tmp_path / "run"
    ended = each(2, order(run, "x", steps=60, save="none", signal=[1, 5], number=number, slow=0.02), LONE)
    steps = holdfast.Run(str(run)).steps
    if number == "SIGTERM":
        assert [code for code, _ in ended] == [143, 143]
        assert "another rank got it" in ended[0][1]
        assert len(steps) == 1
        assert 5 < steps[0] < 60
    else:
        assert [code for code, _ in ended] == [0, 0]
        assert len(steps) == 2
        assert steps[-1] == 60
    manifest = holdfast.Run(str(run))[steps[0]].manifest
    assert any("signal" in reason for reason in manifest.reasons)
    assert list(holdfast.Run(str(run)).latest.verify()) == []


def test_rank_0s_metric_decides_for_all(tmp_path: Path) -> None:
    losses = [5.0, 4.0, 4.5, 3.0, 3.5, 3.6, 3.7, 3.8, 3.9]
    ended = each(2, order(tmp_path / "run", "x", save="best", losses=losses, stop=True), LONE)
    assert [code for code, _ in ended] == [0, 0]
    run = holdfast.Run(str(tmp_path / "run"))
    assert run.steps == [2, 4, 7]  # the two newest that were better, and the end
    assert run.best("loss", mode="min").step == 4
    for rank in results(tmp_path, "x", 2):
        assert rank["step"] == 7
        assert "3 of 3" in rank["stopped"]


def test_a_rule_by_time_saves_the_same_steps_everywhere(tmp_path: Path) -> None:
    ended = each(2, order(tmp_path / "run", "x", steps=40, save="time", slow=0.02), LONE)
    assert [code for code, _ in ended] == [0, 0]
    run = holdfast.Run(str(tmp_path / "run"))
    assert len(run.steps) == 3  # keep=last(3)
    assert all(c.manifest.world_size == 2 for c in run)


def test_save_in_the_loop_is_called_on_every_rank(tmp_path: Path) -> None:
    assert [c for c, _ in each(2, order(tmp_path / "run", "x", save="none", asks=3), LONE)] == [0, 0]
    assert holdfast.Run(str(tmp_path / "run")).tags["asked"] == 4


def test_a_rank_that_has_diverged_is_named(tmp_path: Path) -> None:
    ended = each(3, order(tmp_path / "run", "x", check=True, diverge=[2, 4]), LONE)
    assert all(code != 0 for code, _ in ended)
    assert "step 6: same/w: rank 2 holds other values than rank 0" in ended[0][1]
    assert holdfast.Run(str(tmp_path / "run")).latest.step == 4


@pytest.mark.parametrize("full", [0, 1])
def test_a_full_disk_of_one_rank_fails_the_save_on_all_and_leaves_nothing(tmp_path: Path, full: int) -> None:
    run = tmp_path / "run"
    ended = each(2, order(run, "x", full=full, at=4, writer="thread"), LONE)
    assert all(code > 0 for code, _ in ended)
    assert all("no space left on device" in words for _, words in ended)
    assert f"rank {full}" in ended[1 - full][1]
    steps = holdfast.Run(str(run)).steps
    assert steps in ([2], [2, 6])  # what was snapshotted by then may be written before the failure is raised
    left = {path.name[:12] for path in (run / "data").iterdir() if any(path.iterdir())}
    assert left == {f"{step:012d}" for step in steps}
    assert [code for code, _ in each(2, order(run, "again"), LONE)] == [0, 0]


@pytest.mark.parametrize(
    ("part", "broadcast", "finds"),
    [("~1", False, "rank 1: "), ("~1", True, "rank 1: "), ("rng", False, "data/")],
)
def test_all_fall_back_together_when_one_rank_finds_damage(
    tmp_path: Path, part: str, broadcast: bool, finds: str
) -> None:
    """Of rank 1, or of rank 0, which has told the others by then what to restore."""
    if broadcast:  # where a rank that fails must not leave the others in a collective
        pytest.importorskip("torch.distributed")
    run = tmp_path / "run"
    assert [code for code, _ in each(2, order(run, "first", steps=6), LONE)] == [0, 0]
    newest = holdfast.Run(str(run)).latest
    files = newest.manifest.parts[part].files  # of a rank's own first values, then tensors
    path = run / files[-1 if broadcast else 0].key
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    ended = each(2, order(run, "then", broadcast=broadcast), LONE)
    assert [code for code, _ in ended] == [0, 0], ended
    there = results(tmp_path, "then", 2)
    assert [r["done"][0] for r in there] == [4, 4]
    assert any(f"passed over step 6: {finds}" in note for note in there[0]["notes"])


def test_another_number_of_ranks_takes_it_up(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert [code for code, _ in each(2, order(run, "first", steps=5), LONE)] == [0, 0]
    assert [code for code, _ in each(3, order(run, "then", steps=5), LONE)] == [0, 0, 0]
    first, then = results(tmp_path, "first", 2), results(tmp_path, "then", 3)
    assert {r["w"] for r in then} == {first[0]["w"]}
    assert [r["own"] for r in then] == [first[0]["own"]] * 3
    assert all("saved by 2 ranks and restored by 3" in r["notes"][0] for r in then)


def test_what_did_not_change_is_not_written_again(tmp_path: Path) -> None:
    big = np.arange(200_000, dtype=np.float64).reshape(1000, 200)

    def save(step: int, world: int) -> None:
        import threading

        run = str(tmp_path / "run")
        errors: list[BaseException] = []

        def rank(r: int) -> None:
            try:
                state = {"base": {"w": big.copy()}, "head": {"x": np.full(4, step)}}
                with holdfast.Checkpointer(
                    run,
                    state,
                    ranks=(r, world, 30),
                    replicated=["**"],
                    writer="thread",
                    save=holdfast.every(steps=1),
                ) as ckpt:
                    for _ in ckpt.steps(step):
                        state["head"]["x"] += 1
            except BaseException as e:  # noqa: BLE001
                errors.append(e)

        ranks = [threading.Thread(target=rank, args=(r,)) for r in range(world)]
        [r.start() for r in ranks]
        [r.join() for r in ranks]
        assert not errors, errors

    save(2, 2)
    save(3, 2)  # a new launch knows what it holds too
    new = [c.manifest.new_bytes for c in holdfast.Run(str(tmp_path / "run"))]
    assert new[0] > big.nbytes
    assert all(n < big.nbytes / 10 for n in new[1:])
    for checkpoint in holdfast.Run(str(tmp_path / "run")):
        assert list(checkpoint.verify()) == []
        assert np.array_equal(np.asarray(checkpoint.values(as_="numpy")["base"]["w"]), big)
