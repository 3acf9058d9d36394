"""A simulated run is the run that the rules would make: against the real loop, against arithmetic, against `auto`."""

from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import holdfast
from holdfast import Checkpointer, auto, best, every, last, limit, log_spaced, on, when_idle, within
from holdfast.core.errors import PolicyError
from holdfast.policies import Rule, demote, places
from holdfast.policies.optimum import best_interval, daly_interval, wasted
from holdfast.policies.places import FINE_RECORDS, Place, Price, Sizes, Stay, lost_work
from holdfast.policies.simulate import START, Costs, Outcome, Scenario, Workload, simulate
from holdfast.stores import MemoryStore
from holdfast.testing import MockClock

FREE = Costs(held=0.0, durable=0.0, load=0.0, restart=0.0, mtbf=1e12)


def run(
    save: Rule, keep: Rule | None = None, *mirrors: Place, steps: int = 1000, step_seconds: float = 1.0,
    costs: Costs = FREE, sizes: Sizes | None = None,
) -> Outcome:  # fmt: skip
    places = (Place("local", keep), *mirrors)
    workload = Workload(steps, step_seconds, sizes or Sizes(1000))
    return simulate(Scenario(save, places), workload, costs, losses)


def losses(step: int) -> dict[str, float]:
    """Two metrics, every ten steps: one that improves now and then, one whose best is long ago."""
    if step % 10 or not step:
        return {}
    return {"loss": 1 / (1 + step) + 0.3 * math.sin(step / 7), "early": abs(step - 200)}


RULES: dict[str, tuple[Rule, Rule | None]] = {
    "steps": (every(steps=7), last(3)),
    "minutes and hours": (every(minutes=3), last(2) | every(minutes=20)),
    "growing gaps": (log_spaced(base=2), None),
    "the best": (best("loss", mode="min") | every(steps=50), best("loss", mode="min", k=2)),
    "the best, by its tag alone": (best("early", mode="min") | every(steps=50), last(2)),
    "at most": (every(steps=5).at_most(per=every(minutes=2)), within(minutes=10)),
    "a window": (every(steps=10).after(step=100), last(4)),
    "events": (on("start", "end") | every(steps=100), every(steps=200) | last(1)),
    "evaluations": (on("eval_end") | best("early", mode="min"), last(3)),
    "evaluations that no trigger speaks of": (on("eval_end") | every(steps=70), best("loss", mode="min")),
    "a limit": (every(steps=20), every(steps=40) | limit(count=4)),
}


@pytest.mark.parametrize("name", RULES)
def test_it_saves_and_keeps_what_a_real_run_does(name: str) -> None:
    """The same rules in the real loop, into a real store, under a clock of our own."""
    save, keep = RULES[name]
    clock = MockClock(START)
    store = MemoryStore()
    with Checkpointer(store, {"x": [0]}, save=save, keep=keep, time=clock, writer="inline") as ckpt:
        for step in ckpt.steps(600):
            clock.advance(5.0)
            if seen := losses(step + 1):  # the clock counts finished steps
                ckpt.log(**seen)
    found = run(save, keep, steps=600, step_seconds=5.0)
    real = holdfast.Run(store)
    saved = sorted({e.clock[0] for e in real.events() if type(e).__name__ == "Saved"})
    assert [round(s / 5) for s in found.saves] == saved
    assert [round(k / 5) for k in found.stays[0].kept] == real.steps


def test_auto_saves_at_the_optimum_that_the_plan_shows() -> None:
    """The formula of `auto` is the plan's own, and what it does when driven is what the formula says."""
    for held, mtbf in ((2.0, 3600.0), (20.0, 4 * 3600.0), (0.5, 900.0)):
        costs = Costs(held, durable=held, load=5, restart=5, mtbf=mtbf)
        found = run(auto(max_overhead=1.0, mtbf=mtbf), last(2), costs=costs, steps=300_000, step_seconds=0.5)
        optimum = daly_interval(held, mtbf)
        assert best_interval(held, mtbf, 1.0) == optimum
        middle = found.periods[2:-2]
        assert len(middle) > 20
        assert all(optimum <= period <= optimum + 2 * 0.5 for period in middle), "at the first step behind it"
        near = [wasted([optimum * f], held, mtbf, costs.recovery) for f in (0.7, 1.0, 1.4)]
        assert near[1] == min(near)
        assert found.wasted == pytest.approx(near[1], rel=0.02)


