"""Backups that controllers make by themselves, and keep so many of."""

import json
import subprocess
from pathlib import Path

import pytest

from tests.cluster import conftest, fleet
from tests.operate import cloud as clouds
from tests.support import etcd

KEEP = 3


@pytest.mark.timeout(480)
def test_one_of_several_controllers_makes_each_and_the_oldest_go(tmp_path: Path) -> None:
    folder = tmp_path / "backups"
    folder.write_text("a file where the folder should be")
    settings = {
        "COVEY_ETCD_BACKUP_DIR": str(folder),
        "COVEY_ETCD_BACKUP_INTERVAL": "2s",
        "COVEY_ETCD_BACKUP_KEEP": str(KEEP),
    }
    with fleet.running(tmp_path, controllers=2, members=1, **settings) as cloud:
        nonces = len(cloud.keys("history"))
        failed = f"the backup of etcd to {folder} failed"
        conftest.eventually(lambda: failed in "; ".join(clouds.lesser_troubles(cloud.urls[0])))
        folder.unlink()
        made: set[str] = set()

        def several() -> bool:
            made.add(cloud.value("backup").get("file", ""))
            return len(made - {""}) >= KEEP + 2

        conftest.eventually(several, 90)
        record = cloud.value("backup")
        said = []
        for one in cloud.controllers:
            one.running.end()
            said += [line for line in one.running.err if "a backup was made" in line]
            one.program = None
        files = [json.loads(line)["file"] for line in said]
        assert len(files) == len(set(files)) >= KEEP + 2, files
        left = sorted(folder.iterdir())
        assert len(left) == KEEP and [str(path) for path in left] == sorted(files)[-KEEP:], (left, files)
        for path in left:
            done = subprocess.run(
                [etcd.binary("etcdctl"), "snapshot", "status", str(path)], capture_output=True, check=False
            )
            assert done.returncode == 0, done.stderr
        assert len(cloud.keys("history")) >= nonces + len(files), "a nonce follows each backup"
        ran = conftest.covey("etcd", "status", COVEY_ETCD_ENDPOINTS=cloud.etcd.endpoints[0])
        assert ran.code == 0 and "Last scheduled backup: " in ran.out, ran
        assert record["size_bytes"] > 0 and record["revision"] > 0
