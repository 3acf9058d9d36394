"""holdfast: checkpointing for machine-learning training.

Four lines around a training loop give exact resume, retention and early stopping; see `Checkpointer`. Every name is
loaded on first use, so importing holdfast imports neither numpy nor a framework.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from holdfast.checkpointer import Checkpointer as Checkpointer
    from holdfast.core.errors import HoldfastError as HoldfastError
    from holdfast.functional import load as load
    from holdfast.functional import open as open
    from holdfast.functional import save as save
    from holdfast.policies import EarlyStopping as EarlyStopping
    from holdfast.policies import at as at
    from holdfast.policies import auto as auto
    from holdfast.policies import best as best
    from holdfast.policies import demote as demote
    from holdfast.policies import every as every
    from holdfast.policies import last as last
    from holdfast.policies import limit as limit
    from holdfast.policies import log_spaced as log_spaced
    from holdfast.policies import on as on
    from holdfast.policies import tagged as tagged
    from holdfast.policies import thin as thin
    from holdfast.policies import when_idle as when_idle
    from holdfast.policies import where as where
    from holdfast.policies import within as within
    from holdfast.run import Run as Run
    from holdfast.saving.overlap import protect as protect
    from holdfast.state.codecs import register_codec as register_codec
    from holdfast.state.reports import RestoreReport as RestoreReport
    from holdfast.state.sampler import ResumableSampler as ResumableSampler

_HOMES = {
    "Checkpointer": "holdfast.checkpointer",
    "EarlyStopping": "holdfast.policies",
    "HoldfastError": "holdfast.core.errors",
    "ResumableSampler": "holdfast.state.sampler",
    "RestoreReport": "holdfast.state.reports",
    "Run": "holdfast.run",
    "at": "holdfast.policies",
    "auto": "holdfast.policies",
    "best": "holdfast.policies",
    "demote": "holdfast.policies",
    "every": "holdfast.policies",
    "last": "holdfast.policies",
    "limit": "holdfast.policies",
    "load": "holdfast.functional",
    "log_spaced": "holdfast.policies",
    "on": "holdfast.policies",
    "open": "holdfast.functional",
    "protect": "holdfast.saving.overlap",
    "register_codec": "holdfast.state.codecs",
    "save": "holdfast.functional",
    "tagged": "holdfast.policies",
    "thin": "holdfast.policies",
    "when_idle": "holdfast.policies",
    "where": "holdfast.policies",
    "within": "holdfast.policies",
}

__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'holdfast' has no attribute {name!r}")
    import importlib

    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
