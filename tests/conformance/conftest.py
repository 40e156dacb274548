"""The registry that the specification's workflows are tried on: one per test, of each kind of storage.

`COVEY_CONFORMANCE_URL=http://host:port pytest tests/conformance` tries them on a registry that runs already; tests that
look into a registry's folder, or need one of their own, start theirs all the same.
"""

import contextlib
import os
import secrets
import urllib.parse
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.conformance import workflow
from tests.support import registry, s3

Start = Callable[[Path], contextlib.AbstractAsyncContextManager[registry.Server]]
BACKENDS = ("disk", "s3")
RUNNING = os.environ.get("COVEY_CONFORMANCE_URL", "")


@pytest.fixture(scope="session")
def s3_server() -> Iterator[s3.Server]:
    with s3.running() as server:
        yield server


@pytest.fixture(params=BACKENDS)
def start(request: pytest.FixtureRequest, s3_server: s3.Server) -> Start:
    """Starts a registry in this process; two on one folder work on one storage."""
    if request.param == "disk":
        return registry.serving

    def in_bucket(base: Path) -> contextlib.AbstractAsyncContextManager[registry.Server]:
        bucket = s3_server.bucket_of(str(base))
        return registry.serving(base, bucket=s3_server.config(bucket), environ=s3_server.environ)

    return in_bucket


@pytest.fixture(params=["running"] if RUNNING else BACKENDS)
async def registry_url(request: pytest.FixtureRequest, tmp_path: Path, s3_server: s3.Server) -> AsyncIterator[str]:
    """Where a registry listens."""
    if RUNNING:
        yield RUNNING
        return
    more: dict[str, Any] = {}
    if request.param == "s3":
        more = {"bucket": s3_server.config(s3_server.fresh_bucket()), "environ": s3_server.environ}
    async with registry.serving(tmp_path, **more) as server:
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
