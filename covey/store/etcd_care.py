"""The care of an etcd cluster, as procedures: what an operator does on day two, under load (safety S28).

    survey      who is there, who leads, who lags, how full everyone is, which alarms are raised
    compact     drop revisions that are older than 15 minutes by this process's own clock
    defragment  one member after the other, never the leader, never when that would stop writes
    add         one more member, which has no vote before it has caught up; one at a time, while all are well
    remove      a member that is no more; never one whose going would stop writes
    replace     a lost machine by another one; the newcomer has no vote before it has caught up

Each is safe to break off and to repeat: it looks first, and what is so already is not done again.
"""

import asyncio
import http.client
import re
import ssl
from collections.abc import Callable, Sequence
from typing import NamedTuple

from covey import errors
from covey import world as worlds
from covey.store import base, commit_chore, etcd, etcd_admin, schema

COMPACT_AGE_S = 15 * 60.0  # younger revisions are what watches resume from (safety S28)
LAG_ENTRIES = 1000  # a member this far behind the leader is not counted on
_PAUSE_S = 0.2
_PATIENCE_S = 60.0

Say = Callable[[str], None]


class Standing(NamedTuple):
    """One member. `status` None: it does not answer where we know it."""

    member: etcd_admin.Member
    status: etcd_admin.Status | None
    behind: int  # entries of the log that the leader has and it has not

    @property
    def well(self) -> bool:
        return self.status is not None and self.status.leader_id != 0 and self.behind < LAG_ENTRIES

    @property
    def leads(self) -> bool:
        return self.status is not None and self.status.leader_id == self.member.id

    @property
    def address(self) -> str:
        """Where we know it, else where it says that it is."""
        urls = [etcd_admin.target(url) for url in self.member.client_urls]
        return self.status.address if self.status is not None else next(iter(urls), "")

    @property
    def label(self) -> str:
        return self.member.name or f"{self.member.id:x} (never started)"


class Survey(NamedTuple):
    """The cluster as its members tell. `strangers`: addresses that we were given and no member answers at."""

    standings: tuple[Standing, ...]
    alarms: tuple[etcd_admin.Alarm, ...]
    strangers: tuple[str, ...]

    @property
    def leader(self) -> Standing | None:
        return next((one for one in self.standings if one.leads), None)

    @property
    def voters(self) -> list[Standing]:
        return [one for one in self.standings if not one.member.learner]

    def goes_on_without(self, *names: str) -> bool:
        """Whether those who are well, these left out, are still a majority of all voters."""
        well = [one for one in self.voters if one.well and one.member.name not in names]
        return len(well) > len(self.voters) // 2

    def named(self, name: str) -> Standing:
        """By name, or id in hexadecimal digits. Raises Rejected."""
        for one in self.standings:
            if name in (one.member.name, f"{one.member.id:x}") and name:
                return one
        known = ", ".join(one.label for one in self.standings)
        raise errors.Rejected(f"etcd has no member {name!r}; its members are {known}")


async def survey(admin: etcd_admin.Admin) -> Survey:
    """Ask everyone. Raises Unavailable without a quorum."""
    members, words = await admin.learn()
    said = {word.member_id: word for word in words.values() if word is not None}
    leading = next((word.raft_index for word in said.values() if word.member_id == word.leader_id), 0)
    members.sort(key=lambda one: one.name)
    standings = tuple(
        Standing(one, word := said.get(one.id), max(0, leading - word.raft_index) if word else 0) for one in members
    )
    silent = [address for address, word in words.items() if word is None]
    listed = {etcd_admin.target(url) for one in members for url in one.client_urls}
    strangers = tuple(address for address in silent if address not in listed)
    return Survey(standings, tuple(await admin.alarms()), strangers if _all_reached(standings) else ())


def _all_reached(standings: Sequence[Standing]) -> bool:
    """Only then an address that nobody answers at is certainly nobody's: members have several."""
    return all(one.status is not None for one in standings)


ALARMS = {
    "NOSPACE": "etcd is full: nothing can be started or changed until space is made and its alarm disarmed"
    " (covey etcd defrag, then covey etcd alarms --disarm)",
    "CORRUPT": "an etcd member holds other data than the rest: replace it (covey etcd replace)",
}


