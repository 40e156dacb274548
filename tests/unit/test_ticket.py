"""A ticket is good for one serving node, in one of its lives, and for one template."""

import hashlib

from covey import ticket

TEMPLATE = "sha256:" + "a" * 64
KEY = ticket.key_of("the session's secret")


def test_a_controller_and_the_serving_node_make_the_same_key_of_what_each_knows() -> None:
    assert ticket.key(hashlib.sha256(b"the session's secret").hexdigest()) == KEY


def test_a_ticket_says_who_asks_and_when_it_was_given() -> None:
    text = ticket.issue(KEY, "node-1", TEMPLATE, "nonce")
    assert ticket.check(KEY, text, TEMPLATE) == ticket.Ticket("node-1", "nonce")


def test_what_was_changed_is_no_ticket() -> None:
    text = ticket.issue(KEY, "node-1", TEMPLATE, "nonce")
    asker, nonce, mac = text.split(".")
    for other in (f"node-2.{nonce}.{mac}", f"{asker}.later.{mac}", f"{asker}.{nonce}.{mac[:-1]}", f"{text}.", "", mac):
        assert ticket.check(KEY, other, TEMPLATE) is None
    assert ticket.check(KEY, text, "sha256:" + "b" * 64) is None
    assert ticket.check(ticket.key_of("its next session's"), text, TEMPLATE) is None
    assert ticket.check(KEY, f"{asker}.{nonce}.ä{mac[1:]}", TEMPLATE) is None
