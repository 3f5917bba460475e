"""The check that torch can use a device on this machine."""

from __future__ import annotations

import torch

from lading.errors import NotSupportedError


def require_usable(device: torch.device | str) -> torch.device:
    """Return the device if torch can place a tensor on it.

    :raises NotSupportedError: torch does not know the device, was built without support for it, or does not find it on
        this machine.
    """
    try:
        found = torch.device(device)
        # Only a use of the device shows whether torch supports it and this machine has it.
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        # Keep the first sentence of torch's message, which may go on to list every backend.
        reason = (str(error).splitlines() or [""])[0].partition(". ")[0].rstrip(".")
        raise NotSupportedError(f"torch cannot use the device {str(device)!r}: {reason}.") from error

    return found
