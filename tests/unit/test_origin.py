"""Who asks: addresses behind trusted proxies only, and clients as far as they show."""

import ipaddress

import multidict
import pytest

from covey import origin

PROXIES = (ipaddress.ip_network("10.0.0.0/24"), ipaddress.ip_network("fd00::/8"))


def headers(*values: str) -> multidict.CIMultiDict[str]:
    return multidict.CIMultiDict([("X-Forwarded-For", value) for value in values])


@pytest.mark.parametrize(
    ("peer", "said", "address"),
    [
        ("192.0.2.7", ["198.51.100.1"], "192.0.2.7"),  # anybody can write that header
        ("10.0.0.1", ["198.51.100.1"], "198.51.100.1"),
        ("10.0.0.1", ["203.0.113.9, 198.51.100.1"], "198.51.100.1"),  # what stands before it, the client made up
        ("10.0.0.1", ["203.0.113.9", "198.51.100.1, 10.0.0.2"], "198.51.100.1"),  # a header for each balancer
        ("10.0.0.1", [], "10.0.0.1"),
        ("10.0.0.1", ["nonsense"], "10.0.0.1"),
        ("10.0.0.1", ["2001:db8::1, fd00::1"], "2001:db8::1"),
        ("", ["198.51.100.1"], ""),
        ("10.0.0.1", ["198.51.100.1:51234"], "10.0.0.1"),
        ("10.0.0.1", ["198.51.100.1, ::ffff:10.0.0.2"], "198.51.100.1"),
    ],
)
def test_only_a_trusted_proxy_is_believed(peer: str, said: list[str], address: str) -> None:
    assert origin.address(peer, headers(*said), PROXIES) == address
    assert origin.address(peer, headers(*said), ()) == peer


def test_clients_are_told_apart_by_credentials_else_by_address_and_program() -> None:
    def client(address: str, **more: str) -> str:
        return origin.client(address, multidict.CIMultiDict({name.replace("_", "-"): more[name] for name in more}))

    assert client("10.0.0.1", Authorization="Covey n1.1.x") == client("10.0.0.2", authorization="Covey n1.1.x")
    assert client("10.0.0.1", user_agent="curl") != client("10.0.0.1", user_agent="plugin")
    assert client("10.0.0.1") != client("10.0.0.2")
