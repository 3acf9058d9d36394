"""A safe point of one of several ranks: what rank 0 decides, all do."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from holdfast.core.records import Moment
from holdfast.distributed.words import Turn
from holdfast.loop.together import Together

if TYPE_CHECKING:
    from holdfast.loop.engine import Engine

__all__ = ["take_turn"]

NO_TURN: tuple[tuple[str, ...], bool] = ((), True)


def take_turn(engine: Engine, together: Together, moment: Moment) -> tuple[tuple[str, ...], bool]:
    """Return why to save at this moment, and whether by the rule alone, as all ranks have it.

    Raises:
        RanksDisagree: the ranks do not come to the same turns, or rank 0 is gone.
    """
    turns, interrupts = together.turns, engine.interrupts
    if interrupts.stop_signal is not None or interrupts.save_signal is not None:
        turns.wish(stop_signal=interrupts.stop_signal, save=interrupts.take_save())
    step = moment.now.step
    if step < turns.next and engine.requested is None and not engine.tracker.must_agree(moment):
        return NO_TURN
    turn = turns.decide(_verdict(engine, together, moment)) if together.ranks.leads else turns.follow(step)
    if turn.signal:
        interrupts.told(turn.signal)
        engine.leaving = True
    if turn.stop and engine.stopped is None:
        engine.tracker.stop_for(turn.stop)
    if turn.tags:
        engine.requested = list(turn.tags)
    return tuple(turn.reasons), turn.by_rule


def _verdict(engine: Engine, together: Together, moment: Moment) -> Turn:
    """Return what rank 0 decides, but for the next turn."""
    signal, asked_by_signal = together.turns.wishes()
    if signal:
        moment = replace(moment, events=moment.events | {"preempt"})
    asked: tuple[str, ...] = ("asked for",) if engine.requested is not None else ()
    asked += ("signal SIGUSR1",) if asked_by_signal else ()
    asked += ("preempted by a signal",) if signal else ()
    reasons = engine.rule_reasons(moment) + asked
    stopped = engine.stopped
    return Turn(
        moment.now.step,
        reasons=list(reasons),
        tags=list(engine.requested or ()),
        by_rule=not asked,
        stop=stopped.reason if stopped is not None else "",
        signal=signal,
    )
