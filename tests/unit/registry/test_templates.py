"""Templates over OCI: the client pushes and pulls, the views tell what is there, bad manifests are refused."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from covey import errors, failpoint, model
from covey.client import oci, templates
from covey.client import registry as client
from covey.controller import start_request
from tests.support import registry

TAG = "a b#ü"
BASE = b"base " * 100_000
MORE = b"QFI\xfb" + b"more " * 10_000
UUID = "12345678-1234-1234-1234-123456789abc"
REPOSITORY = f"templates/{UUID}"


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[registry.Server]:
    async with registry.serving(tmp_path / "base") as server:
        yield server


@pytest.fixture
async def remote(server: registry.Server) -> AsyncIterator[client.Registry]:
    async with registry.talking(server) as remote:
        yield remote


@pytest.fixture
def files(tmp_path: Path) -> Mapping[str, Path]:
    made = {}
    for name, content in (("base.img", BASE), ("more.qcow2", MORE), ("vmlinuz", b"kernel"), ("initrd", b"initrd")):
        made[name] = tmp_path / name
        made[name].write_bytes(content)
    return made


@pytest.fixture
def disarm() -> Iterator[None]:
    yield
    failpoint.arm("")


async def view(server: registry.Server, path: str) -> Any:
    """The body of an enveloped answer."""
    status, headers, content = await server.call("GET", path)
    answer = json.loads(content)
    assert (status, answer["status"], answer["message"]) == (200, "OK", ""), answer
    assert headers["Content-Type"] == "application/json"
    return answer["body"]


async def push(remote: client.Registry, tag: str, *layers: Path, name: str = "mac", **more: Any) -> templates.Pushed:
    return await templates.push_template(remote, name, tag, layers, arch=model.Arch.AMD64, **more)


# ---- push and pull -------------------------------------------------------------------------------------------------


async def test_a_template_goes_out_and_comes_back(
    remote: client.Registry, files: Mapping[str, Path], tmp_path: Path
) -> None:
    pushed = await push(
        remote,
        TAG,
        files["base.img"],
        files["more.qcow2"],
        kernel=files["vmlinuz"],
        initrd=files["initrd"],
        vm={"vcpu": 2, "append": "quiet"},
        description="the first",
    )
    assert (pushed.version, pushed.skipped_bytes) == (0, 0)
    assert pushed.moved_bytes == sum(path.stat().st_size for path in files.values())
    pulled = await templates.pull_template(remote, "mac", tmp_path / "out", tag=TAG)
    assert (pulled.digest, pulled.template) == (pushed.digest, pushed.template)
    assert [path.name for path in pulled.files] == ["base.img", "more.qcow2", "vmlinuz", "initrd"]
    for path in pulled.files:
        assert path.read_bytes() == files[path.name].read_bytes()
    config = json.loads((tmp_path / "out" / templates.CONFIG_FILE).read_bytes())
    assert (config["arch"], config["vm"]) == ("amd64", {"vcpu": 2, "append": "quiet"})
    assert config["uncompressed"] == [oci.digest_of(files[name].read_bytes()) for name in files]


async def test_a_second_tag_moves_only_its_new_layer(remote: client.Registry, files: Mapping[str, Path]) -> None:
    first = await push(remote, "v1", files["base.img"])
    second = await push(remote, "v2", files["base.img"], files["more.qcow2"])
    assert (second.template, second.version) == (first.template, 1)
    assert (second.moved_bytes, second.skipped_bytes) == (len(MORE), len(BASE))


async def test_a_layer_of_another_template_is_mounted(remote: client.Registry, files: Mapping[str, Path]) -> None:
    await push(remote, "v1", files["base.img"])
    other = await push(remote, "v1", files["base.img"], name="another")
    assert (other.moved_bytes, other.skipped_bytes) == (0, len(BASE))


async def test_the_same_push_again_moves_nothing_and_is_the_same_version(
    remote: client.Registry, files: Mapping[str, Path]
) -> None:
    first = await push(remote, "v1", files["base.img"])
    again = await push(remote, "v1", files["base.img"])
    assert (again.digest, again.version, again.moved_bytes) == (first.digest, 0, 0)


async def test_an_existing_tag_is_refused_before_anything_moves_and_replaced_by_force(
    remote: client.Registry, server: registry.Server, files: Mapping[str, Path]
) -> None:
    first = await push(remote, "v1", files["base.img"])
    with pytest.raises(errors.Refused, match="tag 'v1' of template 'mac' exists; --force replaces it"):
        await push(remote, "v1", files["more.qcow2"])
    assert not await remote.has_blob(oci.repository_of(first.template), oci.digest_of(MORE))
    forced = await push(remote, "v1", files["more.qcow2"], force=True)
    assert forced.version == 1
    assert (await remote.resolve("mac")).digest == forced.digest
    assert (await remote.manifest(oci.repository_of(first.template), first.digest))[1] == first.digest


async def test_a_pull_leaves_what_is_right_and_continues_what_is_partial(
    remote: client.Registry, files: Mapping[str, Path], tmp_path: Path
) -> None:
    await push(remote, "v1", files["base.img"], files["more.qcow2"])
    out = tmp_path / "out"
    out.mkdir()
    (out / "base.img.part").write_bytes(BASE[:1234])
    (out / "more.qcow2").write_bytes(MORE)
    pulled = await templates.pull_template(remote, "mac", out)
    assert (out / "base.img").read_bytes() == BASE
    assert (pulled.moved_bytes, pulled.skipped_bytes) == (len(BASE), len(MORE))
    assert sorted(path.name for path in out.iterdir()) == ["base.img", "more.qcow2", templates.CONFIG_FILE]


async def test_a_damaged_partial_file_is_found_out_and_fetched_anew(
    remote: client.Registry, files: Mapping[str, Path], tmp_path: Path
) -> None:
    await push(remote, "v1", files["base.img"])
    out = tmp_path / "out"
    out.mkdir()
    (out / "base.img.part").write_bytes(b"damaged")
    await templates.pull_template(remote, "mac", out)
    assert (out / "base.img").read_bytes() == BASE
    assert sorted(path.name for path in out.iterdir()) == ["base.img", templates.CONFIG_FILE]


async def test_a_blob_that_rotted_on_the_server_is_never_shown(
    remote: client.Registry, files: Mapping[str, Path], tmp_path: Path
) -> None:
    await push(remote, "v1", files["base.img"])
    (stored,) = (tmp_path / "base" / "blobs").glob(f"*/*/{oci.digest_of(BASE)[7:]}")
    stored.chmod(0o644)
    stored.write_bytes(b"X" + BASE[1:])
    with pytest.raises(errors.RemoteError, match="the registry sent sha256"):
        await templates.pull_template(remote, "mac", tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


async def test_titles_that_are_no_plain_names_get_others() -> None:
    digest = "sha256:" + "ab" * 32
    titles = ["x", "x", "../../etc/passwd", "/etc/passwd", "", "..", "a\0b", "x" * 300, "y.part", "template.json"]
    layers = [oci.Layer(digest=digest, size=1, kind="t", title=title, blob=digest, blob_size=1) for title in titles]
    assert templates.file_names(layers) == ["x"] + [f"{index}-abababababab" for index in range(1, len(titles))]


async def test_progress_is_told(remote: client.Registry, files: Mapping[str, Path], tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    await push(remote, "v1", files["base.img"], progress=lambda *step: seen.append(step))
    assert seen[-1] == ("base.img", len(BASE), len(BASE))
    seen.clear()
    await templates.pull_template(remote, "mac", tmp_path / "out", progress=lambda *step: seen.append(step))
    assert seen[-1] == ("base.img", len(BASE), len(BASE))


async def test_what_cannot_be_pushed(remote: client.Registry, files: Mapping[str, Path], tmp_path: Path) -> None:
    with pytest.raises(errors.Refused, match="cannot read"):
        await push(remote, "v1", tmp_path / "nope")
    with pytest.raises(errors.Refused, match="at least one disk layer"):
        await push(remote, "v1")
    with pytest.raises(errors.Refused, match="tag needs a name"):
        await push(remote, "", files["base.img"])
    for name in ("", " ", UUID, "x" * 256, "a\nb"):
        with pytest.raises(errors.Refused, match="printable characters"):
            await push(remote, "v1", files["base.img"], name=name)
    assert await remote.templates() == []


@pytest.mark.usefixtures("disarm")
async def test_a_full_disk_is_said_and_nothing_shows(remote: client.Registry, files: Mapping[str, Path]) -> None:
    failpoint.arm("registry.part.write=full")
    with pytest.raises(errors.RemoteError, match="disk is full"):
        await push(remote, "v1", files["base.img"])
    failpoint.arm("")
    assert await remote.templates() == []
    assert (await push(remote, "v1", files["base.img"])).version == 0


# ---- views ---------------------------------------------------------------------------------------------------------


async def test_an_empty_registry_lists_nothing(server: registry.Server) -> None:
    assert await view(server, "/registry/vm") == []
    assert await view(server, "/registry/v2/vm") == []


async def test_the_views_of_a_template(
    server: registry.Server, remote: client.Registry, files: Mapping[str, Path], tmp_path: Path
) -> None:
    first = await push(remote, "v1", files["base.img"])
    await push(remote, TAG, files["base.img"], files["more.qcow2"], description="second")
    assert await view(server, "/registry/vm") == [{first.template: "mac"}]
    (item,) = await view(server, "/registry/v2/vm")
    whole = await view(server, f"/registry/v2/vm?id={first.template}")
    assert await view(server, f"/registry/vm?id={first.template}") == whole
    assert {**item, "versions": whole["versions"]} == whole
    assert (item["name"], item["arch"], item["last_pull"]) == ("mac", "amd64", 0)
    assert item["size"] > len(BASE) + len(MORE)
    assert item["size"] < 2 * len(BASE)
    assert item["last_push"] >= item["creation_date"] > 1_700_000_000
    assert [(v["number"], v["tag"], v["images"]) for v in whole["versions"]] == [
        (0, "v1", ["base.img"]),
        (1, TAG, ["base.img", "more.qcow2"]),
    ]
    assert [v["description"] for v in whole["versions"]] == ["", "second"]
    await templates.pull_template(remote, "mac", tmp_path / "out")
    assert (await view(server, f"/registry/vm?id={first.template}"))["last_pull"] > 1_700_000_000


async def test_one_version_by_tag_by_number_and_the_newest(
    server: registry.Server, remote: client.Registry, files: Mapping[str, Path]
) -> None:
    first = await push(remote, "v1", files["base.img"])
    second = await push(remote, TAG, files["more.qcow2"])
    for wanted in (first.template, "mac"):
        assert (await remote.resolve(wanted)).digest == second.digest
        assert (await remote.resolve(wanted, "v1")).digest == first.digest
        assert (await remote.resolve(wanted, TAG)).number == 1
        assert (await remote.resolve(wanted, version=0)).tag == "v1"
        assert (await remote.resolve(wanted, "v1", 0)).digest == first.digest
    whole = await view(server, f"/registry/vm/info?id={first.template}&version=1")
    assert (whole["id"], whole["name"], whole["tag"], whole["arch"]) == (first.template, "mac", TAG, "amd64")


@pytest.mark.parametrize(
    ("vm", "size"),
    [
        ({"vcpu": 3, "ram_mb": 1536}, (3, 1536)),
        ({}, (0, 0)),
        ({"vcpu": "3", "ram_mb": True}, (0, 0)),
        ({"vcpu": -1, "ram_mb": 10**30}, (0, 0)),
    ],
)
async def test_a_version_tells_the_size_of_its_vms(
    server: registry.Server, remote: client.Registry, files: Mapping[str, Path], vm: dict[str, Any], size: object
) -> None:
    """A start that gives none counts with it, on what the registry itself answers."""
    pushed = await push(remote, "v1", files["base.img"], vm=vm)
    found = await remote.resolve(pushed.template)
    assert (found.vcpu, found.ram_mb) == size
    (version,) = (await remote.template(pushed.template)).versions
    assert (version.vcpu, version.ram_mb) == size
    spec = start_request.spec(start_request.StartRequest(vmid=pushed.template), found, "")
    assert (spec.vcpu, spec.vram_mb) == size
    given = start_request.spec(start_request.StartRequest(vmid=pushed.template, vcpu=1, vram=99), found, "")
    assert (given.vcpu, given.vram_mb) == (1, 99)


async def test_what_does_not_resolve(remote: client.Registry, files: Mapping[str, Path]) -> None:
    await push(remote, "v1", files["base.img"])
    with pytest.raises(errors.Refused, match=r"^No such tag nope$"):
        await remote.resolve("mac", "nope")
    with pytest.raises(errors.Refused, match=r"^No such version 7$"):
        await remote.resolve("mac", version=7)
    with pytest.raises(errors.Refused, match="tag v1 is version 0, not 3"):
        await remote.resolve("mac", "v1", 3)
    for unknown in (UUID, "win", "..", "../mac"):
        with pytest.raises(errors.NotFound, match=r"^Not found$"):
            await remote.resolve(unknown)
        with pytest.raises(errors.NotFound):
            await remote.template(unknown)


async def test_a_registry_that_is_away_is_no_unknown_tag(remote: client.Registry, server: registry.Server) -> None:
    async with registry.talking(registry.Server(1, None)) as away:  # type: ignore[arg-type]  # no call is made by it
        with pytest.raises(errors.RemoteError):
            await away.resolve("mac", "v1")


async def test_disk_and_health(server: registry.Server) -> None:
    disk = await view(server, "/registry/disk")
    assert 0 < disk["free"] <= disk["total"]
    assert all(type(number) is int for number in disk.values())
    assert (await view(server, "/registry/status"))["status"] == "Running"
    assert (await view(server, "/readyz"))["trouble"] == ""
    assert (await server.call("GET", "/livez"))[0] == 200


async def test_unknown_paths_and_methods_are_enveloped(server: registry.Server) -> None:
    for method, path, wanted in (("GET", "/registry/x", 404), ("POST", "/registry/disk", 405), ("GET", "/", 404)):
        status, _, content = await server.call(method, path)
        assert (status, json.loads(content)["status"]) == (wanted, "FAIL")


async def test_a_deleted_template_is_gone_and_its_name_is_free(
    server: registry.Server, remote: client.Registry, files: Mapping[str, Path]
) -> None:
    first = await push(remote, "v1", files["base.img"])
    await remote.delete_manifest(oci.repository_of(first.template), "v1")
    assert await view(server, "/registry/vm") == []
    with pytest.raises(errors.NotFound):
        await remote.resolve("mac")
    second = await push(remote, "v1", files["base.img"])
    assert (second.template != first.template, second.version) == (True, 0)
    assert (await remote.resolve("mac")).id == second.template


async def command(
    server: registry.Server, path: str, body: object = None, method: str = "DELETE", **headers: str
) -> str:
    """A command in the envelope: the message, "" when it was done."""
    content = None if body is None else json.dumps(body).encode()
    status, _, answer = await server.call(method, path, content, **headers)
    assert status == 200, answer
    return str(json.loads(answer)["message"])


@pytest.mark.parametrize(
    ("query", "body", "left"),
    [
        ("", None, [0, 1]),
        ("", {"tag": "v1"}, [0]),
        ("", {"version": 1}, [0]),
        ("", {"number": 1}, [0]),
        ("", {"version": "0"}, []),
        ("", {"tag": "v0"}, []),
        ("&number=1", None, [0]),
        ("&version=1", {}, [0]),
        ("&tag=v1", {"version": 1}, [0]),
    ],
)
async def test_revert_takes_a_version_and_all_newer_ones(
    server: registry.Server,
    remote: client.Registry,
    files: Mapping[str, Path],
    query: str,
    body: object,
    left: list[int],
) -> None:
    for number in range(3):
        template = (await push(remote, f"v{number}", files["base.img"])).template
    assert await command(server, f"/registry/revert?id={template}{query}", body) == ""
    listed = await remote.templates()
    assert [item.id for item in listed] == ([template] if left else [])
    if left:
        assert [version.number for version in (await remote.template("mac")).versions] == left
        assert (await push(remote, "v9", files["base.img"])).version == 3


async def test_a_template_is_deleted_whole_and_only_once(
    server: registry.Server, remote: client.Registry, files: Mapping[str, Path]
) -> None:
    await push(remote, "v0", files["base.img"])
    template = (await push(remote, "v1", files["more.qcow2"])).template
    for _ in range(2):  # a repeat whose answer was lost
        assert await command(server, f"/registry/vm?id={template}") == ""
        assert await remote.templates() == []
    assert await command(server, f"/registry/vm?id={UUID}") == "Not found"
    assert await command(server, f"/registry/revert?id={template}", {"tag": "v0"}) == ""
    assert await command(server, f"/registry/revert?id={template}", {"tag": "v9"}) == "No such tag v9"


async def test_a_repeated_revert_takes_nothing_more(
    server: registry.Server, remote: client.Registry, files: Mapping[str, Path]
) -> None:
    """By an Idempotency-Key, by number, by tag; the client settles first what "the newest" is."""
    for number in range(5):
        template = (await push(remote, f"v{number}", files["base.img"])).template
    path = f"/registry/revert?id={template}"
    for _ in range(2):
        assert await command(server, path, Idempotency_Key="k") == ""
        assert await command(server, path, {"tag": "v3"}) == ""
    assert [version.number for version in (await remote.template("mac")).versions] == [0, 1, 2]
    assert "another request" in await command(server, path, {"version": 0}, Idempotency_Key="k")
    assert (await remote.revert("mac")).number == 2
    assert [version.number for version in (await remote.template("mac")).versions] == [0, 1]
    assert (await remote.revert("mac", version=0)).tag == "v0"
    assert await remote.templates() == []
    assert await command(server, path, Idempotency_Key="k") == ""


async def test_a_further_tag_moves_no_layer(
    server: registry.Server, remote: client.Registry, files: Mapping[str, Path]
) -> None:
    first = await push(remote, "v0", files["base.img"], description="kept")
    await push(remote, "v1", files["more.qcow2"])
    for _ in range(2):
        tagged = await templates.tag_template(remote, "mac", TAG, tag="v0")
        assert (tagged.number, tagged.tag, tagged.description, tagged.images) == (2, TAG, "kept", ["base.img"])
    assert tagged.digest != first.digest
    with pytest.raises(errors.Refused, match="exists"):
        await templates.tag_template(remote, "mac", "v1", version=0)


async def test_what_cannot_be_reverted(
    server: registry.Server, remote: client.Registry, files: Mapping[str, Path]
) -> None:
    template = (await push(remote, "v0", files["base.img"])).template
    path = f"/registry/revert?id={template}"
    assert await command(server, path, {"tag": "nope"}) == "No such tag nope"
    assert await command(server, path, {"version": 5}) == "No such version 5"
    assert await command(server, path + "&version=-1") == "No such version -1"
    assert await command(server, path + "&tag=v0", {"version": 3}) == "tag v0 is version 0, not 3"
    assert "version: given as 0 and as 1" in await command(server, path + "&number=1", {"version": 0})
    assert await command(server, "/registry/revert") == "Not found"
    assert len((await remote.template("mac")).versions) == 1


async def test_an_architecture_is_corrected_and_stays_so(
    server: registry.Server, remote: client.Registry, files: Mapping[str, Path], tmp_path: Path
) -> None:
    template = (await push(remote, "v0", files["base.img"])).template
    for _ in range(2):
        assert await command(server, "/registry/vm/arch", {"id": template, "arch": "arm64"}, "PUT") == ""
    async with registry.serving(tmp_path / "base") as other, registry.talking(other) as again:
        assert (await again.resolve("mac")).arch == "arm64"
        ((item,), whole) = await again.templates(), await again.template("mac")
        assert (item.arch, whole.versions[0].arch) == ("arm64", "arm64")
    assert await command(server, "/registry/vm/arch", {"id": UUID, "arch": "arm64"}, "PUT") == "Not found"
    status, _, answer = await server.call("PUT", "/registry/vm/arch", b'{"id": "mac", "arch": "mips"}')
    assert (status, "arch: invalid enum value" in json.loads(answer)["message"]) == (400, True)


async def test_a_new_name_pushed_twice_at_once_is_one_template(
    remote: client.Registry, files: Mapping[str, Path]
) -> None:
    pushed = await asyncio.gather(*(push(remote, f"v{number}", files["base.img"]) for number in range(5)))
    assert len({one.template for one in pushed}) == 1
    assert sorted(one.version for one in pushed) == [0, 1, 2, 3, 4]


# ---- manifests that claim to be templates --------------------------------------------------------------------------


async def offer(
    server: registry.Server, repository: str = REPOSITORY, reference: str = "v1", *, config: bytes = b"", **change: Any
) -> tuple[int, str]:
    """Push a template's manifest by hand, with changes: status and message."""
    config = config or registry.template_config()
    for blob in (config, BASE):
        await server.push_blob(repository, blob)
    manifest = json.loads(registry.template_manifest(config, BASE, name="mac", tag="v1"))
    manifest.update(change)
    status, _, body = await server.put_manifest(repository, reference, json.dumps(manifest).encode())
    return status, "" if status == 201 else json.loads(body)["errors"][0]["message"]


