"""URIs as lading shows and keeps them."""

import pytest

from lading.system.uris import shown_uri, without_secrets


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("https://host.example/a/b.safetensors?token=s3cret#part", "https://host.example/a/b.safetensors"),
        ("https://user:s3cret@host.example:8080/a", "https://host.example:8080/a"),
        ("https://host.example:8080/name@v1", "https://host.example:8080/name@v1"),
        ("https://host.example/a?mail=me@host.example", "https://host.example/a"),
        ("https://[::1]:8080/name@v1?x=a@b", "https://[::1]:8080/name@v1"),
        ("https://host.example", "https://host.example"),
        ("hg://org/name@main", "hg://org/name@main"),
        ("file:///a?b#c@d", "file:///a?b#c@d"),
    ],
)
def test_the_address_is_shown_without_its_secrets(uri: str, shown: str) -> None:
    assert shown_uri(uri) == shown


@pytest.mark.parametrize("sign", ["?", "#", "/", "@", ":", "//", "?#/@"])
def test_a_password_with_signs_that_need_quotes_is_not_shown(sign: str) -> None:
    for password in (f"s3cret{sign}s3cret", f"5555555{sign}s3cret"):
        assert "s3cret" not in shown_uri(f"https://user:{password}@host.example/a")


@pytest.mark.parametrize("sign", ["?", "#", "@", ":"])
def test_a_password_that_begins_like_a_port_is_not_shown(sign: str) -> None:
    assert "s3cret" not in shown_uri(f"https://user:80{sign}s3cret@host.example/a")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no address: a?b#c@d", "no address: a?b#c@d"),
        ("https://me:s3cret@host.example/a b?s3cret", "https://host.example/a b"),
        ('{"a": "https://host.example/x?s3cret", "b": 1}', '{"a": "https://host.example/x", "b": 1}'),
        ('["s3://k:s3cret@bucket/\\"quoted\\" name?s3cret", 2]', '["s3://bucket/\\"quoted\\" name", 2]'),
        ("see https://a.example and https://me:s3cret@b.example/c", "see https://a.example and https://b.example/c"),
        ("one: https://a.example/?s3cret\ntwo", "one: https://a.example/\ntwo"),
        ("https://a.example/?next=https://b.example/?s3cret", "https://a.example/https://b.example/"),
        ("hg://org/name@main and file:///a?b", "hg://org/name@main and file:///a?b"),
    ],
)
def test_texts_show_their_addresses_without_secrets(text: str, shown: str) -> None:
    assert without_secrets(text) == shown


def test_a_long_text_takes_no_long_time() -> None:
    text = "a" * 200_000 + "://" + "b" * 200_000
    assert without_secrets(text) == text
