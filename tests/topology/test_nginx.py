"""The same behind the shipped nginx. It has no active check, so it learns of an outage from users' requests: reads are
repeated and thus late, and a request without a key may fail. deploy/nginx/README.md says so."""

from tests.support import lab_cloud, open_load, outages

Kind = open_load.Kind
PATIENCE_S = 30.0


def _run(cloud: lab_cloud.Cloud, fault: str, label: str, **spans: float) -> open_load.Load:
    """Clients are more patient than the balancer: what it says counts, however busy the machine is."""
    url, happens = cloud.others[0].url, outages.FAULTS[fault]
    return outages.run(cloud, url, happens, label=label, mix=open_load.MIXED, patience_s=PATIENCE_S, **spans)


def test_a_killed_controller_fails_no_read(behind_nginx: lab_cloud.Cloud) -> None:
    load = _run(behind_nginx, "controller kill -9", "killed")
    assert load.failed(Kind.GET) == []
    load.settle()
    load.assert_exactly_once()


def test_a_frozen_controller_makes_reads_late(behind_nginx: lab_cloud.Cloud) -> None:
    load = _run(behind_nginx, "controller SIGSTOP", "frozen", under_s=5)
    assert load.failed(Kind.GET) == []
    assert load.figures(Kind.GET).longest_s < 3.0 + 5.0 + load.noise_s()  # proxy_read_timeout, and its repeat
    load.settle()
    load.assert_exactly_once()


def test_all_controllers_restart_in_turn(behind_nginx: lab_cloud.Cloud) -> None:
    """A controller that goes down refuses new connections, which nginx tries elsewhere."""
    load = _run(behind_nginx, "rolling restart", "rolling", under_s=0)
    assert load.failed(Kind.GET) == []
    load.settle()
    load.assert_exactly_once()
