"""A snapshot that only looks at the state must be, byte for byte, the snapshot that walks all of it."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import decimal
import enum
import gc
import pathlib
import random
import re
import weakref
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import holdfast
from holdfast.core.errors import UnsupportedValue
from holdfast.saving import plan as planning
from holdfast.saving.arena import Arena
from holdfast.saving.snapshot import Snapshot, Snapshotter, take_snapshot


class Taking(Snapshotter):
    """Snapshots into an arena of its own, copied at once."""

    def __init__(self, state: dict[str, object], arena: Arena) -> None:
        super().__init__(state)
        self.arena = arena

    def take(self, *, gradients: bool = False) -> Snapshot:
        found = self.prepare(self.plan(gradients=gradients), self.arena)
        found.copy()
        return found


class Extra(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.note = b"one"
        self.scale = nn.Parameter(torch.ones(3))

    def get_extra_state(self) -> object:
        return {"note": self.note, "sum": torch.ones(2) * len(self.note)}

    def set_extra_state(self, state: object) -> None:
        raise AssertionError


class Counter:
    def __init__(self) -> None:
        self.held: dict[str, object] = {"n": 1, "memory": torch.arange(5.0), "lines": [1]}

    def state_dict(self) -> dict[str, object]:
        return dict(self.held)

    def load_state_dict(self, state: object) -> None:
        raise AssertionError


@dataclasses.dataclass
class Settings:
    depth: int = 3
    weights: object = dataclasses.field(default_factory=lambda: torch.ones(4))


class Colour(enum.Enum):
    RED = 1
    BLUE = 2


class Words(str):
    pass


State = dict[str, object]


def build() -> State:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), Extra(), nn.Linear(4, 3), nn.Linear(4, 3))
    optimizer = torch.optim.AdamW(
        [{"params": list(model[0].parameters())}, {"params": list(model[3].parameters()), "lr": 0.5}]
    )
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    step(model, optimizer)
    next(iter(optimizer.state.values()))["tail"] = 5
    shared = torch.arange(6.0)
    early, inner = Counter(), nn.Linear(2, 2)
    early.held["tied"] = shared
    early.held["twins"] = [torch.zeros(3)] * 2
    early.held["many"] = [torch.full((2,), float(i)) for i in range(6)]
    return {
        "early": early,
        "held": Settings(weights=inner),
        "of_held": torch.optim.SGD(inner.parameters(), 0.1),
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "stateless": torch.optim.SGD(model.parameters(), 0.1),
        "values": {
            "none": None, "flag": True, "count": 1, "loss": 0.5, "text": "ab", "raw": b"xy", "z": 1 + 2j,
            "when": datetime.datetime(2024, 1, 1, tzinfo=datetime.UTC), "exact": decimal.Decimal("1.0"),
            "series": list(range(20)), "short": [1, 2, [3.5, "x"]], "pair": (1, torch.ones(2)), "set": {1, 2},
            "range": range(3), "colour": Colour.RED, "settings": Settings(), "size": torch.Size([2]),
            "queue": collections.deque([1, 2], maxlen=4), "counter": collections.Counter(a=2),
            "default": collections.defaultdict(list, {"k": [1]}), 5: "five", "place": pathlib.Path("a"),
            "ordered": collections.OrderedDict(a=torch.zeros(2), b=2),
        },
        "tensors": {
            "a": torch.randn(4), "b": torch.randn(2, 3), "flag": torch.tensor([True, False]), "empty": torch.empty(0),
            "half": torch.randn(3).bfloat16(), "tied": shared, "again": shared, "turned": torch.randn(3, 5).t(),
            "complex": torch.randn(3, dtype=torch.complex64), "part": torch.arange(9000.0)[5:9], "nan": torch.tensor(float("nan")),
            "wide": torch.randn(50, 200), "learns": torch.ones(2, requires_grad=True),
            "derived": torch.ones(2, requires_grad=True) * 2, "f8": torch.ones(9).to(torch.float8_e5m2),
            **{f"small{i}": torch.full((i + 1,), float(i)) for i in range(8)},
        },
        "arrays": {
            "x": np.arange(6.0), "x2": np.arange(6.0), "y": np.arange(6).reshape(2, 3), "swapped": np.arange(3, dtype=">f4"), "one": np.float32(2),
            "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)), "flags": np.array([True, False]),
            "big": np.zeros(9000), "square": np.arange(4.0).reshape(2, 2), "none": np.zeros((0, 3)),
        },
        "generators": [torch.Generator(), np.random.default_rng(0), random.Random(0)],
        "odd": {(1, 2): {"deep": 7}},
        "step": 3,
    }  # fmt: skip


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    optimizer.zero_grad()


def everything(taken: Snapshot) -> object:
    return [
        (part, bytes(p.tree), p.kind, p.aliases, p.tensors, bytes(p.data), p.offset)
        for part, p in taken.image.parts.items()
    ]


def agree(snapshotter: Taking, state: State, *, gradients: bool = False) -> None:
    quick = everything(snapshotter.take(gradients=gradients))
    full = everything(take_snapshot(state, Arena(), gradients=gradients))
    for a, b in zip(quick, full, strict=True):  # type: ignore[call-overload]
        assert a == b


MUTATIONS: dict[str, Callable[[State], object]] = {}


def lines(text: str) -> None:
    """Each line is a mutation: `s` is the state, and its parts go by their first letters."""
    for line in filter(None, map(str.strip, text.splitlines())):
        MUTATIONS[line] = lambda s, line=line: exec(
            line,
            {
                **globals(), "s": s, "m": s["model"], "o": s["optimizer"], "v": s["values"], "t": s["tensors"],
                "a": s["arrays"], "g": s["generators"], "e": s["early"],
            },
        )  # fmt: skip


lines(
    """
    t['a'] = torch.randn(4)
    t['a'].add_(1)
    t['a'].resize_(2)
    t['wide'].resize_(60, 200)
    t['b'].t_()
    t['b'].unsqueeze_(0)
    t['b'].data = t['b'].data.view(3, 2)
    t['b'].data = t['b'].data.view(torch.int32)
    t['a'].data = torch.zeros(4)
    t['a'].data = torch._neg_view(t['a'].data)
    t['complex'].data = t['complex'].data.conj()
    t['a'].requires_grad_()
    t['learns'].requires_grad_(False)
    t['learns'].detach_().requires_grad_()
    t['learns'] = (t['learns'].detach().requires_grad_() * 1)
    t['derived'].detach_().requires_grad_()
    t['a'] = nn.Parameter(t['a'].detach())
    t['a'] = t['a'].detach()
    t['a'].untyped_storage().resize_(0); t['a'].resize_(0)
    t['tied'] = t['tied'].clone()
    t['a'] = t['small3']
    t['a'] = t['b'] = t['small5']
    t['part'] = torch.arange(9000.0)[6:10]
    t['part'].add_(1)
    t['turned'].mul_(2)
    t['flag'] = torch.frombuffer(bytearray(b'\\x02\\x00'), dtype=torch.bool)
    t['small2'].data = t['small2'].data.double()
    t['small2'].set_(t['wide'])
    t['new'] = torch.ones(3)
    s['tensors'] = {('b' * 2 if k == 'b' else k): w for k, w in t.items()}
    s['tensors'] = {(''.join(list(k)) if isinstance(k, str) else k): w for k, w in t.items()}
    t.pop('a', None)
    t['a'] = 4
    t['a'] = {'inner': torch.ones(2)}
    t['a'] = np.ones(3)
    s['tensors'].update(reversed(list(t.items()))); x = dict(reversed(list(t.items()))); t.clear(); t.update(x)
    s['tensors'] = dict(t)
    s['tensors'] = collections.OrderedDict(t)
    s['tensors'] = list(t.values())
    x = t.pop('small1', 1); t['small1'] = x
    s['model'] = nn.Linear(2, 2)
    s['other'] = torch.ones(2)
    s.pop('step', None)
    s['step'] = s.get('step', 0) + 1
    s['step'] = 3.0
    x = s.pop('values'); s['values'] = x
    m[3].weight.data = torch.randn(3, 4)
    m[3].weight = nn.Parameter(m[3].weight.data)
    m[3].weight = m[0].weight
    m[0].bias = m[3].bias
    m[0].bias = None
    m[4].weight = m[3].weight
    x = m[3], m[4]; m[4], m[3] = x
    m[4] = nn.Linear(4, 3)
    m[4] = nn.Identity()
    m.append(nn.Linear(1, 1))
    m._modules = {('last' if k == '4' else k): x for k, x in m._modules.items()}
    m[0]._parameters = {k.upper(): x for k, x in m[0]._parameters.items()}
    m[1]._buffers = {k.upper(): x for k, x in m[1]._buffers.items()}
    o.param_groups[0] = {(k.upper() if k == 'lr' else k): x for k, x in o.param_groups[0].items()}
    m[1].register_buffer('running_mean', m[1].running_mean, persistent=False)
    m[1].register_buffer('extra', torch.ones(2))
    m[1].register_buffer('unsaved', torch.ones(2), persistent=False)
    m[1].running_mean = torch.randn(4)
    m[1].num_batches_tracked += 1
    m[0].register_parameter('late', nn.Parameter(torch.ones(2)))
    m[2].note = b'longer'
    m[2].get_extra_state = lambda: {'note': 1}
    m[2].get_extra_state = lambda: {'note': b'one', 'sum': m[0].bias.detach() if m[0].bias is not None else 1}
    m[0].register_state_dict_post_hook(lambda module, state, prefix, meta: state.update({'x': torch.ones(1)}))
    m[0].state_dict = lambda: {'only': torch.ones(2)}
    m.__class__ = type('Other', (nn.Sequential,), {})
    m[0].weight.requires_grad_(False)
    m.half()
    m.double()
    s['model'] = nn.parallel.DataParallel(m)
    s['model'] = m.module if hasattr(m, 'module') else m
    o.param_groups[0]['lr'] = 0.25
    o.param_groups[0]['lr'] = 1
    o.param_groups[0]['lr'] = torch.tensor(0.5)
    o.param_groups[0]['betas'] = (0.5, 0.6)
    o.param_groups[1]['note'] = 'here'
    o.param_groups.reverse()
    o.param_groups[0]['params'].reverse()
    o.add_param_group({'params': [nn.Parameter(torch.ones(2))]})
    o.state.clear()
    o.state = collections.defaultdict(dict)
    o.state.pop(next(iter(o.state), None), None)
    o.state[next(iter(o.state), 'k')] = {'odd': 1}
    o.state['global'] = 4
    o.state[nn.Parameter(torch.ones(1))] = {'orphan': torch.ones(1)}
    next(iter(o.state.values()), {}).update(extra=torch.ones(3))
    next(iter(o.state.values()), {}).update(step=7)
    step(m, o)
    s['scheduler'].step()
    o.register_state_dict_post_hook(lambda opt, state: state)
    s['optimizer'] = torch.optim.SGD(m.parameters(), 0.1, momentum=0.9)
    x, y = list(o.state.values())[:2]; z = dict(y); y.clear(); y.update({'tail': x.pop('tail')}, **z)
    s['stateless'].param_groups[0]['params'].reverse()
    s['stateless'].param_groups[0]['params'][0] = nn.Parameter(torch.ones(1))
    s['stateless'].param_groups[0]['params'].pop()
    v['count'] = 2
    v['count'] = True
    v['count'] = 1.0
    v['count'] = 2**80
    v['flag'] = 1
    v['loss'] = 0.0
    v['loss'] = -0.0
    v['loss'] = float('nan')
    v['loss'] = float('inf')
    v['text'] = 'ab\\ud800'
    v['text'] = r'"\\u0041' + '3"'
    v['text'] = 'A0'
    v['none'] = {}
    v['none'] = pathlib.Path('x')
    v['none'] = torch.ones(2)
    v['raw'] = b'"\\\\u00411"'
    v['exact'] = decimal.Decimal('1.00')
    v['when'] = v['when'].astimezone(datetime.timezone(datetime.timedelta(hours=2)))
    v['series'].append(1)
    v['series'][0] = -0.0
    v['series'] = v['series'][:3]
    v['series'].append(torch.ones(1))
    v['short'].append(4)
    v['short'][0] = 9
    v['short'][2][0] = 0.25
    v['short'] = list(v['short'])
    v['short'] = tuple(v['short'])
    v['short'] += range(10)
    v['pair'] = (2, v['pair'][1])
    v['set'].add(4)
    v['range'] = range(0, 3, 5)
    v['colour'] = Colour.BLUE
    v['settings'].depth = 4
    v['settings'].weights = torch.ones(5)
    v['settings'].weights = s['tensors'].get('small7')
    v['settings'].weights = s['model']
    v['settings'].weights = nn.Linear(2, 2); s['optimizer'] = torch.optim.SGD(v['settings'].weights.parameters())
    v['queue'].append(3)
    v['queue'] = collections.deque([1, 2], maxlen=5)
    v['counter']['a'] += 1
    v['counter'] = dict(v['counter'])
    v['default']['new']
    v['default'].default_factory = dict
    v[5] = 'six'
    x = v.pop(5, 0); v[5.0] = x
    x = v.pop(5, 0); v['5'] = x
    s['odd'][(1, 2)]['deep'] = 8
    s['odd'][(1, 3)] = 8
    s['odd'] = {1: 2}
    s['values'] = {(5.0 if k == 5 else k): w for k, w in v.items()}
    s['values'] = {('5' if k == 5 else k): w for k, w in v.items()}
    s['values'] = {(Words(k) if k == 'text' else k): w for k, w in v.items()}; s['values'] = v
    s['values'] = {(k + 'x' if k == 'text' else k): w for k, w in v.items()}
    v['ordered'].move_to_end('a')
    v[True] = 1
    a['x'] = np.arange(6.0)
    a['x'] += 1
    a['x'].shape = (3, 2)
    a['x'] = a['x'][:2]
    a['square'] = a['square'].T
    a['x'] = a['x'].view('i8')
    a['x'] = a['x'].astype('f4')
    a['x'].resize(12, refcheck=False)
    a['x'] = a['y']
    a['x'] = a['x2']
    a['x'] = a['big'][2:4]
    a['one'] = np.float64(3)
    a['one'] = 3
    a['y'] = a['y'].T
    a['x'].byteswap(inplace=True)
    g[0].manual_seed(5)
    g[1].random()
    g[2].random()
    g.append(4)
    g[1] = np.random.RandomState(1)
    e.held['n'] = 2
    e.held['memory'] = torch.arange(6.0)
    e.held['memory'] = torch.zeros(5)
    e.held['memory'] = t['small4'].detach()
    e.held['tied'] = e.held['tied'].clone()
    e.held['twins'][0] = e.held['twins'][0].clone()
    e.held['many'] = [x + 1 for x in e.held['many']]
    s['held'].weights.weight = nn.Parameter(s['held'].weights.weight.data)
    e.held['again'] = e.held['memory']
    e.held['lines'].append(2)
    e.held = {}
    t['a'] = e.held.get('memory')
    random.random(); np.random.rand(); torch.rand(1)
    torch.set_default_dtype(torch.float32)
    """
)


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_change_is_noticed(name: str) -> None:
    state = build()
    snapshotter = Taking(state, Arena())
    agree(snapshotter, state)
    agree(snapshotter, state)
    MUTATIONS[name](state)
    agree(snapshotter, state)
    agree(snapshotter, state)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.lists(st.sampled_from(sorted(MUTATIONS)), min_size=1, max_size=3), max_size=5))
def test_changes_upon_changes_are_noticed(rounds: list[list[str]]) -> None:
    state = build()
    snapshotter = Taking(state, Arena())
    for names in rounds:
        agree(snapshotter, state)
        for name in names:
            try:
                MUTATIONS[name](state)
            except (TypeError, KeyError, AttributeError, RuntimeError, ValueError, IndexError):
                continue  # what it changes is no longer there
        try:
            take_snapshot(state, Arena())
        except (UnsupportedValue, KeyError) as e:  # torch knows no state_dict with orphans
            with pytest.raises(type(e)):
                snapshotter.take()
            return
        agree(snapshotter, state)


@pytest.fixture
def full_captures(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    recapture, plan = planning.Recapture, planning.Planner._from_start
    monkeypatch.setattr(planning, "Recapture", lambda *a, **k: made.append("traced") or recapture(*a, **k))
    monkeypatch.setattr(
        planning.Planner, "_from_start", lambda *a, **k: made.append("plain") or plan(*a, **k)
    )
    return made


STEADY = (
    "step(m, o)", "s['scheduler'].step()", "v['count'] = 2", "v['loss'] = float('nan')", "t['a'].add_(1)",
    "t['part'].add_(1)", "a['x'] += 1", "g[0].manual_seed(5)", "g[1].random()", "g[2].random()", "e.held['n'] = 2",
    "e.held['memory'] = torch.zeros(5)", "e.held['lines'].append(2)", "o.param_groups[0]['lr'] = 0.25", "m[2].note = b'longer'",
    "v['settings'].depth = 4", "v['series'].append(1)", "e.held['many'] = [x + 1 for x in e.held['many']]", "m[1].num_batches_tracked += 1", "v['colour'] = Colour.BLUE",
    "s['tensors'] = dict(t)", "random.random(); np.random.rand(); torch.rand(1)", "v[5] = 'six'",
    "t['a'] = t['a'].detach()", "v['short'] = list(v['short'])",
)  # fmt: skip


def test_in_the_steady_state_nothing_is_captured_in_full(full_captures: list[str]) -> None:
    state = build()
    snapshotter = Taking(state, Arena())
    snapshotter.take()
    assert full_captures == ["traced"]
    for name in STEADY:
        MUTATIONS[name](state)
        snapshotter.take()
        assert full_captures == ["traced"], name


def test_memory_made_ready_before_is_no_second_capture(full_captures: list[str]) -> None:
    state = build()
    snapshotter = Taking(state, Arena())
    snapshotter.prewarm(snapshotter.plan(), snapshotter.arena)
    memory = snapshotter.arena.memory
    snapshotter.take()
    assert snapshotter.arena.memory is memory is not None
    assert full_captures == ["traced"]


def test_after_a_change_one_full_capture_is_enough(full_captures: list[str]) -> None:
    state = build()
    snapshotter = Taking(state, Arena())
    snapshotter.take()
    MUTATIONS["t['new'] = torch.ones(3)"](state)
    snapshotter.take()
    snapshotter.take()
    assert full_captures == ["traced", "traced"]


def test_gradients_come_and_go(full_captures: list[str]) -> None:
    state = build()
    snapshotter = Taking(state, Arena())
    agree(snapshotter, state)
    for p in state["model"].parameters():  # type: ignore[attr-defined]
        p.grad = torch.ones_like(p)
    agree(snapshotter, state, gradients=True)
    full_captures.clear()
    quick = everything(snapshotter.take())
    assert full_captures == []
    assert quick == everything(take_snapshot(state, Arena()))


def test_an_arena_with_other_memory_gets_the_copy() -> None:
    state = build()
    snapshotter = Taking(state, arena := Arena())
    agree(snapshotter, state)
    arena.reserve([1 << 22])  # the arena grows, and hands out other memory from here on
    state["tensors"]["small3"].zero_()  # type: ignore[index]
    agree(snapshotter, state)


def test_what_is_refused_is_refused_with_its_path_and_forgiven() -> None:
    state = build()
    snapshotter = Taking(state, Arena())
    snapshotter.take()
    values = state["values"]
    assert isinstance(values, dict)
    values["text"] = Words("x")
    with pytest.raises(UnsupportedValue, match=r"values/text: a .*Words is a subclass"):
        snapshotter.take()
    values["text"] = "x"
    agree(snapshotter, state)


def test_a_codec_registered_later_is_used() -> None:
    class Point(nn.Module):
        x = 1

    state: State = {"p": Point(), "t": torch.ones(2)}
    snapshotter = Taking(state, Arena())
    agree(snapshotter, state)
    holdfast.register_codec(Point, "tests.recapture.point", encode=lambda p: p.x, decode=lambda x: Point())
    agree(snapshotter, state)


def test_replaced_tensors_are_let_go() -> None:
    model = nn.Linear(300, 300)
    optimizer = torch.optim.Adam(model.parameters())
    step(model, optimizer)
    state: State = {"big": {"t": torch.ones(100_000)}, "model": model, "optimizer": optimizer}
    snapshotter = Taking(state, Arena())
    snapshotter.take()
    snapshotter.take()
    moments = next(iter(optimizer.state.values()))
    watched = [weakref.ref(t) for t in (state["big"]["t"], model.weight, moments["exp_avg"])]  # type: ignore[index]
    del moments
    state["big"] = {"t": torch.ones(1)}
    model.weight = None  # type: ignore[assignment]
    optimizer.state.clear()
    optimizer.param_groups[0]["params"].clear()
    gc.collect()
    assert [r() for r in watched] == [None, None, None]


def test_memory_that_tensors_gave_up_is_let_go() -> None:
    big = torch.arange(100_000.0).numpy()
    held = weakref.ref(big)
    state: State = {"t": torch.from_numpy(big)}
    snapshotter = Taking(state, Arena())
    snapshotter.take()
    snapshotter.take()
    del big
    state["t"].data = torch.ones(2)  # type: ignore[attr-defined]
    gc.collect()
    assert held() is None


def test_nesting_is_limited_wherever_it_grows() -> None:
    counter = Counter()
    state: State = {"outer": [[[counter]]]}
    snapshotter = Taking(state, Arena())
    snapshotter.take()
    for depth in range(80, 100):
        deep: object = 1
        for _ in range(depth):
            deep = [deep]
        counter.held["lines"] = deep
        try:
            full = everything(take_snapshot(state, Arena()))
        except UnsupportedValue as e:
            with pytest.raises(UnsupportedValue, match=re.escape(str(e))):
                snapshotter.take()
        else:
            assert everything(snapshotter.take()) == full


def test_an_array_can_still_be_resized() -> None:
    array = np.arange(4.0)
    state: State = {"a": array}
    snapshotter = Taking(state, Arena())
    snapshotter.take()
    snapshotter.take()
    del state["a"]
    array.resize(8)
    assert len(array) == 8
