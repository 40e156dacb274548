"""The balancers of deploy/, run in the lab as shipped: the programs that `make setup` unpacks, the files a user copies.

with lab_cloud.running(more=("lb",)) as cloud:
    haproxy = balancers.haproxy(cloud, "lb")      # its .url is the API behind it; port 8089 the registry
"""

import os
import shutil
from pathlib import Path

from tests.support import lab_cloud, netlab

DEPLOY = lab_cloud.ROOT / "deploy"
PAIR = ("lb1", "lb2")  # hosts of two balancers that share an address
VIRTUAL = f"{netlab.NETWORK}.200"


class NotInstalled(Exception):
    """The program is missing; a test must fail on this, never skip."""


def binary(name: str) -> str:
    """Where `make setup` puts it, else on the PATH or where daemons are."""
    ours = lab_cloud.ROOT / ".deps" / "balancers" / "bin" / name
    if ours.exists():
        return str(ours)
    if found := shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin"):
        return found
    raise NotInstalled(f"{name} is not there: run `make setup`")


def haproxy(cloud: lab_cloud.Cloud, host: str) -> lab_cloud.Program:
    """Ready: it answers for the cloud."""
    controllers = {f"COVEY_CONTROLLER_{n}": _place(c.url) for n, c in enumerate(cloud.controllers, 1)}
    registries = {f"COVEY_REGISTRY_{n}": _place(r.url) for n, r in enumerate(cloud.registries, 1)}
    program = cloud.start_other(
        f"{host}-haproxy",
        host,
        [binary("haproxy"), "-db", "-f", str(DEPLOY / "haproxy" / "haproxy.cfg")],
        f"http://{cloud.lab[host].ip}:8090",
        **controllers,
        **registries,
    )
    cloud.wait_ready(program)
    return program


def nginx(cloud: lab_cloud.Cloud, host: str) -> lab_cloud.Program:
    """Ready. Its folder is a copy of deploy/nginx with this cloud's addresses; the folders that the package makes below
    /var/lib are on the host's own small file system."""
    folder = Path(shutil.copytree(DEPLOY / "nginx", cloud.directory / f"{host}-nginx"))
    _write_servers(folder / "controllers.conf", [c.url for c in cloud.controllers])
    _write_servers(folder / "registries.conf", [r.url for r in cloud.registries])
    cloud.lab[host].run(["sh", "-c", "mount -t tmpfs none /var/lib && mkdir /var/lib/nginx"])
    settings = f"daemon off; user root; pid {folder}/pid; error_log stderr info;"
    program = cloud.start_other(
        f"{host}-nginx",
        host,
        [binary("nginx"), "-e", "stderr", "-c", str(folder / "nginx.conf"), "-g", settings],
        f"http://{cloud.lab[host].ip}:8090",
    )
    cloud.wait_ready(program)
    return program


class Pair:
    """Two hosts, each with haproxy and keepalived, that share a virtual address: `url` is the API behind it."""

    def __init__(self, cloud: lab_cloud.Cloud) -> None:
        self.cloud = cloud
        self.url = f"http://{VIRTUAL}:8090"
        self.haproxy = {host: haproxy(cloud, host) for host in PAIR}
        self.keepalived = {host: self._keepalived(host, which) for host, which in zip(PAIR, "ab", strict=True)}

    def _keepalived(self, host: str, which: str) -> lab_cloud.Program:
        folder = Path(shutil.copytree(DEPLOY / "keepalived", self.cloud.directory / f"{host}-keepalived"))
        one, other = (self.cloud.lab[name].ip for name in PAIR)
        addresses = {"VIRTUAL": f"{VIRTUAL}/24", "A": one, "B": other, "CARD": "eth0"}
        (folder / "addresses.conf").write_text("".join(f"${name}={value}\n" for name, value in addresses.items()))
        files = ["-f", folder / f"keepalived-{which}.conf", "-p", folder / "pid", "-r", folder / "vrrp.pid"]
        argv = [binary("keepalived"), "--dont-fork", "--log-console", "--log-detail", *map(str, files)]
        return self.cloud.start_other(f"{host}-keepalived", host, argv)

    def holders(self) -> list[str]:
        """Who has the address now."""
        return [host for host in PAIR if VIRTUAL in self.cloud.lab[host].run(["ip", "-o", "addr"]).stdout]

    def wait_both_well(self) -> str:
        """Until one holds the address, through which the cloud answers, and the other could take it; the holder."""
        self.cloud.wait_ready(*self.haproxy.values())
        self.cloud.until(lambda: len(self.holders()) == 1 and self.cloud.is_ready(self.url), what="one holder")
        (holder,) = self.holders()
        spare = self.keepalived[next(host for host in PAIR if host != holder)]
        self.cloud.until(lambda: spare.log().rfind("BACKUP STATE") > spare.log().rfind("FAULT STATE"), what="a spare")
        return holder


def _place(url: str) -> str:
    return url.removeprefix("http://")


def _write_servers(file: Path, urls: list[str]) -> None:
    """Put this cloud's addresses in place of the example's, each with every set of options that the example has."""
    lines = [line.split(maxsplit=2) for line in file.read_text().splitlines() if line.startswith("server ")]
    kinds = dict.fromkeys(options for _, _, options in lines)
    file.write_text("".join(f"server {_place(url)} {options}\n" for options in kinds for url in urls))
