"""OCI distribution: pull, content discovery, content management, and the manifest's push.

Source: OCI distribution specification 1.1; `?tag=` at a push by digest is of its next version. How a blob's bytes leave
is `sending`'s business. Nothing here reads a blob into memory; manifests have at most 4 MiB. A manifest is answered as
it was pushed, whatever the Accept header says.
"""

import urllib.parse
from collections.abc import Awaitable, Callable, Iterable, Sequence

from aiohttp import web

from covey import answer, gate, model, serve
from covey.client import oci
from covey.registry import catalog, conditions, oci_faults, sending

_DIGITS = 9  # of a page's size

Absent = Callable[[serve.Call, str, model.Digest], Awaitable[web.StreamResponse | None]]


class ContentApi:
    """Handlers below /v2/ that read and manage what is there. `absent`: who may answer with a blob that is not here."""

    def __init__(self, catalog: catalog.Catalog, absent: Absent | None = None) -> None:
        self._catalog = catalog
        self._absent = absent

    def routes(self) -> Sequence[serve.Route]:
        guard = oci_faults.oci_path
        blob, manifest = "/v2/{name:path}/blobs/{digest}", "/v2/{name:path}/manifests/{reference}"
        return [
            serve.Route("GET", "/v2/", guard(self.version)),
            serve.Route("GET", "/v2", guard(self.version)),
            serve.Route("GET", "/v2/_catalog", guard(self.list_repositories)),
            serve.Route("GET", blob, guard(self.get_blob), time_limit_s=None, lane=gate.Lane.OPEN),
            serve.Route("DELETE", blob, guard(self.delete_blob)),
            serve.Route("GET", manifest, guard(self.get_manifest)),
            serve.Route("PUT", manifest, guard(self.put_manifest), body_limit_bytes=oci.MANIFEST_LIMIT),
            serve.Route("DELETE", manifest, guard(self.delete_manifest)),
            serve.Route("GET", "/v2/{name:path}/tags/list", guard(self.list_tags)),
            serve.Route("GET", "/v2/{name:path}/referrers/{digest}", guard(self.list_referrers)),
        ]

    async def version(self, _call: serve.Call) -> web.Response:
        headers = {**answer.HEADERS, "Docker-Distribution-Api-Version": "registry/2.0"}
        return web.Response(body=b"{}", headers=headers)

    async def get_blob(self, call: serve.Call) -> web.StreamResponse:
        digest = model.Digest(call.params["digest"])
        blob = await self._catalog.granted_blob(call.params["name"], digest)
        if blob is None and self._absent is not None:
            answered = await self._absent(call, call.params["name"], digest)
            if answered is not None:
                return answered
        if blob is None:
            raise answer.Fault(404, await self._catalog.why_missing(call.params["name"], digest), code="BLOB_UNKNOWN")
        return await sending.answer(call, self._catalog.blobs, blob)

    async def delete_blob(self, call: serve.Call) -> web.Response:
        try:
            await self._catalog.withdraw(call.params["name"], model.Digest(call.params["digest"]))
        except catalog.Missing as error:
            raise answer.Fault(404, str(error), code="BLOB_UNKNOWN") from error
        return web.Response(status=202, headers={"Server": "covey"})

    async def get_manifest(self, call: serve.Call) -> web.Response:
        name = call.params["name"]
        known, content = await self._catalog.manifest(name, call.params["reference"])
        if call.request.method == "GET" and call.headers.get(oci.LOOK_HEADER, "").lower() != "true":
            await self._catalog.logs.mark_pulled(name)
        headers = {
            "Content-Type": known.media_type,
            "Docker-Content-Digest": known.digest,
            "ETag": conditions.etag(known.digest),
            "Server": "covey",
        }
        if conditions.unchanged(call.headers, known.digest):
            return web.Response(status=304, headers=headers)
        return web.Response(body=content, headers=headers)

    async def put_manifest(self, call: serve.Call) -> web.Response:
        name, reference = call.params["name"], call.params["reference"]
        media_type = call.headers.get("Content-Type", "").partition(";")[0].strip()
        force = "true" in (call.headers.get(oci.FORCE_HEADER, "").lower(), call.query.get("force", "").lower())
        tags = _tags(call)
        content = await call.read()
        for target in tags or [reference]:
            known, number = await self._catalog.push(
                name,
                target,
                content,
                media_type,
                force=force,
                digest=model.Digest(reference) if tags else None,
                allowed=lambda current: conditions.allows(call.headers, current),
            )
        headers = {
            "Location": f"/v2/{name}/manifests/{known.digest}",
            "Docker-Content-Digest": known.digest,
            "Server": "covey",
        }
        if tags:
            headers["OCI-Tag"] = ", ".join(tags)
        if known.subject:
            headers["OCI-Subject"] = known.subject
        if number is not None:
            headers[oci.VERSION_HEADER] = str(number)
        return web.Response(status=201, headers=headers)

    async def delete_manifest(self, call: serve.Call) -> web.Response:
        await self._catalog.delete(call.params["name"], call.params["reference"])
        return web.Response(status=202, headers={"Server": "covey"})

    async def list_tags(self, call: serve.Call) -> web.Response:
        name = call.params["name"]
        fold = await self._catalog.repository(name)
        if not fold.count:
            raise answer.Fault(404, f"there is no repository {name}", code="NAME_UNKNOWN")
        tags, headers = _page(call, f"/v2/{name}/tags/list", fold.tags)
        return web.Response(body=answer.ascii_json({"name": name, "tags": tags}), headers=headers)

    async def list_repositories(self, call: serve.Call) -> web.Response:
        """Not part of the specification; the older registry API has it, and tools use it."""
        names, headers = _page(call, "/v2/_catalog", await self._catalog.names())
        return web.Response(body=answer.ascii_json({"repositories": names}), headers=headers)

    async def list_referrers(self, call: serve.Call) -> web.Response:
        """The manifests about one manifest, as an index; an empty one when there are none. In the order of their
        digests, so that a page can tell where the next one begins."""
        name, digest = call.params["name"], call.params["digest"]
        fold = await self._catalog.repository(name)
        wanted, last = call.query.get("artifactType") or None, call.query.get("last", "")
        found = [
            oci.Descriptor(
                media_type=known.media_type,
                digest=known.digest,
                size=known.size_bytes,
                artifact_type=known.artifact_type,
                annotations=known.annotations,
            )
            for known in sorted(fold.manifests.values(), key=lambda known: known.digest)
            if known.subject == digest and known.digest > last and wanted in (None, known.artifact_type)
        ]
        page = _fitting(found)
        index = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": page}
        headers = {"Content-Type": oci.OCI_INDEX, "Server": "covey"}
        if len(page) < len(found):
            query = {"last": page[-1].digest, **({"artifactType": wanted} if wanted else {})}
            headers["Link"] = f'</v2/{name}/referrers/{digest}?{urllib.parse.urlencode(query)}>; rel="next"'
        if wanted is not None:
            headers["OCI-Filters-Applied"] = "artifactType"
        return web.Response(body=answer.ascii_json(index), headers=headers)


