"""jax arrays and keys: bit for bit, with type, weak type and place; what cannot be stored is refused by name."""

from __future__ import annotations

import subprocess
import sys
import weakref

import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="jax is not installed")

import jax.numpy as jnp  # noqa: E402

import holdfast  # noqa: E402
from holdfast.core.dtypes import DTYPES  # noqa: E402
from holdfast.core.errors import StateError, UnsupportedValue  # noqa: E402
from holdfast.saving.plan import Planner  # noqa: E402
from holdfast.state.adapters.numpy import numpy_dtype  # noqa: E402

NOT_IN_JAX = {"complex32", "float4_e2m1fn_x2"}
NAMES = sorted(DTYPES.keys() - NOT_IN_JAX)


def random_bits(name: str, shape: tuple[int, ...] = (3, 5)) -> np.ndarray:
    """Any bits at all: NaNs with a payload, both zeros, subnormal numbers."""
    raw = np.random.default_rng(1).integers(0, 256, (*shape, numpy_dtype(name).itemsize), np.uint8)
    return (raw & 1 if name == "bool" else raw).view(numpy_dtype(name))[..., 0]


def bits(x: object) -> bytes:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def put(array: np.ndarray) -> jax.Array:
    with jax.enable_x64(True):
        return jax.device_put(array, may_alias=False)


@pytest.mark.parametrize("name", NAMES)
def test_every_element_type_comes_back_bit_for_bit(save, name: str) -> None:
    stored = random_bits(name)
    saved = save({"a": {"x": put(stored)}})
    live = {"a": {"x": put(np.zeros_like(stored))}}
    saved.into(live)
    got = live["a"]["x"]
    assert got.dtype == stored.dtype
    assert bits(got) == stored.tobytes()
    fresh = saved.load("jax")["a"]["x"]
    assert isinstance(fresh, jax.Array)
    assert bits(fresh) == stored.tobytes()
    assert saved.load("numpy")["a"]["x"].tobytes() == stored.tobytes()


@pytest.mark.parametrize("name", ["int4", "uint2", "float4_e2m1fn", "float8_e3m4"])
def test_other_element_types_are_refused_by_name(save, name: str) -> None:
    with pytest.raises(UnsupportedValue, match=f"p/x: a jax array of {name}"):
        save({"p": {"x": jnp.zeros(4, name)}})


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (2, 3, 4)])
def test_every_shape(save, shape: tuple[int, ...]) -> None:
    x = jnp.asarray(random_bits("float32", shape))
    live = {"x": [jnp.zeros(shape)]}
    save({"x": [x]}).into(live)
    assert live["x"][0].shape == shape
    assert bits(live["x"][0]) == bits(x)


def test_weak_types_and_commitment(save) -> None:
    there = jax.devices()[0]
    saved = save({"s": {"weak": jnp.asarray(3.5), "strong": jnp.float32(3.5), "many": jnp.zeros(3) + 1}})
    live = {
        "weak": jax.device_put(jnp.float32(0), there),
        "strong": jnp.asarray(0.0),
        "many": jax.device_put(jnp.zeros(3), there),
    }
    saved.into({"s": live})
    assert [live[k].weak_type for k in ("weak", "strong", "many")] == [True, False, False]
    assert [live[k].committed for k in ("weak", "strong", "many")] == [True, False, True]
    assert saved.load("jax")["s"]["weak"].weak_type


def test_top_level_arrays_are_replaced(save) -> None:
    saved = save({"x": jnp.arange(3)})
    old = jnp.zeros(3, jnp.int32)
    plan = saved.into({"x": old})
    assert plan.replaced["x"].tolist() == [0, 1, 2]
    assert old.tolist() == [0, 0, 0]


def test_a_description_is_a_place_for_an_array(save) -> None:
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    saved = save({"p": {"x": jnp.arange(4.0), "y": jnp.arange(2)}})
    live = {
        "x": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=here),
        "y": jax.ShapeDtypeStruct((2,), jnp.int32),
    }
    saved.into({"p": live})
    assert live["x"].tolist() == [0, 1, 2, 3]
    assert live["x"].committed
    assert not live["y"].committed
    with pytest.raises(UnsupportedValue, match="p/x: a ShapeDtypeStruct"):
        save({"p": {"x": jax.ShapeDtypeStruct((4,), jnp.float32)}})


