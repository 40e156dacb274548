"""Bytes through the registry, side by side with nginx: `python -m bench.registry`, or `make bench ARGS=registry`.

nginx (`worker_processes 2; sendfile on`, its dav module for PUT) and a Covey registry serve and store the same files in
the same run, on one machine, over loopback, with curl as the client. Rounds are interleaved and the median is told,
because whatever else the machine does falls on both. One transfer, and four at once:

1. pull: a GET of a file; over TLS as well;
2. push: nginx stores what comes, without a hash; Covey hashes by sha256 what it stores, with fsync off as nginx has it,
   and on beside it;
3. memory: the most that any Covey process had, over all transfers, and over one file of 8 GiB each way;
4. names: a registry of 1,000 templates with 10,000 tags: its start, and its list.

`cpu` is the servers' processor time for one GiB, which says more than the clock on a machine that others use. The
clients' own (`curl`) stands beside it: of a pull in the clear it is the larger part, so on few processors the speed is
that of curl, and a server gains by sparing its client work more than by sparing its own.
"""

import argparse
import asyncio
import contextlib
import hashlib
import json
import os
import resource
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import msgspec

from bench import registry_names
from covey import durable, settings, world
from covey.registry import disk, service, workers

MIB, GIB = 1 << 20, 1 << 30
NGINX = Path(__file__).resolve().parents[1] / ".deps" / "balancers" / "bin" / "nginx"
_READY_S = 60.0
_TICKS = os.sysconf("SC_CLK_TCK")

_CONFIG = """
worker_processes 2; daemon off; master_process on; pid {home}/pid; error_log {home}/error.log;
events {{ worker_connections 512; }}
http {{
  access_log off; sendfile on; client_max_body_size 0; types {{ }} default_type application/octet-stream;
  client_body_temp_path {home}/body; proxy_temp_path {home}/proxy; fastcgi_temp_path {home}/fastcgi;
  uwsgi_temp_path {home}/uwsgi; scgi_temp_path {home}/scgi;
  server {{
    listen 127.0.0.1:{plain}; listen 127.0.0.1:{tls} ssl;
    ssl_certificate {cert}; ssl_certificate_key {key};
    location /files/ {{ alias {files}/; }}
    location /put/ {{ alias {home}/put/; dav_methods PUT; }}
  }}
}}
"""


class Spec(msgspec.Struct, kw_only=True):
    """One Covey server of the bench."""

    base: str
    port: int
    fsync: bool = False
    cert: str = ""
    key: str = ""
    processes: int = 1

    def config(self) -> service.Config:
        tls = settings.Tls(cert=Path(self.cert), key=Path(self.key)) if self.cert else None
        return service.Config(
            base_path=Path(self.base), port=self.port, fsync=self.fsync, tls=tls, workers=self.processes, grace_s=2.0
        )


# ---- servers -------------------------------------------------------------------------------------------------------


class Server:
    """A server's processes: the one that was started, and its children."""

    def __init__(self, process: "subprocess.Popen[bytes]", url: str) -> None:
        self._process = process
        self.url = url
        self._peaks: dict[int, int] = {}

    def pids(self) -> list[int]:
        found = [self._process.pid]
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError, ValueError):
                if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) in found:
                    found.append(int(entry.name))
        return found

    def cpu_s(self) -> float:
        return sum(_cpu_s(pid) for pid in self.pids())

    def peak_mb(self) -> float:
        """The most memory that one of the processes ever had."""
        return max(_peak_kb(pid) for pid in self.pids()) / 1024

    def stop(self) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(15)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def _cpu_s(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / _TICKS


def _peak_kb(pid: int) -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1])
    return 0