def _tags(call: serve.Call) -> list[str]:
    """Tags for a manifest that is pushed by its digest."""
    tags = list(dict.fromkeys(call.query.getall("tag", [])))
    if tags and not oci.valid_digest(call.params["reference"]):
        raise answer.Fault(400, "tags in the query go with a digest in the path", code="MANIFEST_INVALID")
    for tag in tags:
        if not oci.valid_tag(tag):
            raise answer.Fault(400, f"tag={tag!r} is no tag", code="MANIFEST_INVALID")
    return tags


def _page(call: serve.Call, path: str, names: Iterable[str]) -> tuple[list[str], dict[str, str]]:
    """The names that are asked for by `n` and `last`, and the headers of their answer. The order is that of their
    characters' numbers, which the specification calls ASCIIbetical."""
    last, limit = call.query.get("last", ""), _page_size(call)
    found = sorted(name for name in names if name > last)
    headers = dict(answer.HEADERS)
    if limit is not None and limit < len(found):
        found = found[:limit]
        if found:
            headers["Link"] = f'<{path}?{urllib.parse.urlencode({"n": limit, "last": found[-1]})}>; rel="next"'
    return found, headers


def _fitting(found: Sequence[oci.Descriptor]) -> Sequence[oci.Descriptor]:
    """As many as make an index that clients take, which read no larger manifests than they may push; one at least."""
    size_bytes = 0
    for count, descriptor in enumerate(found):
        size_bytes += len(answer.ascii_json(descriptor)) + 1
        if size_bytes > oci.MANIFEST_LIMIT - 1024 and count:
            return found[:count]
    return found


def _page_size(call: serve.Call) -> int | None:
    text = call.query.get("n")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > _DIGITS:
        raise answer.Fault(400, f"n={text!r} is not a number of tags", code="PAGINATION_NUMBER_INVALID")
    return int(text)
