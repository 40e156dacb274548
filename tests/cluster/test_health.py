"""`covey status` and `covey dump` on a cloud of real programs, of which one after the other is taken away.

Each trouble must be shown with its remedy while it is there, and no longer; and no secret may be in a dump.
"""

import base64
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import conftest, fleet

eventually = conftest.eventually
ROOM = {"registry-space", "node-space"}  # of the machine that the test runs on
SCRIPT = "echo a-word-of-the-script"
VNC = "vnc-pa55"
ETCD_PASSWORD = "etcd-pa55word"


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[fleet.Fleet]:
    with fleet.running(tmp_path, controllers=2, COVEY_NODE_ACTIVE_TIMEOUT="31s") as one:
        yield one


def status(cloud: fleet.Fleet, *argv: str) -> conftest.Ran:
    return conftest.covey("status", *argv, COVEY_CONTROLLER=",".join(cloud.urls))


def troubles(cloud: fleet.Fleet) -> dict[str, dict[str, Any]]:
    """By kind, as `covey status --json` shows them; its exit code must fit."""
    ran = status(cloud, "--json")
    found = ran.json["health"]["troubles"]
    assert ran.code == (1 if found else 0), ran
    assert all(one["text"] and one["remedy"] for one in found)
    return {one["kind"]: one for one in found if one["kind"] not in ROOM}


def kinds(cloud: fleet.Fleet) -> set[str]:
    """As the first controller tells them: to wait for, which by commands would take the machine's time."""
    found = cloud.ask("GET", "/api/v1/health")["body"]["troubles"]
    return {one["kind"] for one in found} - ROOM


def unpacked(path: Path) -> dict[str, bytes]:
    with tarfile.open(path) as archive:
        files = {entry.name.partition("/")[2]: archive.extractfile(entry) for entry in archive}
        return {name: stream.read() for name, stream in files.items() if stream is not None}


@pytest.mark.timeout(400)  # the lease of the node that dies takes half a minute of it
def test_each_trouble_is_shown_with_its_remedy_and_a_dump_has_no_secret(cloud: fleet.Fleet, tmp_path: Path) -> None:
    node = cloud.node("alpha", COVEY_MAX_VMS="1")
    script = base64.b64encode(SCRIPT.encode()).decode()
    (runs,) = cloud.start(vnc_password=VNC, startup_script=script, metadata={"job": "a-word-of-metadata"})
    cloud.wait_until(runs, "Started")
    eventually(lambda: kinds(cloud) == set())
    eventually(lambda: troubles(cloud) == {})
    (waits,) = cloud.start()
    follower = next(member for member in cloud.etcd.members if member is not cloud.etcd.leader())
    node.kill()
    follower.kill()
    cloud.registry.kill()
    cloud.controllers[1].kill()
    wanted = {"etcd-member", "registry", "node-offline", "waiting"}
    eventually(lambda: kinds(cloud) >= wanted, 180)

    told = troubles(cloud)
    assert set(told) >= wanted | {"controller-silent"}
    assert f"etcd member {follower.name} (" in told["etcd-member"]["text"]
    assert "2 of 3 are well: one more lost, and nothing is served" in told["etcd-member"]["text"]
    assert f"covey etcd replace {follower.name}" in told["etcd-member"]["remedy"]
    assert "cannot connect" in told["registry"]["text"]
    assert told["node-offline"]["text"].startswith("node alpha-001 is offline for ")
    assert "1 VM there is shown as not communicating" in told["node-offline"]["text"]
    assert told["waiting"]["about"] == waits
    assert f"covey vm explain {waits}" in told["waiting"]["remedy"]
    assert told["controller-silent"]["about"] == cloud.urls[1]
    lines = status(cloud).out.splitlines()
    assert len([line for line in lines if line.startswith("TROUBLE")]) >= len(wanted)
    (etcd,) = [line for line in lines if line.startswith("etcd")]
    assert "2 of 3 members answer" in etcd
    assert "of 2.0 GiB on disk" in etcd or "of 8.0 GiB on disk" in etcd

    _dump(cloud, node, tmp_path, runs, waits)

    second = next(member for member in cloud.etcd.members if member.process is not None)
    second.kill()
    eventually(lambda: "controller-red" in kinds(cloud))
    eventually(lambda: "there is no majority, so nothing is served" in status(cloud).out)
    assert "1 Started" in status(cloud).out, "what it knew last"

    cloud.controllers[0].kill()
    gone = status(cloud)
    assert (gone.code, gone.out) == (1, "")
    assert gone.err.startswith("covey: no controller answers: ")
    assert gone.err.count("\n") == 1

    cloud.heal()
    cloud.terminate(waits)
    eventually(lambda: kinds(cloud) == set(), 180)
    eventually(lambda: troubles(cloud) == {})


def _dump(cloud: fleet.Fleet, node: fleet.Node, folder: Path, runs: str, waits: str) -> None:
    """Made while half of the cloud is away."""
    file = folder / "dump.tar.gz"
    ran = conftest.covey(
        *("dump", file),
        COVEY_CONTROLLER=",".join(cloud.urls),
        COVEY_ETCD_PASSWORD=ETCD_PASSWORD,
        COVEY_DATA_DIR=str(node.folder.parent.parent),
    )
    assert ran.code == 0, ran
    files = unpacked(file)
    me = node.identity()
    planted = [me["secret"], me["host_key"], VNC, ETCD_PASSWORD, "a-word-of-the-script", "a-word-of-metadata"]
    planted.append(base64.b64encode(SCRIPT.encode()).decode())
    for name, content in files.items():
        for secret in planted:
            assert secret.encode() not in content, f"a secret is in {name}"
    health = json.loads(files["controllers/1/health.json"])["body"]
    assert {one["kind"] for one in health["troubles"]} >= {"etcd-member", "registry", "node-offline", "waiting"}
    assert runs.encode() in files["cloud/instances.json"]
    assert json.loads(files[f"cloud/explain/{waits}.json"])["body"]["text"]
    assert any(one["about"] == runs for one in json.loads(files["cloud/events.json"])["body"])
    assert cloud.urls[1].encode() in files["errors.txt"]
