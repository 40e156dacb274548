"""The storm: a cloud of real programs under load and random faults, and what must be true when it is over.

    python -m tests.storm --minutes 30 --seed 7        (make storm MINUTES=30 SEED=7)
    python -m tests.storm --judge FOLDER               the verdict of an earlier storm, from its files

Clients start, look at and terminate instances at their own pace (`load`) while members of etcd, controllers, the
balancer and agents are killed, frozen, restarted, cut off, and their links made lossy and slow (`faults`, `weather`).
Then everything heals. The clients' recorded history must fit a small model of an instance (`model`), and what nodes
really ran (`nodes`) must fit what was asked for: nothing lost, doubled, leaked or killed by mistake, every create
ended. Nothing here imports covey.

The seed gives the load and the plan of faults; which request meets which fault is up to the machine. Exit status 0
means that nothing was wrong; otherwise the folder with history, journals and logs is kept and named.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.storm import faults, verdict, weather
from tests.support import lab_cloud, netlab

_TELL_S = 30.0
_SETTLE_S = 420.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.storm", description="A cloud under random faults.")
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument(
        "--starts", type=float, default=5.5, help="requests to start a second; each is for 1.4 instances"
    )
    parser.add_argument("--judge", type=Path, help="the folder of an earlier storm")
    parser.add_argument("--discard", action="store_true", help="keep no files, whatever comes out")
    options = parser.parse_args()
    if options.judge:
        return _tell_verdict(options.judge, {})
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    folder = Path(tempfile.mkdtemp(prefix="covey-storm-", dir="/var/tmp"))
    say(f"storm of {options.minutes:g} minutes, seed {options.seed}; files are in {folder}")
    with weather.cloud(folder, options.seed) as cloud:
        done = Storm(cloud, options).run()
        ended = weather.Hand(cloud).ended()
    status = _tell_verdict(folder, done)
    if ended:
        say(f"ended by themselves: {', '.join(ended)}")
        status = 1
    if status == 0 or options.discard:
        shutil.rmtree(folder, ignore_errors=True)
    else:
        again = f"python -m tests.storm --minutes {options.minutes:g} --seed {options.seed}"
        say(f"files are kept in {folder}; the same storm again: {again}")
    return status


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)  # noqa: T201


class Storm:
    """Load and faults side by side, then calm."""

    def __init__(self, cloud: lab_cloud.Cloud, options: argparse.Namespace) -> None:
        self._cloud = cloud
        self._options = options
        self._hand = weather.Hand(cloud)
        self._seconds = options.minutes * 60
        self._told_at = time.monotonic()
        self._done: Counter[str] = Counter()

    def run(self) -> Counter[str]:
        """The faults that were done, by kind."""
        load = self._start_load()
        self._faults()
        (self._cloud.directory / "settle").touch()
        say("all faults are healed; what was accepted must come to stand, then everything ends")
        deadline = time.monotonic() + _SETTLE_S
        while load.running and time.monotonic() < deadline:
            time.sleep(0.2)
            self._tell()
        if load.running or not (self._cloud.directory / "end.json").exists():
            load.kill()
            raise SystemExit(f"the load did not come to its end: see {self._cloud.directory}/load.log")
        return self._done

    def _start_load(self) -> netlab.Process:
        config = {
            "seed": self._options.seed,
            "seconds": self._seconds,
            "starts_s": self._options.starts,
            "template": self._cloud.template,
            "urls": {weather.BALANCER: f"http://{self._cloud.lab[weather.BALANCER].ip}:8090"}
            | {each.name: each.url for each in self._cloud.controllers},
        }
        path = self._cloud.directory / "load.json"
        path.write_text(json.dumps(config))
        environ = netlab.environment(PYTHONPATH=str(lab_cloud.ROOT))
        argv = [sys.executable, "-m", "tests.storm.load", str(path)]
        return self._cloud.lab["load"].spawn(argv, env=environ, log=self._cloud.directory / "load.log")

    def _faults(self) -> None:
        """Each at its time; ends before beginnings."""
        begun = time.monotonic()
        waiting = faults.plan(self._options.seed, self._seconds, weather.HOSTS)
        going: list[faults.Fault] = []
        with (self._cloud.directory / "faults.log").open("w", buffering=1) as log:
            while (now_s := time.monotonic() - begun) < self._seconds:
                for fault in [fault for fault in going if fault.until_s <= now_s]:
                    going.remove(fault)
                    self._hand.end(fault)
                    log.write(f"{time.strftime('%H:%M:%S')} over  {fault}\n")
                while waiting and waiting[0].at_s <= now_s:
                    fault = waiting.pop(0)
                    log.write(f"{time.strftime('%H:%M:%S')} begin {fault}\n")
                    self._hand.begin(fault)
                    self._done[fault.kind] += 1
                    going.append(fault)
                self._tell(going)
                time.sleep(0.05)
            for fault in going:
                self._hand.end(fault)

    def _tell(self, going: list[faults.Fault] | None = None) -> None:
        if time.monotonic() - self._told_at < _TELL_S:
            return
        self._told_at = time.monotonic()
        told = self._progress()
        trouble = ", ".join(f"{fault.kind} {'+'.join(fault.targets)}" for fault in going or ()) or "none"
        counts = "  ".join(f"{name} {value}" for name, value in told.items())
        say(f"{counts}  faults {sum(self._done.values())}  now: {trouble}  load {os.getloadavg()[0]:.1f}")

    def _progress(self) -> dict[str, Any]:
        path = self._cloud.directory / "progress.json"
        return dict(json.loads(path.read_text())) if path.exists() else {}


def _tell_verdict(folder: Path, done: dict[str, int]) -> int:
    found = verdict.of(folder, weather.AGENTS)
    wrong = found.wrong
    for line in wrong[:40]:
        say(f"WRONG: {line}")
    if len(wrong) > 40:
        say(f"and {len(wrong) - 40} more")
    print(verdict.table(found, done))  # noqa: T201
    print("nothing is wrong" if not wrong else f"{len(wrong)} things are wrong")  # noqa: T201
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
