"""Which adapters there are, in the order in which they are asked. torch is never imported to find out, and numpy not
before there is a value to ask about: who only looks at a run's history does not wait for it."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Mapping, Sequence, Set

from holdfast.core.errors import MissingDependency
from holdfast.core.memory import Pinning
from holdfast.state.adapter import Adapter, Dispatch, Engine
from holdfast.state.adapters.containers import Atoms, Mappings, Sequences, Sets
from holdfast.state.adapters.records import Dataclasses, Enums, NamedTuples
from holdfast.state.adapters.stateful import Stateful

__all__ = [
    "after_each_step",
    "before_each_step",
    "dispatch",
    "family",
    "jax_group",
    "jax_is_loaded",
    "optimizers",
    "parameters",
    "pinning",
    "replicated",
    "settle",
    "torch_broadcast",
    "torch_group",
    "torch_is_loaded",
    "torch_rng",
    "torch_store",
    "unused_gradients",
]

_FAMILIES = {
    "Modules": "module",
    "NnxModules": "module",
    "NnxOptimizers": "optimizer",
    "Optimizers": "optimizer",
    "Schedulers": "scheduler",
}


def torch_is_loaded() -> bool:
    """Return whether the program has imported torch."""
    return getattr(sys.modules.get("torch"), "Tensor", None) is not None


def jax_is_loaded() -> bool:
    """Return whether the program has imported jax."""
    return getattr(sys.modules.get("jax"), "Array", None) is not None


def nnx_is_loaded() -> bool:
    """Return whether the program has imported flax.nnx."""
    return jax_is_loaded() and getattr(sys.modules.get("flax.nnx"), "Module", None) is not None


def dispatch(*, torch: bool | None = None, jax: bool | None = None) -> Dispatch:
    """Return the adapters that apply now; True asks for those of a framework even if it is not imported yet.

    Raises:
        MissingDependency: a framework was asked for and is not installed.
    """
    with_torch = torch_is_loaded() if torch is None else torch
    return _dispatch(with_torch, jax_is_loaded() if jax is None else jax, nnx_is_loaded())


def family(value: object) -> str:
    """Return what a top-level value of the state is: "module", "optimizer", "scheduler" or "values"."""
    return _FAMILIES.get(type(dispatch().find(type(value))).__name__, "values")


@functools.cache
def _dispatch(with_torch: bool, with_jax: bool, with_nnx: bool) -> Dispatch:
    from holdfast.state.adapters.generators import NumpyGenerators, PythonGenerators
    from holdfast.state.adapters.numpy import Arrays, DTypes, NumpyEngine, Scalars

    adapters: list[Adapter] = [Mappings(), Sequences(), Sets(), Atoms()]
    engines: dict[str, Engine] = {"numpy": NumpyEngine()}
    if with_torch:
        more, engine = _torch()
        adapters += more
        engines["torch"] = engine
    if with_jax:
        more, engine = _jax(with_nnx)
        adapters += more
        engines["jax"] = engine
    adapters += [Arrays(), Scalars(), DTypes(), NumpyGenerators(), PythonGenerators()]
    adapters += [Stateful(), Enums(), NamedTuples()]
    if with_jax:
        from holdfast.state.adapters.jax_trees import Nodes

        adapters.append(Nodes())
    return Dispatch([*adapters, Dataclasses()], engines)


def _torch() -> tuple[list[Adapter], Engine]:
    try:
        from holdfast.state.adapters.torch_modules import Modules
        from holdfast.state.adapters.torch_optim import Optimizers
        from holdfast.state.adapters.torch_schedulers import Schedulers
        from holdfast.state.adapters.torch_tensor_plans import Tensors
        from holdfast.state.adapters.torch_tensors import ENGINE
        from holdfast.state.adapters.torch_values import Generators, SmallValues
    except ModuleNotFoundError as e:
        if e.name != "torch":
            raise
        raise MissingDependency("torch tensors were asked for; run: pip install 'holdfast[torch]'") from e
    return [Tensors(), Modules(), Optimizers(), Schedulers(), Generators(), SmallValues()], ENGINE


def _jax(with_nnx: bool) -> tuple[list[Adapter], Engine]:
    try:
        from holdfast.state.adapters.jax_arrays import ENGINE, Abstract, Arrays, Tracers
        from holdfast.state.adapters.jax_keys import Keys
    except ModuleNotFoundError as e:
        if e.name != "jax":
            raise
        raise MissingDependency("jax arrays were asked for; run: pip install 'holdfast[jax]'") from e
    adapters: list[Adapter] = [Arrays(), Keys(), Abstract(), Tracers()]
    if with_nnx:
        from holdfast.state.adapters.jax_nnx import NnxModules, NnxObjects, NnxOptimizers, States, Variables

        adapters += [NnxOptimizers(), NnxModules(), NnxObjects(), Variables(), States()]
    return adapters, ENGINE


def parameters(state: Mapping[str, object]) -> tuple[dict[int, str], set[int]]:
    """Return id(parameter) -> tree path for the modules in `state`, and the ids that an optimizer updates."""
    if not torch_is_loaded():
        return {}, set()
    from holdfast.state.adapters.torch_names import survey

    return survey(state)


def optimizers(state: Mapping[str, object]) -> dict[str, object]:
    """Return the torch optimizers in `state` by tree path, those in containers too."""
    if not torch_is_loaded():
        return {}
    from holdfast.state.adapters.torch_names import optimizers_in

    return dict(optimizers_in(state))


def before_each_step(act: Callable[[bool], None]) -> Callable[[], None] | None:
    """Call `act` before any optimizer of this process steps, and say whether such steps may also come unannounced;
    return what ends that, or None without torch."""
    if not torch_is_loaded():
        return None
    from holdfast.state.adapters.torch_steps import before_each_step as register

    return register(act)


def after_each_step(act: Callable[[object], None]) -> Callable[[], None] | None:
    """Call `act`, with its parameter groups, when any optimizer of this process has stepped; return what ends that, or
    None without torch."""
    if not torch_is_loaded():
        return None
    from holdfast.state.adapters.torch_steps import after_each_step as register

    return register(act)


def unused_gradients(state: Mapping[str, object], stepped: Set[int]) -> bool:
    """Return whether an optimizer in `state` has gradients whose parameter groups are not, by id, among the stepped."""
    from holdfast.state.adapters.torch_steps import unused_gradients as look

    return look(state, stepped)


def pinning(values: Sequence[object]) -> Pinning | None:
    """Return what pins host memory for copies of these tensors from devices, if there are any; see `Engine.pinning`."""
    if not torch_is_loaded():
        return None
    return dispatch().engines["torch"].pinning(values)


def torch_rng() -> types.ModuleType | None:
    """Return the adapter of torch's global generators; None without torch."""
    if not torch_is_loaded():
        return None
    from holdfast.state.adapters import torch_rng as adapter

    return adapter