def _free_ports(count: int) -> list[int]:
    import socket

    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def _begin(command: list[str], url: str, look: str) -> Server:
    """Start a program and wait until it answers."""
    process = subprocess.Popen(["setpriv", "--pdeathsig", "TERM", *command], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + _READY_S
    while subprocess.run(["curl", "-ksfI", "-o", os.devnull, url + look], check=False).returncode:
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"{command[0]} did not start")
        time.sleep(0.02)
    return Server(process, url)


def covey(spec: Spec) -> Server:
    scheme = "https" if spec.cert else "http"
    command = [sys.executable, "-m", "bench.registry", "--serve", msgspec.json.encode(spec).decode()]
    return _begin(command, f"{scheme}://127.0.0.1:{spec.port}", "/readyz")


def nginx(home: Path, files: Path, cert: Path, key: Path) -> tuple[Server, str]:
    """The server, and its URL for TLS."""
    plain, tls = _free_ports(2)
    for name in ("body", "put"):
        (home / name).mkdir(parents=True)
    if os.geteuid() == 0:  # its workers run as nobody
        subprocess.run(["chmod", "-R", "a+rwX", str(home)], check=True)
    (home / "conf").write_text(_CONFIG.format(home=home, files=files, plain=plain, tls=tls, cert=cert, key=key))
    user = ["-g", "user root;"] if os.geteuid() == 0 else []
    command = [str(NGINX), "-p", str(home), "-e", str(home / "error.log"), "-c", str(home / "conf"), *user]
    return _begin(command, f"http://127.0.0.1:{plain}", "/files/f0"), f"https://127.0.0.1:{tls}"


def serve(text: str, number: tuple[int, int, int] | None) -> None:
    """What a Covey server of the bench runs: a supervisor with its workers, one process alone, or one worker."""
    import socket

    from covey.registry import tally

    spec = msgspec.json.decode(text, type=Spec)
    config = spec.config()
    command = (sys.executable, "-m", "bench.registry", "--serve", text, "--worker")
    program: workers.Workers | service.Registry
    if number is not None:
        listener, counts, mine = number
        shared = socket.socket(fileno=listener)
        row = tally.Tally(config.workers, mine, counts)
        program = service.Registry(config, world.System(), shared=shared, counts=row)
    elif config.workers > 1:
        program = workers.Workers(config, world.System(), dict(os.environ), command)
    else:
        program = service.Registry(config, world.System())

    async def run() -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        await program.start()
        await stop.wait()
        await program.stop()

    if config.tls is not None:
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(run())
    else:
        asyncio.run(run())


# ---- transfers -----------------------------------------------------------------------------------------------------


@dataclass
class Row:
    """One way of moving files. Speeds are MiB/s, one for each round; cpu is seconds for one GiB."""

    what: str
    at_once: int
    goal: float  # of nginx' speed; 0: none
    nginx: list[float] = field(default_factory=list)
    covey: list[float] = field(default_factory=list)
    nginx_cpu: list[float] = field(default_factory=list)
    covey_cpu: list[float] = field(default_factory=list)
    nginx_curl: list[float] = field(default_factory=list)  # the clients' processor time, for one GiB too
    covey_curl: list[float] = field(default_factory=list)

    def note_nginx(self, found: "Moved") -> None:
        _note(found, self.nginx, self.nginx_cpu, self.nginx_curl)

    def note_covey(self, found: "Moved") -> None:
        _note(found, self.covey, self.covey_cpu, self.covey_curl)

    @property
    def ratio(self) -> float:
        return statistics.median(self.covey) / statistics.median(self.nginx)


class Moved(NamedTuple):
    """What came of some transfers at once. Processor seconds are for one GiB."""

    speed: float
    server_cpu: float
    client_cpu: float


def _note(found: Moved, *columns: list[float]) -> None:
    for column, figure in zip(columns, found, strict=True):
        column.append(figure)


