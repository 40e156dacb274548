"""Bad input and broken hosts as a user meets them, by the whole chain of real processes.

Each gets one clear sentence, and what was there before is all that is there afterwards: files, etcd keys, templates.
What a single part says to bad input is tested at that part.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import conftest
from tests.support import disk, etcd

eventually = conftest.eventually
UNKNOWN = "00000000-0000-4000-8000-000000000000"
MIB = 1 << 20
RESERVE_MIB = 1024  # a node never gives its last GiB away
IMAGE = "application/vnd.oci.image.manifest.v1+json"


@pytest.fixture(scope="module")
def cloud(tmp_path_factory: pytest.TempPathFactory) -> Iterator[conftest.Cloud]:
    """`covey up --nodes 1`, shared by tests that leave it as they found it."""
    with conftest.running_cloud(
        tmp_path_factory.mktemp("up") / "data", "up", "--nodes", 1, COVEY_INSTANCE_TIME_OUT="1s"
    ) as one:
        eventually(lambda: one.ask("GET", "/api/v1/node")["body"])
        yield one


@pytest.fixture(scope="module")
def template(cloud: conftest.Cloud, tmp_path_factory: pytest.TempPathFactory) -> str:
    return cloud.push(tmp_path_factory.mktemp("disk"))


@contextlib.contextmanager
def unchanged(cloud: conftest.Cloud) -> Iterator[None]:
    """Nothing may be left of what is tried inside: no key of an instance or a claim, no file of the registry."""
    before = _keys(cloud), _registry_files(cloud)
    yield
    assert (_keys(cloud), _registry_files(cloud)) == before


def _keys(cloud: conftest.Cloud) -> Mapping[str, str]:
    """All that etcd holds of instances and claims."""
    words = (etcd.binary("etcdctl"), "--endpoints", cloud.etcd, "get", "--prefix", "/covey/", "--write-out=json")
    said = subprocess.run(words, env={**os.environ, "ETCDCTL_API": "3"}, capture_output=True, check=True, timeout=20)
    found = {_text(pair["key"]): _text(pair.get("value", "")) for pair in json.loads(said.stdout).get("kvs", [])}
    kinds = ("instance", "born", "claim", "ledger", "order", "script", "key", "external")
    return {key: value for key, value in found.items() if key.split("/")[2] in kinds}


def _text(encoded: str) -> str:
    return base64.b64decode(encoded).decode()


def _registry_files(cloud: conftest.Cloud) -> set[str]:
    """All but what servers tell each other of their care, and when something was last pulled."""
    root = cloud.data / "registry"
    found = {path.relative_to(root) for path in root.rglob("*") if path.is_file() and path.name != "_pulled"}
    return {str(path) for path in found if path.parts[0] != "notes"}


def _raw(method: str, url: str, body: bytes = b"", **headers: str) -> tuple[int, Any]:
    request = urllib.request.Request(url, data=body, method=method, headers=headers)  # noqa: S310 (our own server)
    try:
        with urllib.request.urlopen(request, timeout=20) as answer:  # noqa: S310
            return answer.status, json.loads(answer.read() or b"null")
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read() or b"null")


# ---- the API -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"vmid": UNKNOWN}, 200, "VM not in the registry"),
        ({"vmid": "../../etc/passwd"}, 200, "VM not in the registry"),
        ({"vmid": "a\0b"}, 200, "vmid: contains a control character"),
        ({"tag": "v9"}, 200, "No such tag v9"),
        ({"tag": "../v1"}, 200, "No such tag ../v1"),
        ({"version": 99}, 200, "No such version 99"),
        ({"node_id": "nope"}, 200, "node_id: there is no node nope"),
        ({"node_id": "../../node"}, 200, "node_id: there is no node ../../node"),
        ({"count": 0}, 200, "count: 0 is not between 1 and 100"),
        ({"count": 10**6}, 200, "count: 1000000 is not between 1 and 100"),
        ({"count": "2"}, 400, "count: expected `int | null`, got `str`; correct it and send the request again"),
        ({"count": True}, 400, "count: expected `int | null`, got `bool`; correct it and send the request again"),
        ({"vmid": 5}, 400, "vmid: expected `str | null`, got `int`; correct it and send the request again"),
        ({"name": "a\nb"}, 200, "name: contains a control character"),
        ({"name_template": "x" * 1025}, 200, "name_template: longer than 1024 characters"),
        (
            {"port_forwarding_override": [{"guest_port": "22", "host_ip": "::1,id=x"}]},
            200,
            "port_forwarding_override[0].host_ip: '::1,id=x' is no IPv4 address; leave it out for the node's own",
        ),
        ({"startup_script": "%"}, 200, "startup_script: not valid base64; encode the script with standard base64"),
    ],
)
def test_a_bad_start_is_one_sentence_and_no_key(
    cloud: conftest.Cloud, template: str, fields: Mapping[str, object], status: int, message: str
) -> None:
    with unchanged(cloud):
        answer = conftest.ask(cloud.controller + "/api/v1/vm", "POST", {"vmid": template, **fields})
        assert answer == (status, {"status": "FAIL", "message": message})


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"null", b"\xff\xfe{", b'{"count":1e999}', b"[" * 100_000])
def test_what_is_no_json_object(cloud: conftest.Cloud, body: bytes) -> None:
    with unchanged(cloud):
        status, answer = _raw("POST", cloud.controller + "/api/v1/vm", body)
        assert (status, answer["status"]) == (400, "FAIL")
        assert "body" in answer["message"] or "count" in answer["message"]


# ---- the registry --------------------------------------------------------------------------------------------------


def test_a_bad_push_by_any_oci_client_leaves_nothing(cloud: conftest.Cloud, template: str) -> None:
    repository = f"{cloud.registry}/v2/templates/{template}"
    digest = "sha256:" + hashlib.sha256(b"whole").hexdigest()
    manifest = {
        "schemaVersion": 2,
        "config": {"mediaType": "application/vnd.oci.empty.v1+json", "digest": digest, "size": 5},
        "layers": [],
    }
    tricks = ("templates/%2e%2e/%2e%2e/etc", "templates/../x", "../../../etc/passwd", "a%00b", "UPPER/x")
    with unchanged(cloud):
        for body in (b"whol", b"other"):  # cut short, and something else
            status, answer = _raw("POST", f"{repository}/blobs/uploads/?digest={digest}", body)
            assert (status, answer["errors"][0]["code"]) == (400, "DIGEST_INVALID")
        content = json.dumps(manifest).encode()
        status, answer = _raw("PUT", f"{repository}/manifests/broken", content, **{"Content-Type": IMAGE})
        assert (status, answer["errors"][0]["code"]) == (404, "MANIFEST_BLOB_UNKNOWN")
        assert digest in answer["errors"][0]["message"]
        for name in tricks:
            status, answer = _raw("POST", f"{cloud.registry}/v2/{name}/blobs/uploads/?digest={digest}", b"whole")
            assert status in (400, 404), name
            assert answer["errors"][0]["message"], name
    assert len(cloud.covey("template", "show", "small", "--json").json["versions"]) == 1


def test_a_push_that_breaks_off_is_never_seen(cloud: conftest.Cloud, template: str) -> None:
    """Half a layer by a client that dies: nothing shows; the same push again is whole."""
    digest = "sha256:" + hashlib.sha256(b"x" * MIB).hexdigest()
    host, _, port = cloud.registry.removeprefix("http://").partition(":")
    with unchanged(cloud), socket.create_connection((host, int(port))) as line:
        head = f"POST /v2/templates/{template}/blobs/uploads/?digest={digest} HTTP/1.1\r\nHost: x\r\n"
        line.sendall(f"{head}Content-Length: {MIB}\r\n\r\n".encode() + b"x" * (MIB // 2))
        line.shutdown(socket.SHUT_WR)
        line.settimeout(20)
        with contextlib.suppress(OSError):
            while line.recv(65536):
                pass
        eventually(lambda: not any("uploads" in name and "part" in name for name in _registry_files(cloud)))
    assert _raw("HEAD", f"{cloud.registry}/v2/templates/{template}/blobs/{digest}")[0] == 404
    status, _ = _raw("POST", f"{cloud.registry}/v2/templates/{template}/blobs/uploads/?digest={digest}", b"x" * MIB)
    assert status == 201


def test_names_are_text_and_never_paths(cloud: conftest.Cloud, tmp_path: Path) -> None:
    """Template names and tags may look like paths: nothing appears outside the registry, and all of it is found."""
    outside = set(cloud.data.parent.iterdir())
    (tmp_path / "disk").write_bytes(b"content")
    for name in ("../../escape", "/etc/escape", "..", "a/b"):
        assert cloud.covey("template", "push", name, "--tag", "../../v1", tmp_path / "disk").code == 0, name
        shown = cloud.covey("template", "show", name, "--json").json
        assert (shown["name"], shown["versions"][0]["tag"]) == (name, "../../v1")
        pulled = cloud.covey("template", "pull", name, tmp_path / "pulled")
        assert pulled.code == 0, pulled
    assert set(cloud.data.parent.iterdir()) == outside
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "pulled"}
    assert all(re.fullmatch(r"[\w./-]+", name) for name in _registry_files(cloud))
    assert not Path("/etc/escape").exists()


def test_a_title_that_is_a_path_stays_in_the_folder(cloud: conftest.Cloud, template: str, tmp_path: Path) -> None:
    """A manifest from elsewhere may call its layers anything."""
    repository = f"{cloud.registry}/v2/templates/{template}"
    shown = cloud.covey("template", "show", "small", "--json").json["versions"][0]
    manifest = _raw("GET", f"{repository}/manifests/{shown['digest']}", Accept=IMAGE)[1]
    (layer,) = manifest["layers"]
    layer["annotations"]["org.opencontainers.image.title"] = "../../escaped"
    manifest["annotations"]["dev.covey.tag"] = "tricky"
    try:
        content = json.dumps(manifest).encode()
        status, _ = _raw("PUT", f"{repository}/manifests/tricky", content, **{"Content-Type": IMAGE})
        assert status == 201
        ran = cloud.covey("template", "pull", "small", tmp_path / "a" / "b", "--tag", "tricky")
        assert ran.code == 0, ran
        assert {path.name for path in tmp_path.rglob("*escaped*")} == set()
        assert len(list((tmp_path / "a" / "b").iterdir())) == 2
    finally:
        revert = f"{cloud.registry}/registry/revert?id={template}&tag=tricky"
        assert _raw("DELETE", revert)[1]["status"] == "OK"


# ---- the command line ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files that no push may take, each named after what is wrong with it."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "good").write_bytes(b"a disk")
    (folder / "empty").touch()
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "short.qcow2").write_bytes(b"QFI\xfb")
    (folder / "bad.json").write_text("{")
    (folder / "types.json").write_text('{"vcpu": "many"}')
    images: dict[str, tuple[str, ...]] = {
        "base.qcow2": (),
        "foreign.qcow2": ("-b", "/etc/passwd", "-F", "raw"),
        "orphan.qcow2": ("-b", "base.qcow2", "-F", "qcow2"),
        "elsewhere.qcow2": ("-o", f"data_file={folder / 'data.raw'}"),
    }
    for name, options in images.items():
        words = ("qemu-img", "create", "-q", "-f", "qcow2", *options, str(folder / name), "1M")
        subprocess.run(words, check=True, timeout=60, cwd=folder)
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("empty",), "empty is empty: a disk layer has content"),
        (("folder",), "cannot read folder: Is a directory"),
        (("nowhere",), "cannot read nowhere: No such file or directory"),
        (("pipe",), "cannot read pipe: it is no regular file"),
        (("/dev/zero",), "cannot read /dev/zero: it is no regular file"),
        (("foreign.qcow2",), "foreign.qcow2: backing file: the header names '/etc/passwd', but a base layer may have"),
        (("base.qcow2", "foreign.qcow2"), "the header names the foreign file '/etc/passwd', only base.qcow2"),
        (("orphan.qcow2",), "orphan.qcow2: backing file: the header names 'base.qcow2', but a base layer may have"),
        (("elsewhere.qcow2",), "elsewhere.qcow2: data-file: the image keeps its data in another file"),
        (("short.qcow2",), "short.qcow2: the qcow2 header is cut short; export the disk anew"),
        (("good", "--config", "bad.json"), "--config bad.json: "),
        (("good", "--config", "types.json"), "--config types.json: vcpu: 'many' is no whole number above 0"),
        (("good", "--config", "/dev/zero"), "--config /dev/zero has more than 1048576 bytes"),
        (("good", "--kernel", "nowhere"), "cannot read nowhere: No such file or directory"),
        (("good", "--tag", ""), "a tag needs a name"),
        (("good", "--tag", "a\nb"), r"tag 'a\nb': a tag may not contain control characters such as line breaks"),
        (("good", "--tag", "x" * 1025), "a tag has at most 1024 characters"),
        (("good", "--tag", b"\xff"), "is not UTF-8 text"),
    ],
)
def test_a_bad_push_is_one_line(
    cloud: conftest.Cloud, template: str, bad_files: Path, words: tuple[str | bytes, ...], said: str
) -> None:
    with unchanged(cloud):
        _refused(cloud, bad_files, ("template", "push", "small", "--tag", "v2", *words), said)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("template", "push", "", "--tag", "v1", "good"), "a template's name has 1 to 255 printable characters"),
        (("template", "push", "a\nb", "--tag", "v1", "good"), "a template's name has 1 to 255 printable characters"),
        (("template", "push", "x" * 256, "--tag", "v1", "good"), "a template's name has 1 to 255 printable"),
        (("template", "push", b"\xff", "--tag", "v1", "good"), "is not UTF-8 text"),
        (("template", "show", ""), "there is no template"),
        (("template", "show", "../../x"), "there is no template ../../x"),
        (("template", "pull", "small", "good"), "good"),
        (("template", "pull", "small", "/proc/nope"), "/proc/nope"),
        (("vm", "start", ""), "there is no template"),
        (("vm", "start", "small", "--script", "folder"), "Is a directory: folder"),
        (("vm", "start", "small", "--script", "/dev/zero"), "--script /dev/zero has more than 262144 bytes"),
        (("vm", "start", "small", "--name", "a\nb"), "name: contains a control character"),
        (("vm", "start", "small", "--external-id", b"\xff"), "is not UTF-8 text"),
        (("vm", "show", "../../x"), "there is no instance ../../x"),
        (("vm", "logs", "x y&a=b"), "there is no instance x y&a=b"),
        (("vm", "terminate", "../../x"), "../../x: Not found"),
        (("node", "show", "../../x"), "there is no node ../../x"),
        (("node", "drain", ""), "there is no node"),
        (("status", "--controller", "http://127.0.0.1:99999"), "--controller: 'http://127.0.0.1:99999' is not"),
        (("status", "--controller", "http://["), "--controller: 'http://[' is not"),
        (("join", "http://127.0.0.1:1", "--hypervisor", "vmware"), "'vmware' is not one of: qemu, synthetic"),
        (("leave", "--data-dir", "nowhere"), "this host is no node of a cloud"),
        (("registry", "--data-dir", "good", "--listen-addr", "127.0.0.1:0"), "cannot hold a registry"),
        (("standalone", "--data-dir", "good", "--listen-addr", "127.0.0.1:0"), "choose another with --data-dir"),
        (("agent", "--data-dir", "good", "--hypervisor", "synthetic"), "choose another with --data-dir"),
        (("join", "CONTROLLER", "--data-dir", "good", "--hypervisor", "synthetic"), "choose another with --data-dir"),
    ],
)
def test_bad_words_are_one_line(
    cloud: conftest.Cloud, template: str, bad_files: Path, words: tuple[str | bytes, ...], said: str
) -> None:
    with unchanged(cloud):
        _refused(cloud, bad_files, tuple(cloud.controller if word == "CONTROLLER" else word for word in words), said)


def _refused(cloud: conftest.Cloud, folder: Path, words: tuple[str | bytes, ...], said: str) -> None:
    """Exit code 1, and one line on stderr that says so. Bytes go as they are: a command line need not be text."""
    command = [*(word.encode() for word in conftest.COVEY), *(os.fsencode(word) for word in words)]
    where = conftest.environment(COVEY_CONTROLLER=cloud.controller, COVEY_REGISTRY=cloud.registry)
    ran = subprocess.run(command, cwd=folder, env=where, capture_output=True, timeout=60, check=False)
    err = ran.stderr.decode()
    assert (ran.returncode, ran.stdout, err.count("\n")) == (1, b"", 1), ran
    assert said in err


# ---- full disks ----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _node_on(small: disk.Small, cloud: conftest.Cloud, name: str) -> Iterator[conftest.Program]:
    """A node that really pulls, with its data on a small disk."""
    program = conftest.Program(
        "agent",
        *("--hypervisor", "synthetic", "--node-name", name, "--controller", cloud.controller),
        *("--data-dir", small.folder),
        within=small.within(),
    )
    try:
        eventually(lambda: _node(cloud, name))
        yield program
    finally:
        program.end()


def _node(cloud: conftest.Cloud, name: str) -> Any:
    return next((one for one in cloud.ask("GET", "/api/v1/node")["body"] if one["node_name"] == name), None)


def test_a_node_with_a_full_disk_waits_for_space(tmp_path: Path) -> None:
    small = disk.Small(tmp_path / "node", 64)
    with (
        conftest.running_cloud(tmp_path / "data", COVEY_INSTANCE_TIME_OUT="1s") as cloud,
        _node_on(small, cloud, "little") as node,
    ):
        id = cloud.start(cloud.push(tmp_path))
        shown = eventually(lambda: _message(cloud, id))
        assert shown.startswith("Waiting: the nodes that could take it are in trouble")
        assert shown.endswith("; little: the disk is full")
        assert "the disk is full" in cloud.covey("node", "show", "little").out
        assert not [name for name in small.files(node.pid, "agent/images") if "layers" in name or "incoming" in name]
        small.resize(node.pid, 2 * RESERVE_MIB)
        eventually(lambda: cloud.state(id) == "Started")
        assert _message(cloud, id) == ""


def _message(cloud: conftest.Cloud, id: str) -> str:
    return str(cloud.ask("GET", f"/api/v1/vm?id={id}")["body"].get("message", ""))


def test_what_does_not_fit_is_placed_elsewhere(tmp_path: Path) -> None:
    """The node has room, but not for this template: it says so, keeps nothing of it, and another node starts it."""
    small = disk.Small(tmp_path / "node", RESERVE_MIB + 8)
    with (
        conftest.running_cloud(tmp_path / "data", "up", "--nodes", 1, COVEY_INSTANCE_TIME_OUT="1s") as cloud,
        _node_on(small, cloud, "little") as node,
    ):
        other = eventually(lambda: _node(cloud, "synthetic-001"))["node_id"]
        template = cloud.push(tmp_path, content=os.urandom(16 * MIB))
        ids = [cloud.start(template) for _ in range(4)]
        eventually(lambda: {cloud.state(id) for id in ids} == {"Started"})
        assert {cloud.ask("GET", f"/api/v1/vm?id={id}")["body"]["node_id"] for id in ids} == {other}
        alone = cloud.start(template, node_id=_node(cloud, "little")["node_id"])
        why = "refused by little: the disk of this node is full: the template needs 16777216 bytes"
        eventually(lambda: why in _message(cloud, alone))
        assert cloud.state(alone) in ("Scheduling", "Pulling"), "it waits: somebody may make room"
        places = ("images/layers", "images/incoming", "vms")
        eventually(lambda: not [name for name in small.files(node.pid, "agent") if name.startswith(places)])
        for id in (*ids, alone):
            assert cloud.ask("DELETE", "/api/v1/vm", {"id": id})["status"] == "OK"
        eventually(lambda: cloud.ask("GET", "/api/v1/vm")["body"] == [])
        assert not [key for key in _keys(cloud) if key.startswith(("/covey/instance/", "/covey/claim/"))]


def test_a_registry_with_a_full_disk_refuses_and_goes_on(tmp_path: Path) -> None:
    small = disk.Small(tmp_path / "registry", 128)  # 64 MiB of it are the reserve
    (tmp_path / "small").write_bytes(b"a small disk")
    (tmp_path / "large").write_bytes(os.urandom(80 * MIB))
    program = conftest.Program(
        "registry",
        *("--listen-addr", "127.0.0.1:0", "--data-dir", small.folder),
        within=small.within(),
        COVEY_LOG_JSON="true",
    )
    try:
        port = json.loads(program.wait_until_said("the registry listens"))["port"]
        url = f"http://127.0.0.1:{port}"

        def push(tag: str, file: str) -> conftest.Ran:
            return conftest.covey("template", "push", "t", "--tag", tag, tmp_path / file, COVEY_REGISTRY=url)

        assert push("v0", "small").code == 0
        before = small.files(program.pid)
        refused = push("v1", "large")
        assert (refused.code, refused.out, refused.err.count("\n")) == (1, "", 1), refused
        assert "the registry's disk is full" in refused.err
        after = small.files(program.pid)
        assert {name for name in after if not name.endswith("_pulled")} == set(before)
        shown = conftest.covey("template", "show", "t", "--json", COVEY_REGISTRY=url).json
        assert [version["tag"] for version in shown["versions"]] == ["v0"]
        assert conftest.covey("template", "pull", "t", tmp_path / "pulled", COVEY_REGISTRY=url).code == 0
        small.resize(program.pid, 512)
        assert push("v1", "large").code == 0
    finally:
        program.end()


# ---- what is missing -----------------------------------------------------------------------------------------------


def test_joining_without_qemu_says_what_to_install(cloud: conftest.Cloud, tmp_path: Path) -> None:
    nodes = len(cloud.ask("GET", "/api/v1/node")["body"])
    (tmp_path / "bin").mkdir()
    ran = conftest.covey("join", cloud.controller, "--data-dir", tmp_path / "node", PATH=str(tmp_path / "bin"))
    assert (ran.code, ran.err.count("\n")) == (1, 1), ran
    assert "qemu-system-x86_64 is not installed: apt-get install qemu-system-x86" in ran.err
    assert len(cloud.ask("GET", "/api/v1/node")["body"]) == nodes
    assert not (tmp_path / "node").exists()  # what it had made
    assert "this host is no node" in conftest.covey("leave", "--data-dir", tmp_path / "node").err


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("echo 'cannot open its files' >&2; exit 1", "etcd ended with exit code 1 at its start"),
        ("kill -KILL $$", "etcd was killed (SIGKILL) at its start"),
    ],
)
def test_an_etcd_that_does_not_start(tmp_path: Path, script: str, said: str) -> None:
    broken = tmp_path / "etcd"
    broken.write_text(f"#!/bin/sh\n{script}\n")
    broken.chmod(0o755)
    places = ("--listen-addr", "127.0.0.1:0", "--registry-listen-address", "127.0.0.1:0")
    ran = conftest.covey("standalone", *places, "--data-dir", tmp_path / "data", COVEY_ETCD_BINARY=str(broken))
    assert (ran.code, ran.out, ran.err.count("\n")) == (1, "", 1), ran
    assert said in ran.err
    assert f"see {tmp_path / 'data' / 'etcd.log'}" in ran.err


def test_an_etcd_that_never_answers_is_said(tmp_path: Path) -> None:
    silent = tmp_path / "etcd"
    silent.write_text("#!/bin/sh\nexec sleep 1000\n")
    silent.chmod(0o755)
    places = ("--listen-addr", "127.0.0.1:0", "--registry-listen-address", "127.0.0.1:0")
    program = conftest.Program("standalone", *places, "--data-dir", tmp_path / "data", COVEY_ETCD_BINARY=str(silent))
    try:
        program.wait_until_said("etcd is not ready yet; waiting up to 60 s for it")
        (child,) = conftest.children(program.pid)
        assert program.end() == 0
        assert not conftest.alive(child)
    finally:
        if program.process.poll() is None:
            program.end()
