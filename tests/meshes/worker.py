"""What the tests of meshes run in processes of their own; how many devices the host has is said in the environment.

python worker.py save URL 4x2            save a state that is spread over a mesh
python worker.py restore URL 4x2 8 ...   restore it on other meshes, and compare it bit for bit
python worker.py train URL 2x2 STEPS     train, and print each loss; at the end a digest of all of the state
python worker.py train URL 2x2 STEPS 7   ... but stay at step 7, to be killed there
"""

from __future__ import annotations

import hashlib
import math
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import NamedSharding, PartitionSpec

import holdfast
from holdfast import Checkpointer, every
from holdfast.core.dtypes import DTYPES
from holdfast.state.adapters.numpy import numpy_dtype

NAMES = sorted(DTYPES.keys() - {"complex32", "float4_e2m1fn_x2"})


def mesh_of(text: str) -> jax.sharding.Mesh:
    sizes = tuple(map(int, text.split("x")))
    devices = jax.devices()[: math.prod(sizes)]
    automatic = (jax.sharding.AxisType.Auto,) * len(sizes)
    return jax.make_mesh(sizes, ("data", "model")[: len(sizes)], devices=devices, axis_types=automatic)


def layouts(mesh: jax.sharding.Mesh) -> list[PartitionSpec]:
    one, *more = mesh.axis_names
    found = [PartitionSpec(), PartitionSpec(one), PartitionSpec(None, one), PartitionSpec(None, None, one)]
    for other in more:
        found += [
            PartitionSpec(one, other),
            PartitionSpec(other, None, one),
            PartitionSpec((one, other)),
            PartitionSpec((other, one)),
        ]
    return found


def values(*, zero: bool) -> dict[str, np.ndarray]:
    """Every element type with any bits, in each of the layouts."""
    random = np.random.default_rng(0)
    found = {}
    for name in NAMES:
        for number in range(7):
            dtype = numpy_dtype(name)
            raw = random.integers(0, 256, (8, 16, 8, dtype.itemsize), np.uint8)
            raw = raw & 1 if name == "bool" else raw
            found[f"{name}/{number}"] = (raw * 0 if zero else raw).view(dtype)[..., 0]
    found["scalar"] = np.float32(0 if zero else 1.5)
    return found


def state_on(mesh: jax.sharding.Mesh, *, zero: bool) -> dict[str, object]:
    specs = layouts(mesh)
    state = {}
    with jax.enable_x64(True):
        for number, (name, value) in enumerate(values(zero=zero).items()):
            spec = specs[(number + number // 7) % len(specs)] if value.ndim else PartitionSpec()
            state[name] = jax.device_put(value, NamedSharding(mesh, spec))
    keys = jax.random.split(jax.random.key(0 if zero else 7), 8)
    state["keys"] = jax.device_put(keys, NamedSharding(mesh, PartitionSpec("data")))
    state["alone"] = jnp.full(3, 0.0 if zero else 2.5)
    return state


def put(value: object, place: NamedSharding) -> jax.Array:
    """Return an array that lies so, also where other processes hold parts of it."""
    array = np.asarray(value)
    return jax.make_array_from_callback(array.shape, place, lambda index: array[index])


def save(url: str, mesh: str) -> None:
    holdfast.save(url, {"train": {"now": state_on(mesh_of(mesh), zero=False)}})


def restore(url: str, *meshes: str) -> None:
    expected = values(zero=False)
    for mesh in meshes:
        live = state_on(mesh_of(mesh), zero=True)
        places = {name: value.sharding for name, value in live.items()}
        report = holdfast.load(url, into={"train": {"now": live}})
        assert report.exact, str(report)
        for name, value in expected.items():
            got = live[name]
            assert got.dtype == value.dtype, name
            assert got.sharding == places[name], (name, got.sharding, places[name])
            assert np.asarray(got).tobytes() == value.tobytes(), name
            for shard in got.addressable_shards:  # what each device holds, replicas too
                assert np.asarray(shard.data).tobytes() == value[shard.index].tobytes(), (name, shard)
        keys = jax.random.split(jax.random.key(7), 8)
        assert np.array_equal(jax.random.key_data(live["keys"]), jax.random.key_data(keys))
        assert live["keys"].sharding == places["keys"]
        assert live["alone"].tolist() == [2.5] * 3
        assert not live["alone"].committed
        print(f"exact on {mesh} of {len(jax.devices())}", flush=True)


def train(url: str, mesh: str, steps: str, stay_at: str = "") -> None:
    where = mesh_of(mesh)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2))

    def step(now: dict[str, object], x: jax.Array) -> tuple[dict[str, object], jax.Array]:
        key, drop = jax.random.split(now["key"])

        def loss_of(params: dict[str, jax.Array]) -> jax.Array:
            hidden = jnp.tanh(x @ params["w"]) * jax.random.bernoulli(drop, 0.8, (16, 64))
            return jnp.mean((hidden @ params["v"] - x) ** 2)

        loss, grads = jax.value_and_grad(loss_of)(now["params"])
        updates, opt = tx.update(grads, now["opt"], now["params"])
        return {"params": optax.apply_updates(now["params"], updates), "opt": opt, "key": key}, loss

    everywhere = NamedSharding(where, PartitionSpec())
    w, v = np.asarray(jax.random.normal(jax.random.key(0), (2, 32, 64)))
    params = {
        "w": put(w, NamedSharding(where, PartitionSpec(None, where.axis_names[-1]))),
        "v": put(v.T, NamedSharding(where, PartitionSpec(where.axis_names[-1], None))),
    }
    words = np.asarray(jax.random.key_data(jax.random.key(1)))
    now = {"params": params, "opt": tx.init(params), "key": jax.random.wrap_key_data(put(words, everywhere))}
    run = {"now": jax.tree.map(lambda x: x if len(x.sharding.device_set) > 1 else put(x, everywhere), now)}
    # What goes out lies as what goes in: so the arrays are donated, and a resumed run compiles the same program.
    places = jax.tree.map(lambda x: x.sharding, run["now"])
    step = jax.jit(step, donate_argnums=0, out_shardings=(places, everywhere))
    with Checkpointer(url, {"train": run}, save=every(steps=3)) as ckpt:
        for number in ckpt.steps(int(steps)):
            x = np.random.standard_normal((16, 32)).astype(np.float32)
            x = put(x, NamedSharding(where, PartitionSpec("data")))
            given = run["now"]["params"]["w"]
            run["now"], loss = step(run["now"], x)
            assert given.is_deleted()
            print(f"step {number} {float(loss).hex()}", flush=True)
            if str(number) == stay_at:
                signal.pause()
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(run["now"]):
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        for shard in (jax.random.key_data(leaf) if is_key else leaf).addressable_shards:
            digest.update(np.asarray(shard.data).tobytes())
    print(f"end {digest.hexdigest()}", flush=True)


if __name__ == "__main__":
    np.random.seed(0)
    {"save": save, "restore": restore, "train": train}[sys.argv[1]](*sys.argv[2:])
