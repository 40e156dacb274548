"""A controller's /api/v1/registry/… before a real registry: lists, deletes, reverts."""

import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from covey import model, server, world
from covey.client import registry as client
from covey.client import templates
from covey.controller import api_registry
from covey.controller import templates as controller_templates
from tests.support import registry
from tests.unit.controller import strict

UUID = "12345678-1234-1234-1234-123456789abc"


class House:
    """A registry with the template "mac" in versions 0 to 3, and a controller's paths to it."""

    def __init__(self, remote: client.Registry, proxy: registry.Server, template: str) -> None:
        self.remote = remote
        self.proxy = proxy
        self.template = template

    async def ask(self, method: str, path: str, body: object = None, **headers: str) -> Any:
        content = None if body is None else json.dumps(body).encode()
        status, _, answer = await self.proxy.call(method, "/api/v1/registry/" + path, content, **headers)
        return status, json.loads(answer)

    async def done(self, path: str, body: object = None, **headers: str) -> str:
        status, answer = await self.ask("DELETE", path, body, **headers)
        assert status == 200, answer
        return str(answer["message"])

    async def versions(self) -> list[int]:
        return [version.number for version in (await self.remote.template("mac")).versions]


@pytest.fixture
async def house(tmp_path: Path) -> AsyncIterator[House]:
    layer = tmp_path / "base.img"
    layer.write_bytes(b"base")
    async with registry.serving(tmp_path / "base") as serving, registry.talking(serving) as remote:
        for number in range(4):
            pushed = await templates.push_template(remote, "mac", f"v{number}", [layer], arch=model.Arch.AMD64)
        asked = controller_templates.Templates([serving.url])
        front = server.Server(api_registry.RegistryApi(asked).routes(), world=world.System())
        await front.start("127.0.0.1", 0)
        async with aiohttp.ClientSession() as session:
            yield House(remote, registry.Server(front.port, session), pushed.template)
        await front.drain(0)
        await asked.close()


async def test_lists_and_disk(house: House) -> None:
    for query in ("", "?apiVer=v1"):
        strict.check_templates((await house.ask("GET", "vm" + query))[1]["body"])
    strict.check_template((await house.ask("GET", f"vm?id={house.template}"))[1]["body"])
    strict.check_disk((await house.ask("GET", "disk"))[1]["body"])
    assert (await house.ask("GET", f"vm?id={UUID}"))[1]["message"] == "Not found"


@pytest.mark.parametrize(
    ("query", "body", "left"),
    [
        ("", None, [0, 1, 2]),
        ("&tag=v1", None, [0]),
        ("&number=2", None, [0, 1]),
        ("&version=2", None, [0, 1]),
        ("", {"tag": "v2"}, [0, 1]),
        ("", {"version": 3}, [0, 1, 2]),
    ],
)
async def test_revert(house: House, query: str, body: object, left: list[int]) -> None:
    assert await house.done(f"revert?id={house.template}{query}", body) == ""
    assert await house.versions() == left


async def test_reverts_are_repeated_under_a_key(house: House) -> None:
    for _ in range(2):
        assert await house.done(f"revert?id={house.template}", Idempotency_Key="one") == ""
    assert await house.versions() == [0, 1, 2]
    assert await house.done(f"revert?id={house.template}", {"tag": "nope"}) == "No such tag nope"
    status, answer = await house.ask("DELETE", f"revert?id={house.template}", {"version": []})
    assert (status, answer["message"].startswith("version: ")) == (400, True)


async def test_delete(house: House) -> None:
    for _ in range(2):
        assert await house.done(f"vm?id={house.template}") == ""
    assert await house.remote.templates() == []
    assert await house.done(f"vm?id={UUID}") == "Not found"
