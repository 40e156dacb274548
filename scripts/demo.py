#!/usr/bin/env python3
"""The main job from end to end, on this machine: a cloud, a template, a VM, a crash, a second layer, nothing left.

Every claim is checked; the first that does not hold ends the demo with exit code 1. Only what users have is used: the
`covey` command, HTTP, etcdctl for a last look, and /proc to see processes. Each run has a directory and ports of its
own, so that it can run twice in a row and beside another one. Ctrl-C cleans up.

    make demo              or: .venv/bin/python scripts/demo.py [--keep]
"""

import argparse
import base64
import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
CACHE = REPOSITORY / ".cache"
BOOT_S = 120.0  # software emulation on a busy machine
SCRIPT = b'echo "Hello from $(hostname)"; uname -sr\n'


class Untrue(Exception):
    """A claim did not hold."""


def say(text: str) -> None:
    print(text, flush=True)


def claim(text: str, holds: bool, seen: object = "") -> None:
    """Say what has just been checked."""
    if not holds:
        raise Untrue(f"{text}: not so{f' ({seen})' if seen != '' else ''}")
    say(f"    ✓ {text}")


def wait_until(text: str, question: Callable[[], Any], timeout_s: float) -> Any:
    """Ask until the answer is true; shows that time passes. The answer."""
    begun = time.monotonic()
    animated = sys.stdout.isatty()
    while not (answer := question()):
        spent = time.monotonic() - begun
        if spent > timeout_s:
            raise Untrue(f"{text}: not within {timeout_s:.0f} s")
        if animated:
            print(f"\r    … {text} {spent:.0f} s", end="", flush=True)
        time.sleep(0.1)
    if animated:
        print("\r\033[K", end="")
    return answer


# ---- what a user has -------------------------------------------------------------------------------------------


class Cloud:
    """One demo's directory, environment and processes."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.data, self.node_data = folder / "cloud", folder / "node"
        self.controller = self.registry = self.etcd = ""
        self.service: subprocess.Popen[bytes] | None = None
        self.env = {
            **{name: value for name, value in os.environ.items() if not name.startswith(("COVEY_", "ANKA_", "ETCD_"))},
            "COVEY_CONFIG": os.devnull,
            "COVEY_INSTANCE_TIME_OUT": "2s",
            "PATH": os.pathsep.join((str(REPOSITORY / ".deps/etcd/usr/bin"), os.environ.get("PATH", os.defpath))),
        }

    def covey(self, *argv: object, shown: bool = True) -> str:
        """Run a command to its end; its output. A failure is a claim that does not hold."""
        words = [str(word) for word in argv]
        if shown:
            say(f"    $ covey {' '.join(word.replace(str(self.folder), '…') for word in words)}")
        done = subprocess.run(
            [sys.executable, "-m", "covey", *words], env=self.env, stdout=subprocess.PIPE, check=False, cwd=REPOSITORY
        )
        if done.returncode:
            raise Untrue(f"covey {' '.join(words)} ended with {done.returncode}")
        return done.stdout.decode()

    def ask(self, method: str, path: str, body: object = None) -> Any:
        """One call of the controller's API: the envelope's body. Raises OSError when nobody answers."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.controller + path, data=data, method=method)  # noqa: S310
        with urllib.request.urlopen(request, timeout=10) as answer:  # noqa: S310
            envelope = json.load(answer)
        if envelope["status"] != "OK":
            raise Untrue(f"{method} {path}: {envelope['message']}")
        return envelope.get("body")

    def instance(self, id: str) -> dict[str, Any]:
        shown: dict[str, Any] = self.ask("GET", f"/api/v1/vm?id={id}")
        return shown

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.controller}/readyz", timeout=2) as answer:  # noqa: S310
                return bool(answer.status == 200)
        except OSError:
            return False


def page_of(instance: dict[str, Any]) -> dict[str, str]:
    """The guest's page behind its forwarded port 80, line by line."""
    (rule,) = [rule for rule in instance["vminfo"]["port_forwarding"] if rule["guest_port"] == 80]
    host = rule.get("host_ip") or instance["vminfo"]["host_ip"]
    with urllib.request.urlopen(f"http://{host}:{rule['host_port']}/cgi-bin/index.cgi", timeout=5) as answer:
        lines = answer.read().decode().splitlines()
    return dict(line.split(": ", 1) for line in lines if ": " in line)


