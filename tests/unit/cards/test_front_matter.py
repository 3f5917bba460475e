"""What a README.md says of a model, whoever wrote it."""

from __future__ import annotations

import pytest

from lading.cards.front_matter import MAX_README_BYTES, front_matter_fields


@pytest.mark.parametrize(
    ("text", "fields"),
    [
        ("---\nlicense: mit\n---\n# A model\n", {"license": "mit"}),
        ("---\nlicense: mit # as ever\r\npipeline_tag: 'text-generation'\r\n...\r\n", {
            "license": "mit", "pipeline_tag": "text-generation"}),
        ("\ufeff\n--- \nbase_model:\n- Qwen/Qwen3-0.6B\n---", {"base_model": "Qwen/Qwen3-0.6B"}),
        ("---\nbase_model:\n  - a/b\n\n  # two\n  - c/ä\ntags: [x]\n---\n", {"base_model": ["a/b", "c/ä"]}),
        ("---\nbase_model: [a/b, c/d]\nlicense: [mit, bsd]\n---\n", {
            "license": "mit, bsd", "base_model": ["a/b", "c/d"]}),
        ("---\nmodel-index:\n  license: inside\n---\nlicense: below\n", {}),
        ("---\nlicense: mit\nmodel-index: [not, closed\n---\n", {"license": "mit"}),
        ("# A model\n---\nlicense: mit\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("", {}),
        ("---\n---\n", {}),
    ],
)  # fmt: skip
def test_the_fields_of_a_card(text: str, fields: dict[str, object]) -> None:
    assert front_matter_fields(text.encode()) == fields


@pytest.mark.parametrize(
    "value",
    [
        "{name: mit}",
        "[]",
        "[mit, {a: b}]",
        "7",
        "null",
        "''",
        "&x mit",
        "*x",
        "!!python/object/apply:os.system [id]",
        '"a\\nb"',
        '"\\u202e"',
        "x" * 201,
        "[" * 10_000,
        "[" + "mit, " * 200 + "]",
        "mit\nlicense_name: {",
    ],
)
def test_a_field_of_another_form_is_left_out(value: str) -> None:
    found = front_matter_fields(f"---\nlicense: {value}\npipeline_tag: ok\n---\n".encode())

    assert found == ({"pipeline_tag": "ok"} | ({"license": "mit"} if value.startswith("mit\n") else {}))


@pytest.mark.parametrize(
    "data",
    [
        b"---\nx: &a [1,1]\nb: &b [*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b]\nlicense: *c\n---\n",
        b"---\nlicense: \xff\xfe\n---\n",
        b"\x89PNG\r\n",
        b"---\n" + b"license: mit\n" * (MAX_README_BYTES // 16),
        b"---\nlicense:" + b"-\n" * (MAX_README_BYTES // 4) + b"---\n",
        b" \n" * (MAX_README_BYTES // 4),
        b"\n---" * (MAX_README_BYTES // 4),
    ],
    ids=["aliases", "bytes", "picture", "no-end", "long-field", "spaces", "markers"],
)
def test_hostile_files_say_nothing(data: bytes) -> None:
    assert front_matter_fields(data) in ({}, {"license": "\ufffd\ufffd"})
