"""What the views show beside the nouns, gathered for one snapshot: presence of nodes, reasons for waiting, names."""

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

from covey import model
from covey.controller import presence, templates, views
from covey.store import view

WhyWaiting = Callable[[view.Snapshot, model.InstanceId], str]


class Spans(NamedTuple):
    """NODE_ACTIVE_TIMEOUT and INSTANCE_ACTIVE_TIMEOUT."""

    node_s: float
    instance_s: float


class Display:
    def __init__(
        self,
        presence: presence.Presence,
        templates: templates.Templates,
        why_waiting: WhyWaiting,
        spans: Spans,
        registry: str,
    ) -> None:
        self._presence = presence
        self._templates = templates
        self._why_waiting = why_waiting
        self._spans = spans
        self._registry = registry
        self._turn = asyncio.Lock()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """While a large answer is made. Many who asked at the same moment are woken in one turn of the event loop: if
        their answers were all made in it, it would last so long that this process took itself for frozen (safety
        S24). So each has a turn of its own."""
        async with self._turn:
            await asyncio.sleep(0)
            yield

    def of(self, snapshot: view.Snapshot) -> views.Shown:
        return views.Shown(
            online=lambda node: self._presence.present(snapshot, node, self._spans.node_s),
            talking=lambda node: self._presence.present(snapshot, node, self._spans.instance_s),
            why_waiting=functools.partial(self._why_waiting, snapshot),
            tags=self._templates.known,
            registry=self._registry,
        )
