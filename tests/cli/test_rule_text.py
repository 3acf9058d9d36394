"""Rules from text: what `repr` prints is read back as the same rule, and nothing else is understood."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.errors import PolicyError
from holdfast.policies import (
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
    tagged,
    thin,
    when_idle,
    within,
)
from holdfast.policies.parse import parse_rule

counts = st.integers(1, 10**9)
words = st.text(min_size=1, max_size=20)
point = st.one_of(
    st.builds(lambda n: every(steps=n), counts),
    st.builds(lambda n, k: every(samples=n + k, offset=k), counts, counts),
    st.builds(lambda n: every(hours=n), st.floats(1e-3, 1e6)),
    st.builds(lambda steps: at(steps), st.lists(counts, min_size=1, max_size=5)),
    st.builds(lambda b, u: log_spaced(base=b, until=u), st.floats(1.01, 100), st.none() | counts),
)
plain = st.one_of(
    point,
    st.builds(last, counts),
    st.builds(lambda n: within(minutes=n), counts),
    st.builds(lambda n: within(hours=n), st.floats(1e-3, 1e6)),
    st.builds(lambda n: within(days=n), st.floats(1e-3, 1e6)),
    st.builds(lambda h, d: thin(hourly=h, daily=d), counts, st.integers(0, 50)),
    st.builds(lambda globs: tagged(*globs), st.lists(words, max_size=3)),
    st.builds(
        lambda m, mode, k, d: best(m, mode=mode, k=k, min_delta=d),
        words, st.sampled_from(["min", "max"]), counts, st.floats(0, 10),
    ),
)  # fmt: skip
triggers = st.one_of(
    point,
    st.builds(lambda: on("end", "preempt")),
    st.builds(lambda g: when_idle(g), st.floats(0, 1e6)),
    st.builds(lambda: auto(max_overhead=0.02, mtbf="2h")),
)


def combined(leaves: st.SearchStrategy[Rule]) -> st.SearchStrategy[Rule]:
    return st.recursive(
        leaves,
        lambda inner: st.one_of(
            st.builds(lambda a, b: a | b, inner, inner),
            st.builds(lambda a, b: a & b, inner, inner),
            st.builds(lambda a: ~a, inner),
            st.builds(
                lambda a, s, e: a.after(step=s, epoch=e), inner, st.integers(0, 99), st.none() | counts
            ),
            st.builds(lambda a, s: a.until(samples=s), inner, counts),
        ),
        max_leaves=6,
    )


retention = combined(plain)
joined = st.one_of(
    retention,
    st.builds(lambda r, g: r | limit(g, count=g), retention, counts),
    st.builds(lambda r, d: r | demote(d), retention, plain),
    st.builds(lambda t, n: t.at_most(per=every(minutes=n)), combined(triggers), counts),
)


@given(joined)
@settings(max_examples=400, deadline=None)
def test_what_repr_prints_is_read_back(rule: Rule) -> None:
    assert parse_rule(repr(rule)) == rule


@pytest.mark.parametrize(
    "text",
    [
        " last(3)\n",
        'last(3) | best("val_loss", mode="min", k=2) | every(steps=1000)',
        "(last(3)|tagged('a'))&every(epochs=1)",
        "every(steps=1e3)",
        "limit('200GB') | demote(every(steps=10))",
        "within(days=7) | thin(hourly=24, daily=7)",
    ],
)
def test_what_people_write(text: str) -> None:
    rule = parse_rule(text)
    assert isinstance(rule, Rule)
    assert rule.refusal("keep=") is None


ATTACKS = [
    "", " ", "last", "last()", "last(0)", "last(-1)", "last(3", "last(3))", "last 3", "3", "None",
    "'last(3)'", "last(3) or last(2)", "not last(3)", "last(3) + last(2)", "last(3) @ last(2)",
    "last(3) | 3", "3 | last(3)", "-last(3)", "last(3); last(2)", "last(3)\nlast(2)", "x = last(3)",
    "(x := last(3))", "lambda: last(3)", "(lambda: last(3))()", "last(3) if 1 else last(2)", "[last(3)]",
    "[last(3)][0]", "{last(3)}", "last(*[3])", "last(**{'n': 3})", "last(n=3, n=4)", "last(3).after",
    "last(3).after()", "last(3).after(steps=3)", "last(3).nodes()", "last(3).__class__",
    "last(3).__init__(4)", "last.__globals__", "last(3).rules", "getattr(last(3), 'n')",
    "__import__('os').system('true')", "open('/etc/passwd')", "eval('last(3)')", "exec('1')", "print(1)",
    "where(lambda r: True)", "where(print)", "Last(3)", "Rule()", "parse_rule('x')", "f'{last(3)}'",
    "last(f'3')", "last(n:=3)", "last(1+2)", "last(2**10**10)", "last(9**9**9)", "'a'*10**10", "last([3])",
    "last(True)", "last(3.5)", "last(1e999)", "last(1j)", "last(b'3')", "last(...)", "every(step=3)",
    "every(steps=3, epochs=3)", "every(hours=1" + "0" * 400 + ")", "every(hours=float('nan'))", "best('x')",
    "best('x', mode='up')", "best('x', mode=min)", "best('', mode='min')",
    "best('x', mode='min', like='hf')", "thin()", "within(1h)", "limit()", "limit('many')", "~limit('1GB')",
    "demote(3)", "demote(limit('1GB'))", "last(3).at_most(per=3)", "last(3).at_most(last(2))", "on('nope')",
    "tagged(3)", "tagged(last(3))", "at(3)", "at([last(3)])", "await last(3)", "(yield)",
    "last(3) < last(4)", "last(3)[0]", "\x00", "last(3)\x00", "ｌａｓｔ(3)x", "last(٣)",
    "last(3) # | last(4)\n|", "\ufeff\ufefflast(3)", "\\", "'\\N{x}'", "~" * 1900 + "last(3)",
    "(" * 900 + "last(3)" + ")" * 900, "last(3)" + "|last(3)" * 300, "[" * 1000, "last(" * 400,
    "last(" + "[" * 80 + "3" + "]" * 80 + ")", "demote(" * 200 + "last(1)" + ")" * 200,
]  # fmt: skip


@pytest.mark.parametrize("text", ATTACKS, ids=range(len(ATTACKS)))
def test_everything_else_is_refused_in_one_sentence(text: str) -> None:
    with warnings.catch_warnings(), pytest.raises(PolicyError) as caught:
        warnings.simplefilter("error")
        parse_rule(text)
    assert len(str(caught.value)) < 2600
    assert "\n" not in str(caught.value)


@given(st.text(max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_rule_or_a_policy_error(text: str) -> None:
    try:
        assert isinstance(parse_rule(text), Rule)
    except PolicyError:
        pass


def test_a_backslash_in_a_name_gives_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert parse_rule(r"tagged('a\d')") == tagged(r"a\d")


def test_the_message_names_the_part_that_is_wrong() -> None:
    with pytest.raises(PolicyError, match=r"'last_one\(3\)'|last_one"):
        parse_rule("every(steps=3) | last_one(3)")
    with pytest.raises(PolicyError, match="needs its arguments"):
        parse_rule("every(steps=3) | last")
    with pytest.raises(PolicyError, match="unexpected keyword"):
        parse_rule("every(step=3)")
