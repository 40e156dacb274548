"""/api/v1/registry/…: templates and disk space as the registry has them now (docs/reference/api.md)."""

from collections.abc import Sequence

import msgspec

from covey import serve
from covey.client import oci
from covey.controller import templates

_TARGET = ("id", "tag", "version", "number", "digest")


class RegistryApi:
    def __init__(self, templates: templates.Templates) -> None:
        self._templates = templates

    def routes(self) -> Sequence[serve.Route]:
        return [
            serve.Route("GET", "/api/v1/registry/vm", self.get),
            serve.Route("DELETE", "/api/v1/registry/vm", self.delete),
            serve.Route("DELETE", "/api/v1/registry/revert", self.revert),
            serve.Route("GET", "/api/v1/registry/disk", self.disk),
        ]

    async def get(self, call: serve.Call) -> object:
        """The list, the same whatever `apiVer` says; or one template, by id only."""
        id = call.query.get("id")
        return await self._templates.list() if id is None else await self._templates.one(id)

    async def delete(self, call: serve.Call) -> None:
        """A whole template. OK when repeated."""
        await self._templates.delete(call.query.get("id", ""))

    async def revert(self, call: serve.Call) -> None:
        """What it aims at stands in the query or in the body; the registry reads both."""
        body = msgspec.structs.asdict(serve.parse(await call.read() or b"{}", oci.RevertAsk))
        query = {name: text for name, text in call.query.items() if name in _TARGET and text}
        await self._templates.revert(query, body, call.headers.get("Idempotency-Key", ""))

    async def disk(self, _call: serve.Call) -> oci.DiskView:
        return await self._templates.disk()
