"""File operations of this process, watched one by one: to note them, to freeze, to die."""

import builtins
import contextlib
import io
import itertools
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OPERATIONS = ("fsync", "link", "mkdir", "open", "remove", "rename", "replace", "rmdir", "unlink")

Watcher = Callable[[str, tuple[Any, ...]], None]


class Died(BaseException):
    """Nothing in a process survives its death, no `except Exception` either."""


@contextlib.contextmanager
def watched(before: Watcher, after: Watcher = lambda name, args: None) -> Iterator[None]:
    """Call `before` and `after` at every file operation, with its name and arguments.

    What a watcher does itself is not watched. Tensorstore writes chunks without Python: what
    it does is seen with the next operation.
    """
    inside = threading.local()

    def wrapped(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            if getattr(inside, "watcher", False):
                return original(*args, **kwargs)
            tell(before, name, args)
            result = original(*args, **kwargs)
            tell(after, name, args)
            return result

        return call

    def tell(watcher: Watcher, name: str, args: tuple[Any, ...]) -> None:
        inside.watcher = True
        try:
            watcher(name, args)
        finally:
            inside.watcher = False

    with contextlib.ExitStack() as stack:
        for module, name in [*((os, n) for n in OPERATIONS), (io, "open"), (builtins, "open")]:
            original = getattr(module, name)
            setattr(module, name, wrapped(name, original))
            stack.callback(setattr, module, name, original)
        yield


@contextlib.contextmanager
def dying(operation: int) -> Iterator[None]:
    """Die at a file operation: neither it nor any later one happens, in whatever `finally`.

    Args:
        operation: Number of the operation, 0 upwards.
    """
    numbers = itertools.count()

    def before(name: str, args: tuple[Any, ...]) -> None:
        if next(numbers) >= operation:
            raise Died

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # the system closes files of the dead
        with watched(before), contextlib.suppress(Died):
            yield


@dataclass(frozen=True, kw_only=True)
class State:
    """A folder as a kill would leave it: contents by path, and its folders, itself included."""

    files: Mapping[str, bytes]
    folders: Sequence[str]

    def thaw(self, root: Path) -> None:
        """Put it on the disk."""
        for folder in self.folders:
            (root / folder).mkdir(parents=True, exist_ok=True)
        for path, data in self.files.items():
            (root / path).write_bytes(data)


class Freezer:
    """States of a folder before and after every file operation, those that differ.

    Args:
        root: The folder.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.states: list[State] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def every_state(self) -> Iterator[None]:
        """Freeze the folder at every file operation in the block."""
        with watched(self._freeze, self._freeze):
            yield
        self._freeze("end", ())

    def _freeze(self, name: str, args: tuple[Any, ...]) -> None:
        with self._lock:
            files, folders = {}, []
            for parent, _, names in os.walk(self.root):
                folders.append(os.path.relpath(parent, self.root))
                for path in (Path(parent, name) for name in names):
                    with contextlib.suppress(FileNotFoundError):
                        files[path.relative_to(self.root).as_posix()] = path.read_bytes()
            state = State(files=files, folders=folders)
            if not self.states or state != self.states[-1]:
                self.states.append(state)
