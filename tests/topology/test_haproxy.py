"""Three controllers behind the shipped haproxy, at 40 requests a second: what clients notice of each outage.

Figures are bounds, at least three times what was measured (docs/operate/balancers.md) and less than what would be
without the mechanism that is tested; a busy machine's own slowness (`noise_s`) is added to times.
"""

import time
import urllib.error
import urllib.request

import pytest

from tests.support import lab_cloud, open_load, outages

Kind = open_load.Kind
PATIENCE_S = 30.0
SLOWEST_GET_S = 5.0  # measured 1; the balancer gives up after 11
WRITES_RESUME_S = 8.0  # measured 1.2 to 1.5
OUTAGE_S = 10.0
RED_S = 8.0  # two, and those of a busy machine


def _run(cloud: lab_cloud.Cloud, fault: str, label: str, **spans: float) -> open_load.Load:
    """Clients are more patient than the balancer: what it says counts, however busy the machine is."""
    url, happens = cloud.others[0].url, outages.FAULTS[fault]
    return outages.run(cloud, url, happens, label=label, mix=open_load.MIXED, patience_s=PATIENCE_S, **spans)


def test_a_killed_controller_costs_nothing_but_what_it_held_without_a_key(behind_haproxy: lab_cloud.Cloud) -> None:
    load = _run(behind_haproxy, "controller kill -9", "killed")
    assert load.failed(Kind.GET) == []
    assert [shot for shot in load.failed(Kind.KEYED) if not load.in_flight_at_fault(shot)] == []
    assert [shot for shot in load.failed(Kind.KEYLESS) if not load.in_flight_at_fault(shot)] == []
    load.settle()
    load.assert_exactly_once()


def test_a_frozen_controller_fails_no_read(behind_haproxy: lab_cloud.Cloud) -> None:
    load = _run(behind_haproxy, "controller SIGSTOP", "frozen")
    assert load.failed(Kind.GET) == []
    assert load.figures(Kind.GET).longest_s < SLOWEST_GET_S + load.noise_s()
    assert {shot.status for shot in load.failed(Kind.KEYLESS)} <= {502, 504}  # it may have been carried out
    load.settle()
    load.assert_exactly_once()


def test_a_controller_cut_off_from_etcd_is_left_out(behind_haproxy: lab_cloud.Cloud) -> None:
    load = _run(behind_haproxy, "controller cut off from etcd", "cut-off")
    assert load.failed(Kind.GET) == []
    load.settle()
    load.assert_exactly_once()


def test_all_controllers_restart_in_turn_and_nobody_notices(behind_haproxy: lab_cloud.Cloud) -> None:
    load = _run(behind_haproxy, "rolling restart", "rolling", under_s=0)
    assert {kind: load.failed(kind) for kind in Kind} == {kind: [] for kind in Kind}
    load.assert_exactly_once()


@pytest.mark.parametrize("fault", ["etcd leader kill -9", "etcd leader SIGSTOP", "etcd leader isolated"])
def test_without_etcd_s_leader_answers_are_late_or_honest(behind_haproxy: lab_cloud.Cloud, fault: str) -> None:
    """What fails says so (503: nothing was done), and writes go on while that member is still away."""
    load = _run(behind_haproxy, fault, fault.replace(" ", "-"), under_s=OUTAGE_S)
    assert {shot.status for kind in Kind for shot in load.failed(kind)} <= {502, 503, 504}
    assert load.resumed_s(Kind.KEYED) < WRITES_RESUME_S + load.noise_s()
    load.settle()
    load.assert_exactly_once()


def test_a_controller_without_quorum_turns_red_and_tells_no_old_news(behind_haproxy: lab_cloud.Cloud) -> None:
    """Asked directly, while the others go on writing: what it shows is never older than what was answered before."""
    cloud = behind_haproxy
    minority, other = cloud.controllers[0], cloud.controllers[1]
    with outages.FAULTS["controller cut off from etcd"](cloud):
        red = cloud.lab["load"].calling(lambda: _seconds_until_red(minority.url))
        refused, number = 0, 0
        while refused < 5:
            number += 1
            assert number < 200, "it goes on answering"
            body = {"vmid": cloud.template, "name": f"news-{number}"}
            started = cloud.ask(f"{other.url}/api/v1/vm", "POST", body)
            assert started.status == 200, started
            (id,) = started.body["body"]
            shown = cloud.ask(f"{minority.url}/api/v1/vm?id={id}")
            refused += shown.status != 200
            assert shown.status != 200 or shown.body["status"] == "OK", "it does not know what was accepted before"
        assert red() < RED_S


def _seconds_until_red(url: str) -> float:
    begun = time.monotonic()
    while time.monotonic() - begun < 60:
        try:
            urllib.request.urlopen(f"{url}/readyz", timeout=2).close()  # noqa: S310 (our own server)
        except urllib.error.HTTPError as error:
            error.close()
            break
        except OSError:  # no answer in time
            continue
        time.sleep(0.02)
    return time.monotonic() - begun
