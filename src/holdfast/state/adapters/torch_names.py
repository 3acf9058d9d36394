"""Canonical names: where a parameter stands in the model, whatever wraps the model today."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin

from holdfast.core.names import join_path

__all__ = [
    "canonical_modules",
    "has_own_state",
    "modules_at_a_glance",
    "objects_in",
    "optimizers_in",
    "survey",
    "unwrapped",
]

# FSDP is not among them: its hooks give a state_dict with clean names, and its inner tensors are shards.
# Wrapper classes, by the module that defines them and the attribute that holds what they wrap. They are
# looked up only where that module is already imported: an instance cannot exist before.
_WRAPPERS = (
    ("torch._dynamo.eval_frame", "OptimizedModule", "_orig_mod"),
    ("torch.nn.parallel.distributed", "DistributedDataParallel", "module"),
    ("torch.nn.parallel.data_parallel", "DataParallel", "module"),
    (
        "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
        "ActivationWrapper",
        "_checkpoint_wrapped_module",
    ),
)
_METHODS = ("state_dict", "load_state_dict", "_save_to_state_dict")
# A lazy module overrides one of them to leave out a detach; what it holds is its tensors all the same.
_INHERITED = {m: (getattr(nn.Module, m), getattr(LazyModuleMixin, m, None)) for m in _METHODS}
# A hook of torch that only records a version number.
_HARMLESS_HOOKS = ("SpectralNormStateDictHook",)
# Those of `fully_shard` only put the sharded parameters in place.
_SHARDING = "torch.distributed.fsdp._fully_shard"


def _wrapper_classes() -> list[tuple[type, str]]:
    found = []
    for module, name, attribute in _WRAPPERS:
        cls = vars(sys.modules[module]).get(name) if module in sys.modules else None
        if isinstance(cls, type):
            found.append((cls, attribute))
    return found


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the user's module inside known wrappers, by their type and never by an attribute's name."""
    wrappers = _wrapper_classes()
    while True:
        for cls, attribute in wrappers:
            if isinstance(module, cls):
                inner = module._modules.get(attribute)
                if inner is None:
                    return module
                module = inner
                break
        else:
            return module


def has_own_state(module: nn.Module) -> bool:
    """Return whether this module's content is what its own methods or hooks say, rather than its tensors."""
    cls = type(module)
    for method in _METHODS:
        if getattr(cls, method) not in _INHERITED[method] or method in module.__dict__:
            return True
    hooks = [*module._state_dict_hooks.values(), *module._state_dict_pre_hooks.values()]
    return not all(map(_is_harmless, hooks))


def _is_harmless(hook: object) -> bool:
    if type(hook).__name__ in _HARMLESS_HOOKS:
        return True
    inner = getattr(hook, "hook", hook)  # torch wraps a pre-hook
    return str(getattr(inner, "__module__", "")).startswith(_SHARDING)


def canonical_modules(root: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Yield (canonical prefix with its final dot, module) for `root` and all below, unwrapped, parents first.

    Shared modules occur once per place. Below a module with its own state nothing is yielded.
    """
    yield from _walk(unwrapped(root), prefix, ())


def _walk(module: nn.Module, prefix: str, above: tuple[int, ...]) -> Iterator[tuple[str, nn.Module]]:
    if id(module) in above:
        return
    yield prefix, module
    if has_own_state(module):
        return
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(unwrapped(child), f"{prefix}{name}.", (*above, id(module)))


def modules_at_a_glance(root: nn.Module) -> list[nn.Module] | None:
    """Return the modules of `canonical_modules`, several times faster; None where one has its own state, or holds
    itself."""
    found: list[nn.Module] = []
    wrappers = tuple(cls for cls, _ in _wrapper_classes())
    plain: dict[type, bool] = {}  # whether a class is no wrapper and leaves its state to us
    above: set[int] = set()

    def visit(module: nn.Module) -> bool:
        cls = type(module)
        if cls not in plain:
            inherited = all(getattr(cls, m) is getattr(nn.Module, m) for m in _METHODS)
            plain[cls] = inherited and not issubclass(cls, wrappers)
        if not plain[cls]:
            module = unwrapped(module)
        own = module.__dict__
        hooked = (
            module._state_dict_hooks or module._state_dict_pre_hooks or not own.keys().isdisjoint(_METHODS)
        )
        if (hooked or not plain[cls]) and has_own_state(module):
            return False
        if id(module) in above:
            return False
        found.append(module)
        above.add(id(module))
        whole = all(child is None or visit(child) for child in module._modules.values())
        above.discard(id(module))
        return whole

    return found if visit(root) else None


def objects_in(state: Mapping[str, object]) -> Iterator[tuple[str, nn.Module | torch.optim.Optimizer]]:
    """Yield (tree path, object) for the modules and optimizers in `state`, in its order.

    Looks into containers and dataclasses, not into objects that look after their own state.
    """
    stack: list[tuple[str, object, int]] = [(str(k), v, 0) for k, v in reversed(list(state.items()))]
    while stack:
        path, value, depth = stack.pop()
        if isinstance(value, (nn.Module, torch.optim.Optimizer)):
            yield path, value
        elif depth < 20:
            stack.extend((join_path(path, k), v, depth + 1) for k, v in reversed(_children(value)))


def optimizers_in(state: Mapping[str, object]) -> Iterator[tuple[str, torch.optim.Optimizer]]:
    """Yield (tree path, optimizer) for the optimizers in `state`, as `objects_in` does."""
    return ((path, value) for path, value in objects_in(state) if isinstance(value, torch.optim.Optimizer))


def survey(state: Mapping[str, object]) -> tuple[dict[int, str], set[int]]:
    """Return id(parameter) -> tree path for all modules in `state`, and the ids that an optimizer updates.

    Where a parameter stands in several places the first path wins.
    """
    names: dict[int, str] = {}
    updated: set[int] = set()
    for path, value in objects_in(state):
        if isinstance(value, nn.Module):
            _name_parameters(value, path, names)
        else:
            updated.update(id(p) for group in value.param_groups for p in group["params"])
    return names, updated


def _children(value: object) -> Sequence[tuple[object, object]]:
    if isinstance(value, dict):
        return [(k, v) for k, v in value.items() if not isinstance(v, (int, float, str, torch.Tensor))]
    if isinstance(value, (list, tuple)):
        return [(i, v) for i, v in enumerate(value) if not isinstance(v, (int, float, str, torch.Tensor))]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [(f.name, getattr(value, f.name, None)) for f in dataclasses.fields(value)]
    return ()


def _name_parameters(root: nn.Module, path: str, names: dict[int, str]) -> None:
    for prefix, module in canonical_modules(root):
        found = module.named_parameters() if has_own_state(module) else module._parameters.items()
        for name, parameter in found:
            if parameter is not None:
                names.setdefault(id(parameter), join_path(path, prefix + name))
