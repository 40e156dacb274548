"""Whether the cloud answers, told once for all nodes of this process.

One line when the first of them is out of touch, one when the last of them is in touch again: hundreds of nodes in one
process lose the same controllers at the same moment, and each asks again every few seconds.
"""

from covey import observe

_log = observe.log("agent")


class Contact:
    """Shared by the agents of one process; `who` is whatever stands for one of them."""

    def __init__(self) -> None:
        self._away: set[object] = set()

    def lost(self, who: object, why: str) -> None:
        if not self._away:
            _log.warning("out of touch with the cloud; VMs run on", why=why)
        self._away.add(who)

    def found(self, who: object) -> None:
        if who in self._away:
            self._away.remove(who)
            if not self._away:
                _log.info("in touch with the cloud again")
