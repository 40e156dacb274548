"""How a member of etcd's cluster begins: what is right follows from its disk and from what the others say. Pure.

                         nobody answers      a cluster that knows      a cluster that       a cluster that does
                                             it, never started         counts on its data   not know it
    no data on disk      new, once all       new or existing           rejoin               one sentence
                         others wait too
    data of that cluster run                 (a removed member: one    run                  one sentence
                                             sentence)
    data of another      run                 one sentence              one sentence         one sentence

A new cluster begins only when every member waits without data: one whose disk was lost waits for the others to tell
that it is known, and never begins a second cluster under the old one's name; nor does it vote with an empty log for
what it has forgotten. "Never started" is what a cluster says of a member without client addresses: it enters them as
soon as it runs.

A member that has just been started tells of less than it knows, until it has read its own log again, however long that
takes. So nothing follows from its list without `proved`: it has answered a linearizable read before it told the list,
which it cannot before it has applied all that was ever committed. Those who begin a cluster have no leader yet that
could prove anything; what they know instead is that all have waited together. Each writes that down where its data will
be, and tells it (`agreed`); the first starts when all have told it. So whoever sees others run already knows by itself
that it has its part in the beginning.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Listed(NamedTuple):
    """A member as a cluster knows it. `name` and `client_urls` are empty before it has started."""

    id: int
    name: str
    peer_urls: tuple[str, ...]
    client_urls: tuple[str, ...]
    learner: bool = False


class Heard(NamedTuple):
    """What an etcd says at another member's address. `doubt`: why the list may be older than what is true; "": it is
    proved."""

    url: str
    cluster: int
    members: tuple[Listed, ...]
    doubt: str = ""

    @property
    def proved(self) -> bool:
        return not self.doubt


class Disk(NamedTuple):
    """Whose data lies in the data directory."""

    cluster: int
    member: int


class Me(NamedTuple):
    name: str
    url: str  # for peers
    members: Mapping[str, str]  # name → peer URL, the same list on every host
    data_dir: str
    cluster: int  # the id that a cluster begun from this list has
    ids: frozenset[int]  # and those of its members
    agreed: bool = False  # all waited together once, and no data was written here since


class Run(NamedTuple):
    """Start etcd. `cluster`: its initial-cluster. `learner`: see that it gets its vote."""

    state: str  # new | existing
    cluster: Mapping[str, str]
    learner: bool = False


class Rejoin(NamedTuple):
    """The cluster counts on data that is not here: the member has to be entered anew."""

    id: int
    why: str


class Agree(NamedTuple):
    """All wait together: write that down and tell it."""


class Wait(NamedTuple):
    why: str


class Refuse(NamedTuple):
    why: str


Decision = Run | Rejoin | Agree | Wait | Refuse


def decide(me: Me, disk: Disk | None, heard: Sequence[Heard], waiting: Mapping[str, bool]) -> Decision:
    """`waiting`: those who have no data and run this same command on the same list, and whether they have agreed."""
    clusters = {one.cluster: one for one in heard}
    if len(clusters) > 1:
        first, second = sorted(clusters.values(), key=lambda one: one.url)[:2]
        return Refuse(
            f"{first.url} belongs to cluster {first.cluster:x} and {second.url} to cluster {second.cluster:x}:"
            " one of them has the data directory of an old cluster; move that away there and start it again"
        )
    if not heard:
        return _alone(me, disk, waiting)
    found = next((one for one in heard if one.proved), heard[0])
    return _without_data(me, found) if disk is None else _with_data(me, disk, found)


def _alone(me: Me, disk: Disk | None, waiting: Mapping[str, bool]) -> Decision:
    if disk is not None:
        return Run("existing", me.members)
    if len(me.members) % 2 == 0:
        return Refuse(
            f"--members names {len(me.members)}, and no cluster answers there that {me.name} could join: to begin one"
            " take one, three or five; an even number survives no more losses than one fewer"
        )
    others = {name: url for name, url in me.members.items() if name != me.name}
    missing = [f"{name} at {url}" for name, url in others.items() if name not in waiting]
    if missing:
        return Wait(f"a new cluster begins when all have come; waiting for {', '.join(missing)}")
    if not me.agreed:
        return Agree()
    return Run("new", me.members) if all(waiting[name] for name in others) else Wait("")


def _with_data(me: Me, disk: Disk, found: Heard) -> Decision:
    aside = f"move it away (mv {me.data_dir} {me.data_dir}.old) and start this again"
    if disk.cluster != found.cluster:
        return Refuse(
            f"{me.data_dir} holds data of cluster {disk.cluster:x}, but {found.url} belongs to cluster"
            f" {found.cluster:x}: if that is the right one, {aside}"
        )
    mine = next((one for one in found.members if one.id == disk.member), None)
    if mine is None and not found.proved:  # it may be needed for a majority; etcd finds out whether it was removed
        return Run("existing", me.members)
    if mine is None:
        return Refuse(
            f"{me.data_dir} holds the data of member {disk.member:x}, which was removed from the cluster at"
            f" {found.url}: {aside}"
        )
    return Run("existing", _initial(me, found), mine.learner)


def _without_data(me: Me, found: Heard) -> Decision:
    if not found.proved:
        if me.agreed and found.cluster == me.cluster:
            return Run("new", me.members)
        return Wait(
            f"the cluster at {found.url} cannot tell yet whether {me.name} has ever run ({found.doubt}); if a majority"
            " of its members is lost, restore a backup (covey etcd restore)"
        )
    mine = next((one for one in found.members if me.url in one.peer_urls), None)
    namesake = next((one for one in found.members if one.name == me.name), None)
    if mine is None and namesake is None:
        return Refuse(
            f"the cluster that answers at {found.url} has no member {me.name} at {me.url}: enter it first"
            f" (covey etcd add {me.name} --peer-url {me.url}, or covey etcd replace OLD_MEMBER …); or, if that is an"
            " old cluster, end it there and move its data directories away"
        )
    known = namesake or mine
    if known is not None and (mine is None or mine.name not in ("", me.name)):
        return Refuse(
            f"the cluster at {found.url} has {known.name} at {', '.join(known.peer_urls)}, not {me.name} at {me.url}:"
            f" to move it here run `covey etcd replace {known.name} --peer-url {me.url}` anywhere, then this again"
        )
    if mine is None:
        return Wait("")
    if not mine.client_urls:
        if found.cluster == me.cluster and {one.id for one in found.members} == me.ids:
            return Run("new", me.members)
        return Run("existing", _initial(me, found), mine.learner)
    return Rejoin(
        mine.id,
        f"the cluster at {found.url} counts on data of {me.name} that is not in {me.data_dir}: a lost disk, or the"
        " wrong --data-dir; if the data is lost add --rejoin, which removes the member and enters it anew",
    )


def _initial(me: Me, found: Heard) -> dict[str, str]:
    """initial-cluster for one who joins: exactly the members that are there, under any name."""
    names = {url: name for name, url in me.members.items()}
    initial: dict[str, str] = {}
    for one in found.members:
        name = me.name if me.url in one.peer_urls else one.name
        for url in one.peer_urls:
            initial[name or names.get(url, f"member-{one.id:x}")] = url
    return initial
