"""How soon a new tag is whole on two followers: `python -m bench.replica`, or `make bench ARGS=replica`.

1. copies: the time from the answer to the tag's push until both followers have it whole, verified and durable, beside
   two copies made at once from the same registry by `curl`, sha256sum and fsync. Rounds are interleaved, each with new
   bytes; the ratio of the medians is told, and the followers' processor time beside the clients'.
2. kills: a follower is killed by SIGKILL so many times on the way; what its peer sent beyond the size of the tag.
3. cut: the line to the follower is cut for so long, while tags are pushed; how long it takes after that.

In 2 and 3 the follower reaches its peer through a relay that counts, and cuts.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import select
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

MIB = 1 << 20
_READY_S = 60.0
_DEADLINE_S = 900.0
_SECRET = "only for this bench"  # noqa: S105
_TICKS = os.sysconf("SC_CLK_TCK")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# ---- servers -------------------------------------------------------------------------------------------------------


class Server:
    """`covey registry`, one of a set; `url` is how its peers reach it."""

    def __init__(self, base: Path, port: int, url: str, urls: list[str], processes: int) -> None:
        self.base, self.url = base, url
        self.local = f"http://127.0.0.1:{port}"
        self._environ = {
            **{name: text for name, text in os.environ.items() if not name.startswith(("COVEY_", "ANKA_"))},
            "COVEY_CONFIG": "/dev/null",
            "COVEY_BASE_PATH": str(base),
            "COVEY_LISTEN_ADDR": f"127.0.0.1:{port}",
            "COVEY_REGISTRY_MODE": "replica",
            "COVEY_REGISTRY_ADVERTISE_URL": url,
            "COVEY_REGISTRY_PEERS": ",".join(urls),
            "COVEY_REGISTRY_PEER_SECRET": _SECRET,
            "COVEY_REGISTRY_PUSH": urls[0],
            "COVEY_REGISTRY_WORKERS": str(processes),
            "COVEY_LOG_LEVEL": "error",
        }
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        command = ["setpriv", "--pdeathsig", "KILL", sys.executable, "-m", "covey", "registry"]
        self._process = subprocess.Popen(command, env=self._environ, stdout=subprocess.DEVNULL)
        wait_until(lambda: get(f"{self.local}/readyz") is not None, _READY_S)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait()
            self._process = None

    def cpu_s(self) -> float:
        assert self._process is not None
        fields = Path(f"/proc/{self._process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def has(self, digest: str) -> bool:
        return place(self.base, digest).exists()


def place(base: Path, digest: str) -> Path:
    name = digest.partition(":")[2]
    return base / "blobs" / "sha256" / name[:2] / name


def get(url: str) -> bytes | None:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            found: bytes = answer.read()
            return found
    except OSError:
        return None


def wait_until(true: Callable[[], bool], limit_s: float = _DEADLINE_S) -> float:
    """How long it took."""
    began = time.monotonic()
    while not true():
        if time.monotonic() - began > limit_s:
            raise TimeoutError("the bench waits in vain")
        time.sleep(0.005)
    return time.monotonic() - began


@contextlib.contextmanager
def running(folder: Path, ports: list[int], urls: list[str], processes: int = 1) -> Iterator[list[Server]]:
    servers = [Server(folder / f"r{number}", port, urls[number], urls, processes) for number, port in enumerate(ports)]
    try:
        for server in servers:
            server.base.mkdir(parents=True)
            server.start()
        wait_until(lambda: b'"mine":true' in (get(f"{servers[0].local}/registry/status") or b""), _READY_S)
        yield servers
    finally:
        for server in servers:
            server.end()


def free_ports(count: int) -> list[int]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


# ---- a push by plain requests --------------------------------------------------------------------------------------


class Tag:
    """A template of one layer of random bytes. `layer` and `manifest` are digests."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.path = folder / "layer"
        size_bytes = self.size_bytes = max(1, size_bytes // MIB) * MIB
        found = hashlib.sha256()
        with self.path.open("wb") as stream:
            for _ in range(size_bytes // MIB):
                piece = os.urandom(MIB)
                stream.write(piece)
                found.update(piece)
        self.layer = f"sha256:{found.hexdigest()}"
        self.repository = f"templates/{uuid.uuid4()}"
        self._config = b'{"arch":"amd64"}'
        document = {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "artifactType": "application/vnd.covey.template.v1",
            "config": self._part("application/vnd.covey.template.config.v1+json", self._config),
            "layers": [
                {"mediaType": "application/vnd.covey.disk.raw.v1", "digest": self.layer, "size": size_bytes},
            ],
            "annotations": {"dev.covey.name": self.repository, "dev.covey.tag": "v1"},
        }
        self._manifest = json.dumps(document).encode()
        self.manifest = f"sha256:{hashlib.sha256(self._manifest).hexdigest()}"

    def _part(self, kind: str, content: bytes) -> dict[str, object]:
        return {"mediaType": kind, "digest": f"sha256:{hashlib.sha256(content).hexdigest()}", "size": len(content)}

    def upload(self, url: str) -> None:
        """All but the manifest: followers hear of nothing yet."""
        to = f"{url}/v2/{self.repository}/blobs/uploads?digest="
        curl("-X", "POST", "-T", str(self.path), to + self.layer)
        curl("-X", "POST", "--data-binary", self._config.decode(), to + self._digest_of_config())

    def _digest_of_config(self) -> str:
        return f"sha256:{hashlib.sha256(self._config).hexdigest()}"

    def enter(self, url: str) -> None:
        to = f"{url}/v2/{self.repository}/manifests/v1"
        curl(
            *("-X", "PUT", "-H", "Content-Type: application/vnd.oci.image.manifest.v1+json"),
            *("--data-binary", self._manifest.decode(), to),
        )


def curl(*words: str) -> None:
    subprocess.run(["curl", "-sSf", "-o", os.devnull, *words], check=True)


# ---- 1: copies -----------------------------------------------------------------------------------------------------


def copies(folder: Path, size_bytes: int, rounds: int) -> dict[str, object]:
    ports = free_ports(3)
    urls = [f"http://127.0.0.1:{port}" for port in ports]
    ours: list[float] = []
    plain: list[float] = []
    ours_cpu: list[float] = []
    plain_cpu: list[float] = []
    with running(folder, ports, urls) as servers:
        holder, *followers = servers
        for number in range(rounds):
            tag = Tag(folder, size_bytes)
            tag.upload(holder.local)
            for side in ("ours", "plain") if number % 2 else ("plain", "ours"):
                if side == "ours":
                    before = sum(server.cpu_s() for server in followers)
                    tag.enter(holder.local)
                    wanted = (tag.layer, tag.manifest)
                    ours.append(wait_until(lambda: all(f.has(d) for f in followers for d in wanted)))  # noqa: B023
                    ours_cpu.append(sum(server.cpu_s() for server in followers) - before)
                else:
                    took, cpu_s = plain_copies(folder, f"{holder.local}/v2/{tag.repository}/blobs/{tag.layer}", tag)
                    plain.append(took)
                    plain_cpu.append(cpu_s)
            say(f"round {number + 1}: ours {ours[-1]:.2f} s, plain {plain[-1]:.2f} s")
            for server in servers:
                place(server.base, tag.layer).unlink()
    return {
        "ours_s": [round(value, 2) for value in ours],
        "plain_s": [round(value, 2) for value in plain],
        "ratio": round(statistics.median(ours) / statistics.median(plain), 2),
        "ours_cpu_s": round(statistics.median(ours_cpu), 2),
        "plain_cpu_s": round(statistics.median(plain_cpu), 2),
    }


def plain_copies(folder: Path, url: str, tag: Tag) -> tuple[float, float]:
    """Two at once: how long until both are there, verified and durable, and their processor time."""
    before = os.times()
    began = time.monotonic()
    script = 'curl -sSf -o "$1" "$2" && test "$(sha256sum < "$1")" = "$3  -" && sync "$1"'
    words = (url, tag.layer.partition(":")[2])
    targets = [folder / f"copy{number}" for number in range(2)]
    running = [subprocess.Popen(["sh", "-c", script, "sh", str(target), *words]) for target in targets]
    for process in running:
        if process.wait() != 0:
            raise RuntimeError("a plain copy failed")
    took = time.monotonic() - began
    after = os.times()
    for target in targets:
        target.unlink()
    return took, after.children_user + after.children_system - before.children_user - before.children_system


# ---- 2 and 3: kills and a cut --------------------------------------------------------------------------------------


class Relay:
    """Before one port of this machine: counts what it has passed back, passes nothing while it is cut. It holds little
    by itself: what waits there has not been fetched."""

    def __init__(self, target: int) -> None:
        self.down_bytes = 0
        self.hold_at: float = math.inf  # so many bytes have passed: no more do
        self.cut = False
        self._target = target
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._closed = False
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def close(self) -> None:
        self._closed = self.cut = True
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.port), timeout=5).close()  # wakes `_accept`
        for thread in self._threads:
            thread.join(10)
        self._listener.close()

    def _accept(self) -> None:
        while True:
            near, _ = self._listener.accept()
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 128 << 10)
            try:
                if self._closed:
                    near.close()
                    return
                far = socket.create_connection(("127.0.0.1", self._target))
            except OSError:
                near.close()
                continue
            self._threads.append(threading.Thread(target=self._pass, args=(near, far), daemon=True))
            self._threads[-1].start()

    def _pass(self, near: socket.socket, far: socket.socket) -> None:
        with near, far, contextlib.suppress(OSError):
            while not self.cut:
                ready, _, _ = select.select([near, far], [], [], 0.5)
                for source in ready:
                    data = source.recv(256 << 10)
                    if not data or self.cut:
                        return
                    (near if source is far else far).sendall(data)
                    if source is far:
                        self.down_bytes += len(data)
                        while self.down_bytes >= self.hold_at and not self.cut:
                            time.sleep(0.005)