def troubles(found: Survey) -> list[str]:
    """What is wrong, one sentence each with its remedy."""
    told = [ALARMS.get(name, f"etcd has raised the alarm {name}") for name in sorted({a.name for a in found.alarms})]
    for one in found.standings:
        if not one.member.name:
            told.append(f"etcd member {one.label} at {', '.join(one.member.peer_urls)} was never started")
        elif one.status is None:
            told.append(f"etcd member {one.label} at {one.address} does not answer")
        elif not one.status.leader_id:
            told.append(f"etcd member {one.label} at {one.address} knows of no leader")
        elif not one.well:
            told.append(f"etcd member {one.label} at {one.address} is {one.behind:,} entries behind the leader")
        elif one.member.learner:
            told.append(f"etcd member {one.label} has no vote yet: it is catching up")
    told += [f"ETCD_ENDPOINTS names {address}, where no member is" for address in found.strangers]
    return told


async def last_backup(store: base.Store) -> schema.Backup | None:
    """The last scheduled backup; None when there was none."""
    record, _ = await commit_chore.read(store, schema.Backup)
    return record if record.at_ns or record.trouble else None


async def last_defrag(store: base.Store) -> schema.Defrag | None:
    """The last scheduled defragmentation; None when there was none."""
    record, _ = await commit_chore.read(store, schema.Defrag)
    return record if record.at_ns or record.trouble else None


async def disarm(admin: etcd_admin.Admin) -> None:
    """End all alarms. etcd raises them again at the next write when the cause is still there."""
    await admin.disarm()


def quota_bytes(address: str, tls: ssl.SSLContext | None) -> int:
    """The space quota that a member works with, from its metrics; 0 when it does not tell. Blocking."""
    connection = (
        http.client.HTTPConnection(address, timeout=3)
        if tls is None
        else http.client.HTTPSConnection(address, timeout=3, context=tls)
    )
    try:
        connection.request("GET", "/metrics")
        found = re.search(rb"^etcd_server_quota_backend_bytes (\S+)", connection.getresponse().read(), re.MULTILINE)
        return int(float(found[1])) if found else 0
    except (OSError, http.client.HTTPException, ValueError):
        return 0
    finally:
        connection.close()


# ---- space ---------------------------------------------------------------------------------------------------------


async def compact(store: etcd.Etcd | base.Store, world: worlds.World, say: Say, pause_s: float = 30.0) -> int:
    """Drop the history of everything up to now, once that is older than 15 minutes: the revision. The age is counted by
    this process's clock alone (safety S9), so it takes 15 minutes. What stands now is not touched."""
    revision = (await store.range(base.EVERYTHING)).revision
    begun_ns = world.boot_ns()
    say(f"The store is at revision {revision}; its history up to there is dropped in 15 minutes, when it is old enough")
    while (left_s := COMPACT_AGE_S - (world.boot_ns() - begun_ns) / 1e9) > 0:
        await asyncio.sleep(min(pause_s, left_s))
    await store.compact(revision)
    return revision


async def defragment(
    admin: etcd_admin.Admin, say: Say, names: Sequence[str] = (), *, force: bool = False, careful: bool = False
) -> int:
    """Give back the space of what was compacted, on one member after the other; how much that was. Raises Rejected
    before a step that would stop writes (a lone member stops them for the time that it takes), and with `careful`
    before any while a member is not well."""
    first = await survey(admin)
    chosen = [first.named(name) for name in names] or list(first.standings)
    freed = 0
    for one in sorted(chosen, key=lambda one: one.leads):
        now = await survey(admin)
        if careful and (ill := unwell(now)):
            raise errors.Rejected(f"member {one.label} is not defragmented while {ill} is not well")
        freed += await _defragment_one(admin, now, now.named(f"{one.member.id:x}"), say, force=force)
    return freed


def unwell(found: Survey) -> str:
    """A member that is away, lags, or does not vote yet; "" when there is none."""
    return next((one.label for one in found.standings if not one.well or one.member.learner), "")


