"""A cloud that knows one follower of the push registry: what was just pushed elsewhere is started at once, and what was
started is started again when no registry is left."""

import json
import os
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from tests.support import lab_cloud, netlab

MIB = 1 << 20
SECRET = "a secret for tests only"


@pytest.fixture
def cloud(tmp_path: Any) -> Iterator[lab_cloud.Cloud]:
    """Registries r1, which takes pushes, and r2; a controller and its node, which were only told of r2."""
    with netlab.Lab(["e1", "r1", "r2", "c1", "n1", "load"]) as lab:
        made = lab_cloud.Cloud(lab, tmp_path)
        made.start_etcd(["e1"])
        urls = [f"http://{lab[name].ip}:8089" for name in ("r1", "r2")]
        for name, url in zip(("r1", "r2"), urls, strict=True):
            made.start_registry(
                name,
                COVEY_REGISTRY_MODE="replica",
                COVEY_REGISTRY_ADVERTISE_URL=url,
                COVEY_REGISTRY_PEERS=",".join(urls),
                COVEY_REGISTRY_PEER_SECRET=SECRET,
                COVEY_REGISTRY_PUSH=urls[0],
            )
        made.start_controller("c1", COVEY_ANKA_REGISTRY=urls[1], COVEY_PUSH_REGISTRY=urls[0])
        made.wait_all_ready()
        made.start_agent("n1")
        made.wait_nodes(1)
        made.until(lambda: _standing(made)["mine"], what="r1 takes pushes")
        yield made


def _standing(cloud: lab_cloud.Cloud) -> Mapping[str, Any]:
    answer = cloud.ask(f"{cloud.registries[0].url}/registry/status", timeout_s=3)
    found: dict[str, Any] = (answer.body["body"].get("replica") or {}) if answer.status == 200 else {}
    return {"mine": False, **found}


def _push(cloud: lab_cloud.Cloud, tag: str) -> str:
    """The template's id."""
    disk = cloud.directory / f"{tag}.img"
    disk.write_bytes(tag.encode() + os.urandom(4 * MIB))
    return str(_covey(cloud, "push", "small", "--tag", tag, "--no-compress", str(disk))["template"])


def _covey(cloud: lab_cloud.Cloud, *words: str) -> Any:
    """`covey template …` of somebody who reads at the follower, and pushes where PUSH_REGISTRY says: nobody listens at
    the first of its URLs."""
    nobody = f"http://{cloud.lab['load'].ip}:8089"
    done = cloud.lab["load"].run(
        [*lab_cloud.COVEY, "template", *words, "--json"],
        COVEY_CONFIG=os.devnull,
        PYTHONPATH=str(lab_cloud.ROOT),
        COVEY_REGISTRY=cloud.registries[1].url,
        COVEY_PUSH_REGISTRY=f"{nobody},{cloud.registries[0].url}",
    )
    return json.loads(done.stdout)


def _started(cloud: lab_cloud.Cloud, template: str, tag: str) -> None:
    """Asked for once; runs."""
    answer = cloud.ask(f"{cloud.controllers[0].url}/api/v1/vm", "POST", {"vmid": template, "tag": tag})
    assert answer.status == 200, answer
    assert answer.body["status"] == "OK", answer
    (id,) = answer.body["body"]

    def running() -> bool:
        state = cloud.state(id)
        assert state != "Error", cloud.ask(f"{cloud.controllers[0].url}/api/v1/vm?id={id}")
        return state == "Started"

    cloud.until(running, what=f"a VM of {tag} runs")


def test_through_a_follower_and_without_any_registry(cloud: lab_cloud.Cloud) -> None:
    tags = ("v1", "v2", "v3")
    for tag in tags:
        template = _push(cloud, tag)
        _started(cloud, template, tag)
    _covey(cloud, "tag", "small", "again", "--tag", "v1")
    _started(cloud, template, "again")
    for registry in cloud.registries:
        registry.kill()
    controller = cloud.controllers[0]
    for again in (False, True):
        if again:
            controller.kill()
            controller.start()
            cloud.wait_ready(controller)
        for tag in tags:
            _started(cloud, template, tag)
        for unknown in ("v4", "V1"):
            answer = cloud.ask(f"{controller.url}/api/v1/vm", "POST", {"vmid": template, "tag": unknown})
            assert answer.body == {"status": "FAIL", "message": "registry not reachable"}
