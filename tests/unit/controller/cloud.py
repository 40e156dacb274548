"""Support: controllers over one memory store on real sockets, a registry that answers as told, and an agent by hand."""

import asyncio
import contextlib
import io
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import msgspec

from covey import errors, model, serve, settings, wire, world
from covey import server as servers
from covey.client import oci
from covey.controller import replica
from covey.store import base, memory

TEMPLATE = model.TemplateId("11111111-1111-4111-8111-111111111111")
DIGEST = "sha256:" + "a" * 64
S = TypeVar("S", bound=base.Store)


async def until(true: Callable[[], bool | Awaitable[bool]], limit_s: float = 90.0) -> None:
    """Wait for a condition, with a deadline."""
    end = time.monotonic() + limit_s
    while True:
        found = true()
        if found if isinstance(found, bool) else await found:
            return
        assert time.monotonic() < end, "the condition did not come true in time"
        await asyncio.sleep(0.01)


@dataclass
class FakeRegistry:
    """The template views for one template with its tags, oldest first; counts what it was asked."""

    tags: list[str] = field(default_factory=lambda: ["v1", "v2"])
    asked: list[str] = field(default_factory=list)
    delay_s: float = 0.0
    fails: bool = False
    size: tuple[int, int] = (0, 0)  # processors and MiB of its VMs
    server: servers.Server | None = None

    @property
    def url(self) -> str:
        assert self.server is not None
        return f"http://127.0.0.1:{self.server.port}"

    def _version(self, number: int) -> dict[str, Any]:
        view = oci.VersionView(
            tag=self.tags[number],
            number=number,
            digest=model.Digest("sha256:" + f"{number:x}" * 64),
            size=1000,
            arch=model.Arch.AMD64,
            creation_date=1_700_000_000,
            vcpu=self.size[0],
            ram_mb=self.size[1],
        )
        return dict(msgspec.to_builtins(view))

    def _item(self) -> dict[str, Any]:
        times = {"last_pull": 0, "last_push": 1_700_000_000, "creation_date": 1_700_000_000}
        return {"id": TEMPLATE, "name": "linux", "size": 1000 * len(self.tags), "arch": "amd64", **times}

    async def _list(self, call: serve.Call) -> object:
        id = call.query.get("id")
        if id is None:
            return [self._item()]
        if id not in (TEMPLATE, "linux"):
            raise errors.NotFound("Not found")
        return {**self._item(), "versions": [self._version(number) for number in range(len(self.tags))]}

    async def _info(self, call: serve.Call) -> object:
        self.asked.append(call.query["id"])
        await asyncio.sleep(self.delay_s)
        if self.fails:
            raise errors.Unavailable("the registry is not ready")
        if call.query["id"] not in (TEMPLATE, "linux"):
            raise errors.NotFound("Not found")
        tag, version = call.query.get("tag", ""), call.query.get("version", "")
        number = int(version) if version else len(self.tags) - 1
        if tag:
            if tag not in self.tags:
                raise errors.Refused(f"No such tag {tag}")
            number = self.tags.index(tag)
        return {**self._version(number), "id": TEMPLATE, "name": "linux"}

    async def _disk(self, _call: serve.Call) -> object:
        return {"total": 1 << 40, "free": 1 << 39}

    async def start(self) -> None:
        routes = [
            serve.Route("GET", "/registry/v2/vm", self._list),
            serve.Route("GET", "/registry/vm/info", self._info),
            serve.Route("GET", "/registry/disk", self._disk),
        ]
        self.server = servers.Server(routes, world=world.System())
        await self.server.start("127.0.0.1", 0)