async def _defragment_one(admin: etcd_admin.Admin, now: Survey, one: Standing, say: Say, *, force: bool) -> int:
    name = one.label
    if one.status is None:
        raise errors.Rejected(f"member {name} does not answer: bring it back first, or name the others")
    alone = len(now.voters) == 1
    if not alone and not force and not one.member.learner and not now.goes_on_without(one.member.name):
        raise errors.Rejected(
            f"member {name} is not defragmented: without it too few members are well to go on writing;"
            " bring the others back first (or --force)"
        )
    if one.leads and not alone:
        await give_up_lead(admin, now, one, say)
    before = one.status.size_bytes
    await admin.defragment(one.status.address)
    after = await _caught_up(admin, one.member.id)
    size = after.status.size_bytes if after.status else 0
    say(f"{name}: {before:,} bytes before, {size:,} bytes now")
    return before - size


async def give_up_lead(admin: etcd_admin.Admin, now: Survey, leader: Standing, say: Say) -> None:
    """Hand the lead to the best of the others, and wait until it has it. Raises Unavailable when there is none."""
    others = [one for one in now.voters if one.well and one is not leader]
    if not others:
        raise errors.Unavailable(f"nobody can take the lead from {leader.label}")
    heir = min(others, key=lambda one: one.behind)
    await admin.move_leader(heir.member.id)
    deadline = asyncio.get_running_loop().time() + _PATIENCE_S
    while asyncio.get_running_loop().time() < deadline:
        if all(word is None or word.leader_id == heir.member.id for word in (await admin.statuses()).values()):
            say(f"{heir.label} leads now")
            return
        await asyncio.sleep(_PAUSE_S)
    raise errors.Unavailable(f"{heir.label} was given the lead and does not lead after {_PATIENCE_S:.0f} s")


async def _caught_up(admin: etcd_admin.Admin, id: int) -> Standing:
    """Wait until a member answers and follows again."""
    deadline = asyncio.get_running_loop().time() + _PATIENCE_S
    while True:
        one = (await survey(admin)).named(f"{id:x}")
        if one.well:
            return one
        if asyncio.get_running_loop().time() > deadline:
            raise errors.Unavailable(f"member {one.label} does not follow after {_PATIENCE_S:.0f} s")
        await asyncio.sleep(_PAUSE_S)


# ---- members -------------------------------------------------------------------------------------------------------


async def remove(admin: etcd_admin.Admin, name: str, say: Say, *, force: bool = False) -> None:
    """Take a member out for good. Raises Rejected when the rest could not go on writing."""
    now = await survey(admin)
    one = now.named(name)
    rest = [other for other in now.voters if other is not one]
    well = sum(other.well for other in rest)
    if not rest:
        raise errors.Rejected(f"{one.label} is the only member: nothing would be left")
    if not one.member.learner and well <= len(rest) // 2 and not force:
        raise errors.Rejected(
            f"{one.label} stays: of the {len(rest)} others only {well} are well, too few to go on writing;"
            " bring them back first"
        )
    if one.leads:
        await give_up_lead(admin, now, one, say)
    await _gone(admin, one.member.id)
    say(f"{one.label} is no member any more; etcd ends there by itself, its data directory stays")


async def _gone(admin: etcd_admin.Admin, id: int) -> None:
    """Remove a member; a lost reply is looked after in the list."""
    try:
        await admin.remove_member(id)
    except (errors.Unsure, errors.Rejected):
        if any(one.id == id for one in await admin.members()):
            raise


async def welcome(admin: etcd_admin.Admin, peer_urls: Sequence[str]) -> etcd_admin.Member:
    """Enter a newcomer without a vote; one that is entered and was never started is taken as it is."""
    for one in await admin.members():
        if set(one.peer_urls) == set(peer_urls) and not one.name:
            return one
    try:
        return await admin.add_member(peer_urls)
    except errors.Unsure:
        found = [one for one in await admin.members() if set(one.peer_urls) == set(peer_urls)]
        if not found:
            raise
        return found[0]


