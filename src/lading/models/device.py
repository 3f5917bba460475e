"""Devices that hold tensors here."""

from __future__ import annotations

import torch

from lading.errors import NotSupportedError


def require_usable(device: torch.device | str) -> torch.device:
    """The device, if torch can put a tensor there.

    :raises NotSupportedError: torch knows no such device, is built without what it needs, or finds none in this
        machine.
    """
    try:
        found = torch.device(device)
        # What is not compiled in, or not in this machine, is only noticed by what uses it.
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        # Of what torch says, which may go on to name every backend that there is, the first sentence.
        reason = (str(error).splitlines() or [""])[0].partition(". ")[0].rstrip(".")
        raise NotSupportedError(f"torch cannot use the device {str(device)!r}: {reason}.") from error

    return found
