"""Controllers are restarted one after the other under load, and no request fails."""

from pathlib import Path

import pytest

from tests.cluster import clients, conftest, fleet

RESTARTS = 5


@pytest.mark.timeout(500)
def test_no_request_fails_while_controllers_are_restarted_one_after_the_other(tmp_path: Path) -> None:
    with fleet.running(tmp_path, controllers=2, members=1, COVEY_SHUTDOWN_DELAY="3s") as cloud:
        node = cloud.node("alpha")
        with clients.asking(cloud.urls, cloud.template) as load:
            for restart in range(RESTARTS):
                going = cloud.controllers[restart % 2]
                code = going.running.end()
                assert code == 0, going.running.err
                going.program = None
                going.start()
                conftest.eventually(lambda url=going.url: url in load.balancer.ready)  # type: ignore[misc]
                assert node.id in {one["node_id"] for one in cloud.ask("GET", "/api/v1/node")["body"]}
        assert load.failures == []
        assert min(load.served[url] for url in cloud.urls) > 20, load.served
        started = load.started
        assert set(started) <= set(cloud.states()), "a start that was answered is gone"
        assert len(set(started)) == len(started) == len(cloud.states())
        assert cloud.shown(node)["state"] == "Active"
