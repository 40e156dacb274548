"""A ticket: a controller's leave to fetch the layers of one template from one node.

    <node that asks>.<nonce of the store's history>.<HMAC-SHA256 of both, and of the template's digest>

The key is made of what a controller and the serving node know of each other already, and nobody else: the digest of the
node's session secret. So a ticket is good for one serving node, in this one of its lives, and for one template; nothing
is stored for it, and no key travels. How old one may be is the serving node's to say, by its own clock: nonces change
each hour (safety S18), and no two clocks are compared (S9).
"""

import hashlib
import hmac
from typing import NamedTuple

_PARTS = 3


class Ticket(NamedTuple):
    """What a good one says."""

    asker: str
    nonce: str


def key_of(secret: str) -> bytes:
    """The key to tickets for the node whose session has this secret."""
    return key(hashlib.sha256(secret.encode()).hexdigest())


def key(secret_sha256: str) -> bytes:
    """The same, for whoever knows the secret's digest alone."""
    return hmac.digest(secret_sha256.encode(), b"covey neighbours 1", "sha256")


def issue(key: bytes, asker: str, template: str, nonce: str) -> str:
    """Leave for node `asker` to fetch layers of the template with this manifest digest."""
    return f"{asker}.{nonce}.{_mac(key, asker, template, nonce)}"


def check(key: bytes, text: str, template: str) -> Ticket | None:
    """What the ticket says, if it is one for this template."""
    parts = text.split(".")
    if len(parts) != _PARTS:
        return None
    asker, nonce, mac = parts
    if not hmac.compare_digest(_mac(key, asker, template, nonce).encode(), mac.encode()):
        return None
    return Ticket(asker, nonce)


def _mac(key: bytes, asker: str, template: str, nonce: str) -> str:
    return hmac.digest(key, "\n".join((asker, template, nonce)).encode(), "sha256").hex()
