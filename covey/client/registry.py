"""The typed client of a registry: template views, manifests, blobs in both directions.

Rules: bytes are verified against their digest before a file appears under its name (promise I8); a transfer that is
cut goes on where it stood, at the next server if need be, and is given up only when nothing moved for a while
(`patience_s`: a server may be starting again); memory is constant. Faults: NotFound and Refused carry the registry's
text, RemoteError means that no registry gave an answer.

Used by agents (fetch by digest), the controller (views, `resolve`), the CLI and registry peers.
"""

from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path

from covey import errors, model
from covey.client import http, line, oci, partial, pull, push, remembered

Progress = Callable[[int], None]  # called with the bytes that are done so far


class Registry:
    """One registry, reached by one or several URLs of equal servers."""

    def __init__(
        self,
        endpoints: http.Endpoints,
        *,
        patience_s: float = 15.0,
        stall_s: float = 30.0,
        notes: remembered.Notes | None = None,
        range_bytes: int = pull.RANGE_BYTES,
        sync_bytes: int = partial.SYNC_BYTES,
    ) -> None:
        """`patience_s`: for so long a transfer is tried again while nothing moves; `stall_s`: a peer that sends or
        takes nothing for so long is left. `notes`: where unfinished uploads are remembered. `range_bytes` are
        asked for at once; after `sync_bytes` new ones a download is made durable."""
        self._http = endpoints
        self._line = line.Line(endpoints, patience_s=patience_s, stall_s=stall_s)
        self._pull = pull.Pull(self._line, range_bytes=range_bytes, sync_bytes=sync_bytes)
        self._push = push.Push(self._line, notes)

    # ---- template views --------------------------------------------------------------------------------------------

    async def templates(self) -> list[oci.TemplateItem]:
        return await self._http.ask("GET", "/registry/v2/vm", list[oci.TemplateItem])

    async def template(self, wanted: str) -> oci.TemplateView:
        """A template by id or name, versions oldest first. Raises NotFound."""
        if not wanted:  # without an id the same path lists all
            raise errors.NotFound("Not found")
        return await self._http.ask("GET", "/registry/v2/vm?" + line.query(id=wanted), oci.TemplateView)

    async def resolve(self, template: str, tag: str = "", version: int | None = None) -> oci.Resolved:
        """One version by template id or name; the newest when neither tag nor version is given (safety S14).
        Raises NotFound for the template, Refused ``No such tag …`` or ``No such version …``, RemoteError when no
        registry can say."""
        number = "" if version is None else str(version)
        query = line.query(id=template, tag=tag, version=number)
        return await self._http.ask("GET", "/registry/vm/info?" + query, oci.Resolved)

    async def delete(self, template: str) -> None:
        """Delete a template, by id or name, for ever. Harmless when repeated. Raises NotFound."""
        await self._http.ask("DELETE", "/registry/vm?" + line.query(id=template), type(None))

    async def revert(self, template: str, tag: str = "", version: int | None = None) -> oci.Resolved:
        """Take back a version (the newest without tag and version) and all newer ones: the version it was. What it is
        is settled first, so that a repeat whose answer was lost takes back no other one (safety S38)."""
        found = await self.resolve(template, tag, version)
        query = {"id": found.id, "version": str(found.number), "digest": found.digest}
        await self.revert_as_asked(query, {}, "")
        return found

    async def revert_as_asked(self, query: Mapping[str, str], body: Mapping[str, object], key: str) -> None:
        """A revert in the words of whoever asks for it; `key` ("": none) makes a repeat the same request."""
        headers = {"Idempotency-Key": key} if key else {}
        await self._http.ask(
            "DELETE", "/registry/revert?" + line.query(**query), type(None), dict(body), headers=headers
        )

    async def set_arch(self, template: str, arch: model.Arch) -> None:
        """Correct the architecture that a template's versions say. Harmless when repeated. Raises NotFound."""
        await self._http.ask("PUT", "/registry/vm/arch", type(None), {"id": template, "arch": arch})

    async def disk(self) -> oci.DiskView:
        return await self._http.ask("GET", "/registry/disk", oci.DiskView)

    async def hold_name(self, name: str) -> model.TemplateId:
        """The id of the template of this name; a new name gets a fresh id. Harmless when repeated."""
        held: list[oci.NameHeld] = []

        async def once() -> None:
            ask = oci.NameAsk(name=name)
            held.append(await self._http.ask("POST", "/registry/v2/vm", oci.NameHeld, ask, repeatable=True))

        await self._line.persist(once, lambda: 0)
        return held[-1].id

    # ---- manifests -------------------------------------------------------------------------------------------------

    async def manifest(
        self, repository: str, reference: str, *, look: bool = False
    ) -> tuple[oci.Manifest, model.Digest, bytes]:
        """A manifest by tag or digest: parsed, its digest, its bytes. Asked for by digest, it is verified. `look`: it
        does not count as a pull."""
        headers = {"Accept": ", ".join(oci.MANIFEST_TYPES), **({oci.LOOK_HEADER: "true"} if look else {})}
        _, content = await self._line.call("GET", f"/v2/{repository}/manifests/{reference}", headers=headers)
        digest = oci.digest_of(content)
        if oci.valid_digest(reference) and reference != digest:
            raise errors.RemoteError(f"the registry sent manifest {digest} for {reference}")
        return oci.parse_manifest(content), digest, content

    async def push_manifest(
        self, repository: str, reference: str, content: bytes, *, force: bool = False
    ) -> tuple[model.Digest, int | None]:
        """Push a manifest: its digest and, for a template under a tag, its version number. Harmless when repeated."""
        headers = {"Content-Type": oci.parse_manifest(content).media_type or oci.OCI_MANIFEST}
        if force:
            headers[oci.FORCE_HEADER] = "true"
        path = f"/v2/{repository}/manifests/{reference}"
        answered, _ = await self._line.call("PUT", path, data=content, headers=headers)
        number = answered.get(oci.VERSION_HEADER)
        return oci.digest_of(content), None if number is None else int(number)

    async def delete_manifest(self, repository: str, reference: str) -> None:
        """Delete a tag, or a manifest with all its tags. Raises NotFound."""
        await self._line.call("DELETE", f"/v2/{repository}/manifests/{reference}")

    # ---- blobs -----------------------------------------------------------------------------------------------------

    async def has_blob(self, repository: str, digest: str) -> bool:
        return await self._push.has(repository, digest)

    async def stream(
        self, repository: str, digest: str, offset: int = 0, *, quiet_s: float = line.QUIET_S
    ) -> AsyncIterator[bytes]:
        """The bytes of a blob from `offset` on, from one server, as they come: not verified, not resumed. Raises
        RemoteError when the transfer is cut, or silent for `quiet_s` while another server is well."""
        headers = {"Range": f"bytes={offset}-"} if offset else {}
        path = f"/v2/{repository}/blobs/{digest}"
        async with self._line.open("GET", path, headers=headers, quiet_s=quiet_s) as answer:
            if offset and answer.status != 206:
                raise errors.RemoteError(f"{answer.url}: the server does not send ranges", answer.status)
            with line.as_remote(answer.url):
                async for chunk in answer.content.iter_chunked(line.READ_BYTES):
                    yield chunk

    async def content(self, repository: str, digest: str, limit_bytes: int = oci.CONFIG_LIMIT) -> bytes:
        """A small blob (a template's config), verified."""
        found: list[bytes] = []
        silence = line.Silence()

        async def once() -> None:
            with silence.measured(lambda: len(found)) as quiet_s:
                found.append(await self._content(repository, digest, limit_bytes, quiet_s))

        await self._line.persist(once, lambda: 0)
        return found[-1]

    async def _content(self, repository: str, digest: str, limit_bytes: int, quiet_s: float) -> bytes:
        parts = bytearray()
        async for chunk in self.stream(repository, digest, quiet_s=quiet_s):
            parts += chunk
            if len(parts) > limit_bytes:
                raise errors.RemoteError(f"{digest} is larger than {limit_bytes} bytes")
        if oci.digest_of(bytes(parts)) != digest:
            raise errors.RemoteError(f"the registry sent {oci.digest_of(bytes(parts))} for {digest}")
        return bytes(parts)

    async def fetch(
        self,
        repository: str,
        digest: str,
        size_bytes: int,
        target: Path,
        *,
        plain: tuple[str, int] | None = None,
        progress: Progress | None = None,
        near: pull.Near | None = None,
    ) -> bool:
        """Download a blob to `target`: see `pull.Pull.fetch`."""
        return await self._pull.fetch(repository, digest, size_bytes, target, plain=plain, progress=progress, near=near)

    async def upload(self, repository: str, digest: str, source: Path, *, progress: Progress | None = None) -> bool:
        """Make a file a blob: see `push.Push.upload`."""
        return await self._push.upload(repository, digest, source, progress=progress)

    async def upload_bytes(self, repository: str, content: bytes) -> model.Digest:
        """Make `content` a blob of the repository in one request."""
        digest = oci.digest_of(content)
        if not await self.has_blob(repository, digest):
            await self._line.call("POST", f"/v2/{repository}/blobs/uploads/?" + line.query(digest=digest), data=content)
        return digest
