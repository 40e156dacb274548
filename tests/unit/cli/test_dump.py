"""`covey dump`: everything that can be had, and no secret, wherever one was planted."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from covey.cli import dump
from tests.unit.cli import conftest

Cloud = conftest.Cloud
Covey = conftest.Covey

ETCD, ROOT, OIDC = "etcd-pass/w+rd", "root-token-0123", "oidc-secret-77"
VNC, SESSION, HOST_KEY, OFFERED = "vnc pässw", "session-secret-1", "host-key-2", "offered-secret-3"
SCRIPT, OUTPUT, META = "export TOKEN_OF_USER=u5er", "deploy key: d3ploy", "meta-s3cret"
STRANGE, PROXY = "strange-s3cret", "pr0xy"
SECRETS = (ETCD, ROOT, OIDC, VNC, SESSION, HOST_KEY, OFFERED, "u5er", "d3ploy", META, STRANGE, PROXY)


def unpacked(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        files = {entry.name.partition("/")[2]: archive.extractfile(entry) for entry in archive}
        return {name: stream.read().decode() for name, stream in files.items() if stream is not None}


@pytest.fixture
def planted(cloud: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Cloud:
    """Secrets in every place that a dump looks into."""
    agent = tmp_path / "data" / "agent" / "node-001"
    agent.mkdir(parents=True)
    (agent / "node.json").write_text(json.dumps({"secret": SESSION, "host_key": HOST_KEY, "offered": [OFFERED]}))
    logs = tmp_path / "logs"
    logs.mkdir()
    (logs / "covey-agent.log").write_text(
        f'{{"event": "joined", "note": "{SESSION} {OFFERED}"}}\n{{"event": "x", "password": "{STRANGE}"}}\n'
        f"etcd login with {ETCD} at https://user:{PROXY}@etcd:2379\n"
    )
    config = tmp_path / "covey.toml"
    config.write_text(f'log_dir = "{logs}"\n[controller]\netcd_password = "{ETCD}"\noidc_client_secret = "{OIDC}"\n')
    for name, value in {
        "COVEY_CONFIG": str(config),
        "COVEY_DATA_DIR": str(tmp_path / "data"),
        "ANKA_ROOT_TOKEN": ROOT,
        "COVEY_SOME_SECRET": STRANGE,
        "COVEY_ANKA_REGISTRY": f"http://user:{PROXY}@registry:8089",
        "COVEY_INITIAL_CLUSTER_TOKEN": "covey",
    }.items():
        monkeypatch.setenv(name, value)
    vm = {
        "instance_id": "i-1",
        "instance_state": "Scheduling",
        "message": f"Waiting: {VNC}",
        "metadata": {"key": META},
        "vminfo": {"vnc_connection_string": f"vnc://:{VNC}@10.0.0.1:5901", "vnc_port": 5901},
        "startup_script": {"return_code": 3, "stdout": OUTPUT, "stderr": SCRIPT},
    }
    cloud.ok("GET", "/api/v1/vm", [{"instance_id": "i-1", "vm": vm}])
    cloud.ok("GET", "/api/v1/health", {"version": "0.2.0", "why": f"{ETCD} was refused"})
    cloud.ok("GET", "/api/v1/settings", {"etcd_password": ETCD, "etcd_endpoints": ["10.0.0.1:2379"]})
    cloud.ok("GET", "/readyz", {"version": "0.2.0"})
    cloud.ok("GET", "/api/v1/status", {"status": "Running"})
    cloud.ok("GET", "/api/v1/node", [{"node_id": "n-1", "node_name": "mac-1"}])
    cloud.ok("GET", "/api/v1/registry/vm", [{"id": "t-1", "name": "debian"}])
    cloud.ok("GET", "/api/v1/events", [{"what": "terminated", "about": "i-0", "why": f"said {ROOT}"}])
    cloud.ok("GET", "/api/v1/vm/explain", {"instance_id": "i-1", "text": "no node has room"})
    return cloud


def test_no_planted_secret_is_in_a_dump_and_what_helps_is(planted: Cloud, covey: Covey, tmp_path: Path) -> None:
    file = tmp_path / "d.tar.gz"
    ran = covey("dump", file)
    assert (ran.code, ran.err) == (0, "")
    assert str(file) in ran.out
    assert file.stat().st_mode & 0o777 == 0o600
    files = unpacked(file)
    for name, text in files.items():
        for secret in SECRETS:
            assert secret not in text, f"{secret} is in {name}"
            assert json.dumps(secret)[1:-1] not in text, f"{secret} is in {name}"
    assert sorted(files) == [
        "README.txt",
        "cloud/events.json",
        "cloud/explain/i-1.json",
        "cloud/instances.json",
        "cloud/nodes.json",
        "cloud/status.json",
        "cloud/templates.json",
        "cloud/waiting.json",
        "controllers/1/health.json",
        "controllers/1/readyz.json",
        "controllers/1/settings.json",
        "errors.txt",
        "host/logs/covey-agent.log",
        "host/settings.json",
        "host/versions.json",
    ]
    (row,) = json.loads(files["cloud/instances.json"])["body"]
    assert row["vm"]["startup_script"] == {"return_code": 3, "stdout": dump.HIDDEN, "stderr": dump.HIDDEN}
    assert row["vm"]["metadata"] == {"key": dump.HIDDEN}
    assert row["vm"]["vminfo"]["vnc_port"] == 5901
    assert '"event": "joined"' in files["host/logs/covey-agent.log"]
    assert "etcd:2379" in files["host/logs/covey-agent.log"]
    assert "no node has room" in files["cloud/explain/i-1.json"]
    assert json.loads(files["controllers/1/health.json"])["body"]["why"] == f"{dump.HIDDEN} was refused"
    settings = {row["from"]: row["value"] for row in json.loads(files["host/settings.json"])["set"]}
    assert settings["ANKA_ROOT_TOKEN"] == dump.HIDDEN
    assert settings["COVEY_ANKA_REGISTRY"] == f"http://{dump.HIDDEN}@registry:8089"
    assert "covey" in files["host/versions.json"]


def test_a_cloud_that_does_not_answer_is_a_smaller_dump(covey: Covey, tmp_path: Path) -> None:
    ran = covey("dump", tmp_path / "d.tar.gz", "--controller", "http://127.0.0.1:9")
    assert ran.code == 0
    assert "left out: controllers/1/health.json (http://127.0.0.1:9): http://127.0.0.1:9: cannot connect" in ran.err
    files = unpacked(tmp_path / "d.tar.gz")
    assert {"README.txt", "errors.txt", "host/settings.json", "host/versions.json"} <= set(files)
    assert "cloud/nodes.json" in files["errors.txt"]


def test_nothing_is_overwritten(covey: Covey, tmp_path: Path) -> None:
    (tmp_path / "d.tar.gz").write_text("mine")
    ran = covey("dump", tmp_path / "d.tar.gz", "--controller", "http://127.0.0.1:9")
    assert (ran.code, ran.err) == (1, f"covey: {tmp_path / 'd.tar.gz'} exists; name another file\n")
    assert (tmp_path / "d.tar.gz").read_text() == "mine"


def test_a_broken_settings_file_does_not_keep_a_dump_from_being_made(
    covey: Covey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "covey.toml").write_text("this is no TOML")
    monkeypatch.setenv("COVEY_CONFIG", str(tmp_path / "covey.toml"))
    ran = covey("dump", tmp_path / "d.tar.gz")
    assert ran.code == 0
    assert "is not TOML" in unpacked(tmp_path / "d.tar.gz")["host/settings.json"]


def test_only_the_end_of_a_large_log_from_a_whole_line_on(tmp_path: Path) -> None:
    log = tmp_path / "covey-x.log"
    log.write_text("".join(f"line {number}\n" for number in range(200_000)))
    end = dump.tail(log)
    assert len(end) <= 1 << 20
    assert end.startswith("line ")
    assert end.endswith("line 199999\n")


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        ({"a": [{"secret": "x"}]}, {"a": [{"secret": dump.HIDDEN}]}),
        ({"password": "", "token": None}, {"password": "", "token": None}),
        ("amqp://me:p@host/x", "amqp://(not shown)@host/x"),
        (7, 7),
    ],
)
def test_values_are_hidden_by_their_names(given: Any, shown: Any) -> None:
    assert dump.Hider([]).value(given) == shown
