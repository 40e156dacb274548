"""A node that refused an instance is left alone with it for a while (safety S9: by the observer's clock alone)."""

from covey import model
from covey.decide import pauses
from tests.support import nouns

S = 1_000_000_000
A, B = model.NodeId("a"), model.NodeId("b")


def test_the_pause_doubles_up_to_half_a_minute() -> None:
    assert [pauses.pause_ns(count) // S for count in range(1, 11)] == [1, 2, 4, 8, 16, 30, 30, 30, 30, 30]
    assert pauses.pause_ns(10_000) == 30 * S


def test_a_pause_begins_when_the_refusal_is_first_seen() -> None:
    one = nouns.instance(refused=(A,))
    seen = pauses.observe({}, [one], now_ns=5 * S)
    later = pauses.observe(seen, [one], now_ns=5 * S + S // 2)
    assert later == seen
    assert pauses.paused(later, 6 * S - 1) == {one.id: (A,)}
    assert pauses.next_end_ns(later, 5 * S) == 6 * S
    assert pauses.paused(later, 6 * S) == {}
    assert pauses.next_end_ns(later, 6 * S) is None


def test_each_node_has_its_own_pause_and_its_own_count() -> None:
    one = nouns.instance(refused=(A, B, A))
    seen = pauses.observe({}, [one, nouns.instance()], now_ns=0)
    assert pauses.paused(seen, 0) == {one.id: (pauses.EVERYWHERE, A, B)}
    assert pauses.paused(seen, 1 * S) == {one.id: (A,)}
    assert pauses.paused(seen, 2 * S) == {}


def test_a_third_refusal_is_a_pause_everywhere_whoever_it_was_by() -> None:
    """Many nodes that lose one registry must not use up all attempts within seconds."""
    nodes = [model.NodeId(f"n{number}") for number in range(pauses.LIMIT)]
    now_ns, seen = 0, pauses.observe({}, [], 0)
    for count in range(1, pauses.LIMIT + 1):
        one = nouns.instance(id=model.InstanceId("i"), refused=tuple(nodes[:count]))
        seen = pauses.observe(seen, [one], now_ns)
        everywhere = pauses.left_ns(seen, one, now_ns).get(pauses.EVERYWHERE, 0)
        assert (everywhere > 0) == (count >= 3)
        now_ns += everywhere
        assert pauses.EVERYWHERE not in pauses.paused(seen, now_ns).get(one.id, ())
    assert now_ns > 20 * 60 * S, "a start outlives a common cause of twenty minutes"


def test_another_refusal_begins_a_new_pause_and_what_waits_no_more_is_forgotten() -> None:
    one = nouns.instance(refused=(A,))
    seen = pauses.observe({}, [one], now_ns=0)
    again = nouns.instance(id=one.id, refused=(A, A))
    seen = pauses.observe(seen, [again], now_ns=10 * S)
    assert pauses.paused(seen, 12 * S - 1) == {one.id: (A,)}
    assert pauses.observe(seen, [], now_ns=11 * S) == {}
