"""A registry that speaks TLS, and clients that believe the authority they are told of, and no other."""

import asyncio
import contextlib
import json
import os
import ssl
import sys
from pathlib import Path

import pytest

from covey import errors, settings, tls_context, world
from covey.client import http, oci
from covey.client import registry as client
from covey.registry import disk, scrub, upkeep
from tests.support import certificates, registry, storage

LAYER = b"a layer of some size" * 200_000


async def test_a_layer_travels_both_ways(tmp_path: Path) -> None:
    made = certificates.make(tmp_path / "tls")
    tls = settings.Tls(cert=made.server_cert, key=made.server_key)
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
    tls = settings.Tls(cert=made.server_cert, key=made.server_key)
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


OFFER = "ECDHE-ECDSA-AES128-GCM-SHA256"  # of TLS 1.2


@pytest.mark.parametrize(
    ("lowest", "highest", "ciphers", "taken"),
    [
        ("1.2", "1.3", (), True),
        ("1.3", "1.3", (), False),
        ("1.2", "1.2", (), True),
        ("1.2", "1.2", ("TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256", "TLS_AES_128_GCM_SHA256"), True),
        ("1.2", "1.2", ("TLS_ECDHE_ECDSA_WITH_CHACHA20_POLY1305_SHA256",), False),
    ],
    ids=["both", "only 1.3", "only 1.2", "a cipher by IANA's name", "another cipher"],
)
async def test_versions_and_ciphers_are_those_that_were_set(
    tmp_path: Path, lowest: str, highest: str, ciphers: tuple[str, ...], taken: bool
) -> None:
    """A client that offers everything gets the newest; `taken`: whether one of TLS 1.2 that knows one cipher is."""
    made = certificates.make(tmp_path / "tls")
    tls = settings.Tls(cert=made.server_cert, key=made.server_key, lowest=lowest, highest=highest, ciphers=ciphers)
    everything, one = (ssl.create_default_context(cafile=made.ca) for _ in range(2))
    one.maximum_version = ssl.TLSVersion.TLSv1_2
    one.set_ciphers(OFFER)
    async with registry.serving(tmp_path / "registry", tls=tls) as server:
        assert (await _met(server.port, everything))[0] == f"TLSv{highest}"
        assert await _met(server.port, one) == (("TLSv1.2", OFFER) if taken else ("", ""))


async def _met(port: int, context: ssl.SSLContext) -> tuple[str, str]:
    """Version and cipher of a connection; nothing when there is none."""
    try:
        _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    except (ssl.SSLError, ConnectionError):
        return "", ""
    made = writer.get_extra_info("ssl_object")
    writer.close()
    with contextlib.suppress(ssl.SSLError, ConnectionError):
        await writer.wait_closed()
    return made.version(), made.cipher()[0]


@pytest.mark.parametrize(
    ("ciphers", "text"),
    [
        (("TLS_RSA_WITH_RC4_128_SHA",), "CIPHER_SUITES names TLS_RSA_WITH_RC4_128_SHA, which is no cipher that this"),
        (("ALL",), "CIPHER_SUITES names ALL, which is no cipher"),
        (("TLS_AES_128_GCM_SHA256",), "names ciphers of TLS 1.3 only, so that TLS 1.2 would have none; set MIN_TLS"),
    ],
)
def test_ciphers_that_nobody_knows_are_refused(tmp_path: Path, ciphers: tuple[str, ...], text: str) -> None:
    made = certificates.make(tmp_path)
    with pytest.raises(errors.SettingError, match=text):
        tls_context.of(settings.Tls(cert=made.server_cert, key=made.server_key, ciphers=ciphers))


async def test_files_that_are_no_certificate_stop_the_start(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("nothing")
    tls = settings.Tls(cert=tmp_path / "x.pem", key=tmp_path / "x.pem")
    with pytest.raises(errors.SettingError, match="are no certificate and its key in PEM"):
        async with registry.serving(tmp_path / "registry", tls=tls):
            pass


def test_a_file_without_authorities_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.pem").write_text("nothing")
    with pytest.raises(errors.SettingError, match=r"CA_CERT .*x.pem holds no certificates in PEM"):
        http.trusting(tmp_path / "x.pem")


async def test_a_lost_blob_is_healed_from_a_registry_that_speaks_tls(tmp_path: Path) -> None:
    """REGISTRY_HEAL_FROM by https, with the authority in CA_CERT and without."""
    made = certificates.make(tmp_path / "tls")
    tls = settings.Tls(cert=made.server_cert, key=made.server_key)
    for name in ("one", "two"):
        with storage.opened(tmp_path / name) as place:
            await place.push("a", "v1", LAYER)
    found = disk.locate(tmp_path / "one", oci.digest_of(LAYER))
    found.chmod(0o600)
    found.write_bytes(b"?" * len(LAYER))
    async with registry.serving(tmp_path / "two", tls=tls) as two:
        with storage.opened(tmp_path / "one") as place:
            assert (await _scrub(place, two.port, None).run()).damaged == (oci.digest_of(LAYER),)
            assert list(await _scrub(place, two.port, None).heal()) == []
            assert list(await _scrub(place, two.port, made.ca).heal()) == [oci.digest_of(LAYER)]
            assert await place.pull("a", "v1") == [LAYER]


def _scrub(place: storage.Storage, port: int, ca_cert: Path | None) -> scrub.Scrub:
    """That of a server with these settings."""
    wanted = upkeep.Settings(heal_from=(f"https://127.0.0.1:{port}",), ca_cert=ca_cert)
    return upkeep.Upkeep(place.catalog, place.care, place.care, world.System(), wanted).scrub
