"""What the controller asks of a registry: which manifest a tag is now, the lists, the room on its disk.

A start is pinned to a manifest digest when it is accepted (safety S14), on a fresh answer of a registry. Two texts are
compared by clients: ``VM not in the registry`` and ``No such tag <tag>``; they are only given when a registry said so.
When none can say, what was started before is started as it was then (`pins`), and all else is refused with ``registry
not reachable``: a CI plugin takes a false "No such tag" as leave to start the latest version.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from covey import errors, model
from covey.client import http, oci, registry
from covey.controller import pins, shared, views

UNREACHABLE = "registry not reachable"
UNKNOWN = "VM not in the registry"
_TIMEOUT_S = 3.0  # two questions in a row still leave time to answer a client that gives up after 10 s
_CONNECT_S = 1.0
_KNOWN_LIMIT = 10_000


class _Silent(errors.Refused):
    """No registry gave an answer."""


class Templates:
    """The registries of this controller, as far as it needs them. `urls` may be empty: then none is reachable.
    `remembered`: for when no registry answers."""

    def __init__(
        self,
        urls: Sequence[str],
        exchange: http.Exchange | None = None,
        ca_cert: Path | None = None,
        remembered: pins.Pins | None = None,
    ) -> None:
        self.urls = tuple(urls)
        self._remembered = remembered
        self._endpoints: http.Endpoints | None = None
        if urls:
            self._endpoints = http.Endpoints(
                urls, timeout_s=_TIMEOUT_S, connect_s=_CONNECT_S, exchange=exchange, ca_cert=ca_cert
            )
        self._registry = registry.Registry(self._endpoints) if self._endpoints else None
        self._pins = shared.Shared(self._ask_pin)
        self._known: dict[model.Digest, views.NodeTemplate] = {}

    async def close(self) -> None:
        await self._pins.close()
        if self._endpoints is not None:
            await self._endpoints.close()

    @property
    def known(self) -> Mapping[model.Digest, views.NodeTemplate]:
        """Names of the manifests seen so far: a digest never changes its meaning."""
        return self._known

    async def resolve(self, template: str, tag: str, version: int | None) -> oci.Resolved:
        """The version to start; the newest when neither tag nor version is given. Raises Refused; StoreError only while
        no registry answers."""
        if not oci.valid_uuid(template):  # given by name: clients look the id up themselves when they read this text
            raise errors.Refused(UNKNOWN)
        found = await self._resolve(pins.Asked(template, tag, version))
        self._remember(found.digest, found.id, found.name, found.tag)
        return found

    async def _resolve(self, asked: pins.Asked) -> oci.Resolved:
        remembered = self._remembered
        if remembered is None:
            return await self._pins.get(asked)
        try:
            found = await self._pins.get(asked)
        except _Silent:
            before = await remembered.recall(asked)
            if before is None:
                raise
            return before
        except errors.Refused:
            remembered.forget(asked)
            raise
        remembered.learn(asked, found)
        return found

    async def list(self) -> list[oci.TemplateItem]:
        try:
            return await self._reachable().templates()
        except errors.RemoteError as error:
            raise errors.Refused(UNREACHABLE) from error

    async def one(self, id: str) -> oci.TemplateView:
        """One template with its versions, oldest first. Raises NotFound."""
        try:
            found = await self._reachable().template(id)
        except errors.RemoteError as error:
            raise errors.Refused(UNREACHABLE) from error
        for version in found.versions:
            self._remember(version.digest, found.id, found.name, version.tag)
        return found

    async def delete(self, id: str) -> None:
        """Delete a template for ever. Harmless when repeated. Raises NotFound."""
        try:
            await self._reachable().delete(id)
        except errors.RemoteError as error:
            raise errors.Refused(UNREACHABLE) from error

    async def revert(self, query: Mapping[str, str], body: Mapping[str, object], key: str) -> None:
        """Take back a version and all newer ones, in the caller's own words; `key` ("": none) makes a repeat the same
        request. Without one the newest is settled first: the registry may be asked twice. Raises Refused."""
        aimed = key or any(
            (query.get(name) or body.get(name)) not in (None, "") for name in ("tag", "version", "number")
        )
        try:
            if not aimed:
                found = await self._reachable().resolve(str(query.get("id") or body.get("id") or ""))
                query = {**query, "version": str(found.number), "digest": found.digest}
            await self._reachable().revert_as_asked(query, body, key)
        except errors.RemoteError as error:
            raise errors.Refused(UNREACHABLE) from error

    async def disk(self) -> oci.DiskView:
        try:
            found = await self._reachable().disk()
        except errors.RemoteError as error:
            raise errors.Refused(UNREACHABLE) from error
        return oci.DiskView(total=found.total, free=min(found.free, found.total))

    async def running(self) -> bool:
        """Whether a registry answers."""
        try:
            await self._reachable().disk()
        except errors.CoveyError:
            return False
        return True

    async def _ask_pin(self, asked: pins.Asked) -> oci.Resolved:
        try:
            return await self._reachable().resolve(asked.template, asked.tag, asked.version)
        except errors.NotFound as error:
            raise errors.Refused(UNKNOWN) from error
        except errors.RemoteError as error:
            raise _Silent(UNREACHABLE) from error

    def _reachable(self) -> registry.Registry:
        if self._registry is None:
            raise _Silent(f"{UNREACHABLE}: this controller was started without one (ANKA_REGISTRY)")
        return self._registry

    def _remember(self, digest: model.Digest, id: str, name: str, tag: str) -> None:
        if len(self._known) < _KNOWN_LIMIT:
            self._known[digest] = views.NodeTemplate(uuid=id, name=name, tag=tag)
