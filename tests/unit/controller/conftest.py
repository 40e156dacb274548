"""A line per request would bury what a failing test has to say."""

import pytest

from covey import observe


@pytest.fixture(autouse=True, scope="session")
def quiet_logs() -> None:
    observe.configure(json=False, level="info")
