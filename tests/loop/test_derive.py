"""bfloat16 weights that follow from their float32 master copy are not written, and come back bit for bit all the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from blake3 import blake3
from safetensors.numpy import load_file
from torch import nn

import holdfast
from holdfast import Checkpointer, Run, demote, every, last
from holdfast.analysis.diff import compare
from holdfast.analysis.statistics import describe
from holdfast.checkpoint import Checkpoint
from holdfast.errors import DigestMismatch, HoldfastError, PolicyError, UnsupportedVersion
from holdfast.export import export_part
from holdfast.format.manifest import check_version, decode_manifest
from holdfast.format.sealed import unseal
from holdfast.loop.saver import SaveSettings
from holdfast.loop.together import check_settings
from holdfast.replication.scrub import scrub
from holdfast.stores import LocalStore

WIDTH = 256  # 128 kB in bfloat16: a tensor with digest blocks of its own


class Mixed(torch.optim.Optimizer):
    """SGD with momentum on float32 master copies of bfloat16 parameters, which are rounded from them."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        super().__init__(list(parameters), {"lr": 0.05})
        for p in self.param_groups[0]["params"]:
            self.state[p] = {
                "master": p.detach().float(),
                "momentum": torch.zeros_like(p, dtype=torch.float32),
            }

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            state["momentum"].mul_(0.9).add_(p.grad.float())
            state["master"].sub_(state["momentum"], alpha=0.05)
            p.copy_(state["master"])


class Training:
    def __init__(self, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)).bfloat16()
        self.optimizer = Mixed(self.model.parameters())
        self.state = {"model": self.model, "optimizer": self.optimizer}

    def step(self) -> None:
        self.optimizer.zero_grad()
        self.model(torch.randn(8, WIDTH, dtype=torch.bfloat16)).square().mean().backward()
        self.optimizer.step()

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


def train(place: Path, steps: int, **options: object) -> Training:
    work = Training()
    with Checkpointer(place, work.state, save=every(steps=1), derive=True, **options) as ckpt:
        for _ in ckpt.steps(steps):
            work.step()
    return work


def derived(place: Path, step: int) -> dict[str, str]:
    return {name: d.source for name, d in Run(place)[step].manifest.derived.items()}


SOURCES = {f"model/{n}.weight": f"optimizer/state/model/{n}.weight/master" for n in (0, 1)}


@pytest.mark.parametrize("writer", ["process", "thread"])
def test_what_follows_is_not_written_and_comes_back(tmp_path: Path, writer: str) -> None:
    work = train(tmp_path, 3, writer=writer)
    assert derived(tmp_path, 3) == SOURCES
    newest = Run(tmp_path)[3]
    held = [name for key in newest.manifest.file_keys for name in load_file(tmp_path / key)]
    assert "0.weight" not in held
    assert "0.bias" in held  # small ones share blocks, and are written
    assert newest.verify() == []
    other = Training(1)
    with Checkpointer(tmp_path, other.state) as ckpt:
        assert list(ckpt.steps(3)) == []
    want = work.weights()
    assert all(torch.equal(p, want[name]) for name, p in other.weights().items())
    assert newest.manifest.format == 2


def test_every_way_to_read_sees_an_ordinary_tensor(tmp_path: Path) -> None:
    work = train(tmp_path / "run", 2)
    name, want = "model/1.weight", work.weights()["1.weight"]
    bits = want.view(torch.int16).numpy()
    checkpoint = holdfast.open(tmp_path / "run")
    assert checkpoint[name].dtype == "bfloat16"
    assert checkpoint[name].shape == (WIDTH, WIDTH)
    assert np.array_equal(checkpoint[name].read().view(np.int16), bits)
    assert np.array_equal(checkpoint[name][3:7].view(np.int16), bits[3:7])
    assert np.array_equal(checkpoint[name][-1].view(np.int16), bits[-1])
    box = ((2, 16), (WIDTH, WIDTH))
    part = checkpoint.reader.read([], {SOURCES[name]: (name, box, (3, 40))})[SOURCES[name]]
    assert part.data == np.ascontiguousarray(bits[2:5, 16:56]).tobytes()
    alone = holdfast.load(tmp_path / "run", only="model/**", as_="torch")["model"]
    assert torch.equal(alone["1.weight"], want)
    export_part(checkpoint, tmp_path / "model.safetensors")
    from safetensors.torch import load_file as load_torch

    assert torch.equal(load_torch(tmp_path / "model.safetensors")["1.weight"], want)
    assert describe(checkpoint.reader, name).count == WIDTH * WIDTH
    found = compare(Run(tmp_path / "run")[1], checkpoint, part="model")
    assert {change.name for change in found.tensors} >= set(SOURCES)
    again = compare(checkpoint, holdfast.open(tmp_path / "run"), part="model")
    assert again.tensors == ()


