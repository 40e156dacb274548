"""Who asks: the address that decisions are recorded with, and the client that shares of a server are given to.

A client is whom it says it is by its credentials; without any it is a program at an address (its User-Agent). So the
build agents, plugins and scripts behind one balancer are told apart as far as they show. Nothing is believed that
matters: these names only decide who waits behind whom.

Behind a balancer the address is the balancer's, unless it is named in TRUSTED_PROXIES: then the last address in
X-Forwarded-For that is no trusted proxy's is taken. From anybody else that header is ignored.
"""

import ipaddress
from collections.abc import Sequence

import multidict

Network = ipaddress.IPv4Network | ipaddress.IPv6Network


def address(peer: str, headers: multidict.MultiMapping[str], trusted: Sequence[Network]) -> str:
    """Where the request comes from; `peer` is who holds the other end of the connection."""
    found = _plain(peer)
    if not trusted:
        return found
    for hop in reversed(",".join(headers.getall("X-Forwarded-For", [])).split(",")):
        if not _is_trusted(found, trusted) or not _is_address(hop.strip()):
            break
        found = _plain(hop.strip())
    return found


def client(address: str, headers: multidict.MultiMapping[str]) -> str:
    """Whose share it is."""
    credentials = headers.get("Authorization", "")
    return credentials or f"{address} {headers.get('User-Agent', '')}"


def _plain(text: str) -> str:
    """An IPv4 address as such: a socket that listens on all addresses shows it as one of IPv6."""
    mapped = text.lower().removeprefix("::ffff:")
    return mapped if mapped != text.lower() and _is_address(mapped) else text


def _is_trusted(text: str, trusted: Sequence[Network]) -> bool:
    return _is_address(text) and any(ipaddress.ip_address(text) in network for network in trusted)


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
