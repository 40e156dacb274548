"""Whole revisions out of answers that are cut anywhere (safety S20)."""

import itertools

from covey.store import etcd_watch
from covey.store.etcdpb import etcd_pb2 as pb


def answer(*revisions: int, fragment: bool = False) -> pb.WatchResponse:
    """An answer with one event per named revision, keys numbered through."""
    events = [
        pb.Event(kv=pb.KeyValue(key=b"%d" % next(_numbers), mod_revision=revision, create_revision=revision))
        for revision in revisions
    ]
    return pb.WatchResponse(events=events, fragment=fragment)


_numbers = itertools.count()


def fed(revisions: etcd_watch.Revisions, given: pb.WatchResponse) -> list[tuple[int, int]]:
    return [(batch.revision, len(batch.changes)) for batch in revisions.feed(given)]


def test_an_answer_that_is_not_cut_is_delivered_at_once() -> None:
    assert fed(etcd_watch.Revisions(5), answer(5, 5, 6)) == [(5, 2), (6, 1)]


def test_a_cut_revision_waits_for_its_rest() -> None:
    revisions = etcd_watch.Revisions(5)
    assert fed(revisions, answer(5, 6, 6, fragment=True)) == [(5, 1)]
    assert revisions.next == 6
    assert fed(revisions, answer(6, fragment=True)) == []
    assert fed(revisions, answer(6, 7, fragment=True)) == [(6, 4)]
    assert fed(revisions, answer(7)) == [(7, 2)]
    assert revisions.next == 8


def test_a_broken_stream_begins_the_cut_revision_anew() -> None:
    revisions = etcd_watch.Revisions(5)
    assert fed(revisions, answer(5, 6, 6, fragment=True)) == [(5, 1)]
    revisions.cut()
    assert revisions.next == 6
    assert fed(revisions, answer(6, 6, 6)) == [(6, 3)]


def test_a_cut_exactly_between_two_revisions() -> None:
    revisions = etcd_watch.Revisions(5)
    assert fed(revisions, answer(5, 5, fragment=True)) == []
    revisions.cut()
    assert revisions.next == 5, "whether it was whole was not known"
    assert fed(revisions, answer(5, 5)) == [(5, 2)]


def test_what_was_not_asked_for_is_dropped() -> None:
    revisions = etcd_watch.Revisions(5)
    assert fed(revisions, answer(3, 4, 5)) == [(5, 1)]
    assert fed(revisions, answer(5, 5)) == []
    assert fed(revisions, answer(6)) == [(6, 1)]


def test_progress_moves_nothing() -> None:
    """etcd before 3.4.25 may answer with a revision whose events are still to come."""
    revisions = etcd_watch.Revisions(5)
    assert fed(revisions, pb.WatchResponse(header=pb.Header(revision=90), watch_id=-1)) == []
    assert revisions.next == 5
    assert fed(revisions, answer(5)) == [(5, 1)]


def test_deletions_and_order_are_kept() -> None:
    given = pb.WatchResponse(
        events=[
            pb.Event(kv=pb.KeyValue(key=b"b", value=b"1", mod_revision=7, create_revision=4, lease=9)),
            pb.Event(type=pb.Event.DELETE, kv=pb.KeyValue(key=b"a", mod_revision=7)),
        ]
    )
    (batch,) = etcd_watch.Revisions(1).feed(given)
    assert [change.key for change in batch.changes] == ["b", "a"]
    assert batch.changes[0].kv is not None and batch.changes[0].kv.lease == 9
    assert batch.changes[1].kv is None