def test_derived_and_stored_tensors_are_compared(tmp_path: Path) -> None:
    work = train(tmp_path / "a", 2)
    holdfast.save(tmp_path / "b", work.state, step=2)  # everything is written
    found = compare(holdfast.open(tmp_path / "a"), holdfast.open(tmp_path / "b"), part="model")
    assert found.tensors == ()


def test_what_does_not_follow_is_written(tmp_path: Path) -> None:
    work = Training()
    with Checkpointer(tmp_path, work.state, save=every(steps=1), derive=True) as ckpt:
        for _ in ckpt.steps(1):
            work.step()
            bits = work.model[0].weight.data.view(torch.int16)
            bits[200, 17] += 1  # one unit in the last place, of one element
            work.model[1].weight.data.view(torch.int16)[0, 0] = 0x7FC1  # a NaN that nothing rounds to
            work.optimizer.state[work.model[1].weight]["master"][0, 0] = torch.nan
    assert derived(tmp_path, 1) == {}
    assert Run(tmp_path)[1].manifest.format == 1
    want = work.weights()
    back = holdfast.load(tmp_path, as_="torch")["model"]
    assert all(torch.equal(back[n].view(torch.int16), t.view(torch.int16)) for n, t in want.items())


def test_a_tensor_may_follow_today_and_not_tomorrow(tmp_path: Path) -> None:
    work = Training()
    kept = {}
    with Checkpointer(tmp_path, work.state, save=every(steps=1), derive=True, writer="thread") as ckpt:
        for step in ckpt.steps(4):
            if step < 2:
                work.step()  # and then nothing changes any more but by hand
            if step in (1, 3):
                work.model[0].weight.data[0, 0] += 64
            if step == 2:
                work.model[0].weight.data.copy_(work.optimizer.state[work.model[0].weight]["master"])
            kept[step + 1] = work.weights()
    assert [len(derived(tmp_path, step)) for step in (1, 2, 3, 4)] == [2, 1, 2, 1]
    for step, want in kept.items():
        back = holdfast.load(tmp_path, step=step, as_="torch")["model"]
        assert all(torch.equal(back[n], t) for n, t in want.items())
    assert not any(Run(tmp_path).verify().values())


def forge(place: Path, old: str, new: str) -> None:
    """Put something else into the newest manifest, and seal it again."""
    path = max((place / "checkpoints").iterdir())
    text = path.read_text()[:-78]
    assert old in text
    text = text.replace(old, new)
    path.write_text(f'{text},"digest":"{blake3(text.encode()).hexdigest()}"}}\n')


