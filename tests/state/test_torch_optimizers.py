"""Every optimizer of torch continues bit for bit from a fresh object; nothing is cast or reordered."""

from __future__ import annotations

import copy
import pathlib

import pytest
import torch
from torch import nn

import holdfast
from holdfast.core.errors import StateError

OPTIMIZERS = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "SGD plain": lambda p: torch.optim.SGD(p, lr=0.05),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01), foreach=False),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adamax": lambda p: torch.optim.Adamax(p),
    "Adadelta": lambda p: torch.optim.Adadelta(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.1),
    "Adafactor": lambda p: torch.optim.Adafactor(p),
    "ASGD": lambda p: torch.optim.ASGD(p, t0=1),
    "LBFGS": lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3, history_size=2),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "RMSprop": lambda p: torch.optim.RMSprop(p, momentum=0.9, centered=True),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Muon": lambda p: torch.optim.Muon([q for q in p if q.ndim == 2]),
}


def make(name: str, seed: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)
    return model, OPTIMIZERS[name](list(model.parameters()))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    dtype = next(model.parameters()).dtype
    x = torch.linspace(-1, 1, 48).reshape(8, 6).to(dtype)
    losses = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model(x) - x[:, :4]).square().mean()
        loss.backward()
        return loss

    for _ in range(steps):
        loss = optimizer.step(closure)
        losses.append(float(loss.detach()))
    return losses


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def same_state(a: torch.optim.Optimizer, b: torch.optim.Optimizer) -> bool:
    return same(a.state_dict(), b.state_dict())


def same(x: object, y: object) -> bool:
    if isinstance(x, torch.Tensor):
        return isinstance(y, torch.Tensor) and x.dtype == y.dtype and torch.equal(x, y)
    if isinstance(x, dict):
        return isinstance(y, dict) and x.keys() == y.keys() and all(same(v, y[k]) for k, v in x.items())
    if isinstance(x, (list, tuple)):
        return type(x) is type(y) and len(x) == len(y) and all(same(v, w) for v, w in zip(x, y, strict=True))
    return x == y


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_next_steps_are_bit_equal(name, save):
    model, optimizer = make(name, 1)
    train(model, optimizer, 3)
    saved = save({"model": model, "optimizer": optimizer})
    want = train(model, optimizer, 3)
    for warm in (0, 2):  # into a fresh optimizer and into one that has state already
        other, live = make(name, 2)
        train(other, live, warm)
        plan = saved.into({"model": other, "optimizer": live})
        assert plan.report.exact
        assert train(other, live, 3) == want
        assert same_weights(model, other)
        assert same_state(optimizer, live)


@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - {"AdamW fused"}))
def test_every_optimizer_of_torch_is_here(name):
    assert issubclass(type(make(name, 0)[1]), torch.optim.Optimizer)
    known = {type(make(n, 0)[1]).__name__ for n in OPTIMIZERS} | {"SparseAdam", "Optimizer"}
    assert {n for n in dir(torch.optim) if isinstance(getattr(torch.optim, n), type)} <= known


def test_sparse_adam(save):
    def build(seed):
        torch.manual_seed(seed)
        emb = nn.Embedding(10, 3, sparse=True)
        return emb, torch.optim.SparseAdam(emb.parameters(), lr=0.1)

    def step(emb, opt, n):
        for i in range(n):
            opt.zero_grad()
            emb(torch.tensor([i, 3])).square().sum().backward()
            opt.step()

    a, oa = build(0)
    step(a, oa, 2)
    saved = save({"m": a, "o": oa})
    step(a, oa, 3)
    b, ob = build(1)
    saved.into({"m": b, "o": ob})
    step(b, ob, 3)
    assert torch.equal(a.weight, b.weight)


def test_fp32_moments_of_bf16_parameters_are_not_cast(save):
    model, optimizer = make("Adam", 0, torch.bfloat16)
    train(model, optimizer, 2)
    for entry in optimizer.state.values():
        for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
            entry[key] = entry[key].float() + 1e-6
    saved = save({"m": model, "o": optimizer})
    want = copy.deepcopy([e["exp_avg"] for e in optimizer.state.values()])
    for warm in (0, 1):
        other, live = make("Adam", 1, torch.bfloat16)
        train(other, live, warm)
        saved.into({"m": other, "o": live}, cast=("**",))
        got = [live.state[p]["exp_avg"] for p in other.parameters()]
        assert all(g.dtype == torch.float32 and torch.equal(g, w) for g, w in zip(got, want, strict=True))


def test_absent_state_stays_absent(save):
    model, optimizer = make("AdamW", 0)
    model[0].requires_grad_(False)
    train(model, optimizer, 2)
    assert len(optimizer.state) == 2
    saved = save({"m": model, "o": optimizer})
    other, live = make("AdamW", 1)
    train(other, live, 1)
    assert len(live.state) == 4
    saved.into({"m": other, "o": live})
    assert {id(p) for p in live.state} == {id(p) for p in other[2].parameters()}
    fresh, empty = make("AdamW", 1)
    save({"m": fresh, "o": empty}).into({"m": other, "o": live})
    assert len(live.state) == 0