def test_a_fixed_interval_wastes_what_the_formula_says() -> None:
    costs = Costs(held=3.0, durable=10.0, load=20.0, restart=60.0, mtbf=3600.0)
    found = run(every(minutes=5), last(1), costs=costs, steps=100_000)
    assert found.interval == pytest.approx(300, rel=0.02)
    assert found.overhead == pytest.approx(0.01, rel=0.02)
    assert found.wasted == pytest.approx(wasted([300.0], 3.0, 3600.0, costs.recovery), rel=0.01)
    assert found.failures == pytest.approx(100_000 / (1 - found.wasted) / 3600)
    mean, worst = found.stays[0].lost(found.seconds)
    assert mean == pytest.approx(150 + 10, abs=3)
    assert worst == pytest.approx(300 + 10, abs=3), "right before the next one is durable"


def test_what_lies_in_a_place_and_what_it_costs() -> None:
    """Ten hours of a save each, the newest two kept: storage by hand."""
    found = run(every(hours=1), last(2), steps=36_000, sizes=Sizes(10**9))
    stay = found.stays[0]
    assert [round(t / 3600) for t in stay.times[:4]] == [1, 2, 3, 3]
    assert stay.sizes[:4] == (10**9, 2 * 10**9, 3 * 10**9, 2 * 10**9), (
        "the old one goes when the new one is there"
    )
    assert (stay.peak_bytes, stay.end_bytes, len(stay.kept)) == (3 * 10**9, 2 * 10**9, 2)
    assert stay.byte_seconds == pytest.approx((1 * 1 + 8 * 2) * 3600e9)
    priced = Stay(Place("s3", price=Price(0.73, 5.0)), *(getattr(stay, n) for n in Stay.__slots__[1:]))
    requests = 10 * (math.ceil(1e9 / (8 << 20)) + 2)
    assert stay.writes == requests
    assert priced.cost == pytest.approx(17 * 3600 * 0.73 / (730 * 3600) + requests / 1000 * 5.0)


