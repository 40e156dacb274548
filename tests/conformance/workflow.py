"""One repository of a registry, in the steps that the distribution specification's workflows are made of."""

import json
import secrets
from collections.abc import Mapping
from typing import Any

from covey.client import oci
from tests.support import registry

Answer = tuple[int, Mapping[str, str], bytes]
EMPTY = b"{}"


class Repo:
    """Requests below /v2/`name`. Paths are given from there on; a Location is followed as it is."""

    def __init__(self, server: registry.Server, name: str) -> None:
        self.server = server
        self.name = name
        self.root = f"/v2/{name}"

    async def call(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        return await self.server.call(method, self._path(path), body, **headers)

    async def error(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str]:
        """A request that must fail: its status and the specification's code."""
        return (await self.server.error(method, self._path(path), body, **headers))[:2]

    def _path(self, path: str) -> str:
        return path if path.startswith("/v2/") else self.root + path

    async def begin(self) -> str:
        """An upload session: where it is."""
        status, headers, _ = await self.call("POST", "/blobs/uploads/")
        assert status == 202
        return headers["Location"]

    async def push_blob(self, content: bytes, algorithm: str = oci.SHA256) -> str:
        digest = oci.digest_of(content, algorithm)
        status, _, answer = await self.call("POST", f"/blobs/uploads/?digest={digest}", content)
        assert status == 201, answer
        return digest

    async def blob(self, digest: str) -> bytes:
        status, headers, body = await self.call("GET", f"/blobs/{digest}")
        assert (status, headers["Docker-Content-Digest"]) == (200, digest)
        return body

    async def put(self, reference: str, manifest: bytes, media_type: str = oci.OCI_MANIFEST, **headers: str) -> Answer:
        return await self.call("PUT", f"/manifests/{reference}", manifest, Content_Type=media_type, **headers)

    async def push_image(self, reference: str = "", *layers: bytes, **more: Any) -> tuple[str, bytes]:
        """An image, by a tag or by its digest: its digest and its manifest."""
        for content in (EMPTY, *layers):
            await self.push_blob(content)
        return await self.push(reference, registry.image_manifest(EMPTY, *layers, **more))

    async def push_index(self, reference: str = "", *manifests: bytes, **more: Any) -> tuple[str, bytes]:
        return await self.push(reference, index(*manifests, **more), oci.OCI_INDEX)

    async def push(self, reference: str, manifest: bytes, media_type: str = oci.OCI_MANIFEST) -> tuple[str, bytes]:
        digest = oci.digest_of(manifest)
        status, _, answer = await self.put(reference or digest, manifest, media_type)
        assert status == 201, answer
        return digest, manifest

    async def status(self, path: str) -> int:
        return (await self.call("GET", path))[0]

    async def tags(self, query: str = "") -> list[str]:
        status, _, body = await self.call("GET", f"/tags/list{query}")
        document = json.loads(body)
        assert (status, document["name"]) == (200, self.name)
        found: list[str] = document["tags"]
        return found

    async def referrers(self, digest: str, query: str = "") -> list[dict[str, Any]]:
        status, headers, body = await self.call("GET", f"/referrers/{digest}{query}")
        document = json.loads(body)
        assert (status, headers["Content-Type"], document["mediaType"]) == (200, oci.OCI_INDEX, oci.OCI_INDEX)
        assert document["schemaVersion"] == 2
        found: list[dict[str, Any]] = document["manifests"]
        return found


def index(*manifests: bytes, **more: Any) -> bytes:
    """The bytes of an image index of images."""
    described = [registry.descriptor(oci.OCI_MANIFEST, manifest) for manifest in manifests]
    return json.dumps({"schemaVersion": 2, "mediaType": oci.OCI_INDEX, "manifests": described, **more}).encode()


def unknown(algorithm: str = oci.SHA256) -> str:
    """A digest that nobody has the bytes of."""
    return oci.digest_of(secrets.token_bytes(16), algorithm)
