"""The network of a QEMU guest: user-mode networking, forwarded ports, and the host's loopback kept out of reach.

User-mode networking (libslirp) gives every VM a network of its own, in which 10.0.2.2 *is* the host's 127.0.0.1: a
guest could talk to every service that the host keeps to itself. Two ways out, the first where it works:

* as root, the VMs' user ids may open no new connection to 127.0.0.0/8: one nft table per data directory, in place
  before the first VM runs and removed with the last. Answers on forwarded ports belong to connections that others
  opened and pass. The host's own resolver, when it listens there, stays reachable for the guests' DNS.
* else the guest gets no way out at all (``restrict=on``); forwarded ports work all the same.
"""

import ipaddress
import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import msgspec

from covey import errors, model

_PORT = re.compile(r"[0-9]{1,5}")
_FORWARD_LINE = re.compile(r"TCP\[HOST_FORWARD\]\s+\d+\s+(\S+)\s+(\d+)\s+\S+\s+(\d+)")
_REFUSED_FORWARD = re.compile(r"host forwarding rule '?tcp:([0-9.]+):(\d+)-")


def forwards(spec: model.Spec, default: str, host_ip: str) -> tuple[model.Forward, ...]:
    """The ports to forward: the instance's own, else the template's (`default`: ``name:guest port[:host port],…``)."""
    chosen = spec.forwards or tuple(_parsed(part) for part in default.replace(" ", "").split(",") if part)
    return tuple(_checked(forward, host_ip) for forward in chosen)


def _parsed(part: str) -> model.Forward:
    name, _, ports = part.partition(":")
    guest_port, _, host_port = ports.partition(":")
    if not _PORT.fullmatch(guest_port) or not _PORT.fullmatch(host_port or "0"):
        raise errors.HypervisorError(f"the template's forwards: {part!r} is not name:guest_port[:host_port]")
    return model.Forward(name=name, guest_port=int(guest_port), host_port=int(host_port or 0))


def _checked(forward: model.Forward, host_ip: str) -> model.Forward:
    text = forward.host_ip or host_ip
    try:
        address = ipaddress.IPv4Address(text)
    except ValueError as fault:
        raise errors.HypervisorError(f"port forwarding {forward.name}: {text!r} is no IPv4 address") from fault
    if forward.protocol != "tcp":
        raise errors.HypervisorError(f"port forwarding {forward.name}: only tcp can be forwarded")
    if not 0 < forward.guest_port < 65536 or not 0 <= forward.host_port < 65536:
        raise errors.HypervisorError(
            f"port forwarding {forward.name}: ports are 1 to 65535 (host port 0: any free one)"
        )
    return model.Forward(
        name=forward.name, guest_port=forward.guest_port, host_port=forward.host_port, host_ip=str(address)
    )


def option(wanted: Sequence[model.Forward], *, restrict: bool) -> str:
    """QEMU's -netdev. Host port 0: the kernel picks a free one, which no other program can snatch in between."""
    rules = "".join(f",hostfwd=tcp:{rule.host_ip}:{rule.host_port}-:{rule.guest_port}" for rule in wanted)
    return f"user,id=net0,ipv6=off{',restrict=on' if restrict else ''}{rules}"


def found(wanted: Sequence[model.Forward], usernet: str) -> tuple[model.Forward, ...]:
    """`wanted` with the host ports that QEMU really listens on, from its ``info usernet``."""
    left = [(ip, int(host), int(guest)) for ip, host, guest in _FORWARD_LINE.findall(usernet)]
    known = []
    # Those with a port of their own first, so that the free choices share what remains.
    for rule in sorted(wanted, key=lambda rule: rule.host_port == 0):
        for line in left:
            if line[2] == rule.guest_port and rule.host_port in (0, line[1]):
                left.remove(line)
                known.append((wanted.index(rule), msgspec.structs.replace(rule, host_port=line[1])))
                break
    return tuple(rule for _, rule in sorted(known, key=lambda pair: pair[0]))


def refused(text: str, wanted: Sequence[model.Forward]) -> str:
    """What the user should read when QEMU could not listen; "" when that was not the trouble."""
    match = _REFUSED_FORWARD.search(text)
    if match is None:
        return ""
    ip, port = match[1], int(match[2])
    name = next((rule.name for rule in wanted if rule.host_port == port), "")
    return (
        f"port forwarding {name}: host port {port} on {ip} is taken or not allowed; "
        f"choose another host_port, or 0 for any free one"
    )


class Fence:
    """The nft table that keeps VMs with user ids `first` to `last` off the host's loopback."""

    def __init__(self, table: str, first: int, last: int, nft: str = "nft") -> None:
        self._table = f"inet {table}"
        self._first = first
        self._last = last
        self._nft = nft

    def raise_(self) -> bool:
        """Put the table in place, replacing an older one in the same transaction. False where that is impossible."""
        resolvers = "".join(
            f"    meta skuid {self._first}-{self._last} ip daddr {ip} meta l4proto {{ tcp, udp }} th dport 53 accept\n"
            for ip in _loopback_resolvers()
        )
        rules = (
            f"add table {self._table}\ndelete table {self._table}\ntable {self._table} {{\n  chain out {{\n"
            f"    type filter hook output priority filter; policy accept;\n{resolvers}"
            f"    meta skuid {self._first}-{self._last} ct state new ip daddr 127.0.0.0/8 reject\n  }}\n}}\n"
        )
        return _nft(self._nft, rules)

    def stands(self) -> bool:
        """Whether the table is in place."""
        return _nft(self._nft, f"list chain {self._table} out\n")

    def remove(self) -> None:
        """Harmless when it is not there."""
        _nft(self._nft, f"add table {self._table}\ndelete table {self._table}\n")


def _nft(binary: str, rules: str) -> bool:
    if os.geteuid() != 0:
        return False
    path = os.pathsep.join((os.environ.get("PATH", ""), "/usr/sbin", "/sbin"))
    try:
        done = subprocess.run(
            [binary, "-f", "-"], input=rules.encode(), env={"PATH": path}, capture_output=True, timeout=10, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0


def _loopback_resolvers() -> list[str]:
    try:
        lines = Path("/etc/resolv.conf").read_text().splitlines()
    except OSError:
        return []
    servers = [line.split()[1] for line in lines if line.startswith("nameserver") and len(line.split()) > 1]
    return [ip for ip in servers if ip.startswith("127.")]
