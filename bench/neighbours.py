"""What leaves the registry, and how long it takes, when many nodes pull a new template at once: `make bench
ARGS=neighbours`.

Each node, and the registry, has a host of its own (a namespace) with a line that carries so much in each direction. The
same pull is measured with nodes that help each other and with nodes that do not (SHARE_LAYERS=false), each time in a
new cloud with empty caches. Needs root.
"""

import argparse
import json
import sys
from typing import NamedTuple

from tests.support import pulling

MIB = 1 << 20


class Row(NamedTuple):
    what: str
    took_s: float
    registry_mib: float


def measure(nodes: int, size_bytes: int, line_bytes_s: int, *, share: bool) -> Row:
    with pulling.running(nodes=nodes, line_bytes_s=line_bytes_s) as fleet:
        fleet.start(share=share)
        took_s = fleet.pull(fleet.push(size_bytes))
        return Row("each other" if share else "plain", took_s, fleet.registry_bytes() / MIB)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--nodes", type=int, default=8)
    parser.add_argument("--mib", type=int, default=256)
    parser.add_argument("--line-mib-s", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    chosen = parser.parse_args()
    rows = []
    print(f"{chosen.nodes} nodes, {chosen.mib} MiB, lines of {chosen.line_mib_s} MiB/s")
    print(f"{'':12} {'seconds':>8} {'from the registry':>18} {'copies':>7}")
    for _ in range(chosen.rounds):
        for share in (True, False):
            row = measure(chosen.nodes, chosen.mib * MIB, chosen.line_mib_s * MIB, share=share)
            rows.append(row)
            print(
                f"{row.what:12} {row.took_s:8.1f} {row.registry_mib:14.0f} MiB {row.registry_mib / chosen.mib:7.2f}",
                flush=True,
            )
    print(json.dumps([row._asdict() for row in rows]))
    worst = max(row.registry_mib for row in rows if row.what == "each other")
    sys.exit(0 if worst <= 1.5 * chosen.mib else f"more than 1.5 copies left the registry: {worst:.0f} MiB")


if __name__ == "__main__":
    main()
