"""Strict unless told otherwise: one error lists every misfit with its path; globs relax them one by one."""

from __future__ import annotations

import random
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

import holdfast
from holdfast.core.errors import InvalidFormat, StateError


class Recorder:
    def __init__(self, *, fails: bool = False) -> None:
        self.fails = fails

    def state_dict(self):
        return {"n": 1}

    def load_state_dict(self, state):
        if self.fails:
            raise RuntimeError("no")


def model(width: int = 3, dtype: torch.dtype = torch.float32) -> nn.Module:
    return nn.ModuleDict({"body": nn.Linear(2, width), "head": nn.Linear(width, 1)}).to(dtype)


def snapshot(m: nn.Module) -> list[bytes]:
    return [p.detach().float().numpy().tobytes() for p in m.parameters()]


def test_every_misfit_is_listed_and_nothing_changes(save):
    saved = save({"m": model(), "gone": [1], "n": 1})
    live = model(4)
    live["extra"] = nn.Linear(1, 1)
    state = {"m": live, "n": 2, "new": {"a": 1}}
    before = snapshot(live)
    with pytest.raises(StateError) as e:
        saved.into(state)
    text = str(e.value)
    assert "7 places do not fit" in text
    for line in (
        "m/body.weight: expected float32[4, 2] (live), found float32[3, 2] (checkpoint)",
        "m/body.bias: expected float32[4] (live), found float32[3]",
        "m/head.weight: expected float32[1, 4] (live), found float32[1, 3]",
        "m/extra.weight: missing from the checkpoint; the live state has float32[1, 1]",
        "pass missing=('m/extra.weight',)",
        "new: missing from the checkpoint; the live state has a dict",
        "gone: unexpected; the checkpoint has a list",
        "pass unexpected=('gone',)",
    ):
        assert line in text, line
    assert "m/extra.bias: missing" in text
    assert snapshot(live) == before
    assert state["n"] == 2


def test_relaxations_are_per_path(save):
    saved = save({"m": model(), "gone": [1]})
    live = model(4)
    live["extra"] = nn.Linear(1, 1)
    plan = saved.into(
        {"m": live, "new": 3}, missing=("m/extra.*", "m/body.*", "m/head.weight", "new"), unexpected=("gone",)
    )
    assert {p for p, _ in plan.report.missing} == {"m/extra.weight", "m/extra.bias", "new"}
    assert {p for p, _ in plan.report.mismatched} == {"m/body.weight", "m/body.bias", "m/head.weight"}
    assert {p for p, _ in plan.report.unexpected} == {"gone"}
    assert {p for p, _ in plan.report.restored} == {"m/head.bias"}
    assert not plan.report.exact
    assert "m/extra.weight" in str(plan.report)


def test_cast(save):
    source = model()
    saved = save({"m": source, "a": {"x": np.arange(3.0)}})
    live, box = model(dtype=torch.bfloat16), {"x": np.zeros(3, np.float32)}
    with pytest.raises(StateError) as e:
        saved.into({"m": live, "a": box})
    assert "m/body.weight: expected bfloat16[3, 2] (live), found float32[3, 2]" in str(e.value)
    assert "pass cast=('a/x',)" in str(e.value)
    array = box["x"]
    plan = saved.into({"m": live, "a": box}, cast=("m/**", "a/x"))
    assert torch.equal(live["body"].weight, source["body"].weight.bfloat16())
    assert box["x"] is array
    assert array.tolist() == [0, 1, 2]
    assert ("m/body.weight", "float32 to bfloat16") in plan.report.cast


def test_only(save):
    source, optimizer = model(), None
    saved = save({"m": source, "n": 5, "box": {"a": 1, "b": [1, 2]}, "o": Recorder()})
    live, box = model(), {"a": 0, "b": [0], "c": 9}
    kept = live["body"].weight.detach().clone()
    plan = saved.into({"m": live, "n": 0, "box": box, "o": Recorder(fails=True)}, only=("m/head.*", "box/b"))
    assert plan.needed == {"m/head.weight", "m/head.bias"}
    assert torch.equal(live["head"].weight, source["head"].weight)
    assert torch.equal(live["body"].weight, kept)
    assert box == {"a": 0, "b": [1, 2], "c": 9}
    assert plan.replaced == {}
    assert optimizer is None
    plan = saved.into({"m": live, "n": 0}, only=("m",))
    assert plan.needed == {n for n in saved.tensors if n.startswith("m/")}
    with pytest.raises(StateError, match="selects nothing"):
        saved.into({"m": live}, only=("model/**",))


