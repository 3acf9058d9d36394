"""Which checkpoint is restored: rank 0 names it, and all ranks look at it and read it at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from holdfast.core.errors import RanksDisagree
from holdfast.distributed.meeting import Meeting
from holdfast.distributed.words import Decision, Outcome
from holdfast.format.manifest import Manifest
from holdfast.loop.resume import Fetch
from holdfast.restoring.reader import Reader
from holdfast.state.restoring import BoxWanted
from holdfast.state.tensors import HostTensor

__all__ = ["Naming", "after_rank_0"]


class Naming:
    """As rank 0: tell the others which checkpoint is tried as soon as it is picked, and again when it is known to fit.
    So all look at it and read it at once, and nobody's live objects change before rank 0 knows that it fits. Where rank
    0 finds that it does not verify, those who have restored it take the next one too."""

    def __init__(self, meeting: Meeting, next_topic: Callable[[], str], topic: str) -> None:
        self._meeting, self._next_topic, self._topic = meeting, next_topic, topic
        self._told: Decision | None = None
        self._gone_on = False

    def named(self, manifest: Manifest) -> str:
        """Let the others know of a checkpoint, unless they do; return the topic under which all speak of it."""
        decision = Decision(manifest.step, manifest.attempt)
        if self._told is not None and self._told != decision:
            step = self._told.step
            self._end(Outcome(error=f"rank 0: step {step} does not verify", instead=step))
            self._topic = self._next_topic()
            self._told, self._gone_on = None, False
        if self._told is None:
            self._meeting.say(self._topic, decision)
            self._told = decision
        return self._topic

    def fetch(
        self, reader: Reader, names: Sequence[str], parts: Mapping[str, BoxWanted]
    ) -> dict[str, HostTensor]:
        """Return the tensors of a restore, as `Reader.read` does."""
        self._go_on("")
        return reader.read(names, parts)

    def give_up(self, error: Exception) -> None:
        """Let them know that rank 0 restores nothing."""
        text = f"{type(error).__name__}: {error}"
        if self._told is None:
            self._meeting.say(self._topic, Decision(error=text))
        else:
            self._end(Outcome(error=f"rank 0 could not restore: {text}"))

    def _end(self, outcome: Outcome) -> None:
        self._go_on(outcome.error)
        self._meeting.say(f"{self._topic}-done", outcome)

    def _go_on(self, error: str) -> None:
        if not self._gone_on:
            self._gone_on = True
            self._meeting.say(f"{self._topic}-fits", Outcome(error=error))


def after_rank_0(meeting: Meeting, topic: str) -> Fetch:
    """Return what reads as another rank, once the checkpoint is known to fit rank 0 too."""

    def fetch(reader: Reader, names: Sequence[str], parts: Mapping[str, BoxWanted]) -> dict[str, HostTensor]:
        word = meeting.hear(f"{topic}-fits", 0, Outcome)
        if word is None:
            raise RanksDisagree(
                f"rank {meeting.ranks.rank} waited {meeting.ranks.seconds:g} s for rank 0 to find out whether step "
                f"{reader.manifest.step} fits"
            )
        if word.error:
            raise RanksDisagree(word.error)
        return reader.read(names, parts)

    return fetch
