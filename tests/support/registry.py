"""Registries for tests: in this process, or as processes of their own that can be killed.

    async with registry.serving(tmp_path) as server:            # in this process, on a free port
        status, headers, body = await server.call("GET", "/v2/")

    async with registry.process(tmp_path, failpoints="registry.entry.linked=kill") as server: …

A process ends with the test runner, even when that is killed (PR_SET_PDEATHSIG by `setpriv`). `call` is a bare HTTP
client that shares no line with the client under test.
"""

import asyncio
import contextlib
import io
import json
import os
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import aiohttp

from covey import failpoint, model, observe, world
from covey.client import http, oci
from covey.client import registry as client
from covey.registry import service

READY_S = 90.0


class Server:
    """A registry that listens on 127.0.0.1:`port`, or at any `url`."""

    def __init__(self, port: int, session: aiohttp.ClientSession, url: str = "") -> None:
        self.port = port
        self.url = url.rstrip("/") or f"http://127.0.0.1:{port}"
        self._session = session

    async def call(
        self, method: str, path: str, body: Any = None, **headers: str
    ) -> tuple[int, Mapping[str, str], bytes]:
        """One request as it is given: no check, no retry. Header names are spelled with underscores."""
        spelled = {name.replace("_", "-"): text for name, text in headers.items()}
        data = io.BytesIO(body) if isinstance(body, bytes) else body
        async with self._session.request(method, self.url + path, data=data, headers=spelled) as answer:
            return answer.status, answer.headers, await answer.read()

    async def error(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, str, str]:
        """A request that must fail: status, the specification's code, the message."""
        status, _, content = await self.call(method, path, body, **headers)
        assert status >= 400, f"{method} {path} was answered {status}"
        (fault,) = json.loads(content)["errors"]
        return status, fault["code"], fault["message"]

    async def push_blob(self, repository: str, content: bytes) -> str:
        digest = oci.digest_of(content)
        status, _, answer = await self.call("POST", f"/v2/{repository}/blobs/uploads/?digest={digest}", content)
        assert status == 201, answer
        return digest

    async def push_image(self, repository: str, tag: str, *layers: bytes) -> tuple[str, bytes]:
        """A small plain OCI image: its digest and its manifest."""
        manifest = await self.manifest(repository, *layers)
        status, _, answer = await self.put_manifest(repository, tag, manifest)
        assert status == 201, answer
        return oci.digest_of(manifest), manifest

    async def manifest(self, repository: str, *layers: bytes) -> bytes:
        """A manifest whose blobs are pushed."""
        config = b"{}"
        await self.push_blob(repository, config)
        for layer in layers:
            await self.push_blob(repository, layer)
        return image_manifest(config, *layers)

    async def put_manifest(
        self, repository: str, reference: str, manifest: bytes, **headers: str
    ) -> tuple[int, Mapping[str, str], bytes]:
        headers.setdefault("Content_Type", oci.OCI_MANIFEST)
        return await self.call("PUT", f"/v2/{repository}/manifests/{reference}", manifest, **headers)


def image_manifest(config: bytes, *layers: bytes, **more: Any) -> bytes:
    """The bytes of an OCI image manifest."""
    blob = "application/vnd.oci.image.layer.v1.tar"
    return json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": oci.OCI_MANIFEST,
            "config": descriptor("application/vnd.oci.image.config.v1+json", config),
            "layers": [descriptor(blob, layer) for layer in layers],
            **more,
        }
    ).encode()


def template_manifest(config: bytes, *layers: bytes, name: str, tag: str) -> bytes:
    """The bytes of a template's manifest."""
    document = {
        "schemaVersion": 2,
        "mediaType": oci.OCI_MANIFEST,
        "artifactType": oci.TEMPLATE,
        "config": descriptor(oci.TEMPLATE_CONFIG, config),
        "layers": [descriptor(oci.DISK_RAW, layer) for layer in layers],
        "annotations": {oci.NAME: name, oci.TAG: tag},
    }
    return json.dumps(document).encode()


def descriptor(media_type: str, content: bytes) -> dict[str, object]:
    return {"mediaType": media_type, "digest": oci.digest_of(content), "size": len(content)}


def template_config(arch: model.Arch = model.Arch.AMD64) -> bytes:
    return json.dumps({"arch": arch}).encode()


@contextlib.asynccontextmanager
async def serving(
    base: Path, *, reserved_bytes: int = 0, environ: Mapping[str, str] = {}, **more: Any
) -> AsyncIterator[Server]:
    """A registry in this process; `more` are fields of its `Config`."""
    config = service.Config(base_path=base, port=0, reserved_bytes=reserved_bytes, **{"grace_s": 2.0, **more})
    registry = service.Registry(config, world.System(), environ)
    await registry.start()
    try:
        async with aiohttp.ClientSession() as session:
            yield Server(registry.port, session)
    finally:
        await registry.stop()


@contextlib.asynccontextmanager
async def talking(*servers: Server, patience_s: float = 15.0, stall_s: float = 30.0) -> AsyncIterator[client.Registry]:
    """The client under test. Little patience: for a server that will not come back."""
    async with http.Endpoints([server.url for server in servers]) as endpoints:
        yield client.Registry(endpoints, patience_s=patience_s, stall_s=stall_s)


class Process(Server):
    """A registry in a process of its own."""

    def __init__(self, port: int, session: aiohttp.ClientSession, child: asyncio.subprocess.Process) -> None:
        super().__init__(port, session)
        self._child = child

    async def ended(self) -> int:
        """Wait until it has ended by itself; its exit code."""
        return await asyncio.wait_for(self._child.wait(), READY_S)

    def send(self, number: signal.Signals) -> None:
        self._child.send_signal(number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)

    @property
    def pid(self) -> int:
        return self._child.pid


@contextlib.asynccontextmanager
async def process(
    base: Path,
    *,
    failpoints: str = "",
    grace_s: float = 2.0,
    port: int = 0,
    within: Sequence[str] = (),
    fsync: bool = True,
    reserved_bytes: int = 0,
) -> AsyncIterator[Process]:
    """A registry process, killed at the end if it still runs. `within`: words before its command, which become it."""
    child = await asyncio.create_subprocess_exec(
        *("setpriv", "--pdeathsig", "KILL", *within, sys.executable, "-m", "tests.support.registry"),
        *(str(base), str(port), str(grace_s), str(int(fsync)), str(reserved_bytes)),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "COVEY_FAILPOINTS": failpoints},
    )
    assert child.stdout is not None
    try:
        line = await asyncio.wait_for(child.stdout.readline(), READY_S)
        async with aiohttp.ClientSession() as session:
            yield Process(int(line), session, child)
    finally:
        if child.returncode is None:
            child.kill()
        await child.communicate()  # also closes the pipe


async def _main(config: service.Config) -> None:
    """What `process` runs: says its port, serves until SIGTERM."""
    observe.configure(level="warning")
    registry = service.Registry(config, world.System())
    await registry.start()
    stopping = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping.set)
    sys.stdout.write(f"{registry.port}\n")
    sys.stdout.flush()
    failpoint.arm(os.environ.get("COVEY_FAILPOINTS", ""))
    await stopping.wait()
    await registry.stop()


if __name__ == "__main__":
    _base, _port, _grace, _fsync, _reserved = sys.argv[1:]
    asyncio.run(
        _main(
            service.Config(
                base_path=Path(_base),
                port=int(_port),
                grace_s=float(_grace),
                fsync=_fsync == "1",
                reserved_bytes=int(_reserved),
            )
        )
    )
