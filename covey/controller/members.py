"""How etcd's members are, for those who operate them: told in the body of a green /readyz (safety S25).

None of it keeps a controller from serving: with a space alarm reads go on, and a minority of members may be away.
"""

import asyncio
from collections.abc import Mapping

from covey import errors
from covey.store import etcd_admin

_LOOK_S = 10.0


class Members:
    """`troubles` as last looked; empty while there is nobody to ask."""

    def __init__(self, admin: etcd_admin.Admin | None) -> None:
        self.troubles: list[str] = []
        self._admin = admin

    async def run(self) -> None:
        """Look again and again."""
        while self._admin is not None:
            self.troubles = await look(self._admin)
            await asyncio.sleep(_LOOK_S)
        await asyncio.Event().wait()  # this store has no members


async def look(admin: etcd_admin.Admin) -> list[str]:
    """What is wrong with the members, in sentences."""
    try:
        return [*_alarms(await admin.alarms()), *_silent(await admin.statuses())]
    except errors.StoreError:
        return []  # then the controller is not ready, and says why


def _alarms(alarms: list[etcd_admin.Alarm]) -> list[str]:
    found = sorted({alarm.name for alarm in alarms})
    return [_ALARMS.get(name, f"etcd has raised the alarm {name}") for name in found]


_ALARMS = {
    "NOSPACE": "etcd is full: nothing can be started or changed until space is made and its alarm disarmed",
    "CORRUPT": "an etcd member holds other data than the rest: replace it",
}


def _silent(words: Mapping[str, etcd_admin.Status | None]) -> list[str]:
    """Members that do not answer, or answer that something is wrong with them."""
    found = []
    for address, word in words.items():
        if word is None:
            found.append(f"etcd member {address} does not answer")
        elif not word.leader_id:
            found.append(f"etcd member {address} knows of no leader")
    return found
