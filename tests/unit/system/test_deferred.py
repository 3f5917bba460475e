"""Names that modules import at their first use."""

from __future__ import annotations

from importlib import import_module

import pytest

from lading.families.nn.decoder_models import Qwen


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("lading.families.qwen", "Qwen"),
        ("lading.families.bert", "Bert"),
        ("lading.catalog", "session"),
        ("lading", "query"),
    ],
)
def test_a_name_is_an_attribute_from_then_on(module: str, name: str) -> None:
    found = import_module(module)
    assert getattr(found, name) is vars(found)[name]


def test_it_is_the_object_of_its_home() -> None:
    assert import_module("lading.families.qwen").Qwen is Qwen


@pytest.mark.parametrize("module", ["lading", "lading.catalog", "lading.families.qwen", "lading.families.wav2vec2"])
def test_another_name_is_an_error_of_python(module: str) -> None:
    with pytest.raises(AttributeError, match=f"module '{module}' has no attribute 'nope'"):
        _ = import_module(module).nope
    with pytest.raises(ImportError, match="cannot import name 'nope'"):
        exec(f"from {module} import nope")
