"""Out of touch and in touch again: one line each, however many nodes and attempts."""

from structlog import testing

from covey.agent import contact


def test_it_is_said_once_for_all_nodes() -> None:
    touch = contact.Contact()
    with testing.capture_logs() as said:
        for _attempt in range(3):
            for node in ("a", "b", "c"):
                touch.lost(node, "no controller answers")
        touch.found("a")
        touch.found("b")
        touch.lost("b", "no controller answers")  # it was just asking a controller that is going down
        touch.found("b")
        assert [line["log_level"] for line in said] == ["warning"]
        touch.found("c")
        touch.found("c")
        assert [line["event"] for line in said][1:] == ["in touch with the cloud again"]
        touch.lost("a", "no controller answers")
        assert len(said) == 3
