"""Modules: canonical names, ties, extra state, own state_dicts, gradients."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from holdfast.core.errors import StateError, UnsupportedValue


class Tied(nn.Module):
    def __init__(self, *, tied: bool = True) -> None:
        super().__init__()
        self.emb = nn.Embedding(5, 3)
        self.out = nn.Linear(3, 5, bias=False)
        if tied:
            self.out.weight = self.emb.weight


class Wrapped(nn.Module):
    """Names that look like a wrapper's and are not."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(2, 2)
        self._orig_mod = nn.Linear(2, 2)
        self._checkpoint_wrapped_module = nn.Linear(2, 2)


class WithExtra(nn.Module):
    def __init__(self, value: object = None) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))
        self.value = value
        self.seen: torch.Tensor | None = None

    def get_extra_state(self) -> object:
        return {"value": self.value, "t": torch.full((2,), 3.0)}

    def set_extra_state(self, state: dict[str, object]) -> None:
        self.value = state["value"]
        self.seen = self.w.detach().clone()


class OwnState(nn.Module):
    """Stores something else than its tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(2))
        self.scale = 1

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[prefix + "packed"] = self.w.detach() * 2
        destination[prefix + "scale"] = self.scale

    def _load_from_state_dict(self, state, prefix, *args):
        with torch.no_grad():
            self.w.copy_(state[prefix + "packed"] / 2)
        self.scale = state[prefix + "scale"]


def equal(a: nn.Module, b: nn.Module) -> bool:
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(torch.equal(x[k], y[k]) for k in x)


def net() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.Linear(8, 3))


def test_state_dict_names_and_bytes(save):
    model = net()
    model(torch.randn(4, 1, 4, 4))
    saved = save({"model": model})
    want = model.state_dict()
    back = saved.load()["model"]
    assert list(back) == list(want)
    assert all(torch.equal(back[k], want[k]) for k in want)
    assert isinstance(back["0.weight"], nn.Parameter)
    assert set(saved.tensors) == {f"model/{k}" for k in want}
    other = net()
    parameters = [id(p) for p in (*other.parameters(), *other.buffers())]
    plan = saved.into({"model": other})
    assert equal(model, other)
    assert [id(p) for p in (*other.parameters(), *other.buffers())] == parameters
    assert plan.replaced == {}
    assert plan.report.exact
    net().load_state_dict(back)  # what load gives is what torch takes


def test_volatile_is_what_no_optimizer_updates(save):
    model, ema = net(), net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.randn(2, 1, 4, 4)).sum().backward()
    optimizer.step()
    captured = save({"model": model, "ema": ema, "optimizer": optimizer, "t": torch.ones(1)}).captured
    volatile = {s.spec.name: s.volatile for s in captured.tensors}
    assert not volatile["model/0.weight"]
    assert volatile["model/1.running_mean"]
    assert volatile["ema/0.weight"]
    assert not volatile["optimizer/state/model/0.weight/momentum_buffer"]
    assert volatile["t"]


def test_non_persistent_buffers_are_reported(save):
    model = nn.Module()
    model.register_buffer("kept", torch.ones(1))
    model.register_buffer("cache", torch.ones(1), persistent=False)
    saved = save({"m": model})
    assert set(saved.tensors) == {"m/kept"}
    assert [e.path for e in saved.captured.report.ignored()] == ["m/cache"]
    assert "m/cache" in str(saved.captured.report)
    saved.into({"m": model})


def test_names_that_only_look_like_wrappers(save):
    model = Wrapped()
    saved = save({"m": model})
    assert set(saved.tensors) == {f"m/{k}" for k in model.state_dict()}
    assert "m/module.weight" in saved.tensors
    assert "m/_orig_mod.weight" in saved.tensors


def wrappers() -> dict[str, object]:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def inner(model: nn.Sequential) -> nn.Module:
        model[0] = checkpoint_wrapper(model[0])
        model[3] = torch.compile(model[3])
        return model

    return {
        "compile": torch.compile,
        "DataParallel": nn.DataParallel,
        "checkpoint_wrapper": checkpoint_wrapper,
        "inside": inner,
        "twice": lambda m: torch.compile(nn.DataParallel(torch.compile(m))),
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("name", ["compile", "DataParallel", "checkpoint_wrapper", "inside", "twice"])
def test_wrappers_leave_no_trace_in_names(name, save):
    wrap = wrappers()[name]
    model = net()
    names = {f"model/{k}" for k in model.state_dict()}
    saved = save({"model": model})
    wrapped = wrap(net())
    optimizer = torch.optim.Adam(wrapped.parameters())
    assert set(save({"model": wrapped}).tensors) == names
    saved.into({"model": wrapped})
    assert equal_values(model, wrapped)
    for p in wrapped.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    again = save({"model": wrapped, "optimizer": optimizer})
    stored = {n for n in again.tensors if n.endswith("exp_avg")}
    assert stored == {f"optimizer/state/model/{k}/exp_avg" for k, _ in model.named_parameters()}


def equal_values(a: nn.Module, b: nn.Module) -> bool:
    pairs = zip((*a.parameters(), *a.buffers()), (*b.parameters(), *b.buffers()), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


def test_distributed_data_parallel(save, tmp_path):
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = net()
        saved = save({"model": model})
        ddp = nn.parallel.DistributedDataParallel(net())
        assert set(save({"model": ddp}).tensors) == set(saved.tensors)
        saved.into({"model": ddp})
        assert equal(model, ddp.module)
    finally:
        dist.destroy_process_group()


def test_tied_weights(save):
    model = Tied()
    saved = save({"m": model})
    assert set(saved.tensors) == {"m/emb.weight"}
    assert saved.captured.aliases == {"m/out.weight": "m/emb.weight"}
    again = Tied()
    plan = saved.into({"m": again})
    assert again.out.weight is again.emb.weight
    assert torch.equal(again.emb.weight, model.emb.weight)
    assert plan.report.notes == []
    apart = Tied(tied=False)
    plan = saved.into({"m": apart})
    assert torch.equal(apart.emb.weight, model.emb.weight)
    assert torch.equal(apart.out.weight, model.emb.weight)
    assert any("m/out.weight: untied" in n for n in plan.report.notes)


def test_tying_what_was_apart(save):
    apart = Tied(tied=False)
    saved = save({"m": apart})
    live = Tied()
    before = live.emb.weight.detach().clone()
    with pytest.raises(StateError, match=r"m/out\.weight: the live state shares one memory"):
        saved.into({"m": live})
    assert torch.equal(live.emb.weight, before)
    with torch.no_grad():
        apart.out.weight.copy_(apart.emb.weight)
    save({"m": apart}).into({"m": live})
    assert torch.equal(live.emb.weight, apart.emb.weight)


def test_ties_across_modules_and_shared_modules(save):
    shared = nn.Linear(2, 2)
    a, b = nn.Sequential(shared, shared), nn.ModuleDict({"x": shared})
    saved = save({"a": a, "b": b})
    assert set(saved.tensors) == {"a/0.weight", "a/0.bias"}
    assert set(saved.load()["b"]) == {"x.weight", "x.bias"}
    assert saved.load()["b"]["x.weight"] is not None
    copy_a, copy_b = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), nn.ModuleDict({"x": nn.Linear(2, 2)})
    saved.into({"a": copy_a, "b": copy_b})
    assert torch.equal(copy_b["x"].weight, shared.weight)
    assert torch.equal(copy_a[1].bias, shared.bias)


def test_extra_state_comes_after_the_weights(save):
    model = nn.Sequential(WithExtra({"deep": [1, (2,)]}))
    nn.init.constant_(model[0].w, 5.0)
    saved = save({"m": model})
    assert "m/0._extra_state/t" in saved.tensors
    live = nn.Sequential(WithExtra())
    saved.into({"m": live})
    assert live[0].value == {"deep": [1, (2,)]}
    assert live[0].seen.tolist() == [5.0, 5.0]


def test_modules_with_their_own_state(save):
    model = nn.ModuleDict({"own": OwnState(), "lin": nn.Linear(2, 2)})
    model["own"].scale = 7
    saved = save({"m": model})
    assert set(saved.tree["m"]) == {"own.packed", "own.scale", "lin.weight", "lin.bias"}
    live = nn.ModuleDict({"own": OwnState(), "lin": nn.Linear(2, 2)})
    saved.into({"m": live})
    assert torch.equal(live["own"].w, model["own"].w)
    assert live["own"].scale == 7
    assert torch.equal(live["lin"].weight, model["lin"].weight)
    del saved.tree["m"]["own.scale"]
    with pytest.raises(StateError, match=r"m/own\.scale: missing"):
        saved.into({"m": live})


def test_hooks_that_change_the_content(save):
    def without_bias(module, state, prefix, metadata):
        del state[prefix + "bias"]

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].register_state_dict_post_hook(without_bias)
    assert set(save({"m": model}).tensors) == {"m/0.weight", "m/1.weight", "m/1.bias"}


def test_instance_override_of_state_dict(save):
    model = nn.Linear(2, 2)
    model.state_dict = lambda: {"adapter": torch.ones(1)}  # as some fine-tuning scripts do
    assert set(save({"m": model}).tensors) == {"m/adapter"}


def test_load_hooks_are_called(save):
    seen = []
    model = nn.Linear(2, 2)
    saved = save({"m": model})
    model.register_load_state_dict_post_hook(lambda m, keys: seen.append((m, keys.missing_keys)))
    saved.into({"m": model})
    assert seen == [(model, [])]


def test_spectral_and_weight_norm(save):
    for make in (
        nn.utils.spectral_norm,
        nn.utils.parametrizations.weight_norm,
        nn.utils.parametrizations.orthogonal,
    ):
        model, live = make(nn.Linear(3, 3)), make(nn.Linear(3, 3))
        model(torch.randn(2, 3))
        save({"m": model}).into({"m": live})
        assert equal(model, live)
        x = torch.randn(2, 3)
        assert torch.equal(model(x), live(x))


def test_averaged_model(save):
    model = net()
    ema = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9)
    )
    ema.update_parameters(model)
    ema.update_parameters(net())
    saved = save({"ema": ema})
    assert "ema/module.0.weight" in saved.tensors
    live = torch.optim.swa_utils.AveragedModel(net())
    saved.into({"ema": live})
    assert equal(ema, live)
    assert live.n_averaged == 2


def test_scripted_module(save):
    with pytest.warns(DeprecationWarning, match="torch.jit.script"):
        model, live = torch.jit.script(nn.Linear(2, 2)), torch.jit.script(nn.Linear(2, 2))
    save({"m": model}).into({"m": live})
    assert torch.equal(model.weight, live.weight)


def test_gradients(save):
    model = net()
    model(torch.randn(2, 1, 4, 4)).sum().backward()
    model[3].bias.grad = None
    saved = save({"m": model}, gradients=True)
    assert "m/0.weight.grad" in saved.tensors
    live = net()
    live[3].bias.grad = torch.ones(3)
    live[0].weight.grad = torch.ones(2, 1, 3, 3)
    kept = live[0].weight.grad
    saved.into({"m": live})
    assert live[3].bias.grad is None
    assert live[0].weight.grad is kept
    for a, b in zip(model.parameters(), live.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None)
        assert a.grad is None or torch.equal(a.grad, b.grad)
    # A checkpoint without gradients leaves them alone.
    before = copy.deepcopy([p.grad for p in live.parameters()])
    save({"m": model}).into({"m": live})
    assert all(
        (a is None and b.grad is None) or torch.equal(a, b.grad)
        for a, b in zip(before, live.parameters(), strict=True)
    )


def test_meta_model_cannot_be_saved(save):
    with pytest.raises(UnsupportedValue, match=r"m/weight: .*to_empty"):
        save({"m": nn.Linear(2, 2, device="meta")})


def test_modules_nested_in_containers(save):
    state = {"trainer": {"nets": [nn.Linear(2, 2)], "n": 1}}
    optimizer = torch.optim.SGD(state["trainer"]["nets"][0].parameters(), lr=0.1)
    saved = save({**state, "opt": optimizer})
    assert "trainer/nets/0/weight" in saved.tensors
    assert saved.tree["opt"]["param_groups"][0]["params"] == ["trainer/nets/0/weight", "trainer/nets/0/bias"]
    live = {"trainer": {"nets": [nn.Linear(2, 2)], "n": 0}}
    saved.into({**live, "opt": torch.optim.SGD(live["trainer"]["nets"][0].parameters(), lr=0.1)})
    assert torch.equal(live["trainer"]["nets"][0].weight, state["trainer"]["nets"][0].weight)


def test_broadcast_buffers(save):
    def make(n: int) -> nn.Module:
        m = nn.Module()
        m.register_buffer("ids", torch.arange(n).expand(2, n))
        return m

    saved = save({"m": make(3)})
    live = make(3)
    live.ids.data = torch.zeros(3, dtype=torch.int64).expand(2, 3)
    saved.into({"m": live})
    assert live.ids.tolist() == [[0, 1, 2]] * 2
    dense = nn.Module()
    dense.register_buffer("ids", torch.arange(6).view(2, 3))
    save({"m": dense}).into({"m": live})
    assert live.ids.tolist() == [[0, 1, 2], [3, 4, 5]]
