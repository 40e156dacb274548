"""A small controller that speaks the agents' protocol and misbehaves on request; and waiting for a condition.

It keeps what agents say as facts (`items`), grants a launch once per (instance, epoch) and says again what it granted
to the same session and nonce. `lose` names paths whose next answer is thrown away after it took effect; `break_` maps
a path to the HTTP status its calls get.
"""

import asyncio
import contextlib
import time
from collections.abc import Callable, Sequence

import msgspec
from aiohttp import web

from covey import model, wire
from covey.decide import abridged
from tests.support import nouns

Said = wire.ReportEvent
CLOUD = "cloud-of-tests"
HISTORY = "history-1"


class Controller:
    def __init__(self) -> None:
        self.url = ""
        self.revision = 10
        self.history = HISTORY
        self.hold = False
        self.counter = 0
        self.secret = ""
        self.host_key = ""
        self.ttl_s = 30.0
        self.heartbeat_s = 0.5
        self.registries: tuple[str, ...] = ()
        self.wants: dict[tuple[str, int], wire.Wanted] = {}
        self.scripts: dict[str, str] = {}
        self.launches: list[wire.LaunchAsk] = []
        self.granted: dict[tuple[str, int], tuple[int, str]] = {}
        self.deny: set[str] = set()
        self.items: list[wire.Item] = []
        self.words: list[model.Word] = []
        self.reports: list[wire.Report] = []
        self.takes_reports = True  # False: as an older version, which does not look at what rides along with a poll
        self.abridges = True  # False: as an older version, which names in each answer everything that is wanted
        self.answered: list[wire.WantedState] = []
        self.forged_tag = ""  # said once, instead of the right one, in an answer that leaves something out
        self.polls: list[wire.Ask] = []
        self.joins: list[wire.Join] = []
        self.questions: list[model.Question] = []  # shown until they are answered
        self.answers: list[wire.Answer] = []
        self.adopts: list[wire.Adopt] = []
        self.called: set[str] = set()
        self.messages: list[int] = []
        self.lose: list[str] = []
        self.break_: dict[str, int] = {}
        self.refuse = ""  # joins are refused with these words
        self.controllers: tuple[str, ...] = ()  # announced to agents
        self.before_launch_answer: Callable[[], None] = lambda: None
        self.before_adopt: Callable[[wire.Adopt], None] = lambda _told: None
        self._numbers: set[tuple[int, str, int, int]] = set()
        self._shown: dict[tuple[str, int], tuple[wire.Wanted, int]] = {}  # as it is, and since which revision
        self._changed = asyncio.Event()
        self._runner: web.AppRunner | None = None

    # ---- what tests do ---------------------------------------------------------------------------------------------

    async def start(self) -> None:
        app = web.Application(client_max_size=1 << 25)
        app.router.add_post("/agent/v1/{call}", self._handle)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1, handler_cancellation=True)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        assert site._server is not None
        port = site._server.sockets[0].getsockname()[1]  # type: ignore[attr-defined]
        self.url = f"http://127.0.0.1:{port}"

    async def stop(self) -> None:
        if self._runner is not None:
            await self._runner.cleanup()

    def want(self, verb: wire.Verb, instance: str, epoch: int = 1, *, spec: model.Spec | None = None) -> None:
        """Say this of the VM from now on."""
        self.wants[instance, epoch] = wire.Wanted(
            instance=model.InstanceId(instance),
            epoch=epoch,
            verb=verb,
            spec=None if verb is wire.Verb.DESTROY else spec or nouns.spec(),
            decision=model.Decision(who="test", why="the test says so") if verb is wire.Verb.DESTROY else None,
            vm_name=f"covey-{instance}",
        )
        self.changed()

    def ask(self, instance: str, nonce: str, *, offset: int = 0, limit: int = 100) -> None:
        """Show this question from now on."""
        self.questions.append(
            model.Question(
                nonce=nonce,
                instance=model.InstanceId(instance),
                epoch=1,
                stream="stdout",
                offset=offset,
                limit=limit,
            )
        )
        self.changed()

    def unwant(self, instance: str, epoch: int = 1) -> None:
        del self.wants[instance, epoch]
        self.changed()

    def restore(self, revision: int = 5, history: str = "restored") -> None:
        """Another history, at a lower revision: this node must tell what it has first."""
        self.hold, self.history, self.revision = True, history, revision
        self.changed()

    def changed(self) -> None:
        self.revision += 1
        self._changed.set()
        self._changed = asyncio.Event()

    def said(self, instance: str) -> list[Said]:
        return [item.event for item in self.items if item.instance == instance]

    def item(self, instance: str, event: Said) -> wire.Item:
        return next(item for item in self.items if item.instance == instance and item.event is event)

    # ---- what agents call ------------------------------------------------------------------------------------------

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        call = request.match_info["call"]
        self.called.add(call)
        body = await request.read()
        refusal = self._refusal(request, call)
        answer = refusal or await getattr(self, f"_{call}")(body)
        refusal = self._refusal(request, call)  # a parked poll hears of it too
        if call in self.lose:
            self.lose.remove(call)
            assert request.transport is not None
            request.transport.abort()
        return refusal or (answer if isinstance(answer, web.Response) else _envelope(answer))

    def _refusal(self, request: web.Request, call: str) -> web.Response | None:
        if call in self.break_:
            return _envelope("broken on request", self.break_[call])
        if call != "join" and not self._knows(request):
            return _envelope("this session is not the newest of its node", 409)
        return None

    def _knows(self, request: web.Request) -> bool:
        _, counter, secret = request.headers["Authorization"].removeprefix("Covey ").split(".")
        return int(counter) == self.counter and secret == self.secret

    async def _join(self, body: bytes) -> wire.Joined | web.Response:
        ask = msgspec.json.decode(body, type=wire.Join)
        self.joins.append(ask)
        if self.refuse:
            return web.json_response({"status": "FAIL", "message": self.refuse, "body": None})
        known = not self.counter or self.secret in (ask.last_secret, ask.secret)
        if not known or (self.host_key and ask.host_key != self.host_key):
            return _envelope("the last secret is not the one", 409)
        if self.secret != ask.secret:
            self.counter += 1
        self.secret, self.host_key = ask.secret, ask.host_key
        self.revision += 1
        return wire.Joined(
            node=model.NodeId("node-1"),
            session=self.counter,
            cloud=CLOUD,
            seen=self._seen(),
            lease=self._lease(),
            heartbeat_s=self.heartbeat_s,
            registries=self.registries,
            name=ask.facts.name,
        )

    async def _wanted(self, body: bytes) -> wire.WantedState:
        ask = msgspec.json.decode(body, type=wire.Ask)
        self.messages.append(ask.messages)
        self.polls.append(ask)
        if self.takes_reports:
            self._take(ask.items, ask.word)
        until = time.monotonic() + ask.wait_s
        while self._tag() == ask.tag and not self.hold and time.monotonic() < until:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(max(until - time.monotonic(), 0)):
                    await self._changed.wait()
        own = self.abridges and ask.known.history == self.history
        since = ask.known.revision if own and not self.hold else 0
        tag, self.forged_tag = (self.forged_tag, "") if since and self.forged_tag else (self._tag(), self.forged_tag)
        answer = wire.WantedState(
            seen=self._seen(),
            tag=tag,
            wanted=self._wanted_since(since),
            since=since,
            lease=self._lease(),
            heartbeat_s=self.heartbeat_s,
            hold=self.hold,
            questions=tuple(self.questions),
            controllers=self.controllers,
            settled=tuple(range(len(ask.items))) if self.takes_reports else (),
            takes_reports=self.takes_reports,
        )
        self.answered.append(answer)
        return answer

    def _wanted_since(self, since: int) -> tuple[wire.Wanted, ...]:
        told: list[wire.Wanted] = []
        for key, want in sorted(self.wants.items()):
            now = self._with_launch(want)
            if self._shown.get(key, (None, 0))[0] != now:
                self._shown[key] = now, self.revision
            if self._shown[key][1] > since or not abridged.lasts(now.verb, launched=now.launched):
                told.append(now)
        return tuple(told)

    async def _answer(self, body: bytes) -> wire.Answered:
        answer = msgspec.json.decode(body, type=wire.Answer)
        self.answers.append(answer)
        self.messages.append(answer.messages)
        self.questions = [question for question in self.questions if question.nonce != answer.nonce]
        return wire.Answered(lease=self._lease(), seen=self._seen(), taken=True)

    async def _adopt(self, body: bytes) -> wire.Adopted | web.Response:
        told = msgspec.json.decode(body, type=wire.Adopt)
        self.before_adopt(told)
        self.adopts.append(told)
        if told.begun.revision and told.begun.history != self.history:
            return _envelope("the store was restored again meanwhile", 503)
        self.messages.append(told.messages)
        self.hold = self.hold and not told.last
        return wire.Adopted(lease=self._lease(), seen=self._seen())

    async def _launch(self, body: bytes) -> wire.Launched:
        ask = msgspec.json.decode(body, type=wire.LaunchAsk)
        self.launches.append(ask)
        self.messages.append(ask.messages)
        key, wanted = (ask.instance, ask.epoch), (self.counter, ask.nonce)
        want = self.wants.get(key)
        if want is None or want.verb is not wire.Verb.RUN or ask.instance in self.deny:
            return wire.Launched(granted=False, lease=self._lease(), seen=self._seen(), why="not wanted any more")
        granted = self.granted.setdefault(key, wanted) == wanted
        self.revision += 1
        self.before_launch_answer()
        script = self.scripts.get(ask.instance, "") if granted else ""
        return wire.Launched(granted=granted, lease=self._lease(), seen=self._seen(), script=script)

    async def _report(self, body: bytes) -> wire.Reported:
        report = msgspec.json.decode(body, type=wire.Report)
        self.reports.append(report)
        self.messages.append(report.messages)
        self._take(report.items, report.word)
        return wire.Reported(lease=self._lease(), seen=self._seen(), settled=tuple(range(len(report.items))))

    def _take(self, items: Sequence[wire.Item], word: model.Word | None) -> None:
        for item in items:
            number = (self.counter, item.instance, item.epoch, item.seq)
            if number not in self._numbers:
                self._numbers.add(number)
                self.items.append(item)
            if item.event is Said.GONE:
                self.wants = {
                    key: want
                    for key, want in self.wants.items()
                    if key[0] != item.instance or key[1] > item.epoch or want.verb is not wire.Verb.DESTROY
                }
                self.changed()
        if word is not None:
            self.words.append(word)

    def _with_launch(self, want: wire.Wanted) -> wire.Wanted:
        return msgspec.structs.replace(want, launched=(want.instance, want.epoch) in self.granted)

    def _tag(self) -> str:
        return wire.tag((want for _, want in sorted(self.wants.items())), (one.nonce for one in self.questions))

    def _seen(self) -> wire.Seen:
        return wire.Seen(history=self.history, revision=self.revision)

    def _lease(self) -> wire.LeaseTerms:
        return wire.LeaseTerms(ttl_s=self.ttl_s)


def _envelope(body: object, status: int = 200) -> web.Response:
    text = body if isinstance(body, str) else ""
    envelope = {"status": "OK" if status == 200 else "FAIL", "message": text, "body": None if text else body}
    return web.Response(body=msgspec.json.encode(envelope), status=status, content_type="application/json")


async def until(condition: Callable[[], object], what: str, limit_s: float = 60.0) -> None:
    """Wait until `condition` holds; fail with `what` at the deadline."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"still not, after {limit_s} s: {what}"
        await asyncio.sleep(0.01)
