"""Runs something as soon as a library is imported, without importing it now."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType


def import_after(library: str, module: str) -> None:
    """Import `module` now if `library` is there already, else right after it is.

    Args:
        library: A package that is slow to import.
        module: Makes itself known to it.
    """
    if library in sys.modules:
        importlib.import_module(module)
    else:
        sys.meta_path.insert(0, _Waiting(library, module))


class _Waiting(importlib.abc.MetaPathFinder):
    def __init__(self, library: str, module: str) -> None:
        self._library, self._module = library, module

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != self._library:
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        found = (finder.find_spec(fullname, path, target) for finder in others)
        spec = next((spec for spec in found if spec is not None), None)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def then(module: ModuleType) -> None:  # whoever only looks for it imports nothing
                execute(module)
                importlib.import_module(self._module)

            spec.loader.exec_module = then  # type: ignore[method-assign]
        return spec