def test_what_does_not_fit_is_named(save) -> None:
    saved = save({"p": {"x": jnp.zeros((2, 3)), "y": jnp.zeros(2, jnp.bfloat16)}})
    live = {"x": jnp.ones((3, 2)), "y": jnp.ones(2)}
    with pytest.raises(StateError) as e:
        saved.into({"p": live})
    assert "p/x: expected float32[3, 2] (live), found float32[2, 3]" in str(e.value)
    assert "p/y" in str(e.value)
    assert "cast=('p/y',)" in str(e.value)
    assert bits(live["x"]) == bits(jnp.ones((3, 2)))
    plan = saved.into({"p": live}, cast=("p/y",), unexpected=("p/x",))
    assert live["y"].dtype == jnp.float32
    assert live["x"].shape == (2, 3)
    assert plan.report.cast == [("p/y", "bfloat16 to float32")]


def test_traced_values_are_refused(save) -> None:
    with pytest.raises(UnsupportedValue, match="p/x: a traced value"):
        jax.jit(lambda x: save({"p": {"x": x}}))(jnp.zeros(2))


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_typed_keys_draw_what_they_would_have_drawn(save, impl: str) -> None:
    key = jax.random.split(jax.random.key(7, impl=impl), 3)[1]
    many = jax.random.split(key, (2, 2))
    saved = save({"r": {"key": key, "many": many}})
    live = {
        "key": jax.random.key(0, impl=impl),
        "many": jax.random.split(jax.random.key(0, impl=impl), (2, 2)),
    }
    saved.into({"r": live})
    assert live["key"].dtype == key.dtype
    assert bits(jax.random.normal(live["key"], (4,))) == bits(jax.random.normal(key, (4,)))
    assert bits(live["many"]) == bits(many)
    fresh = saved.load("jax")["r"]["key"]
    assert bits(jax.random.normal(fresh, (4,))) == bits(jax.random.normal(key, (4,)))
    record = saved.load("numpy")["r"]["key"]
    assert record.type == "jax.key"
    assert record["impl"] == impl
    assert record["data"].tobytes() == bits(key)


def test_a_key_of_another_kind_is_refused(save) -> None:
    saved = save({"r": {"key": jax.random.key(1), "old": jax.random.PRNGKey(5)}})
    with pytest.raises(StateError, match=r"r/key: expected a key of rbg.*found a key of threefry2x32"):
        saved.into({"r": {"key": jax.random.key(0, impl="rbg"), "old": jax.random.PRNGKey(0)}})
    with pytest.raises(StateError, match="r/old: expected a typed random key"):
        saved.into({"r": {"key": jax.random.key(0), "old": jax.random.key(0)}})
    live = {"key": jax.random.key(0), "old": jax.random.PRNGKey(0)}
    saved.into({"r": live})
    assert bits(live["old"]) == bits(jax.random.PRNGKey(5))


def test_the_second_plan_is_a_look_and_holds_the_new_arrays() -> None:
    train = {"now": {"w": jnp.zeros(8), "key": jax.random.key(0)}}
    planner = Planner({"train": train}, rng=False)
    first = planner.plan()
    train["now"] = {"w": jnp.ones(8), "key": jax.random.key(1)}
    second = planner.plan()
    assert second.layout is first.layout
    assert planner.lasts(second)
    by_name = {source.spec.name: source.value for source in second.sources}
    assert bits(by_name["train/now/w"]) == bits(jnp.ones(8))
    assert bits(by_name["train/now/key"]) == bits(jax.random.key(1))
    train["now"] = {"w": jnp.ones(9), "key": jax.random.key(1)}
    assert planner.plan().layout is not first.layout


def test_an_array_that_was_donated_is_named() -> None:
    state = {"train": {"w": jnp.zeros(4)}}
    planner = Planner(state, rng=False)
    planner.plan()
    jax.jit(lambda x: x + 1, donate_argnums=0)(state["train"]["w"])
    with pytest.raises(UnsupportedValue, match="train/w: this array was given away"):
        planner.plan()