async def test_a_template_pushed_by_any_oci_tool_shows(server: registry.Server) -> None:
    assert await offer(server) == (201, "")
    assert await view(server, "/registry/vm") == [{UUID: "mac"}]


async def test_a_plain_image_in_a_template_s_place_does_not_show(server: registry.Server) -> None:
    await server.push_image(REPOSITORY, "v1", BASE)
    await server.push_image("other/image", "v1", BASE)
    assert await view(server, "/registry/v2/vm") == []


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"repository": "elsewhere"}, "templates/<uuid>"),
        ({"repository": "templates/not-a-uuid"}, "templates/<uuid>"),
        ({"annotations": {}}, "needs the annotations"),
        ({"annotations": {oci.NAME: "mac"}}, "needs the annotations"),
        ({"annotations": {oci.NAME: "mac", oci.TAG: "v2"}}, "is spelled 'v2' in OCI, not 'v1'"),
        ({"annotations": {oci.NAME: UUID, oci.TAG: "v1"}}, "not a UUID"),
        ({"config": b"[]"}, "config is not right"),
        ({"config": b'{"arch": "x86_64"}'}, "config is not right"),
        ({"config": b"{}"}, "config is not right"),
        ({"config": b" " * (oci.CONFIG_LIMIT + 1)}, "at most"),
    ],
)
async def test_a_template_s_manifest_that_is_not_right(
    server: registry.Server, change: dict[str, Any], complaint: str
) -> None:
    status, message = await offer(server, **change)
    assert (status, complaint in message) == (400, True), message
    assert await view(server, "/registry/vm") == []


async def test_a_name_that_another_template_holds(server: registry.Server) -> None:
    other = "87654321-1234-1234-1234-123456789abc"
    assert await offer(server) == (201, "")
    status, message = await offer(server, f"templates/{other}")
    assert (status, UUID in message) == (409, True)
    assert await view(server, "/registry/vm") == [{UUID: "mac"}]


async def test_a_refused_push_holds_no_name(server: registry.Server, remote: client.Registry) -> None:
    await offer(server)
    annotations = {oci.NAME: "renamed", oci.TAG: "v2"}
    assert (await offer(server, reference="v2", annotations=annotations))[0] == 409
    assert await remote.hold_name("renamed") != UUID
