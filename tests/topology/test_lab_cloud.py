"""The lab's cloud is what the other tests take it for: a cloud that starts VMs, and whose parts fail as told."""

from tests.support import lab_cloud


def test_a_cloud_in_the_lab_works_and_its_parts_can_fail() -> None:
    with lab_cloud.running(controllers=2, nodes=2) as cloud:
        first, second = cloud.controllers
        started = cloud.ask(f"{first.url}/api/v1/vm", "POST", {"vmid": cloud.template, "count": 2})
        assert started.body["status"] == "OK", started
        for id in started.body["body"]:
            while cloud.state(id, second.url) != "Started":
                assert cloud.state(id, second.url) in ("Scheduling", "Pulling", "Started")
        assert len(cloud.etcd_values("/covey/")) > 4

        leader = cloud.leader()
        leader.kill()
        assert cloud.leader() is not leader
        first.kill()
        assert cloud.ask(f"{first.url}/readyz").status == 0
        first.start()
        cloud.wait_ready(first)
        cloud.lab.isolate("c2")
        assert cloud.ask(f"{second.url}/readyz", timeout_s=1).status == 0
        red = cloud.until(lambda: cloud.ask("http://127.0.0.1:8090/readyz", source="c2").status == 503)
        assert red
        cloud.lab.heal()
        cloud.wait_ready(second)
