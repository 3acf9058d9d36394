"""Workers started by spawn and forkserver give what fork gives."""

from __future__ import annotations

import pytest
from noisy_dataset import Noisy, as_bytes

from holdfast.state.sampler import ResumableSampler

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_resume_under_every_start_method(method: str) -> None:
    sampler = ResumableSampler(Noisy(12), batch_size=3)
    whole, second = as_bytes(sampler.loader()), as_bytes(sampler.loader())
    loader = sampler.loader(num_workers=1, persistent_workers=True, multiprocessing_context=method)
    sampler.load_state_dict({**sampler.state_dict(), "epoch": 0, "position": 6})
    assert as_bytes(loader) == whole[2:]
    assert as_bytes(loader) == second
