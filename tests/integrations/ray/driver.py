"""The driver of a Ray job: `driver.py <directory>`; trains with two workers, undisturbed and with one of them killed.

A program of its own, so that Ray's processes and threads end with it. What workers do is written to the directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
from pathlib import Path

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_AUTH_MODE"] = "disabled"  # or Ray leaves a token in the home directory
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S"] = "0.2"

import ray
import ray.train
import ray.train.torch
import torch
from ray._raylet import GcsClient
from ray.core.generated import autoscaler_pb2
from ray.train import Checkpoint, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from torch import nn

import holdfast
from holdfast import every
from holdfast.errors import InvalidFormat, PolicyError
from holdfast.integrations.ray import checkpointer, url_of

STEPS = 9
KILL_AT = 5


def train(config: dict[str, str]) -> None:
    rank = ray.train.get_context().get_world_rank()
    torch.manual_seed(7)
    net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))
    model = ray.train.torch.prepare_model(net) if config["kind"] == "ddp" else net
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    torch.manual_seed(100 + rank)
    own = {"rank": rank, "seen": torch.zeros(3)}
    mark = Path(config["out"], f"{config['name']}-killed")
    first_life = not mark.exists()
    state = {"model": model, "optimizer": optimizer, "own": own}
    with (
        checkpointer(state=state, save=every(steps=int(config["save"])), seconds=60, watch_steps=2) as ckpt,
        Path(config["out"], f"{config['name']}-{rank}").open("a") as out,
    ):
        for step in ckpt.steps(STEPS):
            if config["name"] == "drained" and step == 3:
                drain()
            if config["name"] == "killed" and first_life and step == KILL_AT:
                ckpt.wait()  # step 4 is a checkpoint
                if rank == 1:
                    mark.touch()
                    os.kill(os.getpid(), signal.SIGKILL)
            x = torch.randn(5, 4)
            loss = model(x).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            own["seen"] += x.sum()
            ckpt.log(loss=loss)
            out.write(f"{step} {loss.item().hex()}\n")
            out.flush()
        digest = hashlib.sha256()
        for tensor in (*model.state_dict().values(), own["seen"], torch.get_rng_state()):
            digest.update(tensor.numpy().tobytes())
        out.write(f"end {digest.hexdigest()}\n")


def drain() -> None:
    """Tell Ray that this worker's node will be taken away in ten minutes, as a provider of spot instances does."""
    node = ray.get_runtime_context().get_node_id()
    client = GcsClient(address=ray.get_runtime_context().gcs_address)
    reason = autoscaler_pb2.DrainNodeReason.Value("DRAIN_NODE_REASON_PREEMPTION")
    accepted, why = client.drain_node(node, reason, "spot", int((time.time() + 600) * 1000))
    assert accepted, why
    deadline = time.monotonic() + 60  # until Ray's watcher, which looks now and then, has told this worker
    while ray.train.get_preemption_info() is None:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def fit(name: str, kind: str, out: Path, workers: int) -> Result:
    config = {"save": "1000" if name == "drained" else "2", "name": name, "kind": kind, "out": str(out)}
    scaling = ScalingConfig(num_workers=workers)
    run = RunConfig(name=name, storage_path=str(out / "ray"), failure_config=FailureConfig(max_failures=1))
    if kind == "ddp":
        return TorchTrainer(
            train,
            train_loop_config=config,
            scaling_config=scaling,
            run_config=run,
            torch_config=TorchConfig("gloo"),
        ).fit()
    return DataParallelTrainer(train, train_loop_config=config, scaling_config=scaling, run_config=run).fit()


def told(result: Result) -> dict[str, object]:
    """Say what Ray was told: its newest checkpoint, and all of them with their metrics."""
    assert result.error is None
    assert result.checkpoint is not None
    reference = url_of(result.checkpoint)
    assert holdfast.open(*reference).step == reference.step
    return {
        "url": reference.url,
        "step": reference.step,
        "metrics": result.metrics,
        "all": [(url_of(c).step, m) for c, m in result.best_checkpoints],
    }


def refused(out: Path) -> dict[str, str]:
    """Say what is refused, and how."""
    words = {}
    try:
        checkpointer(state={})
    except PolicyError as e:
        words["no worker"] = str(e)
    (out / "foreign").mkdir()
    (out / "foreign" / "model.pt").write_bytes(b"")
    try:
        url_of(Checkpoint.from_directory(str(out / "foreign")))
    except InvalidFormat as e:
        words["foreign"] = str(e)
    return words


def main() -> None:
    out = Path(sys.argv[1])
    ray.init(
        num_cpus=3,
        include_dashboard=False,
        object_store_memory=80 * 2**20,
        log_to_driver=False,
        _temp_dir=sys.argv[2],
    )
    try:
        found: dict[str, object] = {"refused": refused(out)}
        for name, kind, workers in (
            ("calm", "ddp", 2),
            ("killed", "ddp", 2),
            ("alone", "plain", 1),
            ("drained", "plain", 1),
        ):
            found[name] = told(fit(name, kind, out, workers))
            (out / "found.json").write_text(json.dumps(found))
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
