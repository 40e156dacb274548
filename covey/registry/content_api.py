"""OCI distribution: pull, content discovery, content management, and the manifest's push.

Source: OCI distribution specification 1.1. Blobs are sent with aiohttp's FileResponse: on a plain asyncio loop that is
the kernel's sendfile, with Range. Nothing here reads a blob into memory; manifests have at most 4 MiB.
"""

import urllib.parse
from collections.abc import Sequence

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter

from covey import answer, gate, model, serve
from covey.client import oci
from covey.registry import catalog, oci_faults

_CHUNK = 1 << 20  # what FileResponse reads at once where there is no sendfile (TLS)


class ContentApi:
    """Handlers below /v2/ that read and manage what is there."""

    def __init__(self, catalog: catalog.Catalog) -> None:
        self._catalog = catalog

    def routes(self) -> Sequence[serve.Route]:
        guard = oci_faults.oci_path
        blob, manifest = "/v2/{name:path}/blobs/{digest}", "/v2/{name:path}/manifests/{reference}"
        return [
            serve.Route("GET", "/v2/", guard(self.version)),
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
        if blob is None:
            raise answer.Fault(404, f"repository {call.params['name']} has no blob {digest}", code="BLOB_UNKNOWN")
        headers = {
            "Content-Type": "application/octet-stream",
            "Docker-Content-Digest": digest,
            "Cache-Control": "max-age=31536000, immutable",
            "Server": "covey",
        }
        return _FileOnce(blob.path, chunk_size=_CHUNK, headers=headers)

    async def delete_blob(self, call: serve.Call) -> web.Response:
        try:
            await self._catalog.withdraw(call.params["name"], model.Digest(call.params["digest"]))
        except catalog.BlobNeeded as error:
            raise answer.Fault(405, str(error), code="UNSUPPORTED") from error
        except catalog.Missing as error:
            raise answer.Fault(404, str(error), code="BLOB_UNKNOWN") from error
        return web.Response(status=202, headers={"Server": "covey"})

    async def get_manifest(self, call: serve.Call) -> web.Response:
        name = call.params["name"]
        known, content = await self._catalog.manifest(name, call.params["reference"])
        if call.request.method == "GET":
            await self._catalog.logs.mark_pulled(name)
        headers = {
            "Content-Type": known.media_type,
            "Docker-Content-Digest": known.digest,
            "ETag": f'"{known.digest}"',
            "Server": "covey",
        }
        return web.Response(body=content, headers=headers)

    async def put_manifest(self, call: serve.Call) -> web.Response:
        name, reference = call.params["name"], call.params["reference"]
        media_type = call.headers.get("Content-Type", "").partition(";")[0].strip()
        force = "true" in (call.headers.get(oci.FORCE_HEADER, "").lower(), call.query.get("force", "").lower())
        known, number = await self._catalog.push(name, reference, await call.read(), media_type, force=force)
        headers = {
            "Location": f"/v2/{name}/manifests/{known.digest}",
            "Docker-Content-Digest": known.digest,
            "Server": "covey",
        }
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
        last = call.query.get("last", "")
        tags = sorted(tag for tag in fold.tags if tag > last)
        limit = _page_size(call)
        headers = dict(answer.HEADERS)
        if limit is not None and limit < len(tags):
            tags = tags[:limit]
            query = urllib.parse.urlencode({"n": limit, "last": tags[-1] if tags else last})
            headers["Link"] = f'</v2/{name}/tags/list?{query}>; rel="next"'
        return web.Response(body=answer.ascii_json({"name": name, "tags": tags}), headers=headers)

    async def list_referrers(self, call: serve.Call) -> web.Response:
        """The manifests about one manifest, as an index; an empty one when there are none."""
        fold = await self._catalog.repository(call.params["name"])
        wanted = call.query.get("artifactType")
        found = [
            oci.Descriptor(
                media_type=known.media_type,
                digest=known.digest,
                size=known.size_bytes,
                artifact_type=known.artifact_type,
                annotations=known.annotations,
            )
            for known in fold.manifests.values()
            if known.subject == call.params["digest"] and wanted in (None, known.artifact_type)
        ]
        index = {"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": found}
        headers = {"Content-Type": oci.OCI_INDEX, "Server": "covey"}
        if wanted is not None:
            headers["OCI-Filters-Applied"] = "artifactType"
        return web.Response(body=answer.ascii_json(index), headers=headers)


class _FileOnce(web.FileResponse):
    """A file that is sent when it is prepared first; the server prepares answers itself, and aiohttp does so again."""

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        return None if self.prepared else await super().prepare(request)


def _page_size(call: serve.Call) -> int | None:
    text = call.query.get("n")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit():
        raise answer.Fault(400, f"n={text!r} is not a number of tags", code="PAGINATION_NUMBER_INVALID")
    return int(text)
