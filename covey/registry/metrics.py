"""What a registry tells Prometheus: its storage as it was at the last look, and what its processes have counted.

The figures of all processes of one server are told at one place (`covey.metrics`). Names begin with
``covey_registry_``; every one is in docs/operate/registry.md.
"""

from collections.abc import Callable, Iterator

from prometheus_client import core

from covey import metrics, settings, world
from covey.registry import figures, standing, tally

Count = tally.Count
_CLASSES = {
    Count.REQUESTS_1XX: "1xx",
    Count.REQUESTS_2XX: "2xx",
    Count.REQUESTS_3XX: "3xx",
    Count.REQUESTS_4XX: "4xx",
    Count.REQUESTS_5XX: "5xx",
}


class Metrics(metrics.Page):
    """Tells of one server; see `metrics.Page`."""

    def __init__(
        self,
        wanted: settings.Metrics,
        counts: tally.Tally,
        seen: Callable[[], figures.Figures],
        world: world.World,
    ) -> None:
        self._counts = counts
        self._seen = seen
        super().__init__(wanted, self._gather, world)

    async def _gather(self) -> Iterator[core.Metric]:
        return self.collect()

    def collect(self) -> Iterator[core.Metric]:
        yield from self._of_processes()
        yield from self._of_storage()
        seen = self._seen().replica
        if seen is not None:
            yield from _of_replica(seen)

    def _of_processes(self) -> Iterator[core.Metric]:
        sums = self._counts.sums()
        requests = core.CounterMetricFamily(
            "covey_registry_requests", "Requests answered, by class of status.", labels=["status"]
        )
        for count, name in _CLASSES.items():
            requests.add_metric([name], sums[count])
        yield requests
        serving = sum(self._counts.row(number)[Count.SERVING] != 0 for number in range(self._counts.rows))
        yield _gauge("workers", "Processes that serve.", serving)
        yield _gauge("connections", "Open connections.", sums[Count.CONNECTIONS])
        yield _counter("received_bytes", "Bytes of request bodies.", sums[Count.RECEIVED_BYTES])
        yield _counter("sent_bytes", "Bytes of answers that were sent whole.", sums[Count.SENT_BYTES])
        busy_s = sums[Count.BUSY_MICROSECONDS] / 1e6
        yield _counter("request_seconds", "Time from requests' first line to their answer's last byte.", busy_s)

    def _of_storage(self) -> Iterator[core.Metric]:
        seen = self._seen()
        yield _gauge("space_total_bytes", "Size of the storage.", seen.total_bytes)
        yield _gauge("space_free_bytes", "What uploads may still take, the reserve taken off.", seen.free_bytes)
        yield _gauge("pushes_possible", "1 when there is room for a push.", int(seen.pushes))
        yield _gauge("quarantined_blobs", "Damaged blobs that nobody has pushed again.", len(seen.quarantined))
        yield _gauge("trash_blobs", "Blobs that nothing needs and that wait to be deleted.", seen.trash_blobs)
        yield _gauge("trash_bytes", "Their size.", seen.trash_bytes)
        yield _gauge("collected_timestamp_seconds", "When a collection last ended; 0: never.", seen.collected_s)
        yield _gauge("collected_bytes", "What the last collection freed.", seen.collected_bytes)
        yield _gauge("scrubbed_timestamp_seconds", "When everything had last been read; 0: never.", seen.scrubbed_s)


def _of_replica(seen: standing.Standing) -> Iterator[core.Metric]:
    yield _gauge("replica_term", "The newest term of the push role that this server knows.", seen.term)
    yield _gauge("replica_holder", "1 on the server that holds the push role.", int(seen.mine))
    yield _gauge("replica_holder_reached", "1 when the push registry answers.", int(seen.reached))
    yield _gauge("replica_lag_seconds", "Since when something of the push registry's is lacking here.", seen.lag_s)
    yield _gauge("replica_lag_bytes", "Size of the blobs that are wanted and not here.", seen.lag_bytes)
    yield _gauge("replica_missing_blobs", "Blobs that are wanted and not here.", seen.missing_blobs)
    yield _gauge("replica_missing_entries", "Entries that could not be copied yet.", seen.missing_entries)
    yield _gauge("replica_lost_blobs", "Wanted blobs that no server of the set has.", seen.nowhere_blobs)
    yield _gauge("replica_aside_entries", "Entries that were set aside.", sum(seen.aside.values()))
    yield _gauge(
        "replica_accepted_entries", "Accepted entries kept in etcd for servers lacking them.", seen.accepted_entries
    )
    yield _gauge("replica_accepted_bytes", "Their size.", seen.accepted_bytes)
    yield _gauge("replica_rejected_blobs", "Blobs from peers that were not what they claim.", seen.rejected_blobs)


def _gauge(name: str, doc: str, value: float) -> core.Metric:
    return core.GaugeMetricFamily(f"covey_registry_{name}", doc, value=value)


def _counter(name: str, doc: str, value: float) -> core.Metric:
    return core.CounterMetricFamily(f"covey_registry_{name}", doc, value=value)