def test_a_snapshot_is_safe_from_a_step_that_is_given_its_arrays(tmp_path) -> None:
    step = jax.jit(lambda s: jax.tree.map(lambda x: x * 1.5 + 1, s), donate_argnums=0)
    train = {
        "now": {"w": jnp.full((512, 1024), 1.0), "b": jnp.full((8,), 2.0)}
    }  # 2 MiB: more than is copied at once
    expected, reused = {}, 0
    with holdfast.Checkpointer(tmp_path / "run", {"train": train}, save=holdfast.every(steps=1)) as ckpt:
        for _ in ckpt.steps(6):
            given = train["now"]
            place = given["w"].unsafe_buffer_pointer()
            train["now"] = jax.block_until_ready(step(given))
            reused += given["w"].is_deleted() and train["now"]["w"].unsafe_buffer_pointer() == place
            expected[ckpt.step + 1] = {k: np.array(v, copy=True) for k, v in train["now"].items()}
    assert reused == 6, "nothing was donated, so this test has shown nothing"
    for at in range(1, 7):
        found = holdfast.load(tmp_path / "run", step=at, as_="numpy")["train"]["now"]
        for name, array in expected[at].items():
            assert found[name].tobytes() == array.tobytes()


def test_torch_tensors_and_jax_arrays_by_name(tmp_path) -> None:
    torch = pytest.importorskip("torch", reason="torch is not installed")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4)).to(torch.bfloat16)
    names = {name: tuple(t.shape) for name, t in model.state_dict().items()}
    holdfast.save(tmp_path / "torch", {"model": model})

    count = {"1.num_batches_tracked"}
    params = {n: jnp.ones(shape, jnp.int32 if n in count else jnp.bfloat16) for n, shape in names.items()}
    with pytest.raises(StateError, match=r"num_batches_tracked.*int32.*int64"):
        holdfast.load(tmp_path / "torch", into={"model": params})
    holdfast.load(tmp_path / "torch", into={"model": params}, cast=["model/1.num_batches_tracked"])
    for name, t in model.state_dict().items():
        if name not in count:
            assert bits(params[name]) == t.view(torch.uint8).numpy().tobytes()
    loaded = holdfast.load(tmp_path / "torch", as_="jax")["model"]
    assert loaded["1.num_batches_tracked"].dtype == jnp.int64
    assert bits(loaded["0.weight"]) == bits(params["0.weight"])

    params = {n: v * 2 for n, v in params.items()}
    holdfast.save(tmp_path / "jax", {"model": params})
    holdfast.load(tmp_path / "jax", into={"model": model}, cast=["model/1.num_batches_tracked"])
    for name, t in model.state_dict().items():
        if name not in count:
            assert bits(params[name]) == t.view(torch.uint8).numpy().tobytes()


def test_reading_needs_no_jax(tmp_path) -> None:
    holdfast.save(tmp_path / "run", {"p": {"x": jnp.arange(4.0), "key": jax.random.key(3)}})
    code = """
import sys
import weakref
sys.modules["jax"] = None
import numpy as np, holdfast, holdfast.errors
found = holdfast.load(sys.argv[1])["p"]
print(found["x"].tolist(), found["key"]["data"].tolist())
live = {"x": np.zeros(4, np.float32), "key": None}
holdfast.load(sys.argv[1], into={"p": live}, only=["p/x"])
print(live["x"].tolist())
try:
    holdfast.load(sys.argv[1], as_="jax")
except holdfast.errors.MissingDependency as e:
    print(e)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "run")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "[0.0, 1.0, 2.0, 3.0] [0, 3]"
    assert lines[1] == "[0.0, 1.0, 2.0, 3.0]"
    assert "pip install 'holdfast[jax]'" in lines[2]


def test_jax_is_imported_by_nobody_but_the_program(tmp_path) -> None:
    code = (
        "import sys, numpy, holdfast; holdfast.save(sys.argv[1], {'x': numpy.zeros(3)}); holdfast.load(sys.argv[1]);"
        "print([m for m in ('jax', 'flax') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_save_holds_no_array_of_its_step(tmp_path) -> None:
    step = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s))
    train = {
        "now": {"w": jnp.zeros((8192, 1024)), "b": [jnp.zeros(8)]}
    }  # 32 MiB: it takes a while to be durable
    given: list[weakref.ref[object]] = []
    with holdfast.Checkpointer(tmp_path / "run", {"train": train}, save=holdfast.every(steps=1)) as ckpt:
        for _ in ckpt.steps(5):
            given.append(weakref.ref(train["now"]["w"]))
            train["now"] = step(train["now"])
            assert given[-1]() is None  # though its save is most likely not complete
