"""One at a time: the threads of a history run in an order that a seed decides, and whoever is killed stays where it is.

A killed server does nothing more: its threads are parked at the very step, with no `finally` run, no file removed, as
after kill -9. They end when the history is over and its folder gone.
"""

import random
import threading
from collections.abc import Callable

_PATIENCE_S = 120.0
_FREEZE_SHARE = 0.03  # of turns at which somebody stands still for a while: others get far meanwhile


class Killed(BaseException):
    """Ends a parked thread, long after its server died."""


class Actor:
    """One call at one server. `outcome` is what it returned or raised, None while it runs or when it was killed."""

    def __init__(self, stage: "Stage", server: object, work: Callable[[], object]) -> None:
        self.server = server
        self.outcome: object = None
        self.done = False
        self.dead = False
        self.frozen_until = -1
        self._stage = stage
        self._work = work
        self.go = threading.Semaphore(0)
        self.thread = threading.Thread(target=self._main, daemon=True)

    def _main(self) -> None:
        try:
            self.go.acquire()
            if not self._stage.over:
                self.outcome = self._work()
        except Exception as error:
            self.outcome = error
        except BaseException:  # Killed: nobody waits for it any more
            return
        finally:
            self.done = not self.dead
            if not self.dead:
                self._stage.back.release()


class Stage:
    """`step` is called by actors wherever they touch what others see; `advance` by the one who directs."""

    def __init__(self, chance: random.Random, *, kills: int, kill_share: float, say: Callable[[str], None]) -> None:
        self.chance = chance
        self.over = False
        self.kills_left = kills
        self.steps = 0
        self.turns = 0
        self.back = threading.Semaphore(0)
        self._kill_share = kill_share
        self._say = say
        self._actors: list[Actor] = []
        self._parked: list[Actor] = []
        self._current: Actor | None = None

    def start(self, server: object, work: Callable[[], object]) -> Actor:
        actor = Actor(self, server, work)
        self._actors.append(actor)
        actor.thread.start()
        return actor

    def running(self) -> list[Actor]:
        return list(self._actors)

    def advance(self) -> Actor:
        """Let somebody go on to their next step; who it was."""
        if self.chance.random() < _FREEZE_SHARE:
            self.chance.choice(self._actors).frozen_until = self.turns + self.chance.randrange(10, 100)
        self.turns += 1
        actor = self.chance.choice([one for one in self._actors if one.frozen_until < self.turns] or self._actors)
        self._current = actor
        actor.go.release()
        if not self.back.acquire(timeout=_PATIENCE_S):
            raise TimeoutError("an actor does not come to its next step")
        self._current = None
        self._actors = [one for one in self._actors if not one.done and not one.dead]
        return actor

    def step(self, where: str, *, deadly: bool = True) -> None:
        """Called on an actor's thread, which holds the baton."""
        actor = self._current
        if actor is None or threading.current_thread() is not actor.thread:
            if self.over:
                raise Killed
            return  # the director itself, before or after the play
        self.steps += 1
        if deadly and self.kills_left and self.chance.random() < self._kill_share:
            self.kills_left -= 1
            self._say(f"killed at {where}")
            self._kill(actor.server)
        self.back.release()
        actor.go.acquire()
        if self.over:
            raise Killed

    def _kill(self, server: object) -> None:
        for one in self._actors:
            if one.server is server:
                one.dead = True
                self._parked.append(one)

    def end(self) -> None:
        """Let the dead go; the folder has to be gone by now."""
        self.over = True
        for one in (*self._parked, *self._actors):
            one.dead = True
            one.go.release()
        for one in (*self._parked, *self._actors):
            one.thread.join(_PATIENCE_S)
