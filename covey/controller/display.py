"""What the views show beside the nouns, gathered for one snapshot: presence of nodes, reasons for waiting, names."""

import functools
from collections.abc import Callable
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

    def of(self, snapshot: view.Snapshot) -> views.Shown:
        return views.Shown(
            online=lambda node: self._presence.present(snapshot, node, self._spans.node_s),
            talking=lambda node: self._presence.present(snapshot, node, self._spans.instance_s),
            why_waiting=functools.partial(self._why_waiting, snapshot),
            tags=self._templates.known,
            registry=self._registry,
        )