@dataclass
class Api:
    """One controller as a client sees it: every answer must keep the envelope."""

    http: aiohttp.ClientSession

    async def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] = {}
    ) -> tuple[int, dict[str, Any]]:
        raw = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        data = io.BytesIO(raw) if raw and len(raw) > 1 << 20 else raw  # aiohttp warns of large plain bytes
        async with self.http.request(method, path, data=data, headers=dict(headers)) as got:
            content = await got.read()
            assert got.headers["Content-Type"] == "application/json"
            assert content.isascii()
            envelope = json.loads(content)
            assert set(envelope) - {"body"} == {"status", "message"}
            assert envelope["status"] in ("OK", "FAIL")
            assert isinstance(envelope["message"], str)
            assert envelope["status"] == "FAIL" or (got.status, envelope["message"]) == (200, "")
            assert envelope["status"] == "OK" or envelope["message"]
            if got.status == 503:
                assert "Retry-After" in got.headers
            return got.status, envelope

    async def ok(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] = {}) -> Any:
        status, envelope = await self.ask(method, path, body, headers)
        assert (status, envelope["status"]) == (200, "OK"), envelope
        return envelope.get("body")

    async def fail(self, method: str, path: str, body: Any = None, headers: Mapping[str, str] = {}) -> str:
        """The message of a business failure: HTTP 200 + FAIL."""
        status, envelope = await self.ask(method, path, body, headers)
        assert (status, envelope["status"]) == (200, "FAIL"), (status, envelope)
        return str(envelope["message"])

    async def start(self, **fields: Any) -> list[str]:
        return list(await self.ok("POST", "/api/v1/vm", {"vmid": TEMPLATE, **fields}))

    async def state(self, id: str) -> str:
        return str((await self.ok("GET", f"/api/v1/vm?id={id}"))["instance_state"])


FACTS = model.Facts(
    name="host-1",
    ip="10.0.0.1",
    arch=model.Arch.AMD64,
    hypervisor="synthetic",
    cpu_count=8,
    ram_mb=16_384,
    disk_bytes=1 << 40,
    slots=4,
    agent_version="0.1.0",
    hypervisor_version="1",
)


@dataclass
class Agent:
    """An agent by hand, over HTTP: it does exactly what the test says."""

    api: Api
    facts: model.Facts = FACTS
    host_key: str = "host-key-1"
    secret: str = "first-secret"
    joined: wire.Joined | None = None
    seen: wire.Seen = field(default_factory=wire.Seen)
    messages: int = 0
    seq: int = 0
    tag: str = ""

    @property
    def me(self) -> wire.Joined:
        assert self.joined is not None
        return self.joined

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Covey {self.me.node}.{self.me.session}.{self.secret}"}

    async def call(self, verb: str, body: Any) -> tuple[int, dict[str, Any]]:
        self.messages += 1
        headers = {} if verb == "join" else self._headers()
        return await self.api.ask("POST", f"/agent/v1/{verb}", msgspec.json.encode(body), headers)

    async def join(self, **changes: Any) -> wire.Joined:
        status, envelope = await self.try_join(**changes)
        assert (status, envelope["status"]) == (200, "OK"), (status, envelope)
        self.joined = msgspec.convert(envelope["body"], wire.Joined)
        self.seen = self.joined.seen
        return self.joined

    async def try_join(self, **changes: Any) -> tuple[int, dict[str, Any]]:
        return await self.call(
            "join", wire.Join(**{"host_key": self.host_key, "secret": self.secret, "facts": self.facts, **changes})
        )

    async def wanted(self, *, wait_s: float = 0.0, tag: str | None = None) -> wire.WantedState:
        ask = wire.Ask(seen=self.seen, messages=self.messages, tag=self.tag if tag is None else tag, wait_s=wait_s)
        status, envelope = await self.call("wanted", ask)
        assert status == 200, envelope
        state = msgspec.convert(envelope["body"], wire.WantedState)
        self.seen, self.tag = state.seen, state.tag
        return state

    async def launch(self, want: wire.Wanted, nonce: str = "n1") -> wire.Launched:
        ask = wire.LaunchAsk(
            instance=want.instance, epoch=want.epoch, nonce=nonce, seen=self.seen, messages=self.messages
        )
        status, envelope = await self.call("launch", ask)
        assert status == 200, envelope
        return msgspec.convert(envelope["body"], wire.Launched)

    async def report(self, *items: wire.Item, word: model.Word | None = None) -> wire.Reported:
        report = wire.Report(seen=self.seen, messages=self.messages, items=items, word=word)
        status, envelope = await self.call("report", report)
        assert status == 200, envelope
        return msgspec.convert(envelope["body"], wire.Reported)

    def item(self, want: wire.Wanted, event: wire.ReportEvent, **fields: Any) -> wire.Item:
        self.seq += 1
        return wire.Item(instance=want.instance, epoch=want.epoch, seq=self.seq, event=event, **fields)

    def word(self, *vms: model.VmSeen, **fields: Any) -> model.Word:
        return model.Word(
            node=self.me.node, session=self.me.session, messages=self.messages, at_ns=0, vms=vms, **fields
        )

    async def work(self, verb: wire.Verb) -> wire.Wanted:
        """The one thing wanted, once it is wanted with this verb."""
        end = time.monotonic() + 60
        while time.monotonic() < end:
            state = await self.wanted(wait_s=1.0)
            found = [want for want in state.wanted if want.verb == verb]
            if found:
                return found[0]
        raise AssertionError(f"nothing to {verb} came in time")