def test_of_very_many_checkpoints_the_rule_is_asked_less_often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each asking looks at all of them: at every commit a plan would take minutes, and the end is the same."""
    asked: list[int] = []
    real = places.plan
    monkeypatch.setattr(
        places, "plan", lambda records, *a, **k: asked.append(len(records)) or real(records, *a, **k)
    )
    [stay] = run(every(minutes=1), within(hours=10), steps=3000, step_seconds=60.0).stays
    assert (len(stay.kept), stay.end_bytes) == (601, 601 * 1000)
    assert 602 * 1000 <= stay.peak_bytes <= 602 * 1000 * (1 + 1 / FINE_RECORDS)
    assert sum(asked) < 700_000, "at every commit it would be over a million and a half"


def test_what_does_not_change_lies_there_once() -> None:
    sizes = Sizes(1000, changed=0.1)
    found = run(every(steps=100), last(3), sizes=sizes)
    assert found.stays[0].peak_bytes == 1000 + 3 * 100
    assert found.stays[0].end_bytes == 1000 + 2 * 100
    weights = run(every(steps=100), last(1) | demote(every(steps=100)), sizes=Sizes(900, weights=1 / 3))
    assert weights.stays[0].end_bytes == 900 + 9 * 300


def test_a_mirror_comes_after_and_has_a_rule_of_its_own() -> None:
    quick = Place("quick", every(steps=500) | last(1), bytes_per_second=1000, ratio=2.0)
    found = run(every(steps=100), last(2), quick)
    mirror = found.stays[1]
    assert [(round(a, 1), round(s)) for a, s in mirror.arrivals[:3]] == [
        (100.5, 100),
        (200.5, 200),
        (300.5, 300),
    ]
    assert [round(k) for k in mirror.kept] == [500, 1000]
    assert mirror.end_bytes == 2 * 500, "packed files are smaller there"
    assert mirror.lost(1000)[1] == pytest.approx(100.5)


def test_a_mirror_without_a_rule_follows_the_primary() -> None:
    found = run(every(steps=100), last(2), Place("other", bytes_per_second=1e6))
    assert found.stays[1].kept == found.stays[0].kept


def test_a_slow_mirror_takes_the_newest_and_leaves_out_what_it_cannot_have() -> None:
    slow = Place("slow", last(1), bytes_per_second=1000 / 250)  # 250 s a checkpoint, one every 100 s
    found = run(every(steps=100), last(1), slow)
    arrivals = found.stays[1].arrivals
    assert [round(s) for _, s in arrivals] == [100, 300, 600, 800, 1000]
    assert [round(a) for a, _ in arrivals] == [350, 600, 850, 1100, 1350]
    assert found.stays[1].lost(1000)[1] == pytest.approx(550), "at 850 s the newest there is that of 300 s"
    assert found.stays[0].end == 1350, "a place is priced until all is in place"


def test_the_newest_goes_first() -> None:
    """A mirror that cannot have all has what a resume would want."""
    slow = Place("slow", every(steps=100), bytes_per_second=1000 / 250)
    found = run(every(steps=100), last(4), slow)
    assert [round(s) for _, s in found.stays[1].arrivals[:4]] == [100, 300, 600, 800]


def test_a_save_that_comes_too_early_waits() -> None:
    """One is written, one waits behind it: a third has no memory to go to and holds training."""
    costs = Costs(held=1.0, durable=50.0, load=0, restart=0, mtbf=1e12)
    found = run(every(steps=10), last(1), costs=costs)
    assert found.seconds == pytest.approx(50 * len(found.saves), rel=0.05), "the disk sets the pace"
    assert found.overhead > 0.7
    idle = run(when_idle(), last(1), costs=costs)
    assert idle.overhead == pytest.approx(1 / 51, rel=0.2), "who asks when the disk is idle never waits"


def test_a_long_run_is_played_in_strides() -> None:
    found = run(every(steps=50_000), last(1), steps=1_000_000)
    assert found.stride == 5
    assert len(found.saves) == 20


@given(
    st.lists(st.tuples(st.floats(0, 100), st.floats(0, 100)), max_size=8).map(
        lambda pairs: [(max(p), min(p)) for p in pairs]
    ),
    st.floats(1, 120),
)
@settings(max_examples=100, derandomize=True, deadline=None)
def test_lost_work_is_the_mean_and_most_over_every_moment(
    arrivals: list[tuple[float, float]], seconds: float
) -> None:
    """Against looking at every moment, one after the other."""
    many = 4000
    moments = [(i + 0.5) * seconds / many for i in range(many)]
    lost = [t - max([s for a, s in arrivals if a <= t], default=0.0) for t in moments]
    mean, worst = lost_work(arrivals, seconds)
    assert mean == pytest.approx(sum(lost) / many, abs=0.1)
    assert worst == pytest.approx(max(lost), abs=0.1)


def test_nonsense_is_refused() -> None:
    for wrong in ((0, 1.0), (1, 0.0), (1, math.nan)):
        with pytest.raises(PolicyError, match="has no length"):
            Workload(*wrong, Sizes(1))
    for costs in ((-1.0, 0, 0, 0, 1), (0, 0, 0, 0, 0), (0, 0, 0, math.nan, 1)):
        with pytest.raises(PolicyError, match="must be a finite number"):
            Costs(*costs)
    with pytest.raises(PolicyError, match="get nowhere"):
        Place("x", bytes_per_second=0.0)
    with pytest.raises(PolicyError, match="share of the state"):
        Sizes(1, changed=1.5)
    with pytest.raises(PolicyError, match="cannot be used as save="):
        run(last(3))
    with pytest.raises(PolicyError, match="cannot be used as keep="):
        run(every(steps=1), auto())
