"""Nodes pull from the registry that is near. The registries are real ones; one is 200 ms away (a busy machine makes
the near one look far for a moment), and all clients would use that one if distance did not count."""

import hashlib
import os
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import lab_cloud, netlab

REPOSITORY = "templates/7a3f5f5e-6d0c-4b87-9c15-3f1f2a3b4c5d"
BLOB = os.urandom(96 << 10)
DIGEST = f"sha256:{hashlib.sha256(BLOB).hexdigest()}"
CLIENTS = 3
_WINDOW = 8 * len(BLOB)  # so much has to come before it is looked where it came from


class Stage:
    """Registries on the hosts `near` and `far`, and clients on `n1` that pull all the time."""

    def __init__(self, cloud: lab_cloud.Cloud) -> None:
        self.cloud = cloud
        self.far, self.near = (cloud.start_registry(name, COVEY_REGISTRY_WORKERS="1") for name in ("far", "near"))
        cloud.wait_ready(self.far, self.near)
        for one in (self.far, self.near):
            path = f"{one.url}/v2/{REPOSITORY}/blobs/uploads/?digest={DIGEST}"
            assert cloud.lab["load"].call(lambda path=path: _post(path)) == 201  # type: ignore[misc]
        argv = [sys.executable, "-m", "tests.support.near_client", f"{self.far.url},{self.near.url}"]
        words = [REPOSITORY, DIGEST, str(len(BLOB)), str(cloud.directory), str(CLIENTS)]
        self.clients = cloud.start_other("clients", "n1", [*argv, *words])

    def pulls_from(self, one: lab_cloud.Program) -> None:
        """Until most of what comes is from there. Not all: a look at the near one that took long on a busy machine is a
        client's opinion for minutes."""
        other = self.near if one is self.far else self.far
        before = self._sent(one), self._sent(other)

        def look() -> bool:
            nonlocal before
            assert self.clients.running, self.clients.log()
            now = self._sent(one), self._sent(other)
            came, elsewhere = now[0] - before[0], now[1] - before[1]
            if came + elsewhere < _WINDOW:
                return False
            before = now
            return came > 2 * elsewhere

        self.cloud.until(look, what=f"most pulls go to {one.name}")

    def _sent(self, one: lab_cloud.Program) -> int:
        """What has left its host."""
        lines = one.host.run(["cat", "/proc/net/dev"]).stdout.splitlines()
        (counts,) = [line.partition(":")[2].split() for line in lines if line.strip().startswith("eth0:")]
        return int(counts[8])  # proc(5)


def _post(url: str) -> int:
    request = urllib.request.Request(url, data=BLOB, method="POST")  # noqa: S310
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
        return int(answer.status)


@pytest.fixture
def stage(tmp_path: Path) -> Iterator[Stage]:
    with netlab.Lab(["far", "near", "n1", "load"], tap=True) as lab:
        lab.slow("n1", "far", delay_s=0.1)
        yield Stage(lab_cloud.Cloud(lab, tmp_path))


def test_pulls_go_to_the_near_registry_and_elsewhere_while_it_is_away(stage: Stage) -> None:
    stage.pulls_from(stage.near)
    stage.near.stop()
    stage.pulls_from(stage.far)
    stage.near.cont()
    stage.pulls_from(stage.near)
    stage.near.kill()
    stage.pulls_from(stage.far)
    stage.near.start()
    stage.pulls_from(stage.near)
    assert stage.clients.log() == ""  # no pull failed
