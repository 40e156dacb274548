"""A registry that speaks TLS, and clients that believe the authority they are told of, and no other."""

import asyncio
import json
import os
import sys
from pathlib import Path

import pytest

from covey import errors
from covey.client import http
from covey.client import registry as client
from covey.registry import service
from tests.support import certificates, registry

LAYER = b"a layer of some size" * 200_000


async def test_a_layer_travels_both_ways(tmp_path: Path) -> None:
    made = certificates.make(tmp_path / "tls")
    tls = service.Identity(cert=made.server_cert, key=made.server_key)
    (tmp_path / "layer").write_bytes(LAYER)
    async with registry.serving(tmp_path / "registry", tls=tls) as plain:
        url = plain.url.replace("http:", "https:")
        async with http.Endpoints([url], ca_cert=made.ca) as endpoints:
            talking = client.Registry(endpoints)
            digest = await talking.upload_bytes("a", LAYER)
            await talking.fetch("a", digest, len(LAYER), tmp_path / "back")
        assert (tmp_path / "back").read_bytes() == LAYER
        async with http.Endpoints([url]) as endpoints:
            with pytest.raises(errors.RemoteError, match="certificate"):
                await endpoints.call("GET", "/readyz")


async def test_the_command_line_believes_the_authority_it_is_told_of(tmp_path: Path) -> None:
    made = certificates.make(tmp_path / "tls")
    tls = service.Identity(cert=made.server_cert, key=made.server_key)
    async with registry.serving(tmp_path / "registry", tls=tls) as plain:
        environ = {**os.environ, "COVEY_REGISTRY": plain.url.replace("http:", "https:"), "COVEY_CONFIG": "/dev/null"}
        code, told = await _list(environ)
        assert code == 1 and b"certificate" in told.lower()
        code, told = await _list({**environ, "ANKA_ROOT_CERT": str(made.ca)})
        assert (code, json.loads(told)) == (0, []), told


async def _list(environ: dict[str, str]) -> tuple[int | None, bytes]:
    command = (sys.executable, "-m", "covey", "template", "list", "--json")
    child = await asyncio.create_subprocess_exec(*command, env=environ, stdout=-1, stderr=-2)
    told, _ = await asyncio.wait_for(child.communicate(), 60)
    return child.returncode, told


async def test_files_that_are_no_certificate_stop_the_start(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("nothing")
    tls = service.Identity(cert=tmp_path / "x.pem", key=tmp_path / "x.pem")
    with pytest.raises(errors.SettingError, match="are no certificate and its key in PEM"):
        async with registry.serving(tmp_path / "registry", tls=tls):
            pass


def test_a_file_without_authorities_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("nothing")
    with pytest.raises(errors.SettingError, match=r"CA_CERT .*x.pem holds no certificates in PEM"):
        http.trusting(tmp_path / "x.pem")
