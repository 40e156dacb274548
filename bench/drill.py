"""A restore drill: `python -m bench.drill --instances 1000 --minutes 10`.

Three etcd members, two controllers, a registry and synthetic nodes, each VM on a disk. Some instances run, a backup is
made, so many more are started over so many minutes while users ask 40 times a second; then every etcd member ends, its
disk is lost, and the store is restored from that backup. Told is how long it took until requests were answered, until
every VM was an instance again, and until all was settled. It fails when a VM was destroyed, begun twice or not
accounted for. The same drill, without the minutes, is a test (tests/operate/test_restore.py).
"""

import argparse
import tempfile
from pathlib import Path

from tests.operate import cloud, drill

KEPT, ENDED = 100, 40


def main() -> None:
    parser = argparse.ArgumentParser(description="Restore the store of a running cloud from an old backup.")
    parser.add_argument("--instances", type=int, default=1000, help="started since the backup (default 1000)")
    parser.add_argument("--minutes", type=float, default=10.0, help="so old is the backup (default 10)")
    parser.add_argument("--nodes", type=int, default=40, help="of 300 slots each (default 40)")
    options = parser.parse_args()
    terms = drill.Terms(kept=KEPT, since=options.instances, ended=ENDED, minutes=options.minutes)
    with (
        tempfile.TemporaryDirectory(prefix="covey-drill-", dir="/var/tmp") as folder,
        cloud.running(Path(folder), nodes=options.nodes, controllers=2) as running,
    ):
        print(drill.run(running, Path(folder), terms).told())


if __name__ == "__main__":
    main()
