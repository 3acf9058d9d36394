"""plan: what it says, what it takes it from, what it draws, and what it refuses."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

import holdfast
from holdfast import Checkpointer, auto, every, last
from holdfast.analysis.costs import measure_run, measure_store
from holdfast.analysis.forecast import Given, assume, parse_price, price_of
from holdfast.core.errors import PolicyError
from holdfast.policies.optimum import best_interval
from holdfast.policies.places import Price
from holdfast.stores import MemoryStore
from holdfast.testing import MockClock

BASIC = ("plan", "--state", "10GB", "--step-seconds", "1", "--hours", "24", "--held", "2s", "--mtbf", "12h")


def test_rule_sets_stand_side_by_side(cli) -> None:
    result = cli(*BASIC, "--save", "every(hours=1)", "--save", "every(hours=4)", "--keep", "last(3)")
    assert result.code == 0, result.err
    assert "A  save every(hours=1)  keep last(3)" in result.out
    assert "B  save every(hours=4)  keep last(3)" in result.out
    [saves] = [line.split() for line in result.out.splitlines() if line.startswith("saves ")]
    assert saves == ["saves", "25", "7"], "24 and 6 by the rule, and the last state"
    [most] = [line.split() for line in result.out.splitlines() if "most bytes" in line]
    assert most[2:] == ["40.0", "GB", "40.0", "GB"], "the one before goes when the new one is there"


def test_the_figures_in_json(cli) -> None:
    found = cli(
        *BASIC, "--save", "every(hours=2)", "--keep", "last(2)", "--mirror", "s3://bucket/run=last(1)",
        "--packed", "2", "--mirror-speed", "50MB", "--price", "s3=0.5/10", "--durable", "30s", "--json",
    ).json  # fmt: skip
    assert found["costs"]["held_seconds"] == 2
    assert found["optimum"]["interval_seconds"] == pytest.approx(best_interval(2, 12 * 3600, 1.0))
    [rules] = found["sets"]
    assert rules["save"] == "every(hours=2)"
    assert rules["wasted"] > found["optimum"]["wasted"]
    primary, mirror = rules["places"]
    assert (primary["end_bytes"], mirror["end_bytes"]) == (20_000_000_000, 5_000_000_000)
    assert (primary["cost"], primary["name"]) == (0, "local")
    assert mirror["cost"] == pytest.approx(
        mirror["mean_bytes"] / 1e9 * 0.5 * (24 / 730) + mirror["writes"] / 100, rel=0.01
    )
    assert mirror["lost_seconds_most"] == pytest.approx(primary["lost_seconds_most"] + 100, abs=3)


def test_without_rules_it_plans_auto(cli) -> None:
    found = cli(*BASIC, "--json").json
    [rules] = found["sets"]
    assert rules["save"] == "auto(max_overhead=0.01, mtbf='12h')"
    assert rules["interval_seconds"] == pytest.approx(found["optimum"]["interval_seconds"], rel=0.01)
    assert rules["wasted"] == pytest.approx(found["optimum"]["wasted"], rel=0.02)


def test_a_metric_that_rules_speak_of_is_made_up_and_said_to_be(cli) -> None:
    result = cli(
        *BASIC,
        "--save",
        'best("val_loss", mode="min") | every(hours=6)',
        "--keep",
        'last(1) | best("acc", mode="max", k=2)',
    )
    assert result.code == 0, result.err
    assert any(
        line.split() == ["val_loss", "gets", "better,", "noisily", "assumed"]
        for line in result.out.splitlines()
    )
    assert any(line.startswith("acc ") for line in result.out.splitlines())


@pytest.fixture
def trained(tmp_path: Path) -> Path:
    """A run whose clock we turn: steps of 10 s, each save holds it for 3 s more; a third of the state changes, and
    generators, of which there are more where torch was imported, weigh nothing beside it."""
    clock = MockClock(1_767_571_200.0)
    frozen = np.random.default_rng(0).standard_normal(400_000).astype("<f4")
    for run in range(4):
        state = {"frozen": {"w": frozen}, "model": {"w": np.zeros(200_000, np.float32)}}
        with Checkpointer(
            tmp_path / "run", state, save=every(steps=10), keep=last(3), time=clock, writer="inline"
        ) as ckpt:
            for step in ckpt.steps((run + 1) * 30):
                clock.advance(13.0 if step and step % 10 == 0 else 10.0)
                state["model"]["w"] += 1
                ckpt.log(loss=1.0)
    return tmp_path / "run"


def test_a_run_tells_its_own_costs(cli, trained: Path) -> None:
    found = measure_run(holdfast.Run(trained))
    assert found.state == holdfast.Run(trained).records()[-1].stored_bytes
    assert found.changed == pytest.approx(1 / 3, abs=0.03)
    assert found.step_seconds == pytest.approx(10.0)
    assert found.held == pytest.approx(3.0)
    assert found.load is not None
    assert 0 < found.load < 5
    assert found.mtbf == pytest.approx((120 * 10 + 11 * 3) / 3, rel=0.1), "three resumes"
    result = cli("plan", trained, "--hours", "2")
    assert result.code == 0, result.err
    assert "the run log: steps with a save against steps without" in result.out
    assert "3 resumes in" in result.out
    given = cli("plan", trained, "--hours", "2", "--state", "1GB", "--json").json
    assert {a["name"]: a["origin"] for a in given["assumptions"]}["state"] == "given"


def test_a_run_without_metrics_still_has_a_size(cli, run: Path) -> None:
    result = cli("plan", run, "--hours", "1", "--step-seconds", "2", "--json")
    assert result.code == 0, result.err
    assert {a["name"]: a["origin"] for a in result.json["assumptions"]}["state"] == "the largest checkpoint"


def test_a_store_is_measured_and_left_as_it_was(cli, tmp_path: Path) -> None:
    store = MemoryStore()
    speed = measure_store(store)
    assert store.list("") == []
    assert min(speed.latency, speed.write, speed.read) > 0
    result = cli(*BASIC, "--store", tmp_path / "there")
    assert result.code == 0, result.err
    assert "measured: the store takes" in result.out
    assert [p for p in (tmp_path / "there").rglob("*") if p.is_file()] == []


def test_what_fails_while_a_store_is_measured_leaves_nothing() -> None:
    class Full(MemoryStore):
        def read_into(self, key: str, start: int, target: memoryview) -> None:
            raise OSError("broken")

    store = Full()
    with pytest.raises(OSError, match="broken"):
        measure_store(store)
    assert store.list("") == []


def test_it_draws(cli, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    target = tmp_path / "plan.png"
    saves = [f"every(hours={n})" for n in (1, 2, 3, 4, 6)]
    rules = [x for s in saves for x in ("--save", s)]
    result = cli(*BASIC, *rules, "--mirror", "gs://other/run", "--mirror", str(tmp_path), "--png", target)
    assert result.code == 0, result.err
    raw = target.read_bytes()
    assert raw.startswith(b"\x89PNG")
    width, height = (int.from_bytes(raw[i : i + 4]) for i in (16, 20))
    assert (width, height) == (1650, 1140)
    assert cli(*BASIC, "--png", tmp_path / "no" / "where.png").code == 6


def test_without_matplotlib_it_says_what_to_install(
    cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    result = cli(*BASIC, "--png", tmp_path / "plan.png")
    assert result.code == 1
    assert "pip install 'holdfast[plot]'" in result.err
    assert not (tmp_path / "plan.png").exists()
    assert cli(*BASIC).code == 0, "and needs it for nothing else"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("plan",), "how large is the state"),
        (("plan", "--state", "much"), "size 'much' is not understood"),
        ((*BASIC, "--mtbf", "soon"), "duration 'soon' is not understood"),
        ((*BASIC, "--save", "last(3)"), "cannot be used as save="),
        ((*BASIC, "--keep", "auto()"), "cannot be used as keep="),
        ((*BASIC, "--save", "every(steps=1)", "--save", "auto()", "--keep", "last(1)", "--keep", "last(2)", "--keep", "last(3)"),
         "do not make pairs"),
        ((*BASIC, "--mirror", "=last(3)"), "mirror '=last(3)' is not understood"),
        ((*BASIC, "--mirror", "s3://b="), "is not understood"),
        ((*BASIC, "--mirror", "s3://b", "--mirror-speed", "0"), "get nowhere"),
        ((*BASIC, "--price", "free"), "price 'free' is not understood"),
        ((*BASIC, "--price", "s3=-1"), "is not understood"),
        ((*BASIC, "--price", "s3=nan"), "is not understood"),
        ((*BASIC, "--changed", "2"), "share of the state"),
        ((*BASIC, "--mirror", "s3://b", "--packed", "0"), "ratio=0.0 must be"),
        ((*BASIC, "--hours", "-1"), "hours=-1.0 must be"),
        ((*BASIC, "--hours", "nan"), "hours=nan must be"),
        ((*BASIC, "--hours", "inf"), "hours=inf must be"),
        ((*BASIC, "--step-seconds", "0"), "step-seconds=0.0 must be"),
        ((*BASIC, "--held", "0s", "--mtbf", "0s"), "mtbf"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused(cli, arguments: tuple[str, ...], said: str) -> None:
    result = cli(*arguments)
    assert result.code == 2, result.out + result.err
    assert said in result.err


def test_prices_go_by_the_beginning_of_a_url() -> None:
    given = dict(map(parse_price, ["s3=0.1", "s3://cold=0.004/0.05", "/data=1"]))
    assert price_of("s3://hot/run", given) == Price(0.1, 0.0)
    assert price_of("s3://cold/run", given) == Price(0.004, 0.05)
    assert price_of("/data/run", given) == Price(1.0)
    assert price_of("runs/x", given) == Price()
    assert price_of("gs://bucket", {}).gb_month > 0


def test_what_is_given_goes_before_what_is_measured() -> None:
    workload, costs, said = assume(Given(state=1000, held=5.0, mtbf=60.0), None, None, 1.0)
    assert (workload.sizes.state, costs.held, costs.mtbf) == (1000, 5.0, 60.0)
    assert {a.name: a.origin for a in said}["state"] == "given"
    assert next(a for a in said if a.name == "restarting").origin == "assumed"
    with pytest.raises(PolicyError):
        assume(Given(), None, None, 1.0)
    assert repr(auto(mtbf=costs.mtbf)) == "auto(max_overhead=0.01, mtbf='1m')"


def test_the_most_bytes_are_the_same_in_the_table_and_in_the_picture(cli, tmp_path, monkeypatch) -> None:
    """The disk must hold, for a moment, the new checkpoint and the one that goes for it: so says either."""
    from matplotlib.axes import Axes

    written: list[str] = []
    annotate = Axes.annotate

    def noted(axes, text, *rest, **options):
        written.append(text)
        return annotate(axes, text, *rest, **options)

    monkeypatch.setattr(Axes, "annotate", noted)
    rules = ("--save", "every(hours=1)", "--keep", "last(2)")
    alone = cli(*BASIC, *rules, "--png", tmp_path / "a.png")
    assert [line.split()[2:] for line in alone.out.splitlines() if "most bytes" in line] == [["30.0", "GB"]]
    assert "at most 30.0 GB" in written
    both = cli(*BASIC, *rules, "--mirror", f"{tmp_path}=last(1)", "--png", tmp_path / "b.png")
    [told] = [line for line in both.out.splitlines() if line.startswith("most bytes in all")]
    [drawn] = [text for text in written if text.endswith(" in all")]
    assert float(told.split()[4]) == float(drawn.split()[2]) > 30
    found = cli(*BASIC, *rules, "--mirror", f"{tmp_path}=last(1)", "--json").json["sets"][0]
    assert (
        found["peak_bytes"] == float(told.split()[4]) * 1e9 <= sum(p["peak_bytes"] for p in found["places"])
    )
