"""QEMU keeps what every hypervisor promises, on real guests."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from covey.agent import hypervisor
from tests.contract import hypervisor_suite
from tests.support import guest


class Place:
    lasting = True

    def __init__(self, host: guest.Host) -> None:
        self._host = host

    def driver(self) -> contextlib.AbstractAsyncContextManager[hypervisor.Hypervisor]:
        return self._host.hypervisor()

    def plan(self, **spec: Any) -> hypervisor.Plan:
        return self._host.plan(**spec)


class TestQemu(hypervisor_suite.Contract):
    @pytest.fixture
    def place(self) -> Iterator[Place]:
        with guest.host() as host:
            yield Place(host)