def torch_group() -> tuple[int, int] | None:
    """Return (rank, number of ranks) of torch.distributed's default group; None where there is none."""
    if not torch_is_loaded():
        return None
    from holdfast.state.adapters.torch_distributed import group

    return group()


def jax_group() -> tuple[int, int] | None:
    """Return (index, number) of the processes of jax.distributed; None where it is not initialised."""
    if not jax_is_loaded():
        return None
    from holdfast.state.adapters.jax_distributed import group

    return group()


def torch_store() -> object | None:
    """Return the key-value store of torch.distributed's default group; None where there is none."""
    if not torch_is_loaded():
        return None
    from holdfast.state.adapters.torch_distributed import default_store

    return default_store()


def torch_broadcast(memory: memoryview) -> None:
    """Fill `memory` on every rank of torch.distributed's default group with what it holds on the first."""
    from holdfast.state.adapters.torch_distributed import broadcast

    broadcast(memory)


def settle(state: Mapping[str, object]) -> None:
    """Bring modules whose parameters are spread over processes to the form in which they are stored."""
    if torch_is_loaded():
        from holdfast.state.adapters.torch_distributed import settle as settle_modules

        settle_modules(state)


def replicated(state: Mapping[str, object]) -> dict[int, tuple[int, ...]]:
    """Return, by id, the parameters of which several processes have the same, and the ranks of these."""
    if not torch_is_loaded():
        return {}
    from holdfast.state.adapters.torch_distributed import replicated as of_modules

    return of_modules(state)
