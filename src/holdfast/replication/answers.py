"""Questions to stores that may not answer: asked at once, and waited for no longer than it is worth."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from holdfast.core.errors import HoldfastError

__all__ = ["Answer", "ask_all"]

Key = TypeVar("Key")
Found = TypeVar("Found")


@dataclass(slots=True)
class Answer(Generic[Found]):
    """What a question came to: what was found, or why not."""

    found: Found | None = None
    error: str | None = None


def ask_all(questions: Mapping[Key, Callable[[], Found]], seconds: float) -> dict[Key, Answer[Found]]:
    """Ask all at once; return each answer. One that has not come after `seconds` is an error, and is waited for no
    more."""
    answers: dict[Key, Answer[Found]] = {key: Answer() for key in questions}
    threads: dict[Key, threading.Thread] = {}
    raised: list[BaseException] = []

    def ask(key: Key, question: Callable[[], Found]) -> None:
        answer: Answer[Found] = Answer()
        try:
            answer.found = question()
        except HoldfastError as e:
            answer.error = str(e)
        except Exception as e:  # noqa: BLE001 - raised below, in the thread that asks
            raised.append(e)
        answers[key] = answer  # in one step: who waits no more sees all of it or nothing

    for key, question in questions.items():
        # A daemon: a store that hangs must not keep the process from ending.
        threads[key] = threading.Thread(target=ask, args=(key, question), name="holdfast-ask", daemon=True)
        threads[key].start()
    for key, thread in threads.items():
        thread.join(seconds)
        if thread.is_alive():
            answers[key] = Answer(error=f"it did not answer within {seconds:g} s")
    if raised:
        raise raised[0]
    return dict(answers)
