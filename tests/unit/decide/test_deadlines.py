"""Time-outs are observed, not computed (safety S9)."""

from covey.decide import deadlines, retention

Kind = deadlines.Kind
Thing = deadlines.Thing
S = 1_000_000_000
SPANS = deadlines.Spans(terminated_ns=60 * S)
THING = Thing(Kind.TERMINATED, "a")


def ripe(*looks: tuple[int, int | None]) -> list[Thing]:
    """What is ripe after seeing THING at these (second, revision); revision None: this controller was not ready."""
    observed: deadlines.Observed = {}
    now = 0
    for second, revision in looks:
        now = second * S
        observed = {} if revision is None else deadlines.observe(observed, [(THING, revision)], now)
    return deadlines.ripe(observed, SPANS, now)


def test_ripe_when_the_same_revision_stood_for_the_whole_span() -> None:
    assert ripe((0, 5), (59, 5)) == []
    assert ripe((0, 5), (60, 5)) == [THING]


def test_a_change_starts_the_span_anew() -> None:
    assert ripe((0, 5), (59, 6), (100, 6)) == []
    assert ripe((0, 5), (59, 6), (119, 6)) == [THING]


def test_a_controller_that_was_not_ready_starts_anew() -> None:
    """Safety S9: late, never early."""
    assert ripe((0, 5), (30, None), (61, 5)) == []
    assert ripe((1000, 5)) == []


def test_what_goes_away_is_forgotten() -> None:
    observed = deadlines.observe({}, [(THING, 5)], 0)
    observed = deadlines.observe(observed, [], 30 * S)
    observed = deadlines.observe(observed, [(THING, 5)], 61 * S)
    assert deadlines.ripe(observed, SPANS, 61 * S) == []


def test_patience_leaves_the_first_turn_to_another() -> None:
    observed = deadlines.observe({}, [(THING, 5)], 0)
    assert deadlines.ripe(observed, SPANS, 60 * S, patience_ns=S) == []
    assert deadlines.ripe(observed, SPANS, 61 * S, patience_ns=S) == [THING]


def test_every_kind_has_a_span() -> None:
    assert all(SPANS.of(kind) > 0 for kind in Kind)
    assert SPANS.of(Kind.UNACKNOWLEDGED) == 3 * S
    assert SPANS.of(Kind.ERROR) == 24 * 3600 * S


def test_history_is_compacted_only_where_it_is_older_than_a_quarter_of_an_hour() -> None:
    """Safety S28."""
    samples = [(10, 0), (20, 60 * S), (30, 900 * S)]
    assert retention.compact_to(samples, 899 * S) == 0
    assert retention.compact_to(samples, 900 * S) == 10
    assert retention.compact_to(samples, 1000 * S) == 20
    assert retention.trimmed(samples, 1000 * S) == [(20, 60 * S), (30, 900 * S)]


def test_only_a_view_that_is_not_older_knows_that_a_text_is_useless() -> None:
    assert retention.unreferenced(users=0, mod_revision=5, seen_revision=5)
    assert not retention.unreferenced(users=0, mod_revision=5, seen_revision=4)
    assert not retention.unreferenced(users=1, mod_revision=5, seen_revision=9)


def test_remembered_requests_beyond_the_limit() -> None:
    """Safety S17."""
    assert retention.beyond_limit(200_000) == 0
    assert retention.beyond_limit(200_007) == 7
