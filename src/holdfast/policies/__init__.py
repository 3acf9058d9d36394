"""When to save, what to keep and when to stop: pure functions over records, without I/O.

Triggers and retention rules are one family of values, combined with `|`, `&` and `~`; `decide` asks a
trigger, `plan` asks a retention rule, `EarlyStopping` gives verdicts. Presets that repeat other programs are
in `holdfast.policies.presets`.
"""

from holdfast.policies.arguments import Mode
from holdfast.policies.best import best
from holdfast.policies.early_stopping import EarlyStopping, StoppingFold, Verdict, require_stopping
from holdfast.policies.grids import at, every, log_spaced
from holdfast.policies.metrics import best_of, improves, order_key
from holdfast.policies.moments import EVENTS, auto, on, when_idle
from holdfast.policies.optimum import best_interval
from holdfast.policies.plan import Decision, decide, plan, relevant, require_retention, require_trigger
from holdfast.policies.retention import demote, last, limit, tagged, thin, where, within
from holdfast.policies.rules import Rule

__all__ = [
    "EVENTS",
    "Decision",
    "EarlyStopping",
    "Mode",
    "Rule",
    "StoppingFold",
    "Verdict",
    "at",
    "auto",
    "best",
    "best_interval",
    "best_of",
    "decide",
    "demote",
    "every",
    "improves",
    "last",
    "limit",
    "log_spaced",
    "on",
    "order_key",
    "plan",
    "relevant",
    "require_retention",
    "require_stopping",
    "require_trigger",
    "tagged",
    "thin",
    "when_idle",
    "where",
    "within",
]
