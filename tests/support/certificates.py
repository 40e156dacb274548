"""Certificates for tests, made by the `openssl` program: one authority, a server for 127.0.0.1, and clients."""

import pathlib
import subprocess

from tests.support import etcd

DAYS = "90"  # shorter ones are told as troubles


def make(directory: pathlib.Path) -> etcd.Security:
    """An authority, a server's pair and a client's pair below `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    ca, ca_key = directory / "ca.pem", directory / "ca.key"
    _run("req", "-x509", *_new_key(ca_key), "-out", str(ca), "-days", DAYS, "-subj", "/CN=test authority")
    server = _signed(directory, "server", "subjectAltName=IP:127.0.0.1,DNS:localhost")
    client = _signed(directory, "client", "extendedKeyUsage=clientAuth")
    return etcd.Security(ca, *server, *client)


def _signed(directory: pathlib.Path, name: str, extension: str) -> tuple[pathlib.Path, pathlib.Path]:
    """A pair signed by the authority in `directory`."""
    certificate, key, request = (directory / f"{name}.{end}" for end in ("pem", "key", "csr"))
    extensions = directory / f"{name}.ext"
    extensions.write_text(extension + "\n")
    _run("req", "-new", *_new_key(key), "-out", str(request), "-subj", f"/CN={name}")
    authority = ("-CA", str(directory / "ca.pem"), "-CAkey", str(directory / "ca.key"), "-CAcreateserial")
    _run(
        "x509",
        "-req",
        "-in",
        str(request),
        *authority,
        "-days",
        DAYS,
        "-extfile",
        str(extensions),
        "-out",
        str(certificate),
    )
    return certificate, key


def _new_key(path: pathlib.Path) -> tuple[str, ...]:
    return ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-keyout", str(path))


def _run(*arguments: str) -> None:
    done = subprocess.run(["openssl", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
