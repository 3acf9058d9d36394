"""Random state: captured without drawing, restored so that the next draws are the same."""

from __future__ import annotations

import random
import subprocess
import sys

import numpy as np
import pytest
import torch

from holdfast.core.errors import StateError
from holdfast.state.rng import capture_rng, preserved_rng, restore_rng


def draw() -> list[float]:
    return [
        random.random(),
        random.gauss(0, 1),
        np.random.rand(),
        np.random.randn(),
        float(torch.rand(())),
        float(torch.randn(())),
    ]


@pytest.fixture(autouse=True)
def _own_random_state():
    with preserved_rng():
        yield


def test_round_trip(save):
    random.gauss(0, 1)
    np.random.randn()  # leaves a second normal in the cache, which is state too
    saved = save({"rng": capture_rng()})
    want = draw()
    draw()
    assert restore_rng(saved.load("numpy")["rng"]) == []
    assert draw() == want


def test_capture_draws_nothing(save):
    before = capture_rng()
    save(
        {
            "rng": capture_rng(),
            "g": torch.Generator(),
            "n": np.random.default_rng(0),
            "m": torch.nn.Linear(2, 2),
        }
    )
    with preserved_rng():
        torch.nn.Linear(2, 2)  # drew; the line above drew to make the module
    after_module = capture_rng()
    save({"rng": after_module})
    assert same(capture_rng(), after_module)
    assert not same(before, after_module)


def same(a: object, b: object) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return np.array_equal(a, b) if isinstance(a, np.ndarray) else a == b


def test_preserved():
    before = capture_rng()
    with preserved_rng():
        draw()
    assert same(capture_rng(), before)


def test_notes_say_what_was_not_carried_over():
    tree = capture_rng()
    tree["cuda"] = {"7": np.zeros(16, np.uint8)}
    del tree["numpy"]
    notes = restore_rng(tree)
    assert any("cuda:7: this process has no such device" in n for n in notes)
    assert any("numpy: not in the checkpoint" in n for n in notes)


def test_malformed_states_are_named():
    with pytest.raises(StateError, match="random state of python: malformed"):
        restore_rng({"python": {"version": 3, "internal": np.zeros(3), "gauss_next": None}})
    with pytest.raises(StateError, match="random state of torch"):
        restore_rng({**capture_rng(), "torch": np.zeros(3, np.uint8)})
    with pytest.raises(StateError, match="expected a mapping"):
        restore_rng([1])


GENERATORS = {
    "python": (lambda s: random.Random(s), lambda g: [g.random(), g.gauss(0, 1)]),
    "numpy PCG64": (
        np.random.default_rng,
        lambda g: [g.random(), g.integers(0, 9), g.integers(0, 9, dtype=np.uint32)],
    ),
    "numpy MT19937": (lambda s: np.random.Generator(np.random.MT19937(s)), lambda g: list(g.random(3))),
    "numpy Philox": (lambda s: np.random.Generator(np.random.Philox(s)), lambda g: list(g.random(3))),
    "numpy SFC64": (lambda s: np.random.Generator(np.random.SFC64(s)), lambda g: list(g.random(3))),
    "numpy PCG64DXSM": (lambda s: np.random.Generator(np.random.PCG64DXSM(s)), lambda g: list(g.random(3))),
    "numpy RandomState": (np.random.RandomState, lambda g: [g.rand(), g.randn()]),
    "numpy bits": (np.random.PCG64, lambda g: [g.random_raw()]),
    "torch": (lambda s: torch.Generator().manual_seed(s), lambda g: torch.randn(3, generator=g).tolist()),
}


@pytest.mark.parametrize("name", sorted(GENERATORS))
def test_owned_generators(name, save):
    make, use = GENERATORS[name]
    live = make(5)
    use(live)
    saved = save({"g": live, "box": [live]})
    want = use(live)
    other = make(6)
    plan = saved.into({"g": other, "box": [other]})
    assert plan.replaced == {}
    assert use(other) == want
    assert use(saved.load()["g"]) == want


def test_subclass_of_random(save):
    class Mine(random.Random):
        pass

    live, other = Mine(1), Mine(2)
    save({"r": live}).into({"r": other})
    assert live.random() == other.random()


NO_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torch":
            raise AssertionError("torch was imported")
sys.meta_path.insert(0, Block())
import numpy as np
from holdfast.core.errors import MissingDependency
from holdfast.state import capture, place, rng, codecs, records, tensors, transfer
from holdfast.format.values import TensorLeaf, Typed
from holdfast.state.tensors import HostTensor, TensorSpec
spec = TensorSpec("m/w", "bfloat16", (2, 3), (1, 2))
host = {"m/w": HostTensor(spec, memoryview(bytes(range(12))))}
tree = {"m": {"w": TensorLeaf("m/w", "torch.Parameter"), "s": Typed("torch.Size", [1, 2])}}
tree["m"]["d"] = Typed("torch.dtype", "float32")
out = place.materialize(tree, host, "numpy")
assert out["m"]["w"].tobytes() == bytes(range(12)), out
assert out["m"]["w"].strides == (2, 4)
assert out["m"]["w"].dtype.name == "bfloat16"
assert out["m"]["s"] == (1, 2)
state = {"a": {"x": np.arange(3), "r": np.random.default_rng(0)}, "n": 1}
found = capture.capture(state)
data = {s.spec.name: bytearray(s.spec.nbytes) for s in found.tensors}
places = [transfer.Stretch(memoryview(b), 0, [(0, len(b))]) for b in data.values()]
transfer.Transfer(found.tensors, [False] * len(data), places).copy(found.tensors)
hosts = {s.spec.name: HostTensor(s.spec, memoryview(data[s.spec.name])) for s in found.tensors}
state["a"]["x"][:] = 0
place.plan_restore(state, found.tree, {n: h.spec for n, h in hosts.items()}, {}).apply(hosts)
assert state["a"]["x"].tolist() == [0, 1, 2]
assert place.materialize(found.tree, hosts, "torch")["n"] == 1
rng.restore_rng(rng.capture_rng())
assert "torch" not in sys.modules
try:
    place.plan_restore({"m": {"w": None}}, {"m": {"w": tree["m"]["w"]}}, {"m/w": spec}, {})
except ValueError as e:
    assert "import torch first" in str(e)
else:
    raise AssertionError("a torch tensor was planned without torch")
"""


def test_without_torch():
    subprocess.run([sys.executable, "-c", NO_TORCH], check=True, timeout=60)


def test_torch_asked_for_and_not_installed():
    code = """
import sys
sys.modules["torch"] = None
from holdfast.core.errors import MissingDependency
from holdfast.state.place import materialize
from holdfast.format.values import Typed
try:
    materialize(Typed("torch.dtype", "float32"), {}, "torch")
except MissingDependency as e:
    assert "holdfast[torch]" in str(e)
else:
    raise AssertionError
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
