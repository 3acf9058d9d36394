"""Random generators of python and numpy that a program owns (the global ones are in `state.rng`)."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from holdfast.core.errors import UnsupportedValue
from holdfast.format.values import Typed
from holdfast.state.adapter import Kinds
from holdfast.state.capturing import Capturing
from holdfast.state.materialize import Materializer
from holdfast.state.records import Record
from holdfast.state.restoring import Build, Restoring, Stage

__all__ = ["NumpyGenerators", "PythonGenerators", "python_state", "set_python_state"]

_BIT_GENERATORS = ("MT19937", "PCG64", "PCG64DXSM", "Philox", "SFC64")
NumpyRng = np.random.Generator | np.random.RandomState | np.random.BitGenerator


def python_state(state: tuple[Any, ...]) -> dict[str, object]:
    """Return `random.getstate()` in a compact storable form."""
    version, internal, gauss = state
    return {"version": version, "internal": np.array(internal, np.uint32), "gauss_next": gauss}


def set_python_state(rng: random.Random, stored: Mapping[str, object]) -> None:
    """Set a python generator from what `python_state` returned."""
    internal = tuple(int(v) for v in np.asarray(stored["internal"]).tolist())
    rng.setstate((stored["version"], internal, stored["gauss_next"]))


class PythonGenerators:
    """random.Random and subclasses that keep its state."""

    divisible = False

    def __init__(self) -> None:
        self.kinds: Kinds = {"random.Random": _new_python}

    def claims(self, cls: type) -> bool:
        return issubclass(cls, random.Random)

    def capture(self, value: object, path: str, into: Capturing) -> object:
        if isinstance(value, random.SystemRandom):
            raise UnsupportedValue(f"{path}: random.SystemRandom has no state; use random.Random(seed)")
        into.note(path, "captured", "random.Random")
        return Typed("random.Random", into.value(python_state(cast("random.Random", value).getstate()), path))

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        rng = cast("random.Random", live)
        if not isinstance(node, Typed) or node.kind != "random.Random":
            ctx.mismatch(path, "a random.Random", _kind(node))
            return lambda m: live
        # Made whole first, so that a malformed state is found before anything live changes.
        ctx.act(
            Stage.VALUES,
            ctx.fresh(node, path),
            lambda v: rng.setstate(cast("random.Random", v).getstate()),
        )
        return lambda m: live


def _new_python(m: Materializer, value: object) -> object:
    rng = random.Random()
    set_python_state(rng, cast("dict[str, object]", m.mapping(value)))
    return rng


class NumpyGenerators:
    """numpy Generator, RandomState and the BitGenerators that numpy ships."""

    divisible = False

    def __init__(self) -> None:
        self.kinds: Kinds = {
            "numpy.random.Generator": lambda m, v: np.random.Generator(_new_bits(m, v)),
            "numpy.random.RandomState": _new_legacy,
            "numpy.random.BitGenerator": _new_bits,
        }

    def claims(self, cls: type) -> bool:
        return issubclass(cls, (np.random.Generator, np.random.RandomState, np.random.BitGenerator))

    def capture(self, value: object, path: str, into: Capturing) -> object:
        state = _state_of(value)
        name = str(state["bit_generator"])
        if name not in _BIT_GENERATORS:
            raise UnsupportedValue(
                f"{path}: the bit generator {name} is not one of numpy's ({', '.join(_BIT_GENERATORS)}); "
                "register a codec for it"
            )
        kind = _kind_of(value)
        into.note(path, "captured", kind, name)
        return Typed(kind, into.value(state, path))

    def plan(self, live: object, node: object, path: str, ctx: Restoring) -> Build:
        kind, name = _kind_of(live), str(_state_of(live)["bit_generator"])
        stored = node.value if isinstance(node, Typed) and node.kind == kind else None
        if not isinstance(stored, dict) or stored.get("bit_generator") != name:
            found = stored.get("bit_generator") if isinstance(stored, dict) else _kind(node)
            ctx.mismatch(path, f"a {kind} with {name}", f"{found}")
            return lambda m: live
        ctx.act(Stage.VALUES, ctx.fresh(node, path), lambda v: _set_state(live, _state_of(v)))
        return lambda m: live


def _kind(node: object) -> str:
    return f"a {node.kind if isinstance(node, Typed) else type(node).__name__}"


def _kind_of(value: object) -> str:
    if isinstance(value, np.random.Generator):
        return "numpy.random.Generator"
    return (
        "numpy.random.RandomState"
        if isinstance(value, np.random.RandomState)
        else "numpy.random.BitGenerator"
    )


def _state_of(value: object) -> dict[str, Any]:
    if isinstance(value, np.random.RandomState):
        return value.get_state(legacy=False)
    bits = (
        value.bit_generator
        if isinstance(value, np.random.Generator)
        else cast("np.random.BitGenerator", value)
    )
    return cast("dict[str, Any]", bits.state)


def _set_state(live: object, state: dict[str, object]) -> None:
    if isinstance(live, np.random.RandomState):
        live.set_state(state)
        return
    bits = (
        live.bit_generator if isinstance(live, np.random.Generator) else cast("np.random.BitGenerator", live)
    )
    bits.state = state


def _new_bits(m: Materializer, value: object) -> Any:
    state = m.mapping(value)
    name = state.get("bit_generator")
    if name not in _BIT_GENERATORS:
        return Record("numpy.random.BitGenerator", {str(k): v for k, v in state.items()})
    bits = getattr(np.random, str(name))(0)
    bits.state = state
    return bits


def _new_legacy(m: Materializer, value: object) -> object:
    state = m.mapping(value)
    if state.get("bit_generator") not in _BIT_GENERATORS:
        return Record("numpy.random.RandomState", {str(k): v for k, v in state.items()})
    rng = np.random.RandomState(getattr(np.random, str(state["bit_generator"]))(0))
    rng.set_state(cast("dict[str, Any]", state))
    return rng
