"""The registry that the specification's workflows are tried on: one per test, of each kind of storage.

`COVEY_CONFORMANCE_URL=http://host:port pytest tests/conformance` tries them on a registry that runs already; tests that
look into a registry's folder, or need one of their own, start theirs all the same.
"""

import contextlib
import os
import secrets
import urllib.parse
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import aiohttp
import pytest

from tests.conformance import workflow
from tests.support import registry

Start = Callable[[Path], contextlib.AbstractAsyncContextManager[registry.Server]]

BACKENDS: dict[str, Start] = {"disk": registry.serving}
RUNNING = os.environ.get("COVEY_CONFORMANCE_URL", "")


@pytest.fixture(params=["running"] if RUNNING else list(BACKENDS))
async def registry_url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """Where a registry listens."""
    if RUNNING:
        yield RUNNING
        return
    async with BACKENDS[request.param](tmp_path) as server:
        yield server.url


@pytest.fixture
async def server(registry_url: str) -> AsyncIterator[registry.Server]:
    async with aiohttp.ClientSession() as session:
        yield registry.Server(urllib.parse.urlsplit(registry_url).port or 80, session, registry_url)


@pytest.fixture
def repo(server: registry.Server) -> workflow.Repo:
    """A repository that nobody has used."""
    return workflow.Repo(server, f"conformance/{secrets.token_hex(6)}")


@pytest.fixture
def other(server: registry.Server) -> workflow.Repo:
    """Another one of the same registry."""
    return workflow.Repo(server, f"conformance/{secrets.token_hex(6)}")
