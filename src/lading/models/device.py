"""Devices: the current one, and the check that torch can use one on this machine."""

from __future__ import annotations

from typing import Final, TypeAlias

import torch

from lading.errors import NotSupportedError

Device: TypeAlias = torch.device
DataType: TypeAlias = torch.dtype

CPU: Final = torch.device("cpu")


def get_current_device() -> torch.device:
    """Return the device of new tensors: the one of ``with torch.device(…)``, or of ``torch.set_default_device``."""
    if torch.__version__ >= "2.8":
        return torch.get_default_device()

    return torch.empty(()).device  # older versions of that function do not see `with torch.device(…)`


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
