"""Objects that are imported when they are first used, such as those that need torch."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pkgutil import resolve_name
from typing import Any

from lading.system.needs import needs_torch


def deferred(namespace: dict[str, Any], /, **homes: str) -> Callable[[str], Any]:
    """Return the ``__getattr__`` of a module.

    :param namespace: the globals of the module.
    :param homes: the module that has the object of each name. Without torch, one that needs it raises
        :class:`~lading.errors.TorchNotFoundError`.
    """

    def __getattr__(name: str) -> Any:  # noqa: N807 (that of the module)
        home = homes.get(name)
        if home is None:
            raise AttributeError(f"module {namespace['__name__']!r} has no attribute {name!r}")

        with needs_torch(f"{namespace['__name__']}.{name}"):
            value = namespace[name] = getattr(import_module(home), name)

        return value

    return __getattr__


def deferred_call(place: str) -> Callable[..., Any]:
    """Return a function that calls the one at ``place``, ``package.module:name``."""

    def call(*args: Any) -> Any:
        return resolve_name(place)(*args)

    return call
