"""Out of touch and in touch again: one line each, however many nodes and attempts."""

import pytest

from covey.agent import contact

LOST, FOUND = "out of touch with the cloud", "in touch with the cloud again"


def test_it_is_said_once_for_all_nodes(capsys: pytest.CaptureFixture[str]) -> None:
    touch = contact.Contact()
    said: list[str] = []

    def lines() -> list[str]:
        printed = capsys.readouterr()  # a logger that is kept writes where its program was told to, others to stdout
        said.extend(text for line in (printed.out + printed.err).splitlines() for text in (LOST, FOUND) if text in line)
        return said

    for _attempt in range(3):
        for node in ("a", "b", "c"):
            touch.lost(node, "no controller answers")
    touch.found("a")
    touch.found("b")
    touch.lost("b", "no controller answers")  # it was just asking a controller that is going down
    touch.found("b")
    assert lines() == [LOST]
    touch.found("c")
    touch.found("c")
    assert lines() == [LOST, FOUND]
    touch.lost("a", "no controller answers")
    assert lines() == [LOST, FOUND, LOST]
