"""What runs while programs are exchanged: users who start, look at and terminate instances through the typed client.

The client asks another controller when one goes down, and repeats starts by their key: that is its duty, and all that
is forgiven. Whatever still reaches the user as a fault is counted, and so is an instance that ends otherwise than its
user wished.
"""

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from covey import errors, world
from covey.client import controller

USERS = 4
LOOKERS = 2
LOOK_S = 0.15  # between two looks of one user
PATIENCE_S = 150.0
CLIENT_S = 30.0  # for one answer: the machine may be busy
FINAL = ("Error", "Terminated", "")


@dataclass
class Users:
    """They run in a thread of their own between `begin` and `end`."""

    urls: Sequence[str]
    template: str
    asked: int = 0  # requests
    started: list[str] = field(default_factory=list)  # ids of instances that were seen Started
    ended: list[str] = field(default_factory=list)  # … and after that Terminated, as wished
    faults: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # id -> why the cloud says that it failed
    _ending: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def begin(self) -> None:
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()))
        self._thread.start()

    def end(self) -> None:
        """Whoever has an instance ends it first."""
        self._ending.set()
        if self._thread is not None:
            self._thread.join()

    async def _run(self) -> None:
        works = [*(self._use() for _ in range(USERS)), *(self._look() for _ in range(LOOKERS))]
        await asyncio.gather(*works)

    async def _use(self) -> None:
        """Start, wait until it runs, terminate, wait until it is gone; again and again."""
        async with controller.Controller(self.urls, world.System(), timeout_s=CLIENT_S) as cloud:
            while not self._ending.is_set():
                try:
                    await self._one_life(cloud)
                except (errors.CoveyError, TimeoutError) as error:
                    self.faults.append(f"{type(error).__name__}: {error}")
                    await asyncio.sleep(LOOK_S)

    async def _one_life(self, cloud: controller.Controller) -> None:
        self.asked += 1
        (id,) = await cloud.start(controller.Start(vmid=self.template, tag="v1"))
        async with asyncio.timeout(PATIENCE_S):
            state = await self._wait(cloud, id, ("Started", *FINAL))
            if state != "Started":
                self.failed[id] = (await cloud.instance(id)).message if state == "Error" else f"it is {state or 'gone'}"
            else:
                self.started.append(id)
            await asyncio.sleep(LOOK_S)
            self.asked += 1
            await cloud.terminate(id)
            await self._wait(cloud, id, ("Terminated", ""))
        self.ended.append(id)

    async def _wait(self, cloud: controller.Controller, id: str, states: Sequence[str]) -> str:
        """Look until its state is one of these; "" once it is forgotten."""
        while True:
            self.asked += 1
            try:
                state = (await cloud.instance(id)).instance_state
            except errors.NotFound:
                state = ""
            if state in states:
                return state
            await asyncio.sleep(LOOK_S)

    async def _look(self) -> None:
        """Lists, as a dashboard asks for them."""
        async with controller.Controller(self.urls, world.System(), timeout_s=CLIENT_S) as cloud:
            while not self._ending.is_set():
                self.asked += 3
                try:
                    await cloud.nodes()
                    await cloud.instances()
                    await cloud.status()
                except errors.CoveyError as error:
                    self.faults.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(LOOK_S)


def doubled(starts: Counter[str]) -> dict[str, int]:
    """Instances whose guests ran more than once."""
    return {id: times for id, times in starts.items() if times > 1}
