"""What a controller tells Prometheus."""

from pathlib import Path

import aiohttp
from prometheus_client import parser

from covey import server
from covey.controller import metrics
from tests.unit.controller import cloud

DOCS = Path(__file__).resolve().parents[3] / "docs" / "operate" / "controllers.md"
Labels = dict[str, str]


async def scrape(url: str) -> dict[str, list[tuple[Labels, float]]]:
    async with aiohttp.ClientSession() as http, http.get(url) as answer:
        assert answer.status == 200 and answer.content_type == "text/plain"
        text = await answer.text()
    found: dict[str, list[tuple[Labels, float]]] = {}
    for family in parser.text_string_to_metric_families(text):
        for sample in family.samples:
            if not sample.name.endswith("_created"):
                found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


async def test_requests_and_the_cloud_are_told_and_every_figure_is_documented() -> None:
    async with cloud.running(
        COVEY_ENABLE_METRICS="true", COVEY_METRICS_PORT="0", COVEY_METRICS_PATH="/figures"
    ) as house:
        await house.api.start()
        for _ in range(3):
            await house.api.ok("GET", "/api/v1/vm")
        await house.api.ask("GET", "/api/v1/no-such-thing-as-this")
        page = house.replicas[0].metrics
        assert page is not None
        told = await scrape(f"http://127.0.0.1:{page.port}/figures")
        requests = {tuple(labels.values()): value for labels, value in told["covey_controller_requests_total"]}
        assert requests["GET", "/api/v1/vm", "200"] == 3
        assert requests["POST", "/api/v1/vm", "200"] == 1
        assert requests["other", "other", "404"] == 1
        assert told["covey_controller_ready"] == [({}, 1)]
        assert told["covey_controller_queue_length"] == [({}, 1)]
        assert ({"state": "Scheduling"}, 1) in told["covey_controller_instances"]
        assert ({"state": "Terminated"}, 0) in told["covey_controller_instances"], "what is not there is told as 0"
        assert 0 <= told["covey_controller_etcd_read_seconds"][0][1] < 60
        text = DOCS.read_text()
        assert [name for name in told if name.removeprefix("covey_controller_") not in text] == []


async def test_without_the_setting_nothing_listens_and_nothing_is_counted(house: cloud.Cloud) -> None:
    assert house.replicas[0].metrics is None


def test_a_client_that_asks_for_ever_new_paths_fills_no_memory() -> None:
    counts = metrics.Requests([])
    for number in range(1000):
        counts.served(server.Served("GET", f"/{number}", 404, 0, 0, 0.001))
    samples = [sample for family in counts.families() for sample in family.samples]
    assert [(sample.labels["path"], round(sample.value, 3)) for sample in samples] == [("other", 1000), ("other", 1.0)]
