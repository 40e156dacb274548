"""/api/v1/vm: start, list, show, update, terminate (docs/reference/api.md).

Reads wait for a snapshot that shows everything answered before (promise I6); writes are one guarded transaction each
and harmless when repeated (promise I7). A start is answered as soon as it is stored: nothing here waits for a node.
"""

from collections.abc import Sequence

import msgspec

from covey import errors, failpoint, model, serve
from covey.controller import display, hosts, listing, start_request, templates, views
from covey.store import base, codec, commit, commit_births, commit_instances, mirror, schema

_KEY_LIMIT = 512
_KEY_REUSED = "Idempotency-Key was used for another request"


class InstanceUpdate(msgspec.Struct, kw_only=True):
    """PUT. Fields that are absent or null stay as they are."""

    metadata: start_request.Metadata | None = None
    external_id: str | None = None
    name: str | None = None


class Terminate(msgspec.Struct, kw_only=True):
    """DELETE."""

    id: str = ""


class InstanceApi:
    def __init__(
        self,
        mirror: mirror.Mirror,
        writer: commit.Writer,
        templates: templates.Templates,
        display: display.Display,
        homes: hosts.Homes,
    ) -> None:
        self._mirror = mirror
        self._writer = writer
        self._templates = templates
        self._display = display
        self._homes = homes
        self._listing = listing.Listing(display, writer.world.boot_ns)

    def routes(self) -> Sequence[serve.Route]:
        return [
            serve.Route("POST", "/api/v1/vm", self.start),
            serve.Route("GET", "/api/v1/vm", self.get),
            serve.Route("PUT", "/api/v1/vm", self.update),
            serve.Route("DELETE", "/api/v1/vm", self.terminate),
        ]

    # ---- start -----------------------------------------------------------------------------------------------------

    async def start(self, call: serve.Call) -> Sequence[model.InstanceId]:
        raw = await call.read()
        request = serve.parse(raw, start_request.StartRequest)
        start_request.check(request)
        body = start_request.body_hash(raw)
        key = _idempotency_key(call)
        earlier = await self._earlier(key, body)
        if earlier:
            return earlier
        start = await self._accept(call, request, key, body)
        spec = start.spec
        rests_on_reading = bool(key or spec.node or (spec.external_id and spec.name))
        snapshot = await (self._mirror.fresh() if rests_on_reading else self._mirror.current())
        if start.spec.node and snapshot.node(start.spec.node) is None:
            raise errors.Refused(f"node_id: there is no node {start.spec.node}")
        call.still_fresh()
        failpoint.reach("controller.start.accepted")
        with self._homes.reserve(snapshot, start.spec, len(start.ids)) as home:
            outcome = await commit_births.create(self._writer, snapshot, start, home.nodes, call.until_ns, home.fits)
            if isinstance(outcome, commit_births.Created):
                home.revision = outcome.revision
        failpoint.reach("controller.start.committed")
        if isinstance(outcome, commit_births.KeyReused):
            raise errors.Refused(_KEY_REUSED)
        return outcome.ids

    async def _earlier(self, key: str, body: str) -> Sequence[model.InstanceId]:
        """The instances of this very request when it was done before: then no registry needs to be asked again."""
        if not key:
            return ()
        page = await self._writer.store.range(schema.idempotency(key))
        if not page.kvs:
            return ()
        remembered = codec.decode(page.kvs[0], schema.Remembered).noun
        if remembered.body != body:
            raise errors.Refused(_KEY_REUSED)
        return remembered.ids

    async def _accept(
        self, call: serve.Call, request: start_request.StartRequest, key: str, body: str
    ) -> commit_births.Start:
        """The request with its template pinned and its ids chosen. Raises Refused."""
        script = start_request.script_text(request)
        start_request.forwards(request)
        pin = await self._templates.resolve(request.vmid or "", request.tag or "", request.version)
        world = self._writer.world
        spec = start_request.spec(request, pin, world.uuid() if script else "")
        count = 1 if request.count is None else request.count
        start_request.check_size(spec, request.metadata, count)
        return commit_births.Start(
            spec=spec,
            ids=tuple(model.InstanceId(world.uuid()) for _ in range(count)),
            who=f"API client {call.client}",
            body=body,
            key=key,
            script_text=script,
            metadata=request.metadata or {},
        )

    # ---- list and show ---------------------------------------------------------------------------------------------

    async def get(self, call: serve.Call) -> object:
        id = call.query.get("id")
        if id is None:
            return await self._list(call)
        snapshot = await self._mirror.fresh()
        kept = snapshot.instance(id)
        if kept is None:
            raise errors.NotFound("Not found")
        outputs = await self._outputs(id) if kept.noun.script_result is not None else views.Outputs()
        return views.inner(kept.noun, self._display.of(snapshot), outputs)

    async def _list(self, call: serve.Call) -> object:
        if listing.PARAMETERS.isdisjoint(call.query):
            return await self._listing.whole(await self._mirror.fresh())
        asked = listing.query(call.query)
        return await self._listing.some(await self._mirror.fresh(), asked)

    async def _outputs(self, id: str) -> views.Outputs:
        prefix = schema.output(id, "")
        page = await self._writer.store.range(prefix, base.prefix_end(prefix))
        streams = {schema.tail(kv.key): kv.value for kv in page.kvs}
        return views.Outputs(streams.get("stdout", b""), streams.get("stderr", b""))

    # ---- update and terminate --------------------------------------------------------------------------------------

    async def update(self, call: serve.Call) -> None:
        id = call.query.get("id", "")
        if not id:
            raise errors.Refused("id: missing; name the instance in the query (?id=)")
        wanted = await call.json(InstanceUpdate)
        start_request.check_metadata(wanted.metadata)
        start_request.check_names(wanted.external_id, wanted.name)
        snapshot = await self._mirror.fresh()
        call.still_fresh()
        outcome = await commit_instances.update(
            self._writer,
            snapshot,
            model.InstanceId(id),
            metadata=wanted.metadata,
            external_id=wanted.external_id,
            name=wanted.name,
            until_ns=call.until_ns,
        )
        if isinstance(outcome, commit.Missing):
            raise errors.NotFound("Not found")

    async def terminate(self, call: serve.Call) -> None:
        """Harmless when repeated, also after the instance was forgotten (promise I7)."""
        id = (await call.json(Terminate)).id
        if not id:
            raise errors.Refused('id: missing; send {"id": "<instance id>"}')
        snapshot = await self._mirror.current()
        call.still_fresh()
        decision = model.Decision(who=f"API client {call.client}", why="terminate request")
        outcome = await commit_instances.terminate(
            self._writer, snapshot, model.InstanceId(id), decision, call.until_ns
        )
        failpoint.reach("controller.terminate.committed")
        if isinstance(outcome, commit.Missing) and not await self._was_born(id):
            raise errors.NotFound("Not found")

    async def _was_born(self, id: str) -> bool:
        page = await self._writer.store.range(schema.born(id))
        return any(not codec.decode(kv, schema.Born).noun.closed for kv in page.kvs)


def _idempotency_key(call: serve.Call) -> str:
    key = call.headers.get("Idempotency-Key", "").strip()
    if len(key) > _KEY_LIMIT:
        raise errors.Refused(f"Idempotency-Key: longer than {_KEY_LIMIT} characters")
    return key
