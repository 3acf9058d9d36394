"""Put a stored tree and its tensors back into live objects, or make new values of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from holdfast.core.errors import StateError
from holdfast.format.values import Typed, tensor_leaves
from holdfast.state.adapter import Engine
from holdfast.state.materialize import Materializer
from holdfast.state.registry import dispatch, parameters
from holdfast.state.reports import RestoreOptions, RestoreReport
from holdfast.state.restoring import Build, Restoring, host_bytes_equal, typed_nodes
from holdfast.state.tensors import HostTensor, TensorSpec

__all__ = ["RestoreOptions", "RestorePlan", "RestoreReport", "materialize", "plan_restore"]

STRICT = RestoreOptions()


class RestorePlan:
    """What a restore will do. `needed` are the stored tensors it reads, `parts` the boxes, by key, that it reads of
    others, and `passing` are those of both that it only copies from; `apply` carries it out.

    After `apply`, `replaced` maps the top-level keys whose value is immutable, and therefore a new object,
    to it.
    """

    def __init__(self, work: Restoring, builds: dict[str, Build], state: Mapping[str, object]) -> None:
        self.needed = frozenset(work.needed)
        self.parts = work.parts
        self.passing = frozenset({name for _, _, name in work.copies} - work.kept) | work.parts.keys()
        self.report: RestoreReport = work.report
        self.replaced: dict[str, object] = {}
        self._work = work
        self._builds = builds
        self._state = state

    def apply(self, tensors: Mapping[str, HostTensor]) -> None:
        """Copy everything into the live objects.

        All that can be checked is checked, and all new values are made, before the first live object changes.
        Then objects that restore themselves go first, tensors and values next, hooks last.

        Raises:
            StateError: bytes are missing or not those that were planned for; nothing live was changed.
        """
        self._check(tensors)
        maker = Materializer(_Renamed(tensors, self._work), self._work.dispatch, resolve=self._work.resolve)
        ready = [(act, act.build(maker)) for act in self._work.acts]
        values = {key: build(maker) for key, build in self._builds.items()}
        for stage in (0, 1, 2):
            if stage == 1:
                self._copy(tensors)
            for act, value in ready:
                if act.stage == stage:
                    act.commit(value)
        self.replaced = {key: value for key, value in values.items() if value is not self._state[key]}

    def _check(self, tensors: Mapping[str, HostTensor]) -> None:
        specs = self._work.specs  # in stored order, as they lie in memory
        found = [_unlike(n, spec, tensors.get(n)) for n, spec in specs.items() if n in self.needed]
        for key, part in self.parts.items():
            spec = TensorSpec(part.name, specs[part.name].dtype, part.shape)
            found.append(_unlike(key, spec, tensors.get(key)))
        problems = sorted(filter(None, found))
        if not problems:
            for path, first, second in self._work.must_equal:
                if not host_bytes_equal(tensors[first], tensors[second]):
                    problems.append(
                        f"{path}: the live state shares one memory here and for {first}; stored are two "
                        f"different values; untie them, or leave one out with only=…"
                    )
        if problems:
            raise StateError(_message(problems))

    def _copy(self, tensors: Mapping[str, HostTensor]) -> None:
        by_engine: dict[int, tuple[Engine, list[tuple[object, HostTensor]]]] = {}
        for engine, live, name in self._work.copies:
            by_engine.setdefault(id(engine), (engine, []))[1].append((live, tensors[name]))
        for engine, pairs in by_engine.values():
            engine.copy_in(pairs)


def _unlike(name: str, spec: TensorSpec, host: HostTensor | None) -> str | None:
    """Return what is wrong with the bytes for a tensor, or None."""
    if host is None:
        return f"{name}: its bytes are missing; expected {spec.nbytes} bytes"
    alike = host.spec is spec or (host.spec.dtype, host.spec.shape) == (spec.dtype, spec.shape)
    if alike and host.whole:
        return None
    return (
        f"{name}: expected {spec.describe()} of {spec.nbytes} bytes, "
        f"found {host.spec.describe()} of {host.data.nbytes} bytes"
    )


class _Renamed(Mapping[str, HostTensor]):
    """The tensors, also under the names that share one (tied weights)."""

    def __init__(self, tensors: Mapping[str, HostTensor], work: Restoring) -> None:
        self._tensors, self._aliases = tensors, work.aliases

    def __getitem__(self, name: str) -> HostTensor:
        return self._tensors[self._aliases.get(name, name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def plan_restore(
    state: Mapping[str, object],
    tree: Mapping[str, object],
    specs: Mapping[str, TensorSpec],
    aliases: Mapping[str, str],
    *,
    options: RestoreOptions = STRICT,
) -> RestorePlan:
    """Pair the live `state` with a stored `tree` and return the plan; touch nothing live.

    `specs` are the stored tensors by name, `aliases` what `Captured.aliases` was.

    Raises:
        StateError: one error that lists every path where the two do not fit and `options` do not allow it,
            each with what was expected, what was found and the relaxation to pass.
    """
    work = Restoring(dispatch(), specs, aliases, options=options, parameters=parameters(state)[0])
    builds: dict[str, Build] = {}
    for key, live in state.items():
        if key in tree:
            builds[key] = work.plan(live, tree[key], key)
        else:
            work.missing(key, f"a {type(live).__name__}")
    for key, node in tree.items():
        if key not in state:
            work.unexpected(key, f"a {node.kind if isinstance(node, Typed) else type(node).__name__}")
    if options.only and not work.report.restored and not work.problems:
        work.problems.append(
            f"only={options.only!r} selects nothing that is in both the state ({', '.join(state)}) "
            f"and the checkpoint ({', '.join(tree)}); use tree paths such as 'model/**'"
        )
    if work.problems:
        raise StateError(_message(work.problems))
    return RestorePlan(work, builds, state)


def materialize(tree: object, tensors: Mapping[str, HostTensor], as_: str) -> object:
    """Make new values of a stored tree, or of any part of it, without live objects.

    "torch" gives back each tensor as the framework's it came from; "jax" makes jax arrays of all but numpy's; "numpy"
    makes arrays of all, with bfloat16 and float8 from ml_dtypes, packed float4 as uint8. Layouts are recreated, ties
    kept.
    Dataclasses, named tuples and enum members become `Record` and `EnumMember`; registered codecs decode.

    Raises:
        StateError: a tensor of the tree is not in `tensors`, or `as_` is none of these words.
        MissingDependency: "torch" was asked for, the tree holds torch tensors and torch is not installed; or "jax",
            and jax is not.
    """
    if as_ not in ("torch", "numpy", "jax"):
        raise StateError(f"as_={as_!r}: expected 'torch', 'jax' or 'numpy'")
    if as_ == "jax":
        return Materializer(tensors, dispatch(jax=True), framework="jax").value(tree)
    if as_ == "numpy":
        return Materializer(tensors, dispatch(), framework="numpy").value(tree)
    return Materializer(tensors, dispatch(torch=True if _needs_torch(tree) else None)).value(tree)


def _needs_torch(tree: object) -> bool:
    kinds = [leaf.kind for leaf in tensor_leaves(tree)] + [typed.kind for typed in typed_nodes(tree)]
    return any(kind.startswith("torch.") for kind in kinds)


def _message(problems: list[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} places do not fit:\n" + "\n".join(f"  {p}" for p in problems)
