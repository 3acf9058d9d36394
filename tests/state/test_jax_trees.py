"""Trees of jax programs: optax states, registered classes, Flax's structures, and NNX objects that stay who they are."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="jax is not installed")
optax = pytest.importorskip("optax", reason="optax is not installed")
flax = pytest.importorskip("flax", reason="flax is not installed")

import jax.numpy as jnp  # noqa: E402
from flax import nnx, struct  # noqa: E402
from flax.core import FrozenDict  # noqa: E402
from flax.training.train_state import TrainState  # noqa: E402

import holdfast  # noqa: E402
from holdfast.core.errors import StateError  # noqa: E402
from holdfast.saving.plan import Planner  # noqa: E402


def host(x: object) -> object:
    if isinstance(x, jax.Array) and jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return np.asarray(jax.random.key_data(x))
    return np.asarray(x)


def assert_same(a: object, b: object) -> None:
    ones, others = jax.tree.leaves(a), jax.tree.leaves(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    assert len(ones) == len(others) > 0
    for x, y in zip(ones, others, strict=True):
        assert host(x).dtype == host(y).dtype
        assert host(x).tobytes() == host(y).tobytes()


def differs(a: object, b: object) -> bool:
    return any(
        host(x).tobytes() != host(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


TRANSFORMS = {
    "chain": lambda: optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3)),
    "schedule": lambda: optax.sgd(optax.cosine_decay_schedule(0.1, 100), momentum=0.9, nesterov=True),
    "injected": lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.01),
    "masked": lambda: optax.masked(optax.adam(1e-2), {"w": True, "b": False}),
    "accumulated": lambda: optax.MultiSteps(optax.adam(1e-2), every_k_schedule=2),
    "labelled": lambda: optax.partition(
        {"x": optax.adam(1e-2), "y": optax.set_to_zero()}, {"w": "x", "b": "y"}
    ),
    "averaged": lambda: optax.chain(optax.adam(1e-2), optax.ema(0.99)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_optax_states_go_on_as_if_nothing_had_been(save, name: str) -> None:
    tx = TRANSFORMS[name]()
    grads = {"w": jnp.arange(6.0).reshape(2, 3) - 2, "b": jnp.ones(3)}

    def stepped(params: object, opt: object, times: int) -> tuple[object, object]:
        for _ in range(times):
            updates, opt = tx.update(grads, opt, params)
            params = optax.apply_updates(params, updates)
        return params, opt

    start = {"w": jnp.ones((2, 3)), "b": jnp.zeros(3)}
    params, opt = stepped(start, tx.init(start), 3)
    saved = save({"train": {"params": params, "opt": opt}})
    live = {"params": start, "opt": tx.init(start)}
    assert saved.into({"train": live}).report.exact
    assert_same(live, {"params": params, "opt": opt})
    assert type(live["opt"]) is type(opt)
    assert_same(stepped(live["params"], live["opt"], 2), stepped(params, opt, 2))


def test_an_optax_state_whose_class_moved_to_another_module_is_paired_by_its_fields(save) -> None:
    tx = optax.adam(1e-2)
    saved = save({"opt": [tx.init({"w": jnp.ones(2)})]})
    (state,) = saved.tree["opt"]
    state[0].value["type"] = "optax._src.elsewhere.ScaleByAdamState"
    live = [tx.init({"w": jnp.zeros(2)})]
    saved.into({"opt": live})
    assert type(live[0][0]) is optax.ScaleByAdamState


def test_static_fields_are_the_programs(save) -> None:
    tx = optax.adam(1e-2)

    def made(scale: float, apply: object) -> TrainState:
        return TrainState.create(apply_fn=apply, params=FrozenDict({"a": {"w": jnp.ones(3) * scale}}), tx=tx)

    one = made(2.0, len).apply_gradients(grads=FrozenDict({"a": {"w": jnp.ones(3)}}))
    saved = save({"train": {"state": one}})
    live = {"state": made(1.0, max)}
    saved.into({"train": live})
    assert live["state"].apply_fn is max
    assert live["state"].tx is tx
    assert type(live["state"].params) is FrozenDict
    assert int(live["state"].step) == 1
    assert_same((live["state"].params, live["state"].opt_state), (one.params, one.opt_state))
    assert sorted(n for n in saved.tensors if "params" in n) == ["train/state/params/a/w"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Registered:
    w: jax.Array
    name: str = dataclasses.field(metadata={"static": True}, default="here")


@struct.dataclass
class Struct:
    w: jax.Array
    act: object = struct.field(pytree_node=False, default=None)


@jax.tree_util.register_pytree_node_class
class Unnamed:
    def __init__(self, a: object, b: object) -> None:
        self.parts = (a, b)

    def tree_flatten(self) -> tuple[tuple[object, ...], None]:
        return self.parts, None

    @classmethod
    def tree_unflatten(cls, aux: None, children: tuple[object, ...]) -> Unnamed:
        return cls(*children)


def test_registered_classes_are_rebuilt_by_what_was_registered(save) -> None:
    def made(v: float) -> dict[str, object]:
        w = jnp.full(2, v)
        return {
            "r": Registered(w, f"static {v}"),
            "s": Struct(w, max if v else min),
            "u": Unnamed(w, {"x": w}),
        }

    saved = save({"p": made(1.0)})
    live = made(0.0)
    saved.into({"p": live})
    assert isinstance(live["u"], Unnamed)
    assert live["r"].name == "static 0.0"
    assert live["s"].act is min
    for x in (live["r"].w, live["s"].w, *live["u"].parts, live["u"].parts[1]["x"]):
        if not isinstance(x, dict):
            assert x.tolist() == [1.0, 1.0]
    assert {"p/r/w", "p/s/w", "p/u/0", "p/u/1/x"} == set(saved.tensors)


def test_parts_that_do_not_fit_are_named(save) -> None:
    saved = save({"p": {"f": FrozenDict({"a": jnp.ones(2), "b": jnp.ones(2)})}})
    live = {"f": FrozenDict({"a": jnp.zeros(2), "c": jnp.zeros(2)})}
    with pytest.raises(StateError) as e:
        saved.into({"p": live})
    assert "p/f/c: missing from the checkpoint" in str(e.value)
    assert "p/f/b: unexpected" in str(e.value)
    saved.into({"p": live}, missing=("p/f/c",), unexpected=("p/f/b",))
    assert live["f"]["a"].tolist() == [1, 1]
    assert live["f"]["c"].tolist() == [0, 0]


class Net(nnx.Module):
    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(4, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.more = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(2)])
        self.same = self.first  # shared: stored once, under the name that comes first
        self.calls = nnx.Variable(jnp.asarray(0))

    def __call__(self, x: jax.Array) -> jax.Array:
        self.calls[...] += 1
        x = self.drop(nnx.relu(self.norm(self.first(x))))
        for layer in self.more:
            x = layer(x)
        return x


def nnx_run(seed: int) -> dict[str, object]:
    model = Net(8, nnx.Rngs(params=seed, dropout=seed + 1))
    optimizer = nnx.Optimizer(model, optax.adamw(1e-2), wrt=nnx.Param)
    return {
        "model": model,
        "optimizer": optimizer,
        "rngs": nnx.Rngs(seed),
        "loss": nnx.metrics.Average("loss"),
    }


@nnx.jit
def nnx_step(model: Net, optimizer: nnx.Optimizer, rngs: nnx.Rngs, loss: nnx.metrics.Average) -> jax.Array:
    x = rngs.normal((16, 4))
    value, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - 1) ** 2))(model)
    optimizer.update(model, grads)
    loss.update(loss=value)
    return value


def test_nnx_objects_go_on_as_if_nothing_had_been(save) -> None:
    one, other = nnx_run(0), nnx_run(5)
    for _ in range(3):
        nnx_step(*one.values())
    saved = save(one)
    shell = {k: id(v) for k, v in other.items()}
    kernel = other["model"].first.kernel
    report = saved.into(other).report
    assert report.exact, str(report)
    assert {k: id(v) for k, v in other.items()} == shell
    assert other["model"].first.kernel is kernel
    assert other["model"].same is other["model"].first
    assert "model/first/kernel" in saved.tensors
    assert not any("same" in name for name in saved.tensors)
    for key in one:
        assert_same(nnx.state(one[key]), nnx.state(other[key]))
    assert [float(nnx_step(*one.values())) for _ in range(3)] == [
        float(nnx_step(*other.values())) for _ in range(3)
    ]
    for key in one:
        assert_same(nnx.state(one[key]), nnx.state(other[key]))


def test_nnx_states_and_variables_are_restored_in_place(save) -> None:
    one, other = Net(8, nnx.Rngs(0)), Net(8, nnx.Rngs(1))
    saved = save({"s": nnx.state(one, nnx.Param), "v": {"count": nnx.Variable(jnp.asarray(3))}})
    state, variable = nnx.state(other, nnx.Param), nnx.Variable(jnp.asarray(0))
    live = {"s": state, "v": {"count": variable}}
    assert saved.into(live).report.exact
    assert_same(state, nnx.state(one, nnx.Param))
    assert live["v"]["count"] is variable
    assert int(variable[...]) == 3
    assert "s/more/1/kernel" in saved.tensors


def test_nnx_modules_and_plain_trees_by_name(save, tmp_path) -> None:
    one, other = Net(8, nnx.Rngs(0)), Net(8, nnx.Rngs(1))
    holdfast.save(tmp_path, {"model": one})
    found = holdfast.load(tmp_path, as_="numpy")["model"]
    assert found["more"][1]["kernel"].tobytes() == host(one.more[1].kernel[...]).tobytes()
    plain = nnx.to_pure_dict(nnx.state(other))
    holdfast.load(tmp_path, into={"model": plain})
    assert_same(plain, nnx.to_pure_dict(nnx.state(one)))
    saved = save({"model": plain})
    assert differs(nnx.state(one), nnx.state(other))
    saved.into({"model": other})
    assert_same(nnx.state(one), nnx.state(other))


def test_nnx_places_that_do_not_fit_are_named(save) -> None:
    class Other(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.first = nnx.Linear(4, 9, rngs=rngs)
            self.head = nnx.Linear(8, 2, rngs=rngs)

    saved, live = save({"model": Net(8, nnx.Rngs(0))}), Other(nnx.Rngs(0))
    before = nnx.state(live)
    with pytest.raises(StateError) as e:
        saved.into({"model": live})
    text = str(e.value)
    assert "model/first/kernel: expected float32[4, 9] (live), found float32[4, 8] (checkpoint)" in text
    assert "model/head/kernel: missing from the checkpoint" in text
    assert "model/more/0/kernel: unexpected" in text
    assert_same(before, nnx.state(live))


def test_the_second_plan_of_an_nnx_state_is_a_look() -> None:
    run = nnx_run(0)
    planner = Planner(run, rng=False)
    nnx_step(*run.values())
    first = planner.plan()
    nnx_step(*run.values())
    second = planner.plan()
    assert second.layout is first.layout
    by_name = {source.spec.name: source.value for source in second.sources}
    assert host(by_name["model/first/kernel"]).tobytes() == host(run["model"].first.kernel[...]).tobytes()
    assert second.kinds["model"] == "module"
    assert second.kinds["optimizer"] == "optimizer"
