"""Packages that only some benchmarks need, imported when they are needed."""

import importlib
from types import ModuleType


def optional(name: str) -> ModuleType | None:
    """The module, or None if it is not installed; a broken installation raises ImportError."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        return None


def required(name: str, *, install: str) -> ModuleType:
    """The module.

    Args:
        name: of the module.
        install: what to do where it is missing.

    Raises:
        ModuleNotFoundError: it is not installed.
    """
    module = optional(name)
    if module is None:
        raise ModuleNotFoundError(f"{name=} is not installed: {install}", name=name)
    return module
