"""What clients notice of each outage, per balancer: `python -m bench.outages`, or with names: `… haproxy nginx`.

A cloud of real programs, each on a host of its own (tests/support/lab_cloud.py), behind a balancer with the files of
deploy/ as they are; an open loop of requests (three quarters GETs, an eighth POSTs with an Idempotency-Key, an eighth
without); one fault in their midst. After each run every start with a key that got no answer is repeated with its key,
and then etcd and the nodes' journals must agree that every start is one VM: the bench ends with an error if not.

Prints a Markdown table, which docs/operate/balancers.md holds. It needs root, and takes about eight minutes.
"""

import argparse
import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from tests.support import balancers, lab_cloud, netlab, open_load, outages

Kind = open_load.Kind
BALANCERS = ("haproxy", "nginx", "keepalived")
NODES = 4
COLUMNS = ("balancer", "fault", "requests", "sent", "failed", "over 0.3 s", "over 1.5 s", "longest", "longest stall")


class Row(NamedTuple):
    balancer: str
    fault: str
    kind: Kind
    figures: open_load.Figures

    def text(self) -> str:
        f = self.figures
        numbers = (f.sent, f.failed, f.slow, f.very_slow, f"{f.longest_s:.2f} s", f"{f.stall_s:.2f} s")
        return "| " + " | ".join(map(str, (self.balancer, self.fault, self.kind, *numbers))) + " |"


def measure(
    cloud: lab_cloud.Cloud, url: str, balancer: str, name: str, fault: outages.Fault, spans: float
) -> list[Row]:
    """One fault under load; three rows."""
    label = f"{balancer}-{name}".replace(" ", "-")
    load = outages.run(cloud, url, fault, label=label, mix=open_load.MIXED, quiet_s=2, under_s=spans, after_s=2)
    rows = [Row(balancer, name, kind, load.figures(kind)) for kind in Kind]  # before repeats
    load.settle()
    load.assert_exactly_once()
    return rows


@contextlib.contextmanager
def broken(pair: balancers.Pair, how: str) -> Iterator[None]:
    """A fault of the balancer that holds the address."""
    holder = pair.wait_both_well()
    programs = [pair.haproxy[holder]] if how.startswith("haproxy") else [pair.keepalived[holder]]
    if how == "haproxy SIGSTOP":
        programs[0].stop()
    elif how == "power off":
        programs = [pair.haproxy[holder], pair.keepalived[holder]]
        pair.cloud.lab[holder].crash()
    else:
        programs[0].kill()
    yield
    for program in programs:
        program.cont() if program.running else program.start()


def _of(pair: balancers.Pair, how: str) -> outages.Fault:
    return lambda _cloud: broken(pair, how)


def behind(balancer: str, seconds: float) -> Iterator[Row]:
    """All rows of one balancer."""
    hosts = balancers.PAIR if balancer == "keepalived" else ("lb",)
    with lab_cloud.running(more=hosts, env={"COVEY_TRUSTED_PROXIES": f"{netlab.NETWORK}.0/24"}) as cloud:
        if balancer == "keepalived":
            pair = balancers.Pair(cloud)
            pair.wait_both_well()
            _start_nodes(cloud, pair.url)
            for how in ("haproxy kill -9", "haproxy SIGSTOP", "keepalived kill -9", "power off"):
                yield from measure(cloud, pair.url, balancer, how, _of(pair, how), seconds)
            return
        url = (balancers.haproxy if balancer == "haproxy" else balancers.nginx)(cloud, "lb").url
        _start_nodes(cloud, url)
        for name, fault in outages.FAULTS.items():
            yield from measure(cloud, url, balancer, name, fault, 0 if name == "rolling restart" else seconds)


def _start_nodes(cloud: lab_cloud.Cloud, url: str) -> None:
    cloud.start_nodes("n1", NODES, [url], COVEY_MAX_VMS="2000")
    cloud.wait_nodes(NODES)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What clients notice of each outage, per balancer.")
    parser.add_argument("balancers", nargs="*", metavar="BALANCER", help=f"of {', '.join(BALANCERS)} (default: all)")
    parser.add_argument("--seconds", type=float, default=6.0, help="how long each fault lasts (default: 6)")
    options = parser.parse_args(arguments)
    if unknown := set(options.balancers) - set(BALANCERS):
        parser.error(f"no such balancer: {', '.join(sorted(unknown))}")
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---|---|---" + "|--:" * (len(COLUMNS) - 3) + "|", flush=True)
    for balancer in options.balancers or BALANCERS:
        for row in behind(balancer, options.seconds):
            print(row.text(), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
