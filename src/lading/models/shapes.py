"""The tensors of a whole model, from its configuration alone."""

from __future__ import annotations

import math
from typing import Any

from lading.errors import ModelConfigError
from lading.models.family import Family, check_config_type
from lading.models.targets import Targets, targets_of, whole_targets
from lading.system.needs import needs_torch


def targets_of_config(family: Family[Any, Any], config: Any) -> Targets:
    """Return the targets of the model that ``family`` builds from ``config``, in the dtypes of the checkpoint.

    :raises TypeError: ``config`` is not of the family's class.
    :raises ModelConfigError: the values of ``config`` are inconsistent (also a ``ValueError``).
    :raises TorchNotFoundError: the family has to build the module, and torch is not installed.
    """
    check_config_type(config, family)
    if family.shapes is None:
        with needs_torch(f"The model family {family.name!r}"):
            from lading.models.construct import build_on_meta

        return targets_of(build_on_meta(family, config), dtype=None)

    try:
        return whole_targets(family.shapes(config))
    except ValueError as error:
        raise ModelConfigError(family.name, str(error)) from error


def count_parameters(family: Family[Any, Any], config: Any) -> int:
    """Return the number of elements of a model, counting tied tensors once; raises as :func:`targets_of_config`."""
    return sum(map(math.prod, targets_of_config(family, config).shapes))