def test_top_level_replacements(save):
    saved = save({"n": 5, "t": (1, np.ones(2)), "none": None, "s": "x"})
    plan = saved.into({"n": 1, "t": (0, np.zeros(2)), "none": None, "s": "x"})
    assert plan.replaced["n"] == 5
    assert plan.replaced["t"][1].tolist() == [1, 1]
    assert "none" not in plan.replaced


def test_another_kind_of_value(save):
    saved = save({"v": {"a": 1}, "w": {"x": None, "y": [1]}})
    with pytest.raises(StateError, match=r"v: expected a list .live., found a dict"):
        saved.into({"v": [1], "w": {}})
    box = {"x": [1, 2], "y": torch.ones(1)}
    saved.into({"v": {}, "w": box})
    assert box == {"x": None, "y": [1]}
    with pytest.raises(StateError, match="v: expected the module Linear"):
        save({"v": 3}).into({"v": nn.Linear(1, 1)})
    with pytest.raises(StateError, match=r"v: expected a torch\.Generator"):
        save({"v": 3}).into({"v": torch.Generator()})
    with pytest.raises(StateError, match=r"v: expected a random\.Random"):
        save({"v": 3}).into({"v": random.Random()})
    with pytest.raises(StateError, match=r"v: expected a numpy\.random\.Generator with PCG64.*MT19937"):
        save({"v": np.random.Generator(np.random.MT19937())}).into({"v": np.random.default_rng()})


def test_keys_that_a_plain_dict_loses_are_noted(save):
    saved = save({"v": {"a": 1}})
    live = {"a": 0, "b": 5}
    plan = saved.into({"v": live})
    assert live == {"a": 1}
    assert any(n.startswith("v/b: not in the checkpoint, removed") for n in plan.report.notes)
    live = {"a": 0, "b": 5}
    saved.into({"v": live}, missing=("v/b",))
    assert live == {"a": 1, "b": 5}


def test_an_object_that_refuses_leaves_the_weights_alone(save):
    source = model()
    saved = save({"m": source, "box": {"k": [1]}, "o": Recorder()})
    live, box = model(), {"k": [2]}
    before = snapshot(live)
    with pytest.raises(RuntimeError, match="no"):
        saved.into({"m": live, "box": box, "o": Recorder(fails=True)})
    assert snapshot(live) == before
    assert box == {"k": [2]}


def test_a_tensor_that_no_file_holds(save):
    saved = save({"v": np.ones(2)})
    saved.tensors.clear()
    with pytest.raises(
        StateError, match="v: the checkpoint's tree names the tensor 'v', which no file holds"
    ):
        saved.into({"v": np.zeros(2)})


def test_planning_touches_nothing(save):
    source = model()
    optimizer = torch.optim.Adam(source.parameters())
    saved = save({"m": source, "o": optimizer, "d": {"a": [1]}})
    live = model()
    other = torch.optim.Adam(live.parameters())
    box = {"a": [2, 3]}
    before = snapshot(live)
    plan = saved.plan({"m": live, "o": other, "d": box})
    assert snapshot(live) == before
    assert box == {"a": [2, 3]}
    assert len(other.state) == 0
    assert plan.needed == set(saved.tensors)


def test_a_plan_can_be_applied_again(save):
    saved = save({"d": {"a": [1, np.ones(2)]}})
    box = {"a": [2, np.zeros(2)]}
    plan = saved.into({"d": box})
    box["a"].append(5)
    plan.apply(saved.tensors)
    assert len(box["a"]) == 2


def test_a_malformed_state_is_found_before_anything_changes(save):
    saved = save({"m": model(), "g": torch.Generator(), "n": np.random.default_rng(0), "r": random.Random(0)})
    for key, damage in (
        ("g", lambda n: n.value.update(state=b"")),
        ("n", lambda n: n.value["state"].update(inc="x")),
        ("r", lambda n: n.value.update(version=99)),
    ):
        live = model()
        state = {"m": live, "g": torch.Generator(), "n": np.random.default_rng(1), "r": random.Random(1)}
        before = snapshot(live)
        damage(saved.tree[key])
        with pytest.raises(InvalidFormat, match="malformed"):
            saved.into({"m": live, key: state[key]}, unexpected=("*",))
        assert snapshot(live) == before


def test_a_place_that_takes_no_new_values_is_refused_before_anything_changes(tmp_path):
    holdfast.save(tmp_path, {"array": np.ones(2), "number": 5}, step=1)
    live = np.zeros(2)
    with pytest.raises(StateError, match=r"`into` is a mappingproxy.*pass a dict"):
        holdfast.load(tmp_path, into=MappingProxyType({"array": live, "number": 0}))
    assert not live.any()
