"""Between holdfast and a real S3 server: requests that get lost, answers that get lost, requests that come twice, errors
of the service, and 200 with an error in its body. A save ends well or says how it ended; what is there is whole."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

import holdfast
from crash import ledger
from crash.proxy import proxied
from holdfast import HoldfastError
from holdfast.stores import open_store
from holdfast.testing import Fault, FaultPlan, forget_this_process, invariants
from servers.moto import S3Server

ROWS = {
    "request lost": ("timeout", "before"),
    "answer lost": ("timeout", "after"),
    "409 for it": ("409", "before"),
    "429 for it": ("429", "before"),
    "500, though it was carried out": ("500", "after"),
    "503 for it": ("503", "before"),
    "200 with an error in its body": ("EIO", "before"),
    "request carried out twice": ("", ""),
}
ROW = "on the way to S3: "
CELLS = [(ROW + name, "save") for name in ROWS]
CALLS = ["put", "begin", "part", "complete"]


def state(step: int) -> dict[str, object]:
    """One part goes up in a put, the other in several parts."""
    return {"small": {"w": np.full(50, step)}, "large": {"w": np.full(1_060_000, step, dtype=np.float64)}}


@pytest.fixture
def way(s3: S3Server, s3_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[object, str]]:
    with proxied(s3.endpoint) as proxy:
        yield proxy, s3_url


@pytest.mark.parametrize("name", ROWS if ledger.BROAD else ["answer lost", "200 with an error in its body"])
def test_a_save_through_a_bad_network(way: tuple[object, str], name: str, s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    proxy, url = way
    kind, when = ROWS[name]
    truth = {}
    for step in (1, 2):
        truth[step] = state(step)
        holdfast.save(url, truth[step], step=step)
    acknowledged = dict(truth)
    cases = 0
    points = [("put", at) for at in (range(1, 12) if ledger.LONG else (5,))] + [(c, 1) for c in CALLS[1:]]
    for step, (call, at) in enumerate(points, 3):
        truth[step] = state(step)
        plan = FaultPlan(*([Fault(kind, at, when, call)] if kind else []))  # type: ignore[arg-type]
        proxy.plan, proxy.twice = plan, not kind  # type: ignore[attr-defined]
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.server_port}")  # type: ignore[attr-defined]
        try:
            holdfast.save(url, truth[step], step=step)
        except HoldfastError as e:
            print(f"{name}, {call} {at}: {type(e).__name__}: {e}")
        else:
            acknowledged[step] = truth[step]
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
        proxy.plan, proxy.twice = FaultPlan(), False  # type: ignore[attr-defined]
        cases += bool(plan.fired) or not kind
        forget_this_process()
        steps = invariants.promises(url, acknowledged, truth)
        for older in sorted(acknowledged)[:-2]:
            holdfast.Run(url).remove([older], force=True, grace=0) if older in steps else None
            del acknowledged[older]
    assert cases >= 3
    holdfast.save(url, state(99), step=99)
    invariants.old_stays_readable(url, {99: state(99)})
    assert not invariants.left_over(open_store(url))
    ledger.count(ROW + name, "save", cases)
