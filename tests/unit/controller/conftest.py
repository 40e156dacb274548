"""One controller or two, ready to be asked. A line per request would bury what a failing test has to say."""

from collections.abc import AsyncIterator

import pytest

from covey import observe
from tests.unit.controller import cloud


@pytest.fixture(autouse=True, scope="session")
def quiet_logs() -> None:
    observe.configure(json=False, level="info")


@pytest.fixture
async def house() -> AsyncIterator[cloud.Cloud]:
    async with cloud.running() as one:
        yield one


@pytest.fixture
async def pair() -> AsyncIterator[cloud.Cloud]:
    async with cloud.running(2) as two:
        yield two
