"""Where the all-in-one service puts its parts: ports, URLs, and what is said when a place is taken."""

import socket
from pathlib import Path

import pytest

from covey import errors, settings, settings_reader, up


def chosen(data: Path, **flags: str) -> settings.Standalone:
    places = {"LISTEN_ADDR": "127.0.0.1:0", "REGISTRY_LISTEN_ADDRESS": "127.0.0.1:0", "DATA_DIR": str(data)}
    return settings.standalone({"COVEY_CONFIG": "/dev/null"}, {**places, **flags})


def test_picked_ports_are_kept(tmp_path: Path) -> None:
    first = up.places(chosen(tmp_path), etcd=True, registry=True)
    assert first.registry is not None
    ports = {
        first.controller.port,
        first.registry.port,
        *(int(url[-5:]) for url in (first.etcd_client, first.etcd_peer)),
    }
    assert len(ports) == 4
    assert up.places(chosen(tmp_path), etcd=True, registry=True) == first


def test_the_kernel_may_offer_a_port_twice(tmp_path: Path) -> None:
    offers = iter([port for port in (up.free_port("127.0.0.1") for _ in range(4)) for _ in range(2)])
    where = up.places(chosen(tmp_path), etcd=True, registry=True, offer=lambda host: next(offers))
    assert where.registry is not None
    assert len({where.controller.port, where.registry.port, where.etcd_client, where.etcd_peer}) == 4


def test_a_kept_port_that_is_taken_meanwhile_is_replaced(tmp_path: Path) -> None:
    first = up.places(chosen(tmp_path), etcd=True, registry=True)
    with socket.create_server(("127.0.0.1", first.controller.port)):
        second = up.places(chosen(tmp_path), etcd=True, registry=True)
    assert second.controller != first.controller
    assert second.etcd_client == first.etcd_client


def test_a_torn_ports_file_only_costs_other_ports(tmp_path: Path) -> None:
    (tmp_path / "ports.json").write_text('{"etcd-cl')
    assert up.places(chosen(tmp_path), etcd=True, registry=True).controller.port


def test_an_asked_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(errors.SettingError, match=f"{address} is taken.*--registry-listen-address"):
            up.places(chosen(tmp_path, REGISTRY_LISTEN_ADDRESS=address), etcd=True, registry=True)


def test_an_address_of_another_machine(tmp_path: Path) -> None:
    with pytest.raises(errors.SettingError, match=r"192\.0\.2\.1:\d+: cannot listen there"):
        up.places(chosen(tmp_path, LISTEN_ADDR="192.0.2.1:8090", ALLOW_ANONYMOUS="true"), etcd=False, registry=False)


def test_without_etcd_and_registry(tmp_path: Path) -> None:
    where = up.places(chosen(tmp_path), etcd=False, registry=False)
    assert (where.etcd_client, where.etcd_peer, where.registry) == ("", "", None)


@pytest.mark.parametrize(
    ("address", "url"),
    [("127.0.0.1:80", "http://127.0.0.1:80"), ("[::1]:80", "http://[::1]:80"), (":80", "http://127.0.0.1:80")],
)
def test_urls(address: str, url: str) -> None:
    assert up.base_url(settings_reader.address(address)) == url