@contextlib.contextmanager
def pair(folder: Path, processes: int) -> Iterator[tuple[Server, Server, Relay]]:
    ports = free_ports(2)
    relay = Relay(ports[0])
    urls = [f"http://127.0.0.1:{relay.port}", f"http://127.0.0.1:{ports[1]}"]
    try:
        with running(folder, ports, urls, processes) as (holder, follower):
            yield holder, follower, relay
    finally:
        relay.close()


def kills(folder: Path, size_bytes: int, count: int, processes: int) -> dict[str, object]:
    with pair(folder, processes) as (holder, follower, relay):
        tag = Tag(folder, size_bytes)
        tag.upload(holder.local)
        began_bytes, began = relay.down_bytes, time.monotonic()
        goals = [began_bytes + size_bytes * number // (count + 1) for number in range(1, count + 1)]
        relay.hold_at = goals[0]
        tag.enter(holder.local)
        for goal in [*goals[1:], math.inf]:
            wait_until(lambda: relay.down_bytes >= relay.hold_at)
            follower.end(signal.SIGKILL)
            relay.hold_at = goal
            follower.start()
        wait_until(lambda: follower.has(tag.layer))
        twice = relay.down_bytes - began_bytes - size_bytes
        return {"kills": count, "twice_mib": round(twice / MIB, 2), "took_s": round(time.monotonic() - began, 1)}


def cut(folder: Path, size_bytes: int, cut_s: float, processes: int) -> dict[str, object]:
    """Ten tags are pushed while the line is cut."""
    with pair(folder, processes) as (holder, follower, relay):
        relay.cut = True
        began = time.monotonic()
        tags = []
        for number in range(10):
            (folder / str(number)).mkdir()
            tags.append(Tag(folder / str(number), size_bytes // 10))
            tags[-1].upload(holder.local)
            tags[-1].enter(holder.local)
        time.sleep(max(0.0, cut_s - (time.monotonic() - began)))
        told = status(follower)
        relay.cut = False
        took = wait_until(lambda: all(follower.has(d) for tag in tags for d in (tag.layer, tag.manifest)))
        gone = wait_until(lambda: status(follower).get("lag_s") == 0)
        return {
            "cut_s": cut_s,
            "lag_told_s": told.get("lag_s"),
            "whole_after_s": round(took, 2),
            "told_after_s": round(took + gone, 2),
        }


def status(server: Server) -> Mapping[str, object]:
    told = json.loads(get(f"{server.local}/registry/status") or b"{}")
    found: Mapping[str, object] = told.get("body", {}).get("replica") or {}
    return found


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench replica", description=__doc__)
    parser.add_argument("--size", type=int, default=1024, help="of the tag, in MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--cut", type=float, default=60.0, help="seconds")
    parser.add_argument("--processes", type=int, default=1, help="of each server, in kills and cut")
    parser.add_argument("--only", nargs="+", choices=("copies", "kills", "cut"), default=["copies", "kills", "cut"])
    parser.add_argument("--folder", type=Path, help="where the disks are")
    options = parser.parse_args(words)
    size_bytes = options.size * MIB
    parts: dict[str, Callable[[Path], dict[str, object]]] = {
        "copies": lambda folder: copies(folder, size_bytes, options.rounds),
        "kills": lambda folder: kills(folder, size_bytes, options.kills, options.processes),
        "cut": lambda folder: cut(folder, size_bytes, options.cut, options.processes),
    }
    found = {}
    with tempfile.TemporaryDirectory(prefix="covey-bench-", dir=options.folder) as text:
        for name in options.only:
            folder = Path(text) / name
            folder.mkdir()
            found[name] = parts[name](folder)
            say(f"{name}: {json.dumps(found[name])}")
    print(json.dumps(found, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
