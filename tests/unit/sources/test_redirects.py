from __future__ import annotations

import pytest
from urllib3.util import Url, parse_url

from lading.errors import PolicyError
from lading.sources.web.redirects import AddressScope, Origin, RedirectPolicy, check_url, is_loopback, reach, shown


def url(text: str) -> Url:
    return parse_url(text)


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("93.184.216.34", AddressScope.EVERYWHERE),
        ("2606:2800:220:1::1", AddressScope.EVERYWHERE),
        ("10.1.2.3", AddressScope.NETWORK),
        ("172.16.0.1", AddressScope.NETWORK),
        ("192.168.1.1", AddressScope.NETWORK),
        ("100.64.0.1", AddressScope.NETWORK),
        ("224.0.0.1", AddressScope.NETWORK),
        ("fd00::1", AddressScope.NETWORK),
        ("127.0.0.1", AddressScope.MACHINE),
        ("127.8.8.8", AddressScope.MACHINE),
        ("0.0.0.0", AddressScope.MACHINE),
        ("169.254.169.254", AddressScope.MACHINE),
        ("::1", AddressScope.MACHINE),
        ("::", AddressScope.MACHINE),
        ("fe80::1%eth0", AddressScope.MACHINE),
        ("::ffff:127.0.0.1", AddressScope.MACHINE),
        ("::ffff:10.0.0.1", AddressScope.NETWORK),
        ("::ffff:8.8.8.8", AddressScope.EVERYWHERE),
        ("2002:7f00:1::", AddressScope.MACHINE),
        ("64:ff9b::a9fe:a9fe", AddressScope.MACHINE),
        ("64:ff9b::a00:1", AddressScope.NETWORK),
        ("64:ff9b::808:808", AddressScope.EVERYWHERE),
        ("example.com", AddressScope.EVERYWHERE),
    ],
)
def test_reach(address: str, expected: AddressScope) -> None:
    assert reach(address) is expected


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST.", "127.0.0.1", "127.1.2.3", "::1", "[::1]"])
def test_loopback_by_name(host: str) -> None:
    assert is_loopback(host)


@pytest.mark.parametrize("host", ["localhost.example.com", "example.com", "10.0.0.1", "0.0.0.0", ""])
def test_not_loopback_by_name(host: str) -> None:
    assert not is_loopback(host)


@pytest.mark.parametrize("target", ["https://a.example/x", "http://127.0.0.1:8000/x", "http://[::1]/x"])
def test_what_may_be_asked(target: str) -> None:
    check_url(url(target))
    check_url(url(target), came_from=url("http://localhost/y"))


@pytest.mark.parametrize(
    "target", ["http://a.example/x", "http://127.0.0.1.example/x", "ftp://a.example/x", "https://u@a.example/x", "/x"]
)
def test_what_may_not(target: str) -> None:
    with pytest.raises(PolicyError):
        check_url(url(target))


def test_never_from_https_to_http_not_even_to_loopback() -> None:
    with pytest.raises(PolicyError, match="from https to http"):
        check_url(url("http://localhost/x"), came_from=url("https://a.example/x"))


@pytest.mark.parametrize(
    ("first", "then", "fine"),
    [
        ("8.8.8.8", "1.1.1.1", True),
        ("8.8.8.8", "10.0.0.1", False),
        ("8.8.8.8", "169.254.169.254", False),
        ("10.0.0.1", "10.0.0.2", True),
        ("10.0.0.1", "8.8.8.8", True),
        ("10.0.0.1", "127.0.0.1", False),
        ("127.0.0.1", "10.0.0.1", True),
    ],
)
def test_never_further_inward(first: str, then: str, fine: bool) -> None:
    boundary, where = RedirectPolicy(), url("https://a.example/x?secret")
    boundary.check_address(where, first)
    if fine:
        boundary.check_address(where, then)
    else:
        with pytest.raises(PolicyError, match="inside this network or machine") as raised:
            boundary.check_address(where, then)
        assert "secret" not in str(raised.value)


def test_behind_a_proxy_the_url_must_do() -> None:
    boundary = RedirectPolicy()
    boundary.check_host(url("https://a.example/x"))
    boundary.check_host(url("https://b.example/x"))
    for inward in ("https://10.0.0.1/x", "https://localhost/x", "https://[::1]/x"):
        with pytest.raises(PolicyError):
            boundary.check_host(url(inward))


def test_plain_http_to_a_name_that_is_not_what_it_says() -> None:
    with pytest.raises(PolicyError, match="loopback interface only"):
        RedirectPolicy().check_address(url("http://localhost/x"), "8.8.8.8")


def test_origins() -> None:
    assert Origin.of(url("https://A.example/x")) == Origin.of(url("https://a.example:443/y"))
    assert Origin.of(url("https://a.example/x")) != Origin.of(url("https://a.example:444/x"))
    assert Origin.of(url("https://a.example/x")) != Origin.of(url("http://a.example:443/x"))


def test_what_is_shown_of_a_url() -> None:
    assert shown("https://a.example/x?sig=secret#y") == "https://a.example/x"
