"""What cannot be stored is refused at capture, with its tree path and what to do."""

from __future__ import annotations

import dataclasses
import threading
import types

import pytest
import torch

from holdfast.core.errors import StateError, UnsupportedValue


class Half:
    def state_dict(self):
        return {}


class DictChild(dict):
    pass


class StrChild(str):
    pass


@dataclasses.dataclass
class Output(dict):
    """As the outputs of models that can be read like a dict; the fields are not all that it holds."""

    loss: float = 0.0


REFUSED = {
    "lambda": (lambda: lambda: 1, "function"),
    "builtin": (lambda: len, "function len"),
    "method": (lambda: [].append, "function"),
    "module": (lambda: types, "imported module"),
    "class": (lambda: Half, "class Half"),
    "lock": (threading.Lock, "lock"),
    "file": (lambda: open(__file__), "open file"),  # noqa: SIM115
    "str child": (lambda: StrChild("x"), "subclass"),
    "generator": (lambda: (i for i in ()), "register_codec"),
    "object": (object, "register_codec"),
    "half": (Half, "give it both"),
    "dict subclass": (DictChild, "subclass"),
    "dataclass that is a dict": (Output, "subclass"),
    "memoryview": (lambda: memoryview(b""), "register_codec"),
    "DataLoader": (lambda: torch.utils.data.DataLoader([1]), "ResumableSampler"),
    "tensor key": (lambda: {torch.ones(1): 1}, "key"),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_with_path_and_remedy(name, save):
    make, word = REFUSED[name]
    value = make()
    try:
        with pytest.raises(UnsupportedValue, match=f"(?i)^top/a/1.*{word}"):
            save({"top": {"a": [0, value]}})
    finally:
        if hasattr(value, "close"):
            value.close()


def test_cycles(save):
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(UnsupportedValue, match=r"^v/0: refers to itself"):
        save({"v": loop})
    deep: list[object] = []
    for _ in range(200):
        deep = [deep]
    with pytest.raises(UnsupportedValue, match="nested deeper"):
        save({"v": deep})


def test_the_same_object_twice_is_no_cycle(save):
    inner = [1]
    assert save({"v": [inner, inner]}).load()["v"] == [[1], [1]]


@pytest.mark.parametrize("key", ["", "a/b", 3])
def test_top_level_keys(key, save):
    with pytest.raises(StateError, match="state key"):
        save({key: 1})


def test_lazy_module(save):
    with pytest.raises(UnsupportedValue, match=r"^model/0\.weight: .*run one forward pass"):
        save({"model": torch.nn.Sequential(torch.nn.LazyLinear(3))})


def test_system_random(save):
    import random

    with pytest.raises(UnsupportedValue, match=r"^r: "):
        save({"r": random.SystemRandom()})
