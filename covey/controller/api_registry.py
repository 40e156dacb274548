"""/api/v1/registry/…: templates and disk space as the registry has them now (docs/reference/api.md)."""

from collections.abc import Sequence

from covey import serve
from covey.client import oci
from covey.controller import templates


class RegistryApi:
    def __init__(self, templates: templates.Templates) -> None:
        self._templates = templates

    def routes(self) -> Sequence[serve.Route]:
        return [
            serve.Route("GET", "/api/v1/registry/vm", self.get),
            serve.Route("GET", "/api/v1/registry/disk", self.disk),
        ]

    async def get(self, call: serve.Call) -> object:
        """The list, the same whatever `apiVer` says; or one template, by id only."""
        id = call.query.get("id")
        return await self._templates.list() if id is None else await self._templates.one(id)

    async def disk(self, _call: serve.Call) -> oci.DiskView:
        return await self._templates.disk()