def vm_info(instance: str, **fields: Any) -> model.VmInfo:
    defaults: dict[str, Any] = {
        "uuid": instance,
        "name": "covey-vm",
        "ip": "192.168.64.7",
        "host_ip": "10.0.0.1",
        "cpu_cores": 2,
        "ram_mb": 4096,
        "forwards": (model.Forward(name="ssh", guest_port=22, host_port=10022, host_ip="10.0.0.1"),),
        "vnc_port": 5901,
        "vnc_password": "secret12",
        "started_ns": 1_700_000_000_000_000_000,
    }
    return model.VmInfo(**{**defaults, **fields})


@dataclass
class Cloud:
    """Some replicas on one store."""

    store: memory.Memory
    replicas: list[replica.Replica]
    apis: list[Api]
    registry: FakeRegistry

    @property
    def api(self) -> Api:
        return self.apis[0]


def chosen(**environ: str) -> settings.Controller:
    quick = {"COVEY_GRACEFUL_SHUTDOWN_TIMEOUT": "2s", "COVEY_SHUTDOWN_DELAY": "0s"}
    return settings.controller({"COVEY_LISTEN_ADDR": "127.0.0.1:0", **quick, **environ})


class Wraps(list[S]):
    """A `wrap` for `running`: what it made of each replica's store, in their order."""

    def __init__(self, made_of: Callable[[base.Store], S]) -> None:
        super().__init__()
        self._made_of = made_of

    def __call__(self, store: base.Store) -> S:
        self.append(self._made_of(store))
        return self[-1]


@contextlib.asynccontextmanager
async def running(
    replicas: int = 1,
    *,
    wrap: Callable[[base.Store], base.Store] = lambda store: store,
    clock: world.World | None = None,
    **environ: str,
) -> AsyncIterator[Cloud]:
    """A cloud that is ready when this is entered, and wholly gone when it is left."""
    clock = clock or world.System()
    registry = FakeRegistry()
    await registry.start()
    store = memory.Memory(clock)
    made = [
        replica.Replica(chosen(COVEY_ANKA_REGISTRY=registry.url, **environ), clock, wrap(store.client()))
        for _ in range(replicas)
    ]
    async with contextlib.AsyncExitStack() as stack:
        assert registry.server is not None
        stack.push_async_callback(registry.server.drain, 1.0)
        stack.push_async_callback(store.close)
        apis = []
        for one in made:
            stack.push_async_callback(one.stop)
            await one.start()
            url = f"http://127.0.0.1:{one.server.port}"
            http = await stack.enter_async_context(aiohttp.ClientSession(url, connector=aiohttp.TCPConnector(limit=0)))
            apis.append(Api(http))
        for api in apis:
            await until(lambda api=api: is_ready(api))  # type: ignore[misc]
        yield Cloud(store, made, apis, registry)


async def is_ready(api: Api) -> bool:
    return (await api.ask("GET", "/readyz"))[0] == 200
