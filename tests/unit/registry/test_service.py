"""A registry that cannot start says why in one sentence."""

from pathlib import Path

import pytest

from covey import errors, world
from covey.registry import service
from tests.support import registry


async def test_a_taken_port(tmp_path: Path) -> None:
    async with registry.serving(tmp_path) as server:
        other = service.Registry(service.Config(base_path=tmp_path, port=server.port), world.System())
        with pytest.raises(errors.SettingError, match=f"{server.port} is taken"):
            await other.start()
        await other.stop()


def test_a_base_path_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(errors.SettingError, match="cannot hold a registry: "):
        service.Registry(service.Config(base_path=tmp_path / "file"), world.System())


async def test_a_storage_of_a_newer_format(tmp_path: Path) -> None:
    async with registry.serving(tmp_path):
        pass
    (tmp_path / "format").chmod(0o644)
    (tmp_path / "format").write_text("2")
    with pytest.raises(errors.SettingError, match="has format 2, this server knows 1"):
        service.Registry(service.Config(base_path=tmp_path), world.System())


async def test_what_was_pushed_is_there_after_a_restart(tmp_path: Path) -> None:
    async with registry.serving(tmp_path) as server:
        digest, manifest = await server.push_image("a/b", "v1", b"layer")
    async with registry.serving(tmp_path) as server:
        assert (await server.call("GET", "/v2/a/b/manifests/v1"))[2] == manifest
        assert (await server.call("GET", f"/v2/a/b/manifests/{digest}"))[2] == manifest
