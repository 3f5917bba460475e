"""Configurations from plain mappings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from lading.cards.card import Architecture
from lading.cards.config import architecture_config

T = TypeVar("T")


def structured(config_kls: type[T], values: Mapping[str, object]) -> T:
    """Return the defaults of a configuration class with ``values`` merged into them."""
    return architecture_config(Architecture(name="x", family="f", overrides=(values,)), config_kls)
