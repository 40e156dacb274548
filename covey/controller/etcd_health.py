"""etcd's members one by one, for /api/v1/health: whatever is ill, within a second and a half and without a fault.

Who the members are is asked of a majority; without one the list that was known last is told. What a member says of
itself it says alone. Members that the settings do not name are learnt of by those who look after the way to etcd
(`controller.members`), and are asked here from then on.
"""

import asyncio
import contextlib
import ssl
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

from covey import errors
from covey import world as worlds
from covey.controller import views
from covey.decide import troubles
from covey.store import base, commit_chore, etcd_admin, etcd_care, schema

T = TypeVar("T")

ASK_S = 1.5
_QUOTA_NS = 60_000_000_000  # a member's quota changes only when it is started anew


async def within(work: Awaitable[T], otherwise: T) -> T:
    """What comes in time; a fault is no answer."""
    with contextlib.suppress(TimeoutError, errors.StoreError):
        async with asyncio.timeout(ASK_S):
            return await work
    return otherwise


class Members:
    """`admin` None: this store has none."""

    def __init__(
        self, admin: etcd_admin.Admin | None, now_ns: Callable[[], int], tls: ssl.SSLContext | None = None
    ) -> None:
        self._admin = admin
        self._now_ns = now_ns
        self._tls = tls
        self._listed: Sequence[etcd_admin.Member] = ()
        self._refused = False  # newer releases of etcd tell a member's status to administrators only
        self._quotas: dict[str, tuple[int, int]] = {}  # address → bytes, and when it told them

    async def look(self) -> tuple[list[troubles.Member], list[str]]:
        """The members, and the names of raised alarms. No members when we may not ask them: that is no illness."""
        admin = self._admin
        if admin is None:
            return [], []
        addresses, self._refused = admin.addresses, False
        words, listed, alarms = await asyncio.gather(
            asyncio.gather(*(within(self._ask(admin, address), None) for address in addresses)),
            within(admin.members(), []),
            within(admin.alarms(), []),
        )
        self._listed = listed or self._listed
        quotas = {address: told[0] for address, told in self._quotas.items()}
        found = members(dict(zip(addresses, words, strict=True)), self._listed, quotas)
        return [] if self._refused else found, sorted({alarm.name for alarm in alarms})

    async def _ask(self, admin: etcd_admin.Admin, address: str) -> etcd_admin.Status:
        """One member's word; its quota is asked for only when it answers, and need not come in time."""
        try:
            word = await admin.status(address)
        except errors.Rejected:
            self._refused = True
            raise
        known, told_ns = self._quotas.get(address, (0, 0))
        if not known or self._now_ns() - told_ns >= _QUOTA_NS:
            asked = await within(asyncio.to_thread(etcd_care.quota_bytes, address, self._tls), 0)
            self._quotas[address] = (asked or known, self._now_ns())
        return word


def members(
    words: Mapping[str, etcd_admin.Status | None],
    listed: Sequence[etcd_admin.Member],
    quotas: Mapping[str, int] | None = None,
) -> list[troubles.Member]:
    """Everyone who is listed, and every address that we were given, by name."""
    said = [word for word in words.values() if word is not None]
    names = {one.id: one.name or f"{one.id:x}" for one in listed}
    newest = max((word.revision for word in said), default=0)
    furthest = max((word.raft_index for word in said), default=0)
    found = [
        troubles.Member(
            name=names.get(word.member_id, ""),
            address=word.address,
            answers=True,
            leads=word.leader_id == word.member_id,
            knows_leader=word.leader_id != 0,
            learner=word.learner,
            version=word.version,
            revision=word.revision,
            revisions_behind=newest - word.revision,
            raft_index=word.raft_index,
            raft_behind=furthest - word.raft_index,
            size_bytes=word.size_bytes,
            used_bytes=word.used_bytes,
            quota_bytes=(quotas or {}).get(word.address, 0),
            troubles=list(word.troubles),
        )
        for word in {word.member_id: word for word in said}.values()
    ]
    silent = {address for address, word in words.items() if word is None}
    found += _silent(silent, [one for one in listed if one.id not in {word.member_id for word in said}], bool(listed))
    return sorted(found, key=lambda one: (one.name, one.address))


def _silent(addresses: set[str], unheard: Sequence[etcd_admin.Member], known: bool) -> list[troubles.Member]:
    """Members that did not answer; an address that is none of theirs is a stranger's once all members are known."""
    found = []
    for one in unheard:
        own = [etcd_admin.target(url) for url in one.client_urls]
        at = next((address for address in own if address in addresses), next(iter(own), ""))
        addresses = addresses - set(own)
        found.append(troubles.Member(name=one.name or f"{one.id:x}", address=at, learner=one.learner))
    if known and len(addresses) <= len(unheard):  # reached by another address than they tell, as through a proxy
        return found
    return found + [troubles.Member(address=address, stranger=known) for address in sorted(addresses)]


async def last_backup(store: base.Store, world: worlds.World, interval_s: float) -> troubles.Backup | None:
    """The last scheduled one, by whichever controller. `interval_s` 0: this one makes none."""
    record, _ = await commit_chore.read(store, schema.Backup)
    if not (record.at_ns or record.trouble or interval_s):
        return None
    return troubles.Backup(
        at=views.date(record.at_ns) if record.at_ns else "",
        age_s=max(int((world.wall_ns() - record.at_ns) / 1e9), 0) if record.at_ns else 0,
        interval_s=int(interval_s),
        file=record.file,
        size_bytes=record.size_bytes,
        trouble=record.trouble,
    )
