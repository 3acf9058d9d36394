"""What to keep: what each rule does, the guards, the reasons, and what is refused."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from holdfast.core.clock import Clock
from holdfast.core.errors import PolicyError
from holdfast.core.records import CheckpointRecord
from holdfast.policies import (
    Decision,
    Rule,
    at,
    auto,
    best,
    demote,
    every,
    last,
    limit,
    log_spaced,
    on,
    plan,
    presets,
    require_retention,
    tagged,
    thin,
    when_idle,
    where,
    within,
)

NAN, INF = math.nan, math.inf
HOUR, DAY = 3600.0, 86400.0
MONDAY = 1_704_067_200.0  # 1 January 2024, 00:00 UTC


def record(step: int, time: float | None = None, **more: object) -> CheckpointRecord:
    clock = more.pop("clock", Clock(step=step))
    return CheckpointRecord(step, "a", float(step) if time is None else time, clock, **more)  # type: ignore[arg-type]


def kept(rule: Rule, records: list[CheckpointRecord], now: float = 1e10) -> list[int]:
    """Return what the rule keeps by itself, without guards."""
    found = rule.keeps(records, now)
    return [one.step for one in records if (one.step, one.attempt) in found]


def steps(*numbers: int) -> list[CheckpointRecord]:
    return [record(number) for number in numbers]


def scored(*values: float | None) -> list[CheckpointRecord]:
    return [record(i, metrics={} if v is None else {"loss": v}) for i, v in enumerate(values, start=1)]


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (last(1), [1600]),
        (last(2), [1500, 1600]),
        (last(99), [100, 480, 520, 990, 1010, 1490, 1500, 1600]),
        (every(steps=500), [520, 1010, 1500]),
        (every(steps=500, offset=100), [100, 990, 1490, 1600]),
        (at([500, 1490, 5000]), [520, 1490]),
        (log_spaced(base=2, until=512), [100, 480, 520]),
        (where(lambda one: one.step % 20 == 0), [100, 480, 520, 1500, 1600]),
        (last(2).until(step=1490), [1010, 1490]),
        (last(9).after(step=1490), [1500, 1600]),
        (last(4) & every(steps=500), [1010, 1500]),
        (~where(lambda one: one.step > 500), [100, 480]),
        (last(1) | at([100]), [100, 1600]),
    ],
)
def test_on_irregular_steps(rule: Rule, wanted: list[int]) -> None:
    assert kept(rule, steps(100, 480, 520, 990, 1010, 1490, 1500, 1600)) == wanted


def test_every_uses_the_clock_and_for_time_the_wall_clock() -> None:
    by_epoch = [record(i, clock=Clock(epoch=i // 3, tokens=i * 10)) for i in range(1, 10)]
    assert kept(every(epochs=1), by_epoch) == [3, 6, 9]
    assert kept(every(tokens=25), by_epoch) == [3, 5, 8]
    by_time = [record(i, MONDAY + i * 1500) for i in range(1, 9)]  # every 25 minutes
    assert kept(every(hours=1), by_time) == [1, 3, 5, 8]
    assert kept(every(hours=1), []) == []


@pytest.mark.parametrize(
    ("rule", "values", "wanted"),
    [
        (best("loss", mode="min"), (3.0, 1.0, 2.0), [2]),
        (best("loss", mode="max"), (3.0, 1.0, 2.0), [1]),
        (best("loss", mode="min", k=2), (3.0, 1.0, 2.0), [2, 3]),
        (best("loss", mode="min"), (1.0, 1.0, 1.0), [1]),
        (best("loss", mode="min", k=2), (1.0, 2.0, 2.0, 2.0), [1, 2]),
        (best("loss", mode="min", k=2), (2.0, 2.0, 1.0), [1, 3]),
        (best("loss", mode="min", k=9), (NAN, None, INF, -INF, 5.0), [5]),
        (best("loss", mode="min"), (NAN, None), []),
        (best("loss", mode="min", min_delta=1.0), (5.0, 4.5), [2]),
        (best("other", mode="min"), (1.0, 2.0), []),
    ],
)
def test_best(rule: Rule, values: tuple[float | None, ...], wanted: list[int]) -> None:
    assert kept(rule, scored(*values)) == wanted


def test_within_counts_back_from_the_newest_checkpoint() -> None:
    records = [record(i, MONDAY + i * DAY) for i in range(5)]
    assert kept(within(days=2), records, now=MONDAY + 400 * DAY) == [2, 3, 4]
    assert kept(within(hours=1), records) == [4]
    assert kept(within(weeks=1), records) == [0, 1, 2, 3, 4]


def test_a_clock_that_was_ahead_does_not_age_the_others() -> None:
    records = [record(1, MONDAY), record(2, MONDAY + DAY), record(3, MONDAY + 9999 * DAY)]
    assert kept(within(days=2), records, now=MONDAY + 2 * DAY) == [1, 2, 3]


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (thin(hourly=1), [35]),
        (thin(hourly=3), [33, 34, 35]),
        (thin(daily=2), [27, 35]),
        (thin(daily=99), [3, 11, 19, 27, 35]),
        (thin(weekly=2), [19, 35]),
        (thin(monthly=1), [35]),
        (thin(hourly=2, daily=2), [27, 34, 35]),
    ],
)
def test_thin(rule: Rule, wanted: list[int]) -> None:
    # Eight per day, every three hours, from Friday 5 January 2024 on: the week ends after the 24th.
    start = MONDAY + 4 * DAY + 12 * HOUR
    assert kept(rule, [record(i, start + i * 3 * HOUR) for i in range(36)]) == wanted


def test_thin_counts_only_periods_with_checkpoints() -> None:
    records = [record(i, MONDAY + i * 40 * DAY) for i in range(5)]
    for rule in (thin(hourly=3), thin(daily=3), thin(weekly=3), thin(monthly=3)):
        assert kept(rule, records) == [2, 3, 4]


def test_tagged() -> None:
    records = [record(1, tags=frozenset({"release-1", "x"})), record(2, tags=frozenset({"best"})), record(3)]
    assert kept(tagged("release-*"), records) == [1]
    assert kept(tagged("best", "x"), records) == [1, 2]
    assert kept(tagged(), records) == [1, 2]
    assert kept(~tagged(), records) == [3]


def actions(rule: Rule | None, records: list[CheckpointRecord], **more: object) -> str:
    """Return the first letters of the decisions: (k)eep, (d)rop; demote is written w, for weights."""
    decisions = plan(records, rule, now=1e10, **more)  # type: ignore[arg-type]
    return "".join({"keep": "k", "drop": "d", "demote": "w"}[one.action] for one in decisions)


def test_no_rule_keeps_everything() -> None:
    assert actions(None, steps(1, 2, 3)) == "kkk"
    assert plan([], None, now=0.0) == plan([], last(1), now=0.0) == ()


def test_decisions_come_in_step_order_with_reasons() -> None:
    records = [record(3, verified=True), record(1), record(2, tags=frozenset({"b", "a"}))]
    assert plan(records, last(2) | best("loss", mode="min"), now=0.0) == (
        Decision(1, "a", "drop", ("no rule keeps it",)),
        Decision(2, "a", "keep", ("guard: tagged a, b", "last(2)")),
        Decision(3, "a", "keep", ("guard: newest committed", "guard: newest verified", "last(2)")),
    )


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({"verified": True}, "guard: newest verified"),
        ({"resumed_from": True}, "guard: resumed from"),
        ({"leased": True}, "guard: in use by a reader"),
        ({"tags": frozenset({"deployed"})}, "guard: tagged deployed"),
        ({"foreign": True}, "guard: not written by holdfast"),
    ],
)
@pytest.mark.parametrize("rule", [last(1), demote(last(9)), last(1) | limit("1B", count=1)], ids=repr)
def test_guards(flags: dict, reason: str, rule: Rule) -> None:
    records = [record(1, stored_bytes=9), record(2, stored_bytes=9, **flags), record(3, stored_bytes=9)]
    decision = plan(records, rule, now=1e10)[1]
    assert decision.action == "keep"
    assert decision.reasons[0] == reason


def test_the_newest_whole_checkpoint_is_guarded_not_the_newest_weights() -> None:
    records = [record(1, verified=True), record(2), record(3, demoted=True, verified=True)]
    assert actions(last(1), records) == "kkk"
    assert [one.reasons for one in plan(records, best("x", mode="min"), now=0.0)] == [
        ("guard: newest verified",),
        ("guard: newest committed",),
        ("no rule keeps it",),
    ]
    assert actions(best("x", mode="min"), [replace(one, demoted=True) for one in steps(1, 2)]) == "dk"


def test_demote() -> None:
    records = steps(1, 2, 3, 4)
    assert actions(last(2) | demote(every(steps=2)), records) == "dwkk"
    assert actions(demote(last(3)), records) == "dwwk"
    assert actions(demote(last(3)), [replace(one, demoted=one.step < 4) for one in records]) == "dkkk"
    decision = plan(records, demote(last(3) | every(steps=2)), now=0.0)[1]
    assert decision.reasons == ("demote: every(steps=2)", "demote: last(3)")


def sized(*sizes: int) -> list[CheckpointRecord]:
    return [record(i, stored_bytes=size) for i, size in enumerate(sizes, start=1)]


@pytest.mark.parametrize(
    ("rule", "wanted"),
    [
        (limit("30B"), "dkkk"),
        (limit("29B"), "ddkk"),
        (limit("1B"), "dddk"),
        (limit("40B"), "kkkk"),
        (limit(count=2), "ddkk"),
        (limit("30B", count=2), "ddkk"),
        (limit("30B") | limit(count=2), "ddkk"),
        (last(3) | limit("20B"), "ddkk"),
        (at([1]) | limit("40B"), "kddk"),
        (last(1) | demote(last(4)) | limit("30B"), "dwwk"),
        (last(2) | demote(last(4)) | limit("20B"), "ddkk"),
    ],
)
def test_limit(rule: Rule, wanted: str) -> None:
    assert actions(rule, sized(10, 10, 10, 10)) == wanted


def test_a_limit_drops_the_best_last() -> None:
    records = [replace(one, stored_bytes=10) for one in scored(1.0, 2.0, 3.0, 4.0)]
    assert actions(last(4) | best("loss", mode="min") | limit("20B"), records) == "kddk"
    assert actions(last(4) | best("loss", mode="min") | limit("10B"), records) == "dddk"


def test_a_limit_can_be_told_about_shared_files() -> None:
    def first_in_full_then_one_byte_each(left: list[CheckpointRecord]) -> int:
        return 10 + len(left) - 1

    shared = first_in_full_then_one_byte_each
    assert actions(limit("12B"), sized(10, 10, 10, 10), stored_together=shared) == "dkkk"


def test_what_a_limit_says() -> None:
    decision = plan(sized(10, 10), last(2) | limit("10B"), now=0.0)[0]
    assert decision.reasons == ("over limit('10 B')", "otherwise kept by last(2)")
    assert plan(sized(10, 10), limit("20B"), now=0.0)[0].reasons == ("no rule but the limit",)


def test_a_function_that_fails_makes_no_plan() -> None:
    with pytest.raises(
        PolicyError, match=r"where\(.*\) failed on the checkpoint of step 1 \(KeyError: 'loss'\)"
    ):
        plan(steps(1, 2), where(lambda one: one.metrics["loss"] < 1), now=0.0)


def test_a_rule_shows_how_it_was_made() -> None:
    rule = (
        (last(3) | best("loss", mode="min", k=2)).until(step=9)
        | every(hours=2) & tagged("a")
        | limit("1.5GB")
    )
    assert repr(rule) == (
        "(last(3) | best('loss', mode='min', k=2)).until(step=9)"
        " | every(hours=2) & tagged('a') | limit('1.5 GB')"
    )
    assert (
        repr(demote(thin(daily=7, weekly=4) | within(days=2)))
        == "demote(thin(daily=7, weekly=4) | within(days=2))"
    )
    assert eval(repr(rule)) == rule


@pytest.mark.parametrize(
    "rule",
    [
        presets.keras_save_best("a", mode="min", initial_value_threshold=0.5),
        presets.lightning_save_top_k("a", mode="max", save_top_k=-1),
        presets.lightning_save_top_k("a", mode="max", save_top_k=3),
        presets.hf_best_model("eval_a", greater_is_better=True),
    ],
    ids=repr,
)
def test_a_preset_shows_how_it_was_made(rule: Rule) -> None:
    assert eval(f"presets.{rule!r}") == rule


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: last(0), "n=0 must be a whole number of at least 1"),
        (lambda: last(True), "n=True must be a whole number"),
        (lambda: within(days=0), "days=0 must be a finite number above 0"),
        (lambda: within(days=NAN), "days=nan must be a finite number above 0"),
        (lambda: within(), r"within\(\) takes exactly one of minutes, hours, days, weeks; found none"),
        (lambda: within(days=1, hours=1), r"within\(\) takes exactly one of .*; found hours=1, days=1"),
        (lambda: thin(), r"thin\(\) takes at least one of hourly="),
        (lambda: thin(daily=-1), "daily=-1 must be a whole number of at least 0"),
        (lambda: tagged(""), r"tagged\(''\) takes tags or globs"),
        (lambda: where(3), r"where\(3\) takes a function"),
        (lambda: limit(), r"limit\(\) takes a size such as '200GB', count=, or both; found none"),
        (lambda: limit("lots"), "size 'lots' is not understood"),
        (lambda: limit(count=0), "count=0 must be a whole number of at least 1"),
        (lambda: demote(3), r"demote\(3\) takes a retention rule"),
        (lambda: demote(on("end")), r"on\('end'\) says when to save, not what to keep"),
        (lambda: demote(limit("1GB")), r"limit\('1.0 GB'\) cannot stand inside demote\(\)"),
        (lambda: demote(~last(3)), r"~last\(3\) as keep= would drop more on every pass"),
        (
            lambda: last(3) & limit("1GB"),
            r"limit\('1.0 GB'\) speaks about the whole plan and does not go with &",
        ),
        (lambda: ~demote(last(1)), r"demote\(last\(1\)\) speaks about the whole plan and does not go with ~"),
        (lambda: limit("1GB").until(step=1), r"does not go with .until\(\); join it with `\|`"),
    ],
)
def test_what_is_refused(make, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        make()


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (on("end"), r"on\('end'\) says when to save, .* cannot be used as keep=; use tagged\(...\) or where"),
        (last(2) | when_idle(), r"when_idle\(min_gap_seconds=0.0\) says when to save, not what to keep"),
        (auto(), r"auto\(max_overhead=0.01, mtbf='1d'\) says when to save"),
        (
            last(2) | ~best("x", mode="min"),
            r"~best\('x', mode='min'\) as keep= would drop more on every pass",
        ),
        (
            every(steps=1).at_most(per=every(hours=1)),
            r"at_most\(per=every\(hours=1\)\) says when .*; use `& every",
        ),
        (last, "keep=<function last at .*> is a function; expected a rule such as every"),
    ],
)
def test_what_cannot_be_used_to_keep(rule: object, message: str) -> None:
    with pytest.raises(PolicyError, match=message):
        require_retention(rule)
    with pytest.raises(PolicyError, match=message):
        plan(steps(1, 2), rule, now=0.0)  # type: ignore[arg-type]