def test_capture_creates_no_state(save):
    model, optimizer = make("AdamW", 0)
    saved = save({"m": model, "o": optimizer})
    assert len(optimizer.state) == 0
    assert saved.tree["o"]["state"] == {}


def test_in_place_where_it_fits(save):
    model, optimizer = make("Adam", 0)
    train(model, optimizer, 2)
    saved = save({"m": model, "o": optimizer})
    before = {id(p): dict(optimizer.state[p]) for p in model.parameters()}
    entries = [optimizer.state[p] for p in model.parameters()]
    train(model, optimizer, 1)
    saved.into({"m": model, "o": optimizer})
    for p, entry in zip(model.parameters(), entries, strict=True):
        assert optimizer.state[p] is entry
        assert all(entry[k] is t for k, t in before[id(p)].items())


def test_parameters_are_found_by_name(save):
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    optimizer = torch.optim.Adam([*model["a"].parameters(), *model["b"].parameters()])
    for i, p in enumerate(model.parameters()):
        p.grad = torch.full_like(p, i + 1.0)
    optimizer.step()
    saved = save({"m": model, "o": optimizer})
    live = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    turned = torch.optim.Adam([*live["b"].parameters(), *live["a"].parameters()])
    plan = saved.into({"m": live, "o": turned})
    assert torch.equal(
        turned.state[live["a"].weight]["exp_avg"], optimizer.state[model["a"].weight]["exp_avg"]
    )
    assert any("another order" in n for n in plan.report.notes)


def test_lbfgs_refuses_another_order(save):
    model, optimizer = make("LBFGS", 0)
    saved = save({"m": model, "o": optimizer})
    turned = torch.optim.LBFGS(list(model.parameters())[::-1])
    with pytest.raises(StateError, match="LBFGS keeps one flat vector"):
        saved.into({"m": model, "o": turned})


def test_parameters_that_no_module_holds(save):
    w = torch.randn(3, requires_grad=True)
    optimizer = torch.optim.Adam([w])
    w.grad = torch.ones(3)
    optimizer.step()
    saved = save({"o": optimizer, "w": w})
    assert "o/state/group0.0/exp_avg" in saved.tensors
    v = torch.zeros(3, requires_grad=True)
    live = torch.optim.Adam([v])
    saved.into({"o": live, "w": v})
    assert torch.equal(v, w)
    assert torch.equal(live.state[v]["exp_avg"], optimizer.state[w]["exp_avg"])