def _curls(commands: list[list[str]], size_bytes: int, server: Server) -> Moved:
    """Run all at once. Raises when one fails."""
    cpu, client = server.cpu_s(), _children_cpu_s()
    began = time.monotonic()
    running = [subprocess.Popen(["curl", "-ksSf", *command], stdout=subprocess.PIPE) for command in commands]
    codes = [process.wait() for process in running]
    took_s = time.monotonic() - began
    for process in running:
        if process.stdout is not None:
            process.stdout.close()
    if any(codes):
        raise RuntimeError(f"curl ended with {codes}")
    total = size_bytes * len(commands)
    return Moved(total / MIB / took_s, (server.cpu_s() - cpu) * GIB / total, (_children_cpu_s() - client) * GIB / total)


def _children_cpu_s() -> float:
    """Of the children that have ended and were waited for: the clients, since servers go on."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def _fetch(url: str) -> list[str]:
    return ["-o", os.devnull, url]


def _store(path: Path, url: str, digest: str) -> list[str]:
    """Begin an upload, as every client does; curl then sends all of it in one request."""
    begin = urllib.request.Request(f"{url}/v2/bench/blobs/uploads/", data=b"", method="POST")
    with urllib.request.urlopen(begin, timeout=60) as answer:
        location = answer.headers["Location"]
    return ["-o", os.devnull, "-T", str(path), f"{url}{location}?digest={digest}"]


class Files:
    """The files that move: `count` of one size, other bytes each, and their digests."""

    def __init__(self, folder: Path, size_bytes: int, count: int) -> None:
        self.folder = folder
        self.size_bytes = size_bytes
        self.paths = [folder / f"f{number}" for number in range(count)]
        self.digests = [_make(path, size_bytes) for path in self.paths]

    def shelve(self, base: Path) -> None:
        """Put them into a storage, as if they had been pushed."""
        for path, digest in zip(self.paths, self.digests, strict=True):
            target = disk.locate(base, digest)
            durable.make_dirs(target.parent, fsync=False)
            target.hardlink_to(path)
            grant(base, digest)


def grant(base: Path, digest: str) -> None:
    right = base / "repositories" / "bench" / "_blobs" / digest.partition(":")[2]
    right.parent.mkdir(parents=True, exist_ok=True)
    right.touch()


def _make(path: Path, size_bytes: int) -> str:
    """Random bytes that repeat every 16 MiB: no server looks at what they are."""
    block = os.urandom(min(16 * MIB, size_bytes))
    sha256 = hashlib.sha256()
    with path.open("wb") as stream:
        left = size_bytes
        while left:
            piece = block[: min(left, len(block))]
            stream.write(piece)
            sha256.update(piece)
            left -= len(piece)
    return f"sha256:{sha256.hexdigest()}"


def pulls(row: Row, files: Files, one: tuple[Server, str], other: tuple[Server, str]) -> None:
    """One round of a pull: nginx, then Covey."""
    names = list(zip(files.paths, files.digests, strict=True))[: row.at_once]
    for (server, url), note, path_of in (
        (one, row.note_nginx, lambda path, _: f"/files/{path.name}"),
        (other, row.note_covey, lambda _, digest: f"/v2/bench/blobs/{digest}"),
    ):
        commands = [_fetch(url + path_of(path, digest)) for path, digest in names]
        note(_curls(commands, files.size_bytes, server))


def pushes(row: Row, files: Files, one: Server, other: Server, base: Path, home: Path) -> None:
    """One round of a push: nginx, then Covey. What one has stored is deleted before the other begins, and the disk has
    written what was left to be written: both find the same memory for their pages, and a disk at rest."""
    chosen = list(zip(files.paths, files.digests, strict=True))[: row.at_once]
    at_nginx = [home / "put" / path.name for path, _ in chosen]
    at_covey = [disk.locate(base, digest) for _, digest in chosen]
    puts = [["-o", os.devnull, "-T", str(path), f"{one.url}/put/{path.name}"] for path, _ in chosen]
    posts = [_store(path, other.url, digest) for path, digest in chosen]
    for commands, server, stored, note in (
        (puts, one, at_nginx, row.note_nginx),
        (posts, other, at_covey, row.note_covey),
    ):
        os.sync()
        note(_curls(commands, files.size_bytes, server))
        for path in stored:
            if path.stat().st_size != files.size_bytes:
                raise RuntimeError(f"{path} was not stored whole")
            path.unlink()


# ---- the whole -----------------------------------------------------------------------------------------------------


@dataclass
class Found:
    """Everything that was measured."""

    size_mib: int
    rounds: int
    processes: int
    rows: list[Row] = field(default_factory=list)
    peak_mb: dict[str, float] = field(default_factory=dict)
    names: registry_names.Found | None = None


@contextlib.contextmanager
def stopping(servers: list[Server]) -> Iterator[list[Server]]:
    try:
        yield servers
    finally:
        for server in servers:
            server.stop()


def measure(given: argparse.Namespace, home: Path) -> Found:
    found = Found(given.size, given.rounds, given.processes)
    say = (lambda text: None) if given.json else (lambda text: print(text, flush=True))
    (home / "files").mkdir()
    home.chmod(0o755)
    files = Files(home / "files", given.size * MIB, 4)
    cert, key = _certificate(home)
    with stopping([]) as servers:
        web, web_tls = nginx(home / "nginx", files.folder, cert, key)
        servers.append(web)
        if "pull" in given.only or "tls" in given.only:
            _measure_pulls(given, found, files, (web, web_tls), servers, (home / "pull", cert, key), say)
        if "push" in given.only:
            _measure_pushes(given, found, files, web, servers, home, say)
        if "large" in given.only:
            _measure_large(given, found, home, say)
    if "names" in given.only:
        found.names = registry_names.measure(home / "names", given.templates, given.tags, covey, Spec, _free_ports)
    return found


def _measure_pulls(
    given: argparse.Namespace,
    found: Found,
    files: Files,
    web: tuple[Server, str],
    servers: list[Server],
    place: tuple[Path, Path, Path],
    say: Callable[[str], None],
) -> None:
    base, cert, key = place
    files.shelve(base)
    plain_port, tls_port = _free_ports(2)
    kinds = {}
    if "pull" in given.only:
        made = covey(Spec(base=str(base), port=plain_port, processes=given.processes))
        servers.append(made)
        kinds["pull"] = (1.0, (web[0], web[0].url), (made, made.url))
    if "tls" in given.only:
        spec = Spec(base=str(base), port=tls_port, processes=given.processes, cert=str(cert), key=str(key))
        made = covey(spec)
        servers.append(made)
        kinds["pull, TLS"] = (0.8, (web[0], web[1]), (made, made.url))
    rows = [(Row(kind, many, goal), one, other) for kind, (goal, one, other) in kinds.items() for many in (1, 4)]
    found.rows += [row for row, _, _ in rows]
    for number in range(given.rounds):
        say(f"pulls, round {number + 1}")
        for row, one, other in rows:
            pulls(row, files, one, other)
    for kind, (_, _, (made, _)) in kinds.items():
        found.peak_mb[kind] = made.peak_mb()


def _measure_pushes(
    given: argparse.Namespace,
    found: Found,
    files: Files,
    web: Server,
    servers: list[Server],
    home: Path,
    say: Callable[[str], None],
) -> None:
    ports = _free_ports(2)
    kinds = []
    for fsync, port in zip((False, True), ports, strict=True):
        base = home / f"push-{fsync}"
        made = covey(Spec(base=str(base), port=port, processes=given.processes, fsync=fsync))
        servers.append(made)
        kinds.append((fsync, base, made))
    rows = [
        (Row(f"push, fsync {'on' if fsync else 'off'}", many, 0.0 if fsync else 0.8), base, made)
        for fsync, base, made in kinds
        for many in (1, 4)
    ]
    found.rows += [row for row, _, _ in rows]
    for number in range(given.rounds):
        say(f"pushes, round {number + 1}")
        for row, base, made in rows:
            pushes(row, files, web, made, base, home / "nginx")
    for fsync, _, made in kinds:
        found.peak_mb[f"push, fsync {'on' if fsync else 'off'}"] = made.peak_mb()


def _measure_large(given: argparse.Namespace, found: Found, home: Path, say: Callable[[str], None]) -> None:
    """One sparse file, pushed and pulled."""
    say(f"a sparse file of {given.large} GiB")
    path, base = home / "sparse", home / "large"
    size = given.large * GIB
    with path.open("wb") as stream:
        stream.truncate(size)
    with path.open("rb") as stream:
        digest = f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"
    (port,) = _free_ports(1)
    with stopping([covey(Spec(base=str(base), port=port, processes=given.processes))]) as (made,):
        _curls([_store(path, made.url, digest)], size, made)
        _curls([_fetch(f"{made.url}/v2/bench/blobs/{digest}")], size, made)
        found.peak_mb[f"{given.large} GiB pushed and pulled"] = made.peak_mb()


def _certificate(home: Path) -> tuple[Path, Path]:
    cert, key = home / "cert.pem", home / "key.pem"
    command = f"openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1 -keyout {key} -out {cert}"
    subprocess.run(command.split(), check=True, capture_output=True)
    return cert, key


def show(found: Found) -> None:
    print(f"{found.size_mib} MiB files, {found.rounds} interleaved rounds, Covey with {found.processes} processes")
    print(f"{'':<18}{'at once':>8}{'MiB/s':>16}{'ratio':>7}{'rounds':>12}{'goal':>6}{'server cpu':>14}{'curl cpu':>14}")
    print(f"{'':<26}{'nginx':>8}{'covey':>8}{'':>25}{'nginx':>7}{'covey':>7}{'nginx':>7}{'covey':>7}")
    for row in found.rows:
        middle = [statistics.median(column) for column in (row.nginx, row.covey)]
        cpu = [statistics.median(c) for c in (row.nginx_cpu, row.covey_cpu, row.nginx_curl, row.covey_curl)]
        ratios = [ours / theirs for theirs, ours in zip(row.nginx, row.covey, strict=True)]
        spread = f"{min(ratios):.2f}-{max(ratios):.2f}"
        print(
            f"{row.what:<18}{row.at_once:>8}{middle[0]:>8.0f}{middle[1]:>8.0f}{row.ratio:>7.2f}{spread:>12}"
            f"{row.goal or '':>6}" + "".join(f"{seconds:>7.2f}" for seconds in cpu)
        )
    print("MiB/s in all, medians; cpu: seconds of processor for one GiB")
    for what, peak in found.peak_mb.items():
        print(f"memory, {what}: at most {peak:.0f} MB in one process (goal: 150)")
    if found.names is not None:
        print(found.names.told())


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="bench registry", description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=int, default=1024, help="of each file, in MiB")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--processes", type=int, default=min(4, os.cpu_count() or 1), help="of one Covey server")
    parser.add_argument("--large", type=int, default=8, help="GiB of the sparse file")
    parser.add_argument("--templates", type=int, default=1000)
    parser.add_argument("--tags", type=int, default=10, help="of each template")
    parser.add_argument("--only", nargs="+", default=["pull", "tls", "push", "large", "names"])
    parser.add_argument("--folder", type=Path, help="where to put the files (default: the temporary directory)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--serve", default="", help=argparse.SUPPRESS)
    parser.add_argument("--worker", nargs=3, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.serve:
        serve(given.serve, tuple(given.worker) if given.worker else None)
        return 0
    home = Path(tempfile.mkdtemp(prefix="covey-bench-", dir=given.folder))
    try:
        found = measure(given, home)
    finally:
        shutil.rmtree(home, ignore_errors=True)
    if given.json:
        print(json.dumps(asdict(found)))
    else:
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
