"""How etcd's members are, for those who operate them: told in the body of a green /readyz (safety S25).

None of it keeps a controller from serving: with a space alarm reads go on, and a minority of members may be away. Each
look also learns of members that came (a replaced one at a new address), so that the way to etcd outlives those that the
settings name.
"""

import asyncio

from covey import errors
from covey.store import etcd_admin, etcd_care

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
        return etcd_care.troubles(await etcd_care.survey(admin))
    except errors.StoreError:
        return []  # then the controller is not ready, and says why
