"""A checkpoint in memory: what the floors above do with captured state, without files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass

import pytest

from holdfast.format.values import decode_value, encode_value
from holdfast.state.capture import Captured, capture
from holdfast.state.place import RestoreOptions, RestorePlan, materialize, plan_restore
from holdfast.state.tensors import HostTensor
from state.copies import copied


@dataclass
class Saved:
    captured: Captured
    tree: dict[str, object]
    tensors: dict[str, HostTensor]

    @property
    def specs(self):
        return {name: host.spec for name, host in self.tensors.items()}

    def plan(self, state: Mapping[str, object], **options: tuple[str, ...]) -> RestorePlan:
        return plan_restore(
            state, self.tree, self.specs, self.captured.aliases, options=RestoreOptions(**options)
        )

    def into(self, state: Mapping[str, object], **options: tuple[str, ...]) -> RestorePlan:
        plan = self.plan(state, **options)
        plan.apply({name: self.tensors[name] for name in plan.needed})
        return plan

    def load(self, as_: str = "torch") -> dict[str, object]:
        return materialize(self.tree, self.tensors, as_)  # type: ignore[return-value]


def save_state(state: Mapping[str, object], *, gradients: bool = False) -> Saved:
    captured = capture(state, gradients=gradients)
    buffers = copied(captured.tensors)
    text = json.dumps({k: encode_value(v, k) for k, v in captured.tree.items()}, allow_nan=False)
    tree = {k: decode_value(v, k) for k, v in json.loads(text).items()}
    tensors = {
        s.spec.name: HostTensor(s.spec, b.toreadonly())
        for s, b in zip(captured.tensors, buffers, strict=True)
    }
    assert len(tensors) == len(captured.tensors), "tensor names are not unique"
    return Saved(captured, tree, tensors)


@pytest.fixture
def save():
    return save_state