def test_named_then_nameless_pairs_by_place(save):
    model, optimizer = make("Adam", 0)
    train(model, optimizer, 1)
    saved = save({"m": model, "o": optimizer})
    other, live = make("Adam", 1)
    plan = saved.into({"o": live}, unexpected=("m",))
    assert any("paired by their place" in n for n in plan.report.notes)
    assert torch.equal(live.state[other[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


def test_hyperparameters(save):
    model, optimizer = make("AdamW fused", 0)
    optimizer.param_groups[0].update(
        lr=0.1 + 0.2, betas=(0.8, 0.95), initial_lr=1.0, mine={"a": 1}, maximize=True
    )
    saved = save({"m": model, "o": optimizer})
    other = make("SGD", 0)[0]
    live = torch.optim.AdamW(other.parameters(), lr=5.0, foreach=True)
    live.param_groups[0]["only_here"] = 3
    plan = saved.into({"m": other, "o": live})
    group = live.param_groups[0]
    assert group["lr"] == 0.1 + 0.2
    assert group["betas"] == (0.8, 0.95)
    assert group["initial_lr"] == 1.0
    assert group["mine"] == {"a": 1}
    assert group["maximize"] is True
    assert group["foreach"] is True
    assert group["fused"] is None
    assert group["only_here"] == 3
    notes = "\n".join(plan.report.notes)
    assert "o/param_groups/0/fused: keeps the live None" in notes
    assert "o/param_groups/0/only_here" in notes


def test_tensor_lr_stays_a_tensor(save):
    model, optimizer = make("AdamW", 0)
    live = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5))
    lr = live.param_groups[0]["lr"]
    save({"m": model, "o": optimizer}).into({"m": model, "o": live})
    assert live.param_groups[0]["lr"] is lr
    assert lr == torch.tensor(0.01)
    save({"m": model, "o": torch.optim.AdamW(model.parameters(), lr=0.25)}).into({"m": model, "o": live})
    assert live.param_groups[0]["lr"] is lr
    assert lr == 0.25


def test_groups_that_differ(save):
    model, _ = make("SGD", 0)
    one = torch.optim.SGD(model.parameters(), lr=0.1)
    two = torch.optim.SGD([{"params": model[0].parameters()}, {"params": model[2].parameters()}], lr=0.1)
    with pytest.raises(StateError) as e:
        save({"m": model, "o": two}).into({"m": model, "o": one})
    assert "o/param_groups/1: unexpected" in str(e.value)
    with pytest.raises(StateError) as e:
        save({"m": model, "o": one}).into({"m": model, "o": two})
    assert "o/param_groups/1: missing" in str(e.value)


def test_another_class_of_optimizer(save):
    model, adam = make("Adam", 0)
    train(model, adam, 1)
    saved = save({"m": model, "o": adam})
    with pytest.raises(StateError, match=r"o: expected a SGD .live., found the state of a Adam"):
        saved.into({"m": model, "o": torch.optim.SGD(model.parameters())})
    with pytest.raises(StateError, match="no optimizer's state"):
        save({"m": model, "o": [1]}).into({"m": model, "o": adam})


def test_new_parameter(save):
    model, optimizer = make("Adam", 0)
    train(model, optimizer, 1)
    saved = save({"m": model, "o": optimizer})
    bigger = nn.Sequential(*make("Adam", 0)[0], nn.Linear(4, 4))
    live = torch.optim.Adam(bigger.parameters(), amsgrad=True)
    with pytest.raises(StateError) as e:
        saved.into({"m": bigger, "o": live})
    assert "m/3.weight: missing" in str(e.value)
    assert "o/state/m/3.weight: missing" in str(e.value)
    saved.into({"m": bigger, "o": live}, missing=("m/3.*", "o/state/m/3.*"))
    assert torch.equal(bigger[0].weight, model[0].weight)
    assert torch.equal(live.state[bigger[0].weight]["exp_avg"], optimizer.state[model[0].weight]["exp_avg"])


class Wrapper(torch.optim.AdamW):
    """An optimizer that says itself what its state is."""

    def state_dict(self):
        return {"inner": super().state_dict(), "mine": 3}

    def load_state_dict(self, state):
        self.mine = state["mine"]
        super().load_state_dict(state["inner"])


def test_own_state_dict(save):
    model, _ = make("SGD", 0)
    optimizer = Wrapper(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    saved = save({"m": model, "o": optimizer})
    other, _ = make("SGD", 1)
    live = Wrapper(other.parameters(), lr=0.5)
    plan = saved.into({"m": other, "o": live})
    assert live.mine == 3
    assert train(other, live, 2) == train(model, optimizer, 2)
    assert any("own load_state_dict" in n for n in plan.report.notes)


def test_hooks_are_respected(save):
    model, optimizer = make("Adam", 0)
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "extra": 1})
    assert save({"m": model, "o": optimizer}).tree["o"]["extra"] == 1


def test_state_of_no_parameter(save):
    model, optimizer = make("SGD", 0)
    optimizer.state["global_step"] = 5
    saved = save({"m": model, "o": optimizer})
    other, live = make("SGD", 1)
    live.state["old"] = 1
    saved.into({"m": other, "o": live})
    assert live.state["global_step"] == 5
    assert "old" not in live.state


def test_only_part_of_an_optimizer(save):
    model, optimizer = make("Adam", 0)
    train(model, optimizer, 1)
    saved = save({"m": model, "o": optimizer})
    other, live = make("Adam", 1)
    train(other, live, 2)
    before = [p.detach().clone() for p in other.parameters()]
    step = live.state[other[0].weight]["step"].clone()
    saved.into({"m": other, "o": live}, only=("o/state/m/2.*/**",))
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))
    assert torch.equal(live.state[other[2].weight]["exp_avg"], optimizer.state[model[2].weight]["exp_avg"])
    assert live.state[other[0].weight]["step"] == step


@pytest.mark.parametrize("name", ["AdamW", "NAdam", "ASGD"])
def test_moments_of_a_scalar_that_is_spread_are_spread_and_its_counters_are_not(
    name: str, tmp_path: pathlib.Path
) -> None:
    tensor = pytest.importorskip("torch.distributed.tensor")
    from torch.distributed.device_mesh import DeviceMesh

    mesh = DeviceMesh("cpu", [0], _init_backend=False, _rank=0)

    def spread(value: float) -> torch.Tensor:
        return tensor.DTensor.from_local(torch.tensor(value), mesh, [tensor.Replicate()], run_check=False)

    def made(value: float) -> tuple[nn.ParameterDict, torch.optim.Optimizer]:
        model = nn.ParameterDict({"scale": nn.Parameter(spread(value))})
        return model, OPTIMIZERS[name](list(model.parameters()))

    def step(model: nn.ParameterDict, optimizer: torch.optim.Optimizer) -> float:
        model["scale"].grad = spread(0.5)
        optimizer.step()
        return model["scale"].to_local().item()

    one, other = made(2.0), made(3.0)
    step(*one)
    holdfast.save(tmp_path, dict(zip(("model", "optimizer"), one, strict=True)))
    holdfast.load(tmp_path, into=dict(zip(("model", "optimizer"), other, strict=True)))
    kinds = [{k: type(v) for k, v in o.state[m["scale"]].items()} for m, o in (one, other)]
    assert kinds[0] == kinds[1]
    assert step(*one) == step(*other)
