"""A cloud whose programs talk TLS to each other, under an authority of its own: push, start, and the pull between."""

import contextlib
import json
import ssl
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from covey.client import oci
from tests.cluster import conftest
from tests.support import certificates, etcd

LAYER = b"a disk of some size" * 100_000


@contextlib.contextmanager
def running(*argv: object, **env: str) -> Iterator[conftest.Program]:
    program = conftest.Program(*argv, **env)
    try:
        yield program
    finally:
        program.end()


class Asking:
    """A client that believes one authority."""

    def __init__(self, url: str, ca: Path) -> None:
        self._url = url
        self._context = ssl.create_default_context(cafile=ca)

    def ask(self, method: str, path: str, body: object = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data=data, method=method)  # noqa: S310
        with urllib.request.urlopen(request, timeout=60, context=self._context) as answer:  # noqa: S310
            return json.load(answer)


@pytest.mark.timeout(300)
def test_a_template_is_pushed_pulled_and_started_over_https_alone(tmp_path: Path) -> None:
    made = certificates.make(tmp_path / "tls")
    (tmp_path / "disk").write_bytes(LAYER)
    ports = [etcd.free_port() for _ in range(2)]
    controller, registry = (f"https://127.0.0.1:{port}" for port in ports)
    serving = {
        "COVEY_USE_HTTPS": "true",
        "COVEY_SERVER_CERT": str(made.server_cert),
        "COVEY_SERVER_KEY": str(made.server_key),
        "COVEY_MIN_TLS_VERSION": "1.3",
    }
    trust = {"COVEY_CA_CERT": str(made.ca)}
    cloud = Asking(controller, made.ca)
    keeps = ("--listen-addr", f"127.0.0.1:{ports[1]}", "--data-dir", tmp_path / "registry")
    leads = ("--listen-addr", f"127.0.0.1:{ports[0]}", "--anka-registry", registry, "--etcd-endpoints")
    works = ("--hypervisor", "synthetic", "--node-name", "alpha", "--data-dir", tmp_path / "node")
    with (
        etcd.running(1) as store,
        running("registry", *keeps, "--registry-workers", 2, **serving) as pulled_from,
        running("controller", *leads, ",".join(store.endpoints), **serving, **trust),
        running("agent", *works, "--controller", controller, **trust) as agent,
    ):
        pulled_from.wait_until_said("the registry listens")
        talking = {"COVEY_REGISTRY": registry, "COVEY_CONTROLLER": controller}
        pushing = ("template", "push", "small", "--tag", "v1", tmp_path / "disk", "--json")
        assert "certificate" in conftest.covey(*pushing, **talking).err.lower()
        ran = conftest.covey(*pushing, **talking, **trust)
        assert ran.code == 0, ran
        agent.wait_until_said("joined")
        conftest.eventually(lambda: _ready(cloud))
        answer = cloud.ask("POST", "/api/v1/vm", {"vmid": ran.json["template"]})
        assert answer["status"] == "OK", answer
        (id,) = answer["body"]
        conftest.eventually(lambda: _state(cloud, id) == "Started")
        layers = tmp_path / "node" / "agent" / "images" / "layers"
        assert (layers / oci.digest_of(LAYER).removeprefix("sha256:")).read_bytes() == LAYER
        status = conftest.covey("status", **talking, **trust)
        assert status.code == 0, status


def _ready(cloud: Asking) -> bool:
    (node,) = cloud.ask("GET", "/api/v1/node")["body"]
    return bool(node["state"] == "Active")


def _state(cloud: Asking, id: str) -> str:
    return str(cloud.ask("GET", f"/api/v1/vm?id={id}")["body"]["instance_state"])
