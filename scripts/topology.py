#!/usr/bin/env python3
"""A whole cloud on this machine, each program on a host of its own, to be broken by hand: Ctrl-C takes all of it away.

    make topology ARGS=haproxy        3 etcd members, 3 controllers behind haproxy, a registry, synthetic nodes
    make topology ARGS=nginx          the same behind nginx
    make topology ARGS=keepalived     two haproxys that share an address
    make topology ARGS=nodeside       no balancer: nodes are given all controllers

Balancers run with the files of deploy/ as they are. Hosts are network namespaces without names
(tests/support/netlab.py); relays on loopback ports of this machine lead into them. Nothing is installed and nothing
stays, not even after kill -9. It needs root.
"""

import argparse
import asyncio
import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from tests.support import balancers, lab_cloud, netlab

KINDS = ("haproxy", "nginx", "keepalived", "nodeside")
RESTART_S = 5.0
LOOK_S = 0.2
TRUST = {"COVEY_TRUSTED_PROXIES": f"{netlab.NETWORK}.0/24"}


def say(text: str = "") -> None:
    print(text, flush=True)


@dataclass
class Topology:
    """The cloud, the URLs at which it is reached inside the lab, and their relays outside."""

    cloud: lab_cloud.Cloud
    urls: Sequence[str]
    registry: str
    relays: list[str] = field(default_factory=list)

    def open_relays(self) -> None:
        self.relays = [relay(self.cloud.lab["load"], url) for url in (*self.urls, self.registry)]


def relay(host: netlab.Host, url: str) -> str:
    """A loopback port of this machine whose connections go to `url` from the lab's host; lives as long as we do."""
    address, port = url.removeprefix("http://").split(":")
    outside = socket.create_server(("127.0.0.1", 0))

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.closing(writer), contextlib.suppress(OSError):
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            inner_reader, inner_writer = await asyncio.open_connection(address, int(port))
        except OSError:
            writer.close()
            return
        await asyncio.gather(carry(reader, inner_writer), carry(inner_reader, writer))

    async def serve() -> None:
        async with await asyncio.start_server(connected, sock=outside) as server:
            await server.serve_forever()

    host.calling(lambda: asyncio.run(serve()))
    return f"http://127.0.0.1:{outside.getsockname()[1]}"


# ---- each kind -------------------------------------------------------------------------------------------------------


def start(kind: str, cloud: lab_cloud.Cloud, nodes: int) -> Topology:
    """Balancers and nodes for the controllers that run."""
    registry = cloud.registries[0].url
    if kind == "nodeside":
        urls = [controller.url for controller in cloud.controllers]
    else:
        urls = [{"haproxy": _haproxy, "nginx": _nginx, "keepalived": _keepalived}[kind](cloud)]
        registry = urls[0].replace(":8090", ":8089")
    cloud.start_nodes("n1", nodes, urls)
    cloud.wait_nodes(nodes)
    return Topology(cloud, urls, registry)


def _haproxy(cloud: lab_cloud.Cloud) -> str:
    return balancers.haproxy(cloud, "lb1").url


def _nginx(cloud: lab_cloud.Cloud) -> str:
    return balancers.nginx(cloud, "lb1").url


def _keepalived(cloud: lab_cloud.Cloud) -> str:
    pair = balancers.Pair(cloud)
    pair.wait_both_well()
    return pair.url


# ---- what is said ----------------------------------------------------------------------------------------------------


def tell(topology: Topology) -> None:
    cloud = topology.cloud
    *apis, registry = topology.relays
    rule = f"nsenter -t {cloud.lab.switch_pid} -n nft"
    say(f"\n{'program':<14}{'host':<6}{'address':<16}{'process':>8}")
    for program in cloud.programs:
        say(f"{program.name:<14}{program.host.name:<6}{program.host.ip:<16}{program.pid:>8}")
    first, lead = cloud.controllers[0], cloud.leader()
    balancer = cloud.others[0] if cloud.others else None
    say("\nFrom another terminal on this machine:")
    say(f"  export COVEY_CONTROLLER={','.join(apis)} COVEY_REGISTRY={registry}")
    say("  .venv/bin/covey node list                                # see it")
    say("  .venv/bin/covey vm start small --count 5 --wait 10       # use it")
    probe = "curl -s -m 5 -o /dev/null -w '%{http_code} %{time_total}\n'"
    say(f"  while sleep 0.2; do {probe} {apis[0]}/api/v1/node; done")
    say(f"Break it (what ended is started again after {RESTART_S:.0f} s):")
    say(f"  kill -9 {first.pid}          # controller {first.name}")
    say(f"  kill -STOP {first.pid}       # freeze it; kill -CONT wakes it up")
    say(f"  kill -9 {lead.pid}          # {lead.name}, which leads etcd")
    if balancer is not None:
        say(f"  kill -STOP {balancer.pid}       # {balancer.name}")
    cut = """'add rule bridge lab faults iifname "p-c1" oifname "p-e*" drop'"""
    say(f"  {rule} {cut}     # c1 without a quorum")
    say(f"  {rule} flush chain bridge lab faults     # heal all cuts")
    say(f"Logs are in {cloud.directory} until the end.\n")
    say("Ready. Ctrl-C ends it.")


def look_after(cloud: lab_cloud.Cloud) -> None:
    """Start again what was ended, after a while, until somebody ends us."""
    since: dict[str, float] = {}
    while True:
        time.sleep(LOOK_S)
        for program in cloud.programs:
            if program.running:
                continue
            if program.name not in since:
                since[program.name] = time.monotonic()
                say(f"{program.name} has ended ({program.wait()})")
            elif time.monotonic() - since[program.name] > RESTART_S:
                del since[program.name]
                program.start()
                say(f"{program.name} runs again: process {program.pid}")


def main() -> int:
    parser = argparse.ArgumentParser(description="A whole cloud on this machine, to be broken by hand.")
    parser.add_argument("kind", choices=KINDS)
    parser.add_argument("--nodes", type=int, default=5, help="synthetic nodes (default: 5)")
    options = parser.parse_args()
    if os.geteuid() != 0:
        print("topology: namespaces need root: sudo make topology ARGS=…", file=sys.stderr)
        return 1
    for number in (signal.SIGINT, signal.SIGTERM):  # a shell's background jobs are begun with SIGINT ignored
        signal.signal(number, signal.default_int_handler)
    more = {"keepalived": balancers.PAIR, "nodeside": ()}.get(options.kind, ("lb1",))
    say(f"Starting 3 etcd members, 3 controllers, a registry, {options.nodes} nodes: {options.kind}")
    try:
        with lab_cloud.running(more=more, env=TRUST) as cloud:
            topology = start(options.kind, cloud, options.nodes)
            topology.open_relays()
            tell(topology)
            look_after(cloud)
    except KeyboardInterrupt:
        say("\nEverything is taken down.")
        return 0
    except (netlab.LabError, lab_cloud.NotReady, balancers.NotInstalled) as error:
        print(f"topology: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