def page_soon(instance: dict[str, Any]) -> dict[str, str]:
    def look() -> dict[str, str] | None:
        with contextlib.suppress(OSError, ValueError):
            return page_of(instance)
        return None

    page: dict[str, str] = wait_until("the guest's web server answers", look, 30)
    return page


def processes(*words: str) -> dict[int, str]:
    """Processes whose command line contains all of these words."""
    found = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode("utf-8", "replace")
                if all(word in line for word in words):
                    found[int(entry.name)] = line
    return found


def child_of(parent: int, *words: str) -> int:
    """The one child of `parent` whose command line contains these words; 0 when there is none."""
    for pid in processes(*words):
        with contextlib.suppress(OSError):
            if int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1]) == parent:
                return pid
    return 0


def files_below(folder: Path) -> dict[str, int]:
    """Every file and its size."""
    return {str(path): path.stat().st_size for path in folder.rglob("*") if path.is_file()}


def size(count: float) -> str:
    return f"{count / 1024:.0f} KiB" if count < 1024 * 1024 else f"{count / 1024 / 1024:.1f} MiB"


# ---- the six steps ---------------------------------------------------------------------------------------------


def start_cloud(cloud: Cloud) -> None:
    """1. All-in-one service, and this machine as a node."""
    say("    $ covey standalone")
    cloud.data.mkdir()
    with (cloud.folder / "standalone.log").open("wb") as log:
        places = ("--data-dir", str(cloud.data), "--listen-addr", "127.0.0.1:0")
        cloud.service = subprocess.Popen(
            [sys.executable, "-m", "covey", "standalone", *places, "--registry-listen-address", "127.0.0.1:0"],
            env=cloud.env,
            stdout=subprocess.PIPE,
            stderr=log,
            start_new_session=True,
            preexec_fn=end_with(os.getpid()),
            cwd=REPOSITORY,
        )
    assert cloud.service.stdout is not None
    for line in iter(cloud.service.stdout.readline, b""):
        text = line.decode().rstrip()
        say(f"      {text.replace(str(cloud.folder), '…')}")
        for name in ("controller", "registry", "etcd"):
            if name in text and "listens on" in text:
                setattr(cloud, name, text.split()[-1])
        if text.startswith("Next:"):
            break
    claim("the controller is ready", bool(cloud.controller) and cloud.ready(), cloud_log(cloud))
    cloud.env |= {"COVEY_CONTROLLER": cloud.controller, "COVEY_REGISTRY": cloud.registry}
    say(indented(cloud.covey("join", cloud.controller, "--data-dir", cloud.node_data)))
    nodes = wait_until("the node is Active", lambda: active_nodes(cloud), 30)
    claim(f"this machine is node {nodes[0]['node_name']}", len(nodes) == 1, nodes)


def active_nodes(cloud: Cloud) -> list[dict[str, Any]]:
    return [node for node in cloud.ask("GET", "/api/v1/node") if node["state"] == "Active"]


def push_first(cloud: Cloud) -> dict[str, Any]:
    """2. A small Linux from Debian packages."""
    folder = cloud.folder / "template"
    cloud.covey("template", "build-demo", folder, "--cache", CACHE / "packages")
    pushed = push(cloud, "v1", folder / "base.qcow2")
    whole = sum((folder / name).stat().st_size for name in ("base.qcow2", "vmlinuz", "initrd"))
    moved = pushed["moved_bytes"]
    all_of_it = (pushed["file_bytes"], pushed["skipped_bytes"]) == (whole, 0) and 0 < moved <= whole
    claim(f"the whole template moved: {size(whole)}, packed to {size(moved)}", all_of_it, pushed)
    return pushed


def push(cloud: Cloud, tag: str, *layers: Path) -> dict[str, Any]:
    folder = cloud.folder / "template"
    boot = ("--kernel", folder / "vmlinuz", "--initrd", folder / "initrd", "--config", folder / "config.json")
    pushed: dict[str, Any] = json.loads(cloud.covey("template", "push", "demo", "--tag", tag, *layers, *boot, "--json"))
    return pushed


def start_first(cloud: Cloud, template: str) -> tuple[dict[str, Any], dict[str, str]]:
    """3. An instance over the API, and a talk with its guest."""
    say("    POST /api/v1/vm with a start script")
    script = base64.b64encode(SCRIPT).decode()
    order = {"vmid": template, "tag": "v1", "startup_script": script, "script_monitoring": True, "script_timeout": 60}
    (id,) = cloud.ask("POST", "/api/v1/vm", order)
    instance = wait_until_started(cloud, id)
    say(indented(json.dumps(instance["vminfo"], indent=2)))
    said = cloud.covey("vm", "logs", id)
    say(indented(said))
    claim("its start script ran", said.startswith("Hello from "), said)
    page = page_soon(instance)
    claim("a forwarded port of the guest answers, and the guest knows its instance", page.get("instance") == id, page)
    return instance, page


