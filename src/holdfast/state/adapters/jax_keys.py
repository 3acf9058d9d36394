"""Typed random keys of jax: the name of the algorithm, and the key's words as an array."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import jax

from holdfast.core.errors import UnsupportedValue
from holdfast.format.values import TensorLeaf, Typed
from holdfast.state.adapter import Kinds
from holdfast.state.adapters.jax_arrays import is_key_class, plan_array
from holdfast.state.adapters.jax_placing import Home
from holdfast.state.capturing import Capturing
from holdfast.state.materialize import Materializer
from holdfast.state.restoring import Build, Kept, Restoring

__all__ = ["KEY", "Keys"]

KEY = "jax.key"


class Keys:
    """Keys of `jax.random.key`, one or an array of them. A legacy key is an array of uint32 and stored as one."""

    divisible = False

    def __init__(self) -> None:
        self.kinds: Kinds = {KEY: _new_key}

    def claims(self, cls: type) -> bool:
        return is_key_class(cls)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        key = cast("jax.Array", value)
        if key.is_deleted():
            raise UnsupportedValue(f"{path}: this key was donated; put the new one into the state")
        impl = _impl(key, path)
        return Typed(KEY, {"impl": impl, "data": into.value(jax.random.key_data(key), path)})

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        stored = _parts(node)
        if stored is None:
            ctx.mismatch(
                path, "a typed random key", "something else",
                remedy="Make a typed key of stored words with jax.random.wrap_key_data after load()",
            )  # fmt: skip
            return Kept(live)
        key = cast("jax.Array", live)
        impl, leaf = stored
        if impl != _impl(key, path):
            ctx.mismatch(path, f"a key of {_impl(key, path)}", f"a key of {impl}")
            return Kept(live)
        words = plan_array(Home.of(jax.random.key_data(key)), live, leaf, path, ctx=ctx)

        def build(m: Materializer) -> object:
            data = words(m)
            return data if data is live else jax.random.wrap_key_data(cast("jax.Array", data), impl=impl)

        return build


def _impl(key: jax.Array, path: str) -> str:
    impl = jax.random.key_impl(key)
    if not isinstance(impl, str):
        raise UnsupportedValue(f"{path}: a key of {impl} has no name by which it could be found again")
    return impl


def _parts(node: object) -> tuple[str, TensorLeaf] | None:
    if not isinstance(node, Typed) or node.kind != KEY or not isinstance(node.value, dict):
        return None
    impl, leaf = node.value.get("impl"), node.value.get("data")
    return (impl, leaf) if isinstance(impl, str) and isinstance(leaf, TensorLeaf) else None


def _new_key(m: Materializer, value: object) -> object:
    parts = cast("Mapping[str, object]", value)
    data = cast("jax.Array", m.value(parts["data"]))
    return jax.random.wrap_key_data(data, impl=str(parts["impl"]))
