"""Until when certificates are good: in files and at servers."""

import asyncio
import datetime
import ssl
import subprocess
import time
from pathlib import Path

import pytest

from covey.controller import certificates
from tests.support import certificates as made
from tests.unit.controller import cloud


def end_by_openssl(path: Path) -> datetime.datetime:
    done = subprocess.run(
        ["openssl", "x509", "-in", path, "-noout", "-enddate"], capture_output=True, text=True, check=True
    )
    text = done.stdout.strip().removeprefix("notAfter=")
    return datetime.datetime.strptime(text, "%b %d %H:%M:%S %Y GMT").replace(tzinfo=datetime.UTC)


@pytest.mark.parametrize("days", ["1", "20000"])  # two forms of a date: up to 2049, and later
def test_the_date_is_the_one_that_openssl_reads(days: str, tmp_path: Path) -> None:
    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", tmp_path / "key")
    path = tmp_path / "cert.pem"
    words = ("openssl", "req", "-x509", *key, "-out", path, "-days", days, "-subj", "/CN=x")
    subprocess.run(words, capture_output=True, check=True)
    assert certificates.end_of(ssl.PEM_cert_to_DER_cert(path.read_text())) == end_by_openssl(path)


def test_what_is_no_certificate_is_a_value_error(tmp_path: Path) -> None:
    files = made.make(tmp_path)
    der = ssl.PEM_cert_to_DER_cert(files.ca.read_text())
    for broken in (b"", b"\x30", der[:20], der[:100], b"\x30\x03abc", bytes(200)):
        with pytest.raises(ValueError):
            certificates.end_of(broken)


async def test_files_and_servers_are_told_soonest_first(tmp_path: Path) -> None:
    files = made.make(tmp_path)
    both = tmp_path / "chain.pem"
    both.write_text(files.server_cert.read_text() + files.ca.read_text())
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(files.server_cert, files.server_key)
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    try:
        where = certificates.servers([f"https://127.0.0.1:{port}", "http://127.0.0.1:1"], "registry")
        wanted = {"SERVER_CERT": both, "ETCD_CERT": tmp_path / "missing.pem"}
        found = await certificates.Certificates(wanted, lambda: where, time.time_ns).look()
    finally:
        server.close()
        await server.wait_closed()
    assert {one.name for one in found} == {f"SERVER_CERT {both}", f"registry https://127.0.0.1:{port}"}
    first = min(end_by_openssl(files.ca), end_by_openssl(files.server_cert))
    assert found[0].expires == first.strftime("%Y-%m-%dT%H:%M:%SZ")
    assert all(89 * 86400 < one.left_s < 91 * 86400 for one in found)


async def test_a_controller_tells_of_its_own(tmp_path: Path) -> None:
    files = made.make(tmp_path)
    async with cloud.running(COVEY_CA_CERT=str(files.ca)) as house:
        shown = (await house.api.ok("GET", "/api/v1/health"))["certificates"]
        assert [one["name"] for one in shown] == [f"CA_CERT {files.ca}"]