def test_a_wrong_source_is_found_out_before_anything_live_changes(tmp_path: Path) -> None:
    train(tmp_path, 2, keep=last(1))
    forge(tmp_path, SOURCES["model/0.weight"], SOURCES["model/1.weight"])
    problems = holdfast.open(tmp_path).verify()
    assert [p.key for p in problems] == ["model/0.weight"]
    assert "does not match its digest" in problems[0].message
    other = Training(1)
    before = other.weights()
    with pytest.raises(DigestMismatch, match=r"model/0\.weight"):
        holdfast.load(tmp_path, into=other.state, step=2)
    assert all(torch.equal(p, before[name]) for name, p in other.weights().items())
    with pytest.raises(DigestMismatch):
        holdfast.open(tmp_path)["model/0.weight"][0:1]


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        (SOURCES["model/0.weight"], "model/1.weight", "stored nowhere"),
        (SOURCES["model/0.weight"], "nowhere/at/all", "belongs to no part"),
        (SOURCES["model/0.weight"], "optimizer/none", "no data file"),
        (SOURCES["model/0.weight"], "optimizer/state/model/0.bias/master", "which is float32 of"),
        (f'"shape":[{WIDTH},{WIDTH}]', '"shape":[-1,4]', "not a manifest"),
        (f'"shape":[{WIDTH},{WIDTH}]', f'"shape":[{2**31},{2**31},{2**31}]', "malformed"),
        (f'"shape":[{WIDTH},{WIDTH}]', f'"shape":[1],"shape":[{WIDTH},{WIDTH}]', "not in the one form"),
        ('"format":2', '"format":1', "version 1 with 2 derived"),
        ('"format":2', '"format":3', "format version 3"),
        ('"derived":{"model', '"derived":{},"other":{"model', "other"),
        ('"model/0.weight":{"source"', '"rng/0.weight":{"source"', "not its own"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(tmp_path: Path, old: str, new: str, why: str) -> None:
    train(tmp_path, 1, writer="inline")
    forge(tmp_path, old, new)
    store = LocalStore(tmp_path)
    with pytest.raises(HoldfastError, match=why):
        _ = Checkpoint(store, decode_manifest(store.read(max(store.names("checkpoints"))), "it")).reader
    with pytest.raises(HoldfastError):
        holdfast.load(tmp_path)


def test_a_reader_of_version_1_refuses_it_with_a_sentence(tmp_path: Path) -> None:
    train(tmp_path, 1, writer="inline")
    path = max((tmp_path / "checkpoints").iterdir())
    with pytest.raises(
        UnsupportedVersion, match=r"version 2; this holdfast reads version 1\. Install a newer"
    ):
        check_version(unseal(path.read_bytes(), "it"), "it")  # what it looks at first
    assert json.loads(path.read_bytes())["format"] == 2


def test_weights_that_follow_from_an_optimizer_are_not_demoted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    work = train(tmp_path, 3, keep=last(1) | demote(every(steps=1)))
    run = Run(tmp_path)
    assert run.steps[-1] == 3
    assert not any(run[step].manifest.demoted for step in run.steps)
    assert "is not demoted: its weights follow from what optimizer holds" in caplog.text
    back = holdfast.load(tmp_path, as_="torch")["model"]
    assert all(torch.equal(back[n], t) for n, t in work.weights().items())


def test_a_mirror_and_the_trash_hold_it_too(tmp_path: Path) -> None:
    work = train(tmp_path / "run", 3, keep=last(1), mirrors=[str(tmp_path / "mirror")], grace="1h")
    mirror = Run(tmp_path / "mirror")
    assert scrub(mirror.store).problems == ()
    assert mirror[3].manifest.derived.keys() == SOURCES.keys()
    assert torch.equal(
        holdfast.load(tmp_path / "mirror", as_="torch")["model"]["0.weight"], work.weights()["0.weight"]
    )
    run = Run(tmp_path / "run")
    assert run.steps == [3]
    run.undelete(2)
    assert Run(tmp_path / "run")[2].verify() == []


def test_several_ranks_refuse_it() -> None:
    with pytest.raises(PolicyError, match="with several ranks every tensor is written"):
        check_settings(SaveSettings(derive=True))


def test_a_tied_weight_may_follow(tmp_path: Path) -> None:
    master = torch.randn(WIDTH, WIDTH)
    weight = master.bfloat16()
    state = {"a": {"w": weight, "again": weight}, "b": {"w": weight}, "m": {"w": master}, "w": weight.clone()}
    with Checkpointer(tmp_path, state, derive=True, save=every(steps=1)) as ckpt:
        for _ in ckpt.steps(1):
            pass
    assert derived(tmp_path, 1) == {"a/w": "m/w"}
    back = holdfast.load(tmp_path, as_="torch")
    for found in (back["a"]["w"], back["a"]["again"], back["b"]["w"], back["w"]):
        assert torch.equal(found, weight)
    raw = LocalStore(tmp_path).read(max(LocalStore(tmp_path).names("checkpoints")))
    assert decode_manifest(raw, "it").format == 2
