"""One of several processes that hold one mesh between them, as a test starts it.

python several.py RANK WORLD PORT save URL 4            save a state whose arrays lie on the devices of all processes
python several.py RANK WORLD PORT restore URL 4         restore it, and compare bit for bit what lies here
python several.py RANK WORLD PORT save-rows URL         save 32 MiB of which each process holds some rows
python several.py RANK WORLD PORT restore-rows URL      restore them, and print how many MiB were read for that
python several.py RANK WORLD PORT train URL 2x2 STEPS   train; the first process prints each loss; a further number: where to stay
"""

from __future__ import annotations

import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from worker import layouts, mesh_of, train, values

from holdfast import Checkpointer


def spread(mesh: jax.sharding.Mesh, *, zero: bool) -> dict[str, jax.Array]:
    specs = layouts(mesh)
    state = {}
    with jax.enable_x64(True):
        for number, (name, value) in enumerate(values(zero=zero).items()):
            spec = specs[(number + number // 7) % len(specs)] if value.ndim else PartitionSpec()
            place = NamedSharding(mesh, spec)
            state[name] = jax.make_array_from_callback(
                value.shape, place, lambda i, v=value: v[i], dtype=value.dtype
            )
    words = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(0 if zero else 7), 8)))
    data = NamedSharding(mesh, PartitionSpec("data"))
    data = jax.make_array_from_callback(words.shape, data, lambda i: words[i], dtype=words.dtype)
    state["keys"] = jax.random.wrap_key_data(data)
    return state


def save(url: str, mesh: str) -> None:
    own = {"rank": jax.process_index(), "x": jax.numpy.full(3, float(jax.process_index()))}
    now = spread(mesh_of(mesh), zero=False)
    with Checkpointer(url, {"train": {"now": now}, "own": own}) as ckpt:
        for _ in ckpt.steps(1):
            pass


def restore(url: str, mesh: str) -> None:
    expected = values(zero=False)
    live = spread(mesh_of(mesh), zero=True)
    places = {name: value.sharding for name, value in live.items()}
    own = {"rank": -1, "x": jax.numpy.zeros(3)}
    with Checkpointer(url, {"train": {"now": live}, "own": own}) as ckpt:
        ckpt.restore("latest")
    for name, value in expected.items():
        got = live[name]
        assert got.sharding == places[name], name
        assert got.dtype == value.dtype, name
        for shard in got.addressable_shards:
            assert np.asarray(shard.data).tobytes() == value[shard.index].tobytes(), (name, shard)
    words = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(7), 8)))
    for shard in jax.random.key_data(live["keys"]).addressable_shards:
        assert np.array_equal(np.asarray(shard.data), words[shard.index])
    print(f"exact; own {own['rank']} {own['x'].tolist()}", flush=True)


def rows(*, zero: bool) -> dict[str, jax.Array]:
    place = NamedSharding(mesh_of(str(len(jax.devices()))), PartitionSpec("data"))
    value = np.arange(8 << 20, dtype=np.float32).reshape(8192, 1024) * (not zero)
    return {"w": jax.make_array_from_callback(value.shape, place, lambda i: value[i])}


def save_rows(url: str) -> None:
    with Checkpointer(url, {"p": rows(zero=False)}) as ckpt:
        for _ in ckpt.steps(1):
            pass


def bytes_read() -> int:
    return int(Path("/proc/self/io").read_text().split("rchar:")[1].split()[0])


def restore_rows(url: str) -> None:
    live, expected = rows(zero=True), rows(zero=False)
    with Checkpointer(url, {"p": live}) as ckpt:
        before = bytes_read()
        ckpt.restore("latest")
        read = bytes_read() - before
    for got, wanted in zip(live["w"].addressable_shards, expected["w"].addressable_shards, strict=True):
        assert np.array_equal(got.data, wanted.data)
    print(f"read {read >> 20}", flush=True)


if __name__ == "__main__":
    rank, world, port, verb, *words = sys.argv[1:]
    if int(world) > 1:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", int(world), int(rank))
    np.random.seed(0)
    verbs = {
        "save": save,
        "restore": restore,
        "save-rows": save_rows,
        "restore-rows": restore_rows,
        "train": train,
    }
    verbs[verb](*words)
