"""Which of several equal servers a client talks to: health, quickness and preference, as rules without I/O or clock.

Each client has an order of its own in which it likes the servers, drawn from `salt` (rendezvous hashing, Thaler and
Ravishankar 1998): over many clients every server is the first choice of as many. A client uses the first one that is

    well       nothing failed since it last answered, and it is not clearly slower than another one
    settled    it has been well for a while

So the load spreads without anybody counting it. When a server ends, those who liked it best go to their second choice,
evenly over the rest. When it is back, each of them returns after a while of its own: no stampede, and the load is even
again. Somebody who is well where he is never moves for a small gain.

What failed is left alone for a pause that grows with each failure in a row, up to a limit, and must then prove itself
in a look (`due`, `looked`: a question nobody waits for) before calls go there: a recovered server is used again, and no
call pays for finding out that one is still away. When nothing is well, calls go to what failed least.

Answer times of calls that do not wait for news on purpose are averaged. Where that gets long, all servers are looked
at, and only looks are compared with looks: a slow store makes all servers slow, and is no reason to move.

Where much is moved (`near`), servers that are clearly farther come after the near ones, of which there may be several:
all are looked at in the beginning and now and then.

Servers that the cloud names (`learn`) come before those that were given: these are the last resort.
"""

import hashlib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

PAUSE_S = 1.0  # after the first failure; doubled with each one in a row
PAUSE_LIMIT_S = 15.0
SETTLE_LIMIT_S = 15.0  # a recovered server is used again within so long, by each client at a time of its own
_AT_ONCE = 1e-9  # a look that is due since long ago
COMPARE_S = 60.0  # between two comparisons: slow answers mean much to do, and looks of a whole fleet add to it
FORGIVEN_S = 60.0  # well for so long: earlier failures no longer count
BUSY_LIMIT_S = 3.0  # no wish of a server to be left alone counts for longer
_SLOW_S = 0.25  # answers that take longer on average are worth comparing
_CLEARLY = 3.0  # times slower (and a little), to be left
_ABOUT_AS_QUICK = 1.5  # times slower (and a little), to be used again
_LITTLE_S = 0.05
_FAR_TIMES = 3.0  # so many times longer than at the nearest takes a look at a far one …
_FAR_S = 0.005  # … and a little
_NEAR_AGAIN_S = 600.0  # between two looks for that
_NEWEST = 0.3  # weight of the newest answer time in the average
LATE_S = 1.0  # a call that has no answer for so long is worth a second copy
_LATE_TIMES = 3.0  # ... or for so many times as long as usual
_COPIES = 3.0  # second copies that may be sent in a row
_COPIES_PER_CALL = 0.1  # ... and in the long run: overload must not feed itself


@dataclass(slots=True)
class _Server:
    """One server as this client knows it. Times are seconds of the caller's clock."""

    liked: float  # the lower, the better liked
    last_resort: bool = False
    failed: bool = False
    proven: bool = True  # False: named by the cloud, and never reached from here yet
    failures: int = 0  # in a row, forgiven after a while
    well_s: float = 0.0  # since when
    paused_s: float = 0.0  # until then a failure is one with the failure before
    look_s: float = 0.0  # when a look is due; 0 while none is needed
    settled_s: float = 0.0  # from when on it may be chosen before others
    busy_until_s: float = 0.0  # by its own word
    slow: bool = False
    usual_s: float = 0.0  # average answer time of calls; 0: not known
    glance_s: float = 0.0  # answer time of the last look; 0: not known

    @property
    def well(self) -> bool:
        return self.proven and not self.failed


