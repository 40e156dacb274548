"""TLS, client certificates and logins towards etcd, end to end; what does not fit is one clear sentence."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster import conftest
from tests.support import certificates, etcd, ran

pytestmark = pytest.mark.timeout(480)
LOGIN = {"COVEY_USE_ETCD_LOGIN": "true", "COVEY_ETCD_USERNAME": "root", "COVEY_ETCD_PASSWORD": "s3cret"}


@contextlib.contextmanager
def secured(folder: Path) -> Iterator[tuple[etcd.Cluster, dict[str, str]]]:
    """Three members that ask for a client certificate and a login, and what a client needs to be set."""
    files = certificates.make(folder / "tls")
    with etcd.running(3, security=files) as cluster:
        cluster.ctl("user", "add", "root:s3cret")
        cluster.ctl("role", "add", "covey")
        cluster.ctl("role", "grant-permission", "covey", "readwrite", "--from-key", "")
        cluster.ctl("user", "add", "covey:pw")
        cluster.ctl("user", "grant-role", "covey", "covey")
        cluster.ctl("user", "grant-role", "root", "root")
        cluster.ctl("auth", "enable")
        cluster.login = "root:s3cret"
        yield (
            cluster,
            {
                "COVEY_ETCD_ENDPOINTS": ",".join(f"https://{endpoint}" for endpoint in cluster.endpoints),
                "COVEY_ETCD_CA_CERT": str(files.ca),
                "COVEY_ETCD_CERT": str(files.client_cert),
                "COVEY_ETCD_CERT_KEY": str(files.client_key),
            },
        )


def covey(*words: object, env: dict[str, str]) -> ran.Ran:
    return conftest.covey("etcd", *words, **env)


def sentence(env: dict[str, str], *words: object) -> str:
    """The one line with which the command fails."""
    found = covey(*(words or ("status",)), env={"COVEY_ETCD_REQUEST_TIMEOUT": "4s", **env})
    assert found.code == 1, found
    (line,) = found.err.splitlines()
    assert line.startswith("covey: ")
    return line


def test_a_controller_and_the_commands_work_with_certificates_and_logins(tmp_path: Path) -> None:
    with secured(tmp_path) as (cluster, env):
        url = f"http://127.0.0.1:{etcd.free_port()}"
        words = ("controller", "--listen-addr", url.removeprefix("http://"), "--allow-empty-registry")
        mine = {**env, "COVEY_USE_ETCD_LOGIN": "true", "COVEY_ETCD_USERNAME": "covey", "COVEY_ETCD_PASSWORD": "pw"}
        controller = conftest.Program(*words, **mine)
        try:
            conftest.eventually(lambda: conftest.ask(f"{url}/readyz")[0] == 200)
            assert conftest.ask(f"{url}/api/v1/node")[1]["body"] == []
            found = covey("status", env={**env, **LOGIN})
            assert found.code == 0 and found.out.count("follower") == 2 and found.out.count("2.0 GiB") == 3, found
            found = covey("backup", tmp_path / "b.db", env={**env, **LOGIN})
            assert found.code == 0 and "no Covey cloud" not in found.out, found
            found = covey("defrag", env={**env, **LOGIN})
            assert found.code == 0, found
            assert "may not do this" in sentence(mine, "backup", tmp_path / "c.db")
            conftest.eventually(lambda: conftest.ask(f"{url}/readyz")[0] == 200)
            assert cluster.ctl("get", "--prefix", "/covey/controller/", "--keys-only").strip()
        finally:
            controller.end()


def test_what_does_not_fit_is_one_clear_sentence(tmp_path: Path) -> None:
    other = certificates.make(tmp_path / "other")
    with secured(tmp_path) as (cluster, env):
        assert "ETCD_CA_CERT" in sentence({**env, "COVEY_ETCD_CA_CERT": str(other.ca)})
        bare = {name: value for name, value in env.items() if "ETCD_CERT" not in name}
        assert "asks for a client certificate: set ETCD_CERT and ETCD_CERT_KEY" in sentence(bare)
        strange = {"COVEY_ETCD_CERT": str(other.client_cert), "COVEY_ETCD_CERT_KEY": str(other.client_key)}
        line = sentence({**env, **strange})
        assert "refuses the client certificate" in line and str(other.client_cert) in line
        assert "do not belong together" in sentence({**env, "COVEY_ETCD_CERT_KEY": str(other.client_key)})
        plain = ",".join(cluster.endpoints)
        assert "speaks TLS: set USE_ETCD_TLS=true" in sentence({"COVEY_ETCD_ENDPOINTS": plain})
        wrong = sentence({**env, **LOGIN, "COVEY_ETCD_PASSWORD": "guessed"})
        assert "etcd refuses the login of 'root': check ETCD_USERNAME and ETCD_PASSWORD" in wrong
        assert "guessed" not in wrong

        words = ("controller", "--listen-addr", "127.0.0.1:0", "--allow-empty-registry")
        controller = conftest.Program(*words, **env, **{**LOGIN, "COVEY_ETCD_PASSWORD": "guessed"})
        try:
            controller.wait_until_said("etcd refuses the login of 'root'")
        finally:
            controller.end()


def test_tls_where_none_is_spoken_and_a_login_where_none_is_asked_for() -> None:
    with etcd.running() as cluster:
        env = {"COVEY_ETCD_ENDPOINTS": cluster.endpoints[0]}
        assert "speaks no TLS: unset USE_ETCD_TLS" in sentence({**env, "COVEY_USE_ETCD_TLS": "true"})
        assert "etcd has no logins switched on" in sentence({**env, **LOGIN})
    assert "connection refused; is it running, and is ETCD_ENDPOINTS right?" in sentence(env)
