"""How soon a pull goes on when its registry is killed or freezes under it: `python -m bench.midpull --size 512`.

Two `covey registry` on one directory; a client that was given both pulls one blob, and when a quarter is here the
server that sends is killed (SIGKILL) or frozen (SIGSTOP). Told is the longest time in which not one byte came after
that, by the client's own count; what the whole pull took, beside an undisturbed one; and that the
digest is right. Rounds are interleaved.
"""

import argparse
import asyncio
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import replica
from covey.client import http, oci, packing, registry

MIB = 1 << 20
_REPOSITORY = "templates/7a3f5f5e-6d0c-4b87-9c15-3f1f2a3b4c5d"
_FAULTS = {"none": 0, "kill -9": signal.SIGKILL, "SIGSTOP": signal.SIGSTOP}


class Server:
    """`covey registry` on a directory that others use too."""

    def __init__(self, base: Path, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        environ = {name: text for name, text in os.environ.items() if not name.startswith(("COVEY_", "ANKA_"))}
        told = {"BASE_PATH": str(base), "LISTEN_ADDR": f"127.0.0.1:{port}", "REGISTRY_MODE": "shared"}
        told |= {"CONFIG": "/dev/null", "REGISTRY_WORKERS": "1", "LOG_LEVEL": "error"}
        self._environ = environ | {f"COVEY_{name}": text for name, text in told.items()}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Unless it runs; returns when it is ready."""
        if self._process is None or self._process.poll() is not None:
            command = ("setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "covey", "registry")
            self._process = subprocess.Popen(command, env=self._environ)
        self.hurt(signal.SIGCONT)
        replica.wait_until(lambda: replica.get(f"{self.url}/readyz") is not None, 60.0)

    def hurt(self, number: int) -> None:
        if self._process is not None and number:
            self._process.send_signal(number)

    def end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()


async def one_pull(
    servers: tuple[Server, Server], digest: str, size: int, target: Path, fault: int
) -> dict[str, float]:
    """Seconds of the longest silence after the fault, and of the whole."""
    here = 0
    hurt_s = silent_s = 0.0
    moved_s = time.monotonic()

    def moved(done: int) -> None:
        nonlocal here, hurt_s, moved_s, silent_s
        now_s = time.monotonic()
        if done > here:
            if hurt_s:
                silent_s = max(silent_s, now_s - max(moved_s, hurt_s))
            here, moved_s = done, now_s
        if not hurt_s and here >= size // 4:
            servers[0].hurt(fault)
            hurt_s = now_s

    began_s = time.monotonic()
    async with http.Endpoints([server.url for server in servers], timeout_s=30) as endpoints:
        await registry.Registry(endpoints).fetch(_REPOSITORY, digest, size, target, progress=moved)
    took_s = time.monotonic() - began_s
    right = packing.hash_file(target)[0] == digest
    target.unlink()
    if not right:
        raise SystemExit("the digest is wrong")
    return {"longest silence s": silent_s, "whole pull s": took_s}


async def measure(size: int, rounds: int, folder: Path) -> dict[str, dict[str, list[float]]]:
    content = os.urandom(size)
    one, two = (Server(folder / "base", port) for port in replica.free_ports(2))
    servers = (one, two)
    found: dict[str, dict[str, list[float]]] = {}
    try:
        for server in servers:
            server.start()
        async with http.Endpoints([servers[1].url]) as endpoints:
            digest = oci.digest_of(content)
            (folder / "layer").write_bytes(content)
            await registry.Registry(endpoints).upload(_REPOSITORY, digest, folder / "layer")
        for _ in range(rounds):
            for name, fault in _FAULTS.items():
                servers[0].start()
                figures = await one_pull(servers, digest, size, folder / "pulled", fault)
                for figure, value in figures.items():
                    found.setdefault(name, {}).setdefault(figure, []).append(round(value, 3))
    finally:
        for server in servers:
            server.end()
    return found


def main() -> None:
    """Say the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=512, help="MiB of the blob")
    parser.add_argument("--rounds", type=int, default=5)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="covey-midpull-", dir="/var/tmp") as folder:
        found = asyncio.run(measure(chosen.size * MIB, chosen.rounds, Path(folder)))
    print(json.dumps(found))
    for name, figures in found.items():
        for figure, values in figures.items():
            print(f"{name:8} {figure:18} median {statistics.median(values):.2f}, worst {max(values):.2f}")


if __name__ == "__main__":
    main()
