"""Modules on the meta device: a restore gives them memory and values at once, and the objects stay the same."""

import weakref

import pytest
import torch
from torch import nn

from holdfast.core.errors import StateError
from holdfast.state.tensors import HostTensor


class Net(nn.Module):
    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.conv = nn.Conv2d(3, 5, 3).to(memory_format=torch.channels_last)
        self.head = nn.Linear(4, 7, bias=False)
        self.frozen = nn.Parameter(torch.ones(3), requires_grad=False)
        if tied:
            self.head.weight = self.embed.weight


def trained(tied: bool = False) -> tuple[Net, torch.optim.Adam]:
    torch.manual_seed(1)
    model = Net(tied)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=0.1)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    optimizer.zero_grad()
    model.norm(torch.randn(9, 4))
    return model, optimizer


def on_meta(tied: bool = False) -> Net:
    with torch.device("meta"):
        return Net(tied)


def same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    for name, t in first.items():
        assert torch.equal(t, second[name])
        assert t.device == second[name].device
        assert t.stride() == second[name].stride()


@pytest.mark.parametrize("tied", [False, True])
def test_a_meta_model_gets_memory_and_values_and_stays_the_same_objects(save, tied):
    model, _ = trained(tied)
    saved = save({"m": model})
    live = on_meta(tied)
    objects = dict(live.named_parameters(remove_duplicate=False))
    live.frozen.no_decay = True
    report = saved.into({"m": live}).report
    same(model, live)
    for name, p in live.named_parameters(remove_duplicate=False):
        assert p is objects[name]
        assert type(p) is nn.Parameter
        assert p.is_leaf
        assert p.requires_grad == (name != "frozen")
    assert live.frozen.no_decay
    assert (live.head.weight is live.embed.weight) == tied
    assert ("m/conv.weight", "materialised on cpu") in report.restored
    live.head(torch.ones(2, 4)).sum().backward()
    assert live.head.weight.grad is not None


def test_an_optimizer_made_before_on_meta_parameters_goes_on_as_the_saved_one(save):
    model, optimizer = trained()
    saved = save({"m": model, "o": optimizer})
    live = on_meta()
    other = torch.optim.Adam((p for p in live.parameters() if p.requires_grad), lr=0.5)
    saved.into({"o": other, "m": live})  # the optimizer is planned before its parameters have memory
    for net, opt in ((model, optimizer), (live, other)):
        for p in net.parameters():
            p.grad = torch.full_like(p, 0.25)
        opt.step()
    same(model, live)
    assert all(s["exp_avg"].device.type == "cpu" for s in other.state.values())


def test_one_stored_tensor_for_two_meta_parameters_gives_each_its_own_memory(save):
    saved = save({"m": trained(tied=True)[0]})
    for name, host in saved.tensors.items():  # as large ones are read: a new tensor may keep the memory
        saved.tensors[name] = HostTensor(host.spec, memoryview(bytearray(host.data)), owned=True)
    live = on_meta(tied=False)
    saved.into({"m": live})
    with torch.no_grad():
        live.head.weight.zero_()
    assert not torch.equal(live.embed.weight, live.head.weight)


def test_two_stored_tensors_for_one_meta_parameter_must_be_equal(save):
    model, _ = trained()
    live = on_meta(tied=True)
    with pytest.raises(StateError, match="shares one memory here"):
        save({"m": model}).into({"m": live})
    assert live.embed.weight.is_meta  # nothing was changed
    with torch.no_grad():
        model.head.weight.copy_(model.embed.weight)
    save({"m": model}).into({"m": live})
    same(model, live)


def test_the_layout_is_that_of_the_meta_model(save):
    model = nn.Conv2d(3, 5, 3)
    live = nn.Conv2d(3, 5, 3, device="meta").to(memory_format=torch.channels_last)
    stride = live.weight.stride()
    save({"m": model}).into({"m": live})
    assert live.weight.stride() == stride != model.weight.stride()
    assert torch.equal(live.weight, model.weight)


def test_a_part_is_materialised_and_the_rest_stays(save):
    model, _ = trained()
    live = on_meta()
    save({"m": model}).into({"m": live}, only=("m/head.*",))
    assert torch.equal(live.head.weight, model.head.weight)
    assert live.embed.weight.is_meta


def test_another_shape_or_type_is_a_misfit_as_for_any_other(save):
    saved = save({"m": nn.Linear(2, 3)})
    with pytest.raises(
        StateError, match=r"m/weight: expected float32\[4, 2\] \(live\), found float32\[3, 2\]"
    ):
        saved.into({"m": nn.Linear(2, 4, device="meta")})
    with pytest.raises(StateError, match=r"pass cast=\('m/weight',\)"):
        saved.into({"m": nn.Linear(2, 3, device="meta", dtype=torch.bfloat16)})
    live = nn.Linear(2, 3, device="meta", dtype=torch.bfloat16)
    saved.into({"m": live}, cast=("m/**",))
    assert live.weight.dtype == torch.bfloat16
    assert not live.weight.is_meta


def hook(live):
    live.weight.register_post_accumulate_grad_hook(lambda p: None)


def graph(live):
    live.kept = live(torch.ones(1, 2, device="meta"))


@pytest.mark.parametrize(
    ("hold", "why"),
    [
        (lambda live: setattr(live, "kept", weakref.ref(live.weight)), "weak reference"),
        (hook, "has hooks"),
        (graph, "graph of a forward pass"),
    ],
)
def test_what_could_not_stay_the_same_object_is_refused_before_anything_changes(save, hold, why):
    live = nn.Linear(2, 2, device="meta")
    hold(live)
    with pytest.raises(StateError, match=rf"m/weight: .*{why}.*to_empty"):
        save({"m": nn.Linear(2, 2)}).into({"m": live})
    assert live.bias.is_meta


