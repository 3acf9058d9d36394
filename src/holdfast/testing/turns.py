"""Clients that act at the same time, one store call after the other, in an order that is chosen and can be repeated."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence

from holdfast.stores.base import Store
from holdfast.testing.faulty import FaultStore
from holdfast.testing.plan import Fault, FaultPlan

__all__ = ["Turns"]


class _Client:
    def __init__(self, name: str, act: Callable[[], object]) -> None:
        self.name = name
        self.go = threading.Semaphore(0)
        self.done = False
        self.outcome: object = None
        self._act = act

    def run(self, back: threading.Semaphore) -> None:
        self.go.acquire()
        try:
            self.outcome = self._act()
        except BaseException as e:  # noqa: BLE001 - an outcome like any other; the test looks at it
            self.outcome = e
        finally:
            self.done = True
            back.release()


class _Turn(FaultPlan):
    """A plan that waits for its turn at each call, and then lets happen what is planned."""

    def __init__(self, turns: Turns, *faults: Fault) -> None:
        super().__init__(*faults)
        self._turns = turns

    def _next(self, call: str, key: str, *, changes: bool) -> Fault | None:
        self._turns.pause()
        return super()._next(call, key, changes=changes)


class Turns:
    """Runs clients in threads of which only one moves, from one store call to the next.

    `order` names whose turn is next, call by call (a name whose client has ended, or is not known, is passed over);
    beyond it `seed` decides. `trace` tells who went in fact: given as `order` it repeats the run.
    """

    def __init__(self, *, order: Sequence[str] = (), seed: int = 0) -> None:
        self._order = list(order)
        self._source = random.Random(seed)
        self._clients: dict[int, _Client] = {}
        self._back = threading.Semaphore(0)
        self.trace: list[str] = []

    def store(self, store: Store, *faults: Fault) -> FaultStore:
        """Return a store for a client: each of its calls waits for the client's turn."""
        return FaultStore(store, _Turn(self, *faults))

    def pause(self) -> None:
        """Let the others move; return when it is this client's turn. Other threads than the clients' do not wait."""
        client = self._clients.get(threading.get_ident())
        if client is not None:
            self._back.release()
            client.go.acquire()

    def run(self, acts: Mapping[str, Callable[[], object]]) -> dict[str, object]:
        """Run the clients to their ends; return what each returned, or the exception that it raised."""
        clients = {name: _Client(name, act) for name, act in acts.items()}
        for client in clients.values():
            thread = threading.Thread(target=client.run, args=(self._back,), name=client.name, daemon=True)
            thread.start()
            assert thread.ident is not None
            self._clients[thread.ident] = client
        ready = list(clients)
        while ready:
            name = self._choose(ready)
            self.trace.append(name)
            clients[name].go.release()
            self._back.acquire()
            if clients[name].done:
                ready.remove(name)
        return {name: client.outcome for name, client in clients.items()}

    def _choose(self, ready: Sequence[str]) -> str:
        while self._order:
            name = self._order.pop(0)
            if name in ready:
                return name
        return self._source.choice(ready)
