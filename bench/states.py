"""What is saved: states of named tensors, and a small transformer that trains."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

State = dict[str, dict[str, torch.Tensor]]

ONE_TENSOR = ("model", "h.1.qkv")  # what the load case reads alone


class Subject:
    """A state and how it changes. `live` is for libraries that take objects; `tensors` are the same bytes by name."""

    def __init__(self, state: State, *, changing: tuple[str, ...] = ()) -> None:
        self._state = state
        self._changing = [t for part in changing or tuple(state) for t in state[part].values()]

    @property
    def live(self) -> Mapping[str, object]:
        return self._state

    def tensors(self) -> State:
        return self._state

    def nbytes(self, *parts: str) -> int:
        state = self.tensors()
        return sum(t.nbytes for part in parts or tuple(state) for t in state[part].values())

    def change(self) -> None:
        """Give every tensor that changes a new value, in place: nothing of it may be left out as unchanged."""
        torch._foreach_add_(self._changing, 1e-3)


class Training(Subject):
    """A language model on the CPU with AdamW: real steps, whose time a checkpointer may or may not lengthen."""

    def __init__(self, width: int, layers: int, tokens: int) -> None:
        torch.manual_seed(0)
        torch.set_num_threads(1)  # so that one of two cores trains, as a GPU would, and one is free to save
        vocabulary = 2048
        layer = nn.TransformerEncoderLayer(
            width, 8, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.model = nn.Sequential(
            nn.Embedding(vocabulary, width),
            nn.TransformerEncoder(layer, layers, enable_nested_tensor=False),
            nn.Linear(width, vocabulary),
        )
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, foreach=True)
        self._batch = torch.randint(0, vocabulary, (1, tokens + 1))
        self.backward()
        self.optimizer.step()  # the optimizer's state exists from its first step on

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
        nn.functional.cross_entropy(logits.flatten(0, 1), self._batch[:, 1:].flatten()).backward()

    def change(self) -> None:
        self.backward()
        self.optimizer.step()


def transformer(quick: bool) -> Subject:
    """Parameters and both Adam moments of a transformer, as fp32 tensors: 1.1 GB."""
    width, layers = (256, 2) if quick else (1024, 7)
    shapes: dict[str, tuple[int, ...]] = {"wte": (50257 // 8, width), "head.bias": (width,)}
    for i in range(layers):
        shapes |= {f"h.{i}.qkv": (3 * width, width), f"h.{i}.proj": (width, width), f"h.{i}.norm": (width,)}
        shapes |= {f"h.{i}.up": (4 * width, width), f"h.{i}.down": (width, 4 * width)}
    parts = ("model", "exp_avg", "exp_avg_sq")
    return Subject({part: {n: torch.randn(s) for n, s in shapes.items()} for part in parts})


def tiny(quick: bool, count: int = 20_000) -> Subject:
    """Many tensors of 64 floats."""
    count = count // 20 if quick else count
    return Subject({"model": {f"layer{i}.weight": torch.randn(64) for i in range(count)}})


def many(quick: bool) -> Subject:
    return tiny(quick, 100_000)


def lora(quick: bool) -> Subject:
    """A frozen base of 400 MB and adapters of rank 4 that change, 2 MB."""
    width, layers = (256, 2) if quick else (1024, 24)
    base = {f"h.{i}.{n}": torch.randn(width, width) for i in range(layers) for n in ("q", "k", "v", "o")}
    adapters = {
        f"h.{i}.{n}.{half}": torch.randn(shape)
        for i in range(layers)
        for n in ("q", "v")
        for half, shape in (("a", (4, width)), ("b", (width, 4)))
    }
    return Subject({"base": base, "adapters": adapters}, changing=("adapters",))


def training(quick: bool) -> Subject:
    """177 MB of state, steps of about 100 ms on one core."""
    return Training(64, 1, 16) if quick else Training(512, 4, 64)


def large_training(quick: bool) -> Subject:
    """1.1 GB of state, steps of most of a second on one core: many times what a copy of the state takes."""
    return Training(64, 1, 16) if quick else Training(1024, 7, 32)


STATES = {
    "transformer": transformer,
    "tiny": tiny,
    "many": many,
    "lora": lora,
    "training": training,
    "large training": large_training,
}