def wait_until_started(cloud: Cloud, id: str) -> dict[str, Any]:
    def look() -> dict[str, Any] | None:
        instance = cloud.instance(id)
        if instance["instance_state"] in ("Error", "Terminating", "Terminated"):
            raise Untrue(f"instance {id} is {instance['instance_state']}: {instance.get('message', '')}")
        return instance if instance["instance_state"] == "Started" else None

    begun = time.monotonic()
    started: dict[str, Any] = wait_until(f"instance {id} is started", look, BOOT_S)
    claim(f"instance {id} is Started after {time.monotonic() - begun:.1f} s", True)
    return started


def crash_controller(cloud: Cloud, instance: dict[str, Any], page: dict[str, str]) -> None:
    """4. kill -9 of the controller: the VM never notices."""
    assert cloud.service is not None
    id = instance["instance_id"]
    controller = child_of(cloud.service.pid, "covey controller")
    machine = list(processes(f"covey-{id}", "qemu-system"))
    claim(f"the VM is one QEMU process, {machine}", len(machine) == 1, machine)
    say(f"    $ kill -9 {controller}     (the controller)")
    os.kill(controller, signal.SIGKILL)
    begun, answered = time.monotonic(), 0
    while not cloud.ready():
        if page_of(instance) != page or time.monotonic() - begun > 60:
            raise Untrue("the guest goes on unchanged while the controller is away")
        answered += 1
    away = time.monotonic() - begun
    claim(f"in {away:.1f} s without a controller the guest answered {answered} times, from the same boot", answered > 0)
    again = child_of(cloud.service.pid, "covey controller")
    claim(f"the controller was started again, as process {again}", again not in (0, controller))
    shown = cloud.instance(id)
    same = (shown["instance_state"], shown["vminfo"]["uuid"]) == ("Started", instance["vminfo"]["uuid"])
    claim("it shows the same instance, Started, in the same VM", same, shown)
    claim("the VM is the same process", list(processes(f"covey-{id}", "qemu-system")) == machine)
    claim("the guest has the same boot id", page_of(instance) == page)


def push_second(cloud: Cloud, template: str) -> str:
    """5. A second tag that adds one layer."""
    folder = cloud.folder / "template"
    cloud.covey("template", "build-demo", folder, "--layer", "second")
    layer = (folder / "second.qcow2").stat().st_size
    pushed = push(cloud, "v2", folder / "base.qcow2", folder / "second.qcow2")
    moved, skipped = pushed["moved_bytes"], pushed["skipped_bytes"]
    claim(
        f"pushed {size(moved)}, skipped {size(skipped)} that the registry had", 0 < moved <= layer and skipped > moved
    )
    before = files_below(cloud.node_data)
    started = cloud.covey("vm", "start", "demo", "--tag", "v2", "--wait", f"{BOOT_S:.0f}", "--json")
    id: str = json.loads(started)["instances"][0]
    instance = cloud.instance(id)
    page = page_soon(instance)
    claim("the guest sees the new layer", page.get("layer") == "second", page)
    new = {path: count for path, count in files_below(cloud.node_data).items() if path not in before}
    fetched = [path for path, count in new.items() if count == layer]
    base = (folder / "base.qcow2").stat().st_size
    claim(
        f"the node fetched only the new layer, {size(layer)}, and not the base of {size(base)} again",
        len(fetched) == 1 and base not in new.values() and instance["vmid"] == template,
        new,
    )
    return id


