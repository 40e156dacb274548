"""Bad templates and broken hosts with real VMs, by the whole chain: service, agent and QEMU as real processes."""

import contextlib
import hashlib
import json
import os
import subprocess
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from backports import zstd

from tests.cluster import conftest as programs
from tests.support import guest

eventually = programs.eventually
DISK = "application/vnd.covey.disk.qcow2.v1"
IMAGE = "application/vnd.oci.image.manifest.v1+json"


class House(NamedTuple):
    """A cloud with this host as its only node, a real one."""

    cloud: programs.Cloud
    host: guest.Host
    node: Path  # the agent's folder

    def message(self, id: str) -> str:
        return str(self.cloud.ask("GET", f"/api/v1/vm?id={id}")["body"].get("message", ""))

    def left(self) -> list[str]:
        """What there is of VMs: processes, and files beside those of the image cache."""
        files = [
            str(path.relative_to(self.node)) for name in ("vms", "records") for path in self.node.glob(f"{name}/*")
        ]
        return [*map(str, self.host.processes()), *files]

    def terminate(self, id: str) -> None:
        assert self.cloud.covey("vm", "terminate", id).code == 0
        eventually(lambda: self.cloud.state(id) == "Not found")
        eventually(lambda: not self.left())
        (node,) = self.cloud.ask("GET", "/api/v1/node")["body"]
        assert node["vm_count"] == 0


@contextlib.contextmanager
def _agent(cloud: programs.Cloud, data: Path, **env: str) -> Iterator[programs.Program]:
    program = programs.Program(
        *("agent", "--controller", cloud.controller, "--data-dir", data, "--qemu-accel", "tcg", "--max-vms", 1), **env
    )
    try:
        eventually(lambda: cloud.ask("GET", "/api/v1/node")["body"])
        yield program
    finally:
        program.end()


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    data = tmp_path_factory.mktemp("service") / "data"
    with (
        guest.host() as host,
        programs.running_cloud(data, COVEY_INSTANCE_TIME_OUT="1s") as cloud,
        _agent(cloud, host.root),
    ):
        yield House(cloud=cloud, host=host, node=host.root / "agent")


