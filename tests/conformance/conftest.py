"""One registry per test of the distribution specification's workflows."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support import registry


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[registry.Server]:
    async with registry.serving(tmp_path) as server:
        yield server
