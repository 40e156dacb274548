"""Uploads that go on: after a restart, after a kill, and at another server of the same storage (safety S31)."""

import itertools
import signal
from pathlib import Path

from covey.client import oci
from tests.conformance import conftest, workflow
from tests.support import registry

LAYER = bytes(range(256)) * 1000
DIGEST = oci.digest_of(LAYER)
SIZE = len(LAYER)
CUTS = (0, 1000, 1001, 100_000, SIZE)


async def send(repo: workflow.Repo, location: str, first: int, end: int) -> None:
    """One chunk, after the server has said that it belongs here."""
    status, headers, _ = await repo.call("GET", location)
    assert (status, headers[oci.OFFSET_HEADER]) == (204, str(first))
    status, headers, _ = await repo.call("PATCH", location, LAYER[first:end], Content_Range=f"{first}-{end - 1}")
    assert (status, headers["Range"]) == (202, f"0-{end - 1}")


async def test_a_session_survives_restarts(start: conftest.Start, tmp_path: Path) -> None:
    location = ""
    for first, end in itertools.pairwise(CUTS):
        async with start(tmp_path) as server:
            repo = workflow.Repo(server, "a/b")
            location = location or await repo.begin()
            await send(repo, location, first, end)
    async with start(tmp_path) as server:
        repo = workflow.Repo(server, "a/b")
        assert (await repo.call("PUT", f"{location}?digest={DIGEST}"))[0] == 201
        assert await repo.blob(DIGEST) == LAYER


async def test_a_session_goes_on_at_another_server_of_the_storage(start: conftest.Start, tmp_path: Path) -> None:
    async with start(tmp_path) as one, start(tmp_path) as two:
        repos = [workflow.Repo(server, "a/b") for server in (one, two)]
        location = await repos[0].begin()
        for turn, (first, end) in enumerate(itertools.pairwise(CUTS)):
            await send(repos[turn % 2], location, first, end)
        last = repos[len(CUTS) % 2]
        assert (await last.call("PATCH", location, LAYER[:10], Content_Range="0-9"))[0] == 416
        assert (await last.call("PUT", f"{location}?digest={DIGEST}"))[0] == 201
        for repo in repos:
            assert await repo.blob(DIGEST) == LAYER


async def test_a_session_survives_a_kill(tmp_path: Path) -> None:
    async with registry.process(tmp_path) as server:
        repo = workflow.Repo(server, "a/b")
        location = await repo.begin()
        await send(repo, location, 0, 100_000)
        server.send(signal.SIGKILL)
        await server.ended()
    async with registry.serving(tmp_path) as server_again:
        repo = workflow.Repo(server_again, "a/b")
        await send(repo, location, 100_000, SIZE)
        assert (await repo.call("PUT", f"{location}?digest={DIGEST}"))[0] == 201
        assert await repo.blob(DIGEST) == LAYER