@pytest.fixture(scope="module")
def demo(house: House) -> str:
    files = guest.template()
    boot = ("--kernel", files / "vmlinuz", "--initrd", files / "initrd", "--config", files / "config.json")
    ran = house.cloud.covey("template", "push", "demo", "--tag", "v1", files / "base.qcow2", *boot, "--json")
    assert ran.code == 0, ran
    return str(ran.json["template"])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("-b", "/etc/passwd", "-F", "raw"), "backing file: the header names '/etc/passwd'"),
        (("-b", "nbd://10.0.0.1/x", "-F", "raw"), "backing file: the header names 'nbd://10.0.0.1/x'"),
        (("-o", "data_file=data.raw"), "data-file: the image keeps its data in another file"),
    ],
)
def test_a_foreign_file_in_a_header_pushed_by_any_oci_client(
    house: House, demo: str, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    """The command line refuses such a layer; whoever pushes it past that finds that no node opens what it names."""
    bad = tmp_path / "bad.qcow2"
    unread = ("-u",) if "-b" in options else ()  # the file below need not be there
    words = ("qemu-img", "create", "-q", *unread, "-f", "qcow2", *options, str(bad), "1M")
    subprocess.run(words, check=True, timeout=60, cwd=tmp_path)
    refused = house.cloud.covey("template", "push", "demo", "--tag", "bad", bad)
    assert (refused.code, refused.err.count("\n")) == (1, 1)
    assert said in refused.err
    tag = "bad-" + hashlib.sha256(repr(options).encode()).hexdigest()[:8]
    _push_by_hand(house.cloud.registry, demo, tag, bad.read_bytes(), mediaType=DISK)
    id = house.cloud.start(demo, tag=tag)
    eventually(lambda: house.cloud.state(id) == "Error")
    assert said in house.message(id)
    assert house.host.processes() == []
    eventually(lambda: not house.left())
    house.terminate(id)


def test_a_packed_layer_that_holds_something_else(house: House, demo: str) -> None:
    """Its digest is right, what is in it is not what its template says: an Error that says so, no start without end."""
    _push_by_hand(house.cloud.registry, demo, "packed", zstd.compress(b"something else"), mediaType=f"{DISK}+zstd")
    id = house.cloud.start(demo, tag="packed")
    eventually(lambda: house.cloud.state(id) == "Error")
    assert "push the template again" in house.message(id)
    eventually(lambda: not house.left())
    house.terminate(id)


def _push_by_hand(registry: str, template: str, tag: str, layer: bytes, **change: str) -> None:
    """The manifest of v1 with another disk under it, sent by plain HTTP."""
    base = f"{registry}/v2/templates/{template}"
    digest = "sha256:" + hashlib.sha256(layer).hexdigest()
    _send("POST", f"{base}/blobs/uploads/?digest={digest}", layer, "application/octet-stream")
    with urllib.request.urlopen(f"{base}/manifests/v1", timeout=60) as answer:  # noqa: S310 (our own server)
        manifest: dict[str, Any] = json.load(answer)
    manifest["layers"][0].update(digest=digest, size=len(layer), **change)
    manifest["annotations"]["dev.covey.tag"] = tag
    _send("PUT", f"{base}/manifests/{tag}", json.dumps(manifest).encode(), IMAGE)


def _send(method: str, url: str, body: bytes, kind: str) -> None:
    request = urllib.request.Request(url, data=body, method=method, headers={"Content-Type": kind})  # noqa: S310
    with urllib.request.urlopen(request, timeout=60) as answer:  # noqa: S310
        assert answer.status == 201


def test_a_killed_qemu_is_an_error_that_says_so_and_frees_its_slot(house: House, demo: str) -> None:
    """And a name that looks like a path and like options of QEMU is no more than a name."""
    name = "../../etc/$instance_id,id=x,file=/etc/passwd"
    id = house.cloud.start(demo, tag="v1", name_template=name)
    eventually(lambda: house.cloud.state(id) == "Started", timeout_s=guest.BOOT_S)
    vm = house.cloud.ask("GET", f"/api/v1/vm?id={id}")["body"]["vminfo"]
    assert vm["name"].endswith(f"../../etc/{id},id=x,file=/etc/passwd")
    assert {path.name for path in (house.node / "vms").iterdir()} == {f"{id}.1"}
    (pid,) = house.host.processes()
    programs.kill(pid)
    eventually(lambda: house.cloud.state(id) == "Error")
    assert "QEMU was killed" in house.message(id)
    assert house.host.processes() == []
    waiting = house.cloud.start(demo, tag="v1")
    house.cloud.covey("vm", "terminate", id)
    eventually(lambda: house.cloud.state(waiting) == "Started", timeout_s=guest.BOOT_S)
    house.terminate(waiting)


@pytest.fixture
def tools() -> Iterator[Path]:
    """A folder that a VM's own user passes through."""
    with tempfile.TemporaryDirectory(prefix="covey-tools-") as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def test_qemu_that_went_missing(tmp_path: Path, tools: Path) -> None:
    """QEMU is taken away under a node: refused before launch, and said; it starts when QEMU is back."""
    qemu = _tools(tools) / "qemu-system-x86_64"
    where = qemu.readlink()
    files = guest.template()
    boot = ("--kernel", files / "vmlinuz", "--initrd", files / "initrd", "--config", files / "config.json")
    with (
        guest.host() as host,
        programs.running_cloud(tmp_path / "data", COVEY_INSTANCE_TIME_OUT="1s") as cloud,
        _agent(cloud, host.root, PATH=str(tools)),
    ):
        other = House(cloud=cloud, host=host, node=host.root / "agent")
        ran = cloud.covey("template", "push", "demo", "--tag", "v1", files / "base.qcow2", *boot, "--json")
        template = str(ran.json["template"])
        qemu.unlink()
        id = cloud.start(template)
        eventually(lambda: "qemu-system-x86_64 is not installed: apt-get install qemu-system-x86" in other.message(id))
        assert cloud.state(id) in ("Scheduling", "Pulling"), "it waits: somebody may install it again"
        eventually(lambda: not other.left())
        qemu.symlink_to(where)
        eventually(lambda: cloud.state(id) == "Started", timeout_s=guest.BOOT_S)
        other.terminate(id)


def _tools(folder: Path) -> Path:
    """All programs of this host by links, so that one can be taken away."""
    for place in reversed(os.get_exec_path()):
        for path in Path(place).iterdir() if Path(place).is_dir() else ():
            (folder / path.name).unlink(missing_ok=True)
            (folder / path.name).symlink_to(path)
    return folder
