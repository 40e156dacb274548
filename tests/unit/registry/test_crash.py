"""kill -9 at each step of a push: the old tag or the new one, never a mixture, and the push can be repeated (I8)."""

import signal
from pathlib import Path

import pytest

from covey import errors, model
from covey.client import oci, templates
from covey.client import registry as client
from tests.support import registry

OLD = b"old layer " * 50_000
NEW = b"new layer " * 60_000
STEPS = [
    "registry.part.write",
    "registry.part.written",
    "registry.part.entered",
    "registry.blob.linked",
    "registry.blob.granted",
    "registry.put.written",
    "registry.manifest.stored",
    "registry.entry.written",
    "registry.entry.linked",
]


async def push(remote: client.Registry, path: Path, *, force: bool = False, name: str = "mac") -> templates.Pushed:
    return await templates.push_template(remote, name, "v1", [path], arch=model.Arch.AMD64, force=force)


@pytest.fixture
def old(tmp_path: Path) -> Path:
    (tmp_path / "old").write_bytes(OLD)
    return tmp_path / "old"


@pytest.fixture
def new(tmp_path: Path) -> Path:
    (tmp_path / "new").write_bytes(NEW)
    return tmp_path / "new"


@pytest.mark.parametrize("step", STEPS)
async def test_killed_while_a_tag_is_replaced(tmp_path: Path, old: Path, new: Path, step: str) -> None:
    base = tmp_path / "base"
    async with registry.serving(base) as server, registry.talking(server) as remote:
        first = await push(remote, old)
    process = registry.process(base, failpoints=f"{step}=kill")
    async with process as dying, registry.talking(dying, patience_s=0.2) as remote:
        with pytest.raises(errors.RemoteError):
            await push(remote, new, force=True)
        assert await dying.ended() == -signal.SIGKILL
    async with registry.serving(base) as server, registry.talking(server) as remote:
        standing = await remote.resolve("mac", "v1")
        pulled = await templates.pull_template(remote, "mac", tmp_path / "out", tag="v1")
        content = pulled.files[0].read_bytes()
        if step == "registry.entry.linked":
            assert (standing.number, content) == (1, NEW)
        else:
            assert (standing.digest, standing.number, content) == (first.digest, 0, OLD)
        again = await push(remote, new, force=True)
        assert again.version == 1
        assert (await remote.resolve("mac")).digest == again.digest


@pytest.mark.parametrize("step", [*STEPS, "registry.name.claimed"])
async def test_killed_while_a_template_is_made(tmp_path: Path, new: Path, step: str) -> None:
    base = tmp_path / "base"
    process = registry.process(base, failpoints=f"{step}=kill")
    async with process as dying, registry.talking(dying, patience_s=0.2) as remote:
        with pytest.raises(errors.RemoteError):
            await push(remote, new)
        assert await dying.ended() == -signal.SIGKILL
    async with registry.serving(base) as server, registry.talking(server) as remote:
        assert [item.name for item in await remote.templates()] in ([], ["mac"])
        again = await push(remote, new)
        assert again.version == 0
        assert [item.id for item in await remote.templates()] == [again.template]
        assert await remote.content(oci.repository_of(again.template), oci.digest_of(NEW)) == NEW


async def test_killed_while_parts_are_joined(tmp_path: Path) -> None:
    base = tmp_path / "base"
    async with registry.process(base, failpoints="registry.upload.joined=kill") as dying:
        _, headers, _ = await dying.call("POST", "/v2/a/blobs/uploads/")
        location = headers["Location"]
        await dying.call("PATCH", location, NEW[:1000])
        await dying.call("PATCH", location, NEW[1000:])
        with pytest.raises(OSError):
            await dying.call("PUT", f"{location}?digest={oci.digest_of(NEW)}")
        assert await dying.ended() == -signal.SIGKILL
    async with registry.serving(base) as other:
        assert (await other.call("HEAD", f"/v2/a/blobs/{oci.digest_of(NEW)}"))[0] == 404
        assert (await other.call("GET", location))[1][oci.OFFSET_HEADER] == str(len(NEW))
        assert (await other.call("PUT", f"{location}?digest={oci.digest_of(NEW)}"))[0] == 201
        assert (await other.call("GET", f"/v2/a/blobs/{oci.digest_of(NEW)}"))[2] == NEW
    assert list((base / "uploads").iterdir()) == []
