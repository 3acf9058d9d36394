"""What is saved: states of named tensors, and a transformer that trains."""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from bench.devices import catch_up

State = dict[str, dict[str, torch.Tensor]]

VOCABULARY = 2048
ONE_TENSOR = ("model", "h.1.qkv")  # what the load case reads alone


@dataclass(frozen=True, slots=True)
class Recipe:
    """Which state a worker makes for itself, and where."""

    where: str  # module:function, imported in the worker alone
    quick: bool  # a small one of the same kind
    device: str = "cpu"

    def subject(self) -> Subject:
        module, _, name = self.where.partition(":")
        make: Callable[[bool, str], Subject] = getattr(importlib.import_module(f"bench.{module}"), name)
        return make(self.quick, self.device)


class Subject:
    """A state and how it changes. `live` is for libraries that take objects; `tensors` are the same bytes by name."""

    def __init__(self, state: State, *, changing: tuple[str, ...] = ()) -> None:
        self._state = state
        self._changing = changing

    @property
    def live(self) -> Mapping[str, object]:
        return self._state

    def tensors(self) -> State:
        return self._state

    def local(self) -> State:
        """What this process holds of tensors that are spread over several, nothing copied; all of the others."""
        return {p: {n: held(t) for n, t in of.items()} for p, of in self.tensors().items()}

    @property
    def device(self) -> str:
        return next(t.device.type for of in self.tensors().values() for t in of.values())

    def nbytes(self, *parts: str) -> int:
        """Bytes that this process holds of some parts, or of all."""
        return sum(t.nbytes for t in self._held(parts))

    def change(self) -> None:
        """Give every tensor that changes a new value, in place: nothing of it may be left out as unchanged."""
        with torch.no_grad():
            torch._foreach_add_(self._held(self._changing), 1e-3)  # pyright: ignore[reportPrivateImportUsage]

    def _held(self, parts: tuple[str, ...]) -> list[torch.Tensor]:
        local = self.local()
        return [t for part in parts or tuple(local) for t in local[part].values()]


class Training(Subject):
    """A language model with AdamW: real steps, whose time a checkpointer may or may not lengthen. Each half of a step
    returns when the device has caught up, as it must where the program looks at its loss."""

    def __init__(self, model: nn.Module, batch: torch.Tensor) -> None:
        super().__init__({})
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
        self._batch = batch
        self.backward()
        self.optimizer.step()  # the optimizer's state exists from its first step on
        self.optimizer.zero_grad()

    @property
    def live(self) -> Mapping[str, object]:
        return {"model": self.model, "optimizer": self.optimizer}

    def tensors(self) -> State:
        """The same tensors by name, for libraries that take tensors: weights and both moments, nothing copied."""
        named = dict(self.model.named_parameters())
        moments = {
            key: {name: self.optimizer.state[p][key] for name, p in named.items()}
            for key in ("exp_avg", "exp_avg_sq")
        }
        return {"model": {name: p.detach() for name, p in named.items()}, **moments}

    def backward(self) -> None:
        """The part of a step that reads parameters and does not change them."""
        self.optimizer.zero_grad()
        logits = self.model(self._batch[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), self._batch[:, 1:].flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        catch_up(self._batch.device.type)

    def step(self) -> float:
        """The part that changes them; return when, on `time.perf_counter`, nothing held it up any more."""
        marks: list[float] = []
        last_hook = self.optimizer.register_step_pre_hook(lambda *_: marks.append(time.perf_counter()))
        self.optimizer.step()
        last_hook.remove()
        catch_up(self._batch.device.type)
        return marks[0]


def held(t: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: of a DTensor its own part, the very memory."""
    found: torch.Tensor = getattr(t, "_local_tensor", t)
    return found


def language_model(width: int, layers: int) -> nn.Sequential:
    """A transformer between an embedding and a linear layer."""
    layer = nn.TransformerEncoderLayer(width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True)
    return nn.Sequential(
        nn.Embedding(VOCABULARY, width),
        nn.TransformerEncoder(layer, layers, enable_nested_tensor=False),
        nn.Linear(width, VOCABULARY),
    )


def transformer(quick: bool, device: str = "cpu") -> Subject:
    """Parameters and both Adam moments of a transformer, as fp32 tensors: 1.1 GB."""
    width, layers = (256, 2) if quick else (1024, 7)
    shapes: dict[str, tuple[int, ...]] = {"wte": (50257 // 8, width), "head.bias": (width,)}
    for i in range(layers):
        shapes |= {f"h.{i}.qkv": (3 * width, width), f"h.{i}.proj": (width, width), f"h.{i}.norm": (width,)}
        shapes |= {f"h.{i}.up": (4 * width, width), f"h.{i}.down": (width, 4 * width)}
    parts = ("model", "exp_avg", "exp_avg_sq")
    return Subject({part: {n: torch.randn(s, device=device) for n, s in shapes.items()} for part in parts})


def tiny(quick: bool, device: str = "cpu", count: int = 20_000) -> Subject:
    """Many tensors of 64 floats."""
    count = count // 20 if quick else count
    return Subject({"model": {f"layer{i}.weight": torch.randn(64, device=device) for i in range(count)}})


def many(quick: bool, device: str = "cpu") -> Subject:
    return tiny(quick, device, 100_000)


def lora(quick: bool, device: str = "cpu") -> Subject:
    """A frozen base of 400 MB and adapters of rank 4 that change, 2 MB."""
    width, layers = (256, 2) if quick else (1024, 24)
    base = {
        f"h.{i}.{n}": torch.randn(width, width, device=device)
        for i in range(layers)
        for n in ("q", "k", "v", "o")
    }
    adapters = {
        f"h.{i}.{n}.{half}": torch.randn(shape, device=device)
        for i in range(layers)
        for n in ("q", "v")
        for half, shape in (("a", (4, width)), ("b", (width, 4)))
    }
    return Subject({"base": base, "adapters": adapters}, changing=("adapters",))


def training(quick: bool, device: str = "cpu") -> Subject:
    """177 MB of state, steps of about 100 ms on one core."""
    return _training(64, 1, (1, 16), device) if quick else _training(512, 4, (1, 64), device)


def large_training(quick: bool, device: str = "cpu") -> Subject:
    """1.1 GB of state, steps that are longer than a copy of it: most of a second on one core, 50 ms on a large GPU."""
    if quick:
        return training(quick, device)
    return _training(1024, 7, (1, 32) if device == "cpu" else (8, 512), device)


def _training(width: int, layers: int, batch: tuple[int, int], device: str) -> Training:
    torch.manual_seed(0)
    if device == "cpu":
        torch.set_num_threads(1)  # so that one of two cores trains, as a GPU would, and one is free to save
    rows, tokens = batch
    with torch.device(device):
        model = language_model(width, layers)
        data = torch.randint(0, VOCABULARY, (rows, tokens + 1))
    return Training(model, data)
