"""Threads that go one step at a time, in a given order."""

import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from kdhiera.stores import LocalStore


class Turns:
    """Lets threads take steps in an order of their names; whoever is left goes freely.

    Args:
        order: Names, one a step; steps of one that has ended are left out.
        between: Called after every step, while nobody else moves.
    """

    def __init__(self, order: Sequence[str], between: Callable[[], None] = lambda: None) -> None:
        self._order = list(order)
        self._between = between
        self._ended: set[str] = set()
        self._changed = threading.Condition()

    def wait(self, name: str) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: self._next() in (None, name), timeout=60)

    def done(self) -> None:
        self._between()
        with self._changed:
            if self._order:
                self._order.pop(0)
            self._changed.notify_all()

    def end(self, name: str) -> None:
        with self._changed:
            self._ended.add(name)
            self._changed.notify_all()

    def _next(self) -> str | None:
        while self._order and self._order[0] in self._ended:
            self._order.pop(0)
        return self._order[0] if self._order else None


class SteppedStore(LocalStore):
    """Does some operations only when it is its turn.

    Args:
        root: The folder.
        name: In the order.
        turns: The order.
        steps: Name and key (or its beginning) of operations that are steps.
    """

    def __init__(
        self, root: Path, name: str, turns: Turns, steps: Sequence[tuple[str, str]]
    ) -> None:
        super().__init__(root)
        self._name, self._turns, self._steps = name, turns, steps

    def create(self, key, data):
        return self._step("create", key, super().create, key, data)

    def exists(self, key):
        return self._step("exists", key, super().exists, key)

    def read(self, key):
        return self._step("read", key, super().read, key)

    def names(self, folder):
        return self._step("names", folder, super().names, folder)

    def delete(self, keys):
        for key in list(keys):
            self._step("delete", key, super().delete, [key])

    def _step(self, operation, key, call, *args):
        if not any(operation == name and key.startswith(start) for name, start in self._steps):
            return call(*args)
        self._turns.wait(self._name)
        try:
            return call(*args)
        finally:
            self._turns.done()


def run_in_turns(turns: Turns, work: Mapping[str, Callable[[], None]]) -> dict[str, BaseException]:
    """Run some work in a thread each; returns what failed, by name."""
    failed: dict[str, BaseException] = {}

    def guarded(name: str) -> None:
        try:
            work[name]()
        except BaseException as error:  # the caller's assertion shows it
            failed[name] = error
        finally:
            turns.end(name)

    threads = [threading.Thread(target=guarded, args=(name,)) for name in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)
    return failed