async def add(
    admin: etcd_admin.Admin, name: str, peer_url: str, say: Say, how: Say, *, wait_s: float
) -> etcd_admin.Member:
    """One more member, called `name`. `how` is told once it can be started. Raises Rejected where that would weaken the
    cluster; Unavailable when it does not come in `wait_s`: repeat the command then, it goes on where it was."""
    now = await survey(admin)
    there = next((one for one in now.standings if peer_url in one.member.peer_urls), None)
    if there is None:
        _may_grow(now, name)
        newcomer = await welcome(admin, [peer_url])
    elif there.member.name in ("", name):
        newcomer = there.member
    else:
        raise errors.Rejected(f"the member at {peer_url} is {there.label}, not {name}")
    if newcomer.learner:
        await _wait_for_vote(admin, newcomer, peer_url, say, how, wait_s)
    voters = len((await survey(admin)).voters)
    say(f"{voters} members vote now" + _even(voters))
    return newcomer


def _may_grow(now: Survey, name: str) -> None:
    if any(one.member.name == name for one in now.standings):
        raise errors.Rejected(f"there is a member {name} at another address: to move it use covey etcd replace {name}")
    for one in now.standings:
        if one.member.learner:
            raise errors.Rejected(
                f"{one.label} at {', '.join(one.member.peer_urls)} has no vote yet: members are added one at a time;"
                f" start it, or take it out (covey etcd remove {one.member.name or f'{one.member.id:x}'})"
            )
        if not one.well:
            raise errors.Rejected(
                f"{one.label} is not well: one more member would make the majority larger, not safer; bring it back, or"
                f" put the new machine in its place (covey etcd replace {one.label})"
            )


def _even(voters: int) -> str:
    if voters % 2:
        return ""
    return f"; {voters} survive no more losses than {voters - 1}, and need one more to be there: add another one soon"


async def _wait_for_vote(
    admin: etcd_admin.Admin, newcomer: etcd_admin.Member, peer_url: str, say: Say, how: Say, wait_s: float
) -> None:
    say(f"A member at {peer_url} is awaited; it has no vote until it has caught up")
    how(peer_url)
    await promote(admin, newcomer.id, wait_s)
    say(f"The member at {peer_url} has caught up and votes now")


async def replace(
    admin: etcd_admin.Admin, name: str, peer_url: str, say: Say, how: Say, *, wait_s: float
) -> etcd_admin.Member:
    """Put a new machine in the place of member `name`. One that is lost goes first; one that still works stays until
    the newcomer votes. `how` is told once the newcomer can be started. Raises Unavailable when it does not come in
    `wait_s`: repeat the command then, it goes on where it was."""
    now = await survey(admin)
    old = next((one for one in now.standings if name in (one.member.name, f"{one.member.id:x}")), None)
    same_place = old is not None and peer_url in old.member.peer_urls
    if old is not None and (not old.well or same_place):
        if same_place and old.well:
            raise errors.Rejected(
                f"{name} runs well at {peer_url}: to move it name another --peer-url; to begin it anew stop it first"
            )
        await remove(admin, f"{old.member.id:x}", say)
        old = None
    newcomer = next((one for one in await admin.members() if peer_url in one.peer_urls), None)
    if newcomer is None:
        if old is None and len(now.voters) % 2:  # nobody is missing: a name that was mistyped, not a second try
            now.named(name)
        newcomer = await welcome(admin, [peer_url])
    if newcomer.learner:
        await _wait_for_vote(admin, newcomer, peer_url, say, how, wait_s)
    if old is not None and old.member.id != newcomer.id:
        await remove(admin, f"{old.member.id:x}", say)
    return newcomer


async def promote(admin: etcd_admin.Admin, id: int, wait_s: float) -> None:
    """Wait until a learner has caught up and give it its vote; harmless when it has one. Raises Unavailable."""
    deadline = asyncio.get_running_loop().time() + wait_s
    why = "it has not started"
    while True:
        try:
            found = next((one for one in await admin.members() if one.id == id), None)
            if found is None:
                raise errors.Rejected(f"member {id:x} was removed")
            if not found.learner:
                return
            if found.name:
                await admin.promote_member(id)
                return
        except errors.Rejected as refusal:
            if "learner" not in str(refusal):
                raise
            why = str(refusal)
        except (errors.Unavailable, errors.Unsure) as error:
            why = str(error)
        if asyncio.get_running_loop().time() > deadline:
            raise errors.Unavailable(f"the new member has no vote after {wait_s:.0f} s: {why}")
        await asyncio.sleep(_PAUSE_S * 2)
