"""Devices are told apart by whether a tensor can be there, before anything is read for them."""

from __future__ import annotations

import pytest
import torch

from lading import NotSupportedError, load_model
from lading.models.device import require_usable


def test_devices_that_hold_tensors() -> None:
    assert require_usable("cpu") == torch.device("cpu")
    assert require_usable(torch.device("meta")).type == "meta"


@pytest.mark.parametrize("name", ["toaster", "cuda:99", "mps", ""])
def test_devices_that_do_not(name: str) -> None:
    with pytest.raises(NotSupportedError, match=f"torch cannot use the device '{name}': .+\\.$"):
        require_usable(name)


def test_an_unusable_device_raises_before_the_search_for_the_card() -> None:
    with pytest.raises(NotSupportedError, match="torch cannot use the device 'cuda:99'"):
        load_model("no_such_model", device="cuda:99")