class Balance:
    """What one client thinks of its servers. `salt` "": it likes them in the order in which they were given."""

    def __init__(self, given: Sequence[str], learnt: Sequence[str] = (), salt: str = "", *, near: bool = False) -> None:
        self._given = tuple(dict.fromkeys(given))
        self._salt = salt
        self._near = near
        self._servers: dict[str, _Server] = {}
        self._urls: tuple[str, ...] = ()
        self._copies = _COPIES
        self._compare_s = 0.0  # when servers may be compared again
        self._order: list[str] | None = None  # as worked out last, while nothing has changed …
        self._order_until_s = 0.0  # … and nobody has settled
        self._learn(learnt, proven=True)

    @property
    def urls(self) -> tuple[str, ...]:
        return self._urls

    def learn(self, urls: Iterable[str]) -> None:
        """The cloud's servers now, in place of those it named before. New ones must prove themselves first."""
        self._learn(urls, proven=False)

    def _learn(self, urls: Iterable[str], *, proven: bool) -> None:
        before, learnt = self._servers, tuple(dict.fromkeys(urls))
        self._order = None
        self._servers = {}
        for index, url in enumerate(dict.fromkeys((*learnt, *self._given))):
            known = before.get(url) or _Server(
                liked=0.0, proven=proven or url in self._given, look_s=_AT_ONCE if self._near else 0.0
            )
            known.liked = _fraction(self._salt, url) if self._salt else float(index)
            known.last_resort = bool(learnt) and url not in learnt
            self._servers[url] = known
        self._urls = tuple(self._servers)

    # ---- choosing --------------------------------------------------------------------------------------------------

    def order(self, now_s: float) -> list[str]:
        """All servers, the one to use now first. Not to be written to."""

        if self._order is not None and now_s < self._order_until_s:
            return self._order

        nearest_s = min((one.glance_s for one in self._servers.values() if one.well and one.glance_s), default=0.0)
        far_s = _FAR_TIMES * nearest_s + _FAR_S if self._near else math.inf

        def key(url: str) -> tuple[float, ...]:
            one = self._servers[url]
            if not one.well:
                return (2.0, one.failures, one.last_resort, one.liked)
            return (float(one.slow or one.settled_s > now_s), one.glance_s > far_s, one.last_resort, one.liked)

        later = [one.settled_s for one in self._servers.values() if one.settled_s > now_s]
        self._order, self._order_until_s = sorted(self._servers, key=key), min(later, default=math.inf)
        return self._order

    def well(self, url: str) -> bool:
        """Whether a call may go there without need."""
        one = self._servers.get(url)
        return one is not None and one.well

    def busy_for_s(self, now_s: float) -> float:
        """How long to leave all of them alone: more than 0 only while every one of them asked for it."""
        least_s = math.inf
        for one in self._servers.values():
            if one.busy_until_s <= now_s:
                return 0.0
            least_s = min(least_s, one.busy_until_s)
        return least_s - now_s

    # ---- second copies ---------------------------------------------------------------------------------------------

    def late_after_s(self, url: str) -> float:
        """When a call to this server that has no answer is worth a second copy."""
        one = self._servers.get(url)
        return max(LATE_S, _LATE_TIMES * one.usual_s) if one is not None else LATE_S

    def take_copy(self) -> bool:
        """Whether one more second copy may be sent now."""
        if self._copies < 1:
            return False
        self._copies -= 1
        return True

    # ---- what happened ---------------------------------------------------------------------------------------------

    def answered(self, url: str, now_s: float, took_s: float | None = None) -> None:
        """It answered a call. `took_s` None: the call waited for news, so its time says nothing."""
        one = self._servers.get(url)
        if one is None:
            return
        self._copies = min(_COPIES, self._copies + _COPIES_PER_CALL)
        one.busy_until_s = 0.0
        if took_s is not None:
            one.usual_s = _average(one.usual_s, took_s)
        self._recover(url, one, now_s)
        if one.usual_s > _SLOW_S:
            self._compare(now_s)

    def failed(self, url: str, now_s: float) -> None:
        """It could not be reached, broke off, or let a call wait while another one answered."""
        one = self._servers.get(url)
        if one is None or (one.failed and now_s < one.paused_s):
            return
        if one.well and now_s - one.well_s > FORGIVEN_S:
            one.failures = 0
        one.failed, one.failures = True, one.failures + 1
        self._order = None
        pause_s = min(PAUSE_LIMIT_S, PAUSE_S * 2 ** min(one.failures - 1, 10))
        one.paused_s = one.look_s = now_s + pause_s * (1 + _fraction(self._salt, url, one.failures)) / 2

    def busy(self, url: str, now_s: float, wish_s: float) -> None:
        """It said that it cannot serve now, and to be left alone for `wish_s`."""
        self.failed(url, now_s)
        one = self._servers.get(url)
        if one is not None:
            one.busy_until_s = now_s + min(wish_s, BUSY_LIMIT_S)

    # ---- looks -----------------------------------------------------------------------------------------------------

    def due(self, now_s: float) -> list[str]:
        """Servers to look at now; each is named once, until the look's outcome is told or long overdue."""
        if len(self._servers) < 2:
            return []  # there is no choice: calls find out
        found = [url for url, one in self._servers.items() if (one.look_s > 0 or not one.well) and one.look_s <= now_s]
        for url in found:
            self._servers[url].look_s = now_s + PAUSE_LIMIT_S
        return found

    def looked(self, url: str, now_s: float, took_s: float | None) -> None:
        """The outcome of a look: how long the answer took; None when it failed."""
        one = self._servers.get(url)
        if one is None:
            return
        if took_s is None:
            self.failed(url, now_s)
            return
        one.look_s, one.glance_s = self._next_look_s(now_s), took_s
        self._recover(url, one, now_s)
        for name, any_one in self._servers.items():
            if any_one.glance_s:
                self._judge(name, any_one, now_s)

    def _next_look_s(self, now_s: float) -> float:
        """At a server that is well; 0: when there is a need."""
        return now_s + _NEAR_AGAIN_S * (1 + _fraction(self._salt, "near")) / 2 if self._near else 0.0

    def _recover(self, url: str, one: _Server, now_s: float) -> None:
        if one.well:
            return
        self._order = None
        needed = not any(other.well for other in self._servers.values())
        one.failed, one.proven, one.look_s, one.well_s = False, True, self._next_look_s(now_s), now_s
        one.settled_s = now_s if needed else self._settles_s(url, now_s)

    def _settles_s(self, url: str, now_s: float) -> float:
        return now_s + SETTLE_LIMIT_S * _fraction(self._salt, url, "settles")

    def _compare(self, now_s: float) -> None:
        """Answers got slow: look at all of them, the one in use too, but not again and again."""
        if now_s < self._compare_s:
            return
        self._compare_s = now_s + COMPARE_S * (1 + _fraction(self._salt, "compares")) / 2
        for one in self._servers.values():
            if one.well and (self._near or one.look_s == 0.0):
                one.look_s, one.glance_s = now_s, 0.0

    def _judge(self, url: str, one: _Server, now_s: float) -> None:
        """Leave a server that is clearly slower than the quickest other; use it again once it is about as quick."""
        others = (other for name, other in self._servers.items() if name != url)
        best_s = min((other.glance_s for other in others if other.well and other.glance_s), default=0.0)
        if best_s == 0.0:
            return
        self._order = None
        if one.slow and one.glance_s < _ABOUT_AS_QUICK * best_s + _LITTLE_S / 2:
            one.slow, one.usual_s, one.look_s = False, 0.0, self._next_look_s(now_s)
            one.settled_s = self._settles_s(url, now_s)
        elif one.slow or (one.usual_s > _SLOW_S and one.glance_s > _CLEARLY * best_s + _LITTLE_S):
            one.slow, one.look_s = True, now_s + PAUSE_LIMIT_S


def _average(before_s: float, newest_s: float) -> float:
    return newest_s if before_s == 0.0 else before_s + _NEWEST * (newest_s - before_s)


def _fraction(*what: object) -> float:
    """A number from 0 to 1 that follows from `what`, as good as random."""
    digest = hashlib.blake2b("\0".join(map(str, what)).encode(), digest_size=8).digest()
    return int.from_bytes(digest) / 2**64
