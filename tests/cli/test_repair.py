"""`holdfast scrub` and `holdfast repair`: each line names the object that it speaks of."""

from __future__ import annotations

from pathlib import Path

import numpy as np

import holdfast


def test_what_is_mended_or_lost_is_named(cli, tmp_path: Path) -> None:
    run, copy = tmp_path / "run", tmp_path / "copy"
    for step in (1, 2, 3):
        holdfast.save(run, {"m": {"w": np.full(4000, step, np.float32)}}, step=step)
    assert cli("cp", run, copy).code == 0
    [data] = run.glob("data/000000000001-*/*.safetensors")
    raw = bytearray(data.read_bytes())
    raw[-1] ^= 1
    data.write_bytes(raw)
    (run / "checkpoints/000000000003.json").unlink()

    scrubbed = cli("scrub", run)
    assert scrubbed.code == 4
    assert f"holdfast repair {run} --from COPY" in scrubbed.out
    lost = cli("repair", run, "--from", tmp_path / "copy", "--dry-run", "--damaged-only")
    assert lost.out.count(f"would mend: {data.relative_to(run)}: bytes ") == 1, "its key stands there once"
    mended = cli("repair", run, "--from", copy)
    assert f"mended: checkpoints/000000000003.json: the manifest is gone  from {copy}\n" in mended.out
    assert cli("repair", run, "--from", copy).out.startswith("nothing is wrong")
