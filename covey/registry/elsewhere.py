"""Lost blobs are fetched from other registries, over the distribution API, and verified before they count."""

import contextlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import aiohttp

from covey import errors, model, observe
from covey.client import http
from covey.client import registry as client
from covey.registry import blobs

log = observe.log("scrub")

_TRIES = 5  # of one transfer that is cut, as long as it moves


class Registries:
    """`scrub.Elsewhere`: the registries of `urls`, asked one after the other. `ca_cert`: believed where by https."""

    def __init__(self, urls: Sequence[str], blobs: blobs.Blobs, *, ca_cert: Path | None = None) -> None:
        self._urls = urls
        self._blobs = blobs
        self._ca_cert = ca_cert

    async def fetch(self, repository: str, digest: model.Digest) -> bool:
        for url in self._urls:
            async with http.Endpoints([url], ca_cert=self._ca_cert) as endpoints:
                remote = client.Registry(endpoints, patience_s=5.0)
                try:
                    if await self._manifest(remote, repository, digest) or await self._blob(remote, repository, digest):
                        return True
                except (errors.CoveyError, aiohttp.ClientError, OSError) as error:
                    log.warning("a blob could not be fetched", digest=digest, registry=url, error=str(error))
        return False

    async def _manifest(self, remote: client.Registry, repository: str, digest: model.Digest) -> bool:
        try:
            _, _, content = await remote.manifest(repository, digest)
        except (errors.NotFound, errors.Refused):
            return False
        await self._blobs.put(content, digest)
        return True

    async def _blob(self, remote: client.Registry, repository: str, digest: model.Digest) -> bool:
        if not await remote.has_blob(repository, digest):
            return False
        session = await self._blobs.begin()
        try:
            for _ in range(_TRIES):
                offset = await self._blobs.offset(session)
                with contextlib.suppress(blobs.Cut):
                    await self._blobs.write(session, offset, _pieces(remote, repository, digest, offset))
                    break
            await self._blobs.finish(session, digest)
        finally:
            await self._blobs.abort(session)
        return True


async def _pieces(remote: client.Registry, repository: str, digest: model.Digest, offset: int) -> AsyncIterator[bytes]:
    """The bytes from `offset` on, a premature end in the words of `blobs`."""
    try:
        async for piece in remote.stream(repository, digest, offset):
            yield piece
    except errors.RemoteError as error:
        raise blobs.Cut(str(error)) from error