def test_a_meta_buffer_that_is_never_stored_is_not_passed_over_in_silence(save):
    def made(device: str) -> nn.Module:
        net = nn.Linear(2, 2, device=device)
        net.register_buffer("scale", torch.ones(1, device=device), persistent=False)
        return net

    saved = save({"m": made("cpu")})
    with pytest.raises(
        StateError, match=r"m/scale: missing .* a buffer on the meta device that is never stored"
    ):
        saved.into({"m": made("meta")})
    live = made("meta")
    saved.into({"m": live}, missing=("m/scale",))
    assert live.scale.is_meta
    assert not live.weight.is_meta


class Own(nn.Linear):
    def state_dict(self, *args, **kwargs):
        return super().state_dict(*args, **kwargs)


def test_a_module_or_optimizer_that_loads_itself_is_refused_on_meta(save):
    with pytest.raises(
        StateError, match=r"m: has tensors on the meta device and loads its state itself; .*to_empty"
    ):
        save({"m": Own(2, 2)}).into({"m": Own(2, 2, device="meta")})
    source, live = nn.Linear(2, 2), nn.Linear(2, 2, device="meta")
    state = {"m": source, "o": torch.optim.SGD(source.parameters(), momentum=0.9)}
    state["o"].register_state_dict_pre_hook(lambda o: None)
    other = torch.optim.SGD(live.parameters(), momentum=0.9)
    other.register_state_dict_pre_hook(lambda o: None)
    with pytest.raises(
        StateError, match="o: its parameters are on the meta device and it loads its state itself"
    ):
        save(state).into({"m": live, "o": other})


def test_a_failed_restore_leaves_a_meta_model_on_meta(save):
    saved = save({"m": nn.Linear(2, 2)})
    live = nn.Linear(2, 2, device="meta")
    plan = saved.plan({"m": live})
    with pytest.raises(StateError, match="bytes are missing"):
        plan.apply({"m/weight": saved.tensors["m/weight"]})
    assert live.weight.is_meta
    assert live.bias.is_meta


def lazy_net() -> nn.Sequential:
    return nn.Sequential(nn.LazyConv1d(4, 3), nn.LazyBatchNorm1d(), nn.Flatten(), nn.LazyLinear(3))


def trained_net() -> tuple[nn.Sequential, torch.optim.Adam]:
    torch.manual_seed(3)
    net = lazy_net()
    net(torch.randn(5, 2, 9))
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1)
    net(torch.randn(5, 2, 9)).sum().backward()
    optimizer.step()
    return net, optimizer


def test_a_lazy_model_takes_the_stored_shapes_and_goes_on_as_the_saved_one(save):
    net, optimizer = trained_net()
    saved = save({"m": net, "o": optimizer})
    live = lazy_net()
    other = torch.optim.Adam(live.parameters(), lr=0.5)
    objects = dict(live.named_parameters())
    report = saved.into({"o": other, "m": live}).report
    same(net, live)
    assert ("m/0.weight", "materialised on cpu") in report.restored
    assert all(p is objects[n] and type(p) is nn.Parameter for n, p in live.named_parameters())
    batch = torch.randn(5, 2, 9)
    for one, opt in ((net, optimizer), (live, other)):
        opt.zero_grad()
        one(batch).sum().backward()
        opt.step()
    same(net, live)
    assert [type(m) for m in live] == [nn.Conv1d, nn.BatchNorm1d, nn.Flatten, nn.Linear]


def test_a_restored_lazy_model_is_saved_before_its_first_forward_pass(save):
    net, _ = trained_net()
    live, again = lazy_net(), lazy_net()
    save({"m": net}).into({"m": live})
    save({"m": live}).into({"m": again})
    same(net, again)


def test_a_lazy_parameter_takes_the_memory_that_was_read(save):
    net, _ = trained_net()
    saved = save({"m": net})
    for name, host in saved.tensors.items():  # as large ones are read: a new tensor may keep the memory
        saved.tensors[name] = HostTensor(host.spec, memoryview(bytearray(host.data)), owned=True)
    live = lazy_net()
    saved.into({"m": live})
    memory = saved.tensors["m/3.weight"].memory
    assert live[3].weight.data_ptr() == torch.frombuffer(memory, dtype=torch.float32).data_ptr()


def test_some_of_a_lazy_model_and_another_type(save):
    net, _ = trained_net()
    saved = save({"m": net})
    live = lazy_net()
    saved.into({"m": live}, only=("m/0.*",))
    assert torch.equal(live[0].weight, net[0].weight)
    assert live[3].has_uninitialized_params()
    with pytest.raises(StateError, match=r"pass cast=\('m/3.weight',\)"):
        saved.into({"m": lazy_net().half()}, only=("m/3.*",))
    half = lazy_net().half()
    saved.into({"m": half}, only=("m/3.*",), cast=("m/3.*",))
    assert half[3].weight.dtype == torch.float16
    with pytest.raises(StateError, match=r"m/3.weight"):
        save({"m": {"3.weight": 5}}).into({"m": lazy_net()})


def test_gradients_of_a_lazy_model(save):
    net, _ = trained_net()
    net(torch.randn(5, 2, 9)).sum().backward()
    live = lazy_net()
    save({"m": net}, gradients=True).into({"m": live})
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(net.parameters(), live.parameters(), strict=True))