def clean(cloud: Cloud, ids: list[str]) -> None:
    """6. Nothing is left."""
    cloud.covey("vm", "terminate", *ids)
    wait_until("no instance is listed", lambda: cloud.ask("GET", "/api/v1/vm") == [], 60)
    claim("no instance is listed", True)
    machines = machines_of(cloud) or [pid for id in ids for pid in processes("qemu-system", id)]
    claim("no VM process is left", not machines, machines)
    files = [path for path in files_below(cloud.node_data) if any(id in path for id in ids)]
    left = [path for path in files if "/tombstones/" not in path]  # a note that they were destroyed, kept 30 days
    claim("no overlay and no other file of the VMs is left", not left, left)
    etcdctl = shutil.which("etcdctl", path=cloud.env["PATH"])
    if etcdctl is None:
        raise Untrue("etcdctl is not installed: make setup fetches it")
    keys = subprocess.run(
        [etcdctl, "--endpoints", cloud.etcd, "get", "--prefix", "--keys-only", "/covey/instance/"],
        env={**cloud.env, "ETCDCTL_API": "3"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    claim("no instance key is left in etcd", not keys, keys)
    say(indented(cloud.covey("leave", "--data-dir", cloud.node_data)))
    assert cloud.service is not None
    cloud.service.terminate()
    claim("the all-in-one service stops with exit code 0", cloud.service.wait(60) == 0, cloud.service.returncode)


def machines_of(cloud: Cloud) -> dict[int, str]:
    """QEMU processes that use this demo's directory."""
    return processes("qemu-system", str(cloud.folder))


# ---- around them -----------------------------------------------------------------------------------------------


def cloud_log(cloud: Cloud) -> str:
    lines = (cloud.folder / "standalone.log").read_text("utf-8", "replace").strip().splitlines()
    return lines[-1] if lines else "no log"


def indented(text: str) -> str:
    return "\n".join(f"      {line}" for line in text.rstrip().splitlines())


def end_with(parent: int) -> Callable[[], None]:
    """Run in the child: it ends when the demo is killed."""
    libc = ctypes.CDLL(None)

    def ask() -> None:
        libc.prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG, linux/prctl.h
        if os.getppid() != parent:
            os._exit(1)

    return ask


@contextlib.contextmanager
def cleaned_up(cloud: Cloud, keep: bool) -> Iterator[None]:
    """However the demo ends: no process and no file of it is left."""
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        service = cloud.service
        if service is not None and service.poll() is None and cloud.controller:
            with contextlib.suppress(OSError, Untrue, KeyError):
                for wrapper in cloud.ask("GET", "/api/v1/vm"):
                    cloud.ask("DELETE", "/api/v1/vm", {"id": wrapper["instance_id"]})
                wait_until("no VM is left", lambda: not machines_of(cloud), 20)
        lock = cloud.node_data / "agent/agent.lock"
        if lock.exists() and (agent := lock.read_text().strip()) and int(agent) in processes("covey agent"):
            os.kill(int(agent), signal.SIGTERM)
            with contextlib.suppress(Untrue):
                wait_until("the agent stops", lambda: int(agent) not in processes("covey agent"), 20)
        for pid in machines_of(cloud):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if service is not None:
            service.terminate()
            service.wait(60)
        if keep:
            say(f"Kept: {cloud.folder}")
        else:
            shutil.rmtree(cloud.folder, ignore_errors=True)


def run(cloud: Cloud) -> None:
    times: list[tuple[str, float]] = []

    @contextlib.contextmanager
    def step(title: str) -> Iterator[None]:
        say(f"\n{len(times) + 1}. {title}")
        begun = time.monotonic()
        yield
        times.append((title, time.monotonic() - begun))

    with step("Start a cloud, and make this machine its node"):
        start_cloud(cloud)
    with step("Build a small Linux template and push it"):
        template = push_first(cloud)["template"]
    with step("Start an instance and talk to it"):
        instance, page = start_first(cloud, template)
    with step("Kill the controller with -9 while the VM runs"):
        crash_controller(cloud, instance, page)
    with step("Push a second tag that adds one layer, and start from it"):
        second = push_second(cloud, template)
    with step("Terminate everything"):
        clean(cloud, [instance["instance_id"], second])
    say("")
    for number, (title, seconds) in enumerate(times, 1):
        say(f"{number}. {title.ljust(60)} {seconds:6.1f} s")
    say(f"   {'All'.ljust(60)} {sum(seconds for _, seconds in times):6.1f} s")


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--keep", action="store_true", help="leave the directory, to look into its logs")
    keep = options.parse_args().keep
    CACHE.mkdir(exist_ok=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    cloud = Cloud(Path(tempfile.mkdtemp(prefix="demo-", dir=CACHE)))
    cloud.folder.chmod(0o755)  # QEMU runs as a user of its own and must get through
    try:
        with cleaned_up(cloud, keep):
            run(cloud)
    except Untrue as error:
        say(f"\nThe demo failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("\nInterrupted; everything is cleaned up")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
