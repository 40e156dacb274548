"""The template views in the API's envelope: what the repositories hold, as the product's clients read it.

    GET    /registry/status                       version, space
    GET    /registry/vm[?id=]                     [{id: name}, …]; one template with its versions
    GET    /registry/v2/vm[?id=]                  [template, …]; one template with its versions
    POST   /registry/v2/vm {name}                 the id that holds this name, a fresh one for a new name
    GET    /registry/vm/info?id=&tag=&version=    one version; neither tag nor version: the newest
    PUT    /registry/vm/arch {id, arch}           which processors the template's versions are for
    DELETE /registry/vm?id=                       the whole template
    DELETE /registry/revert?id=&tag=&version=     one version and all newer ones; neither: the newest
    GET    /registry/disk                         total and free bytes
    GET    /livez, /readyz                        200; readyz says in its body when the disk is full

`id` may be a template's name everywhere. An unknown one is 200 + FAIL ``Not found``; an unknown tag is
``No such tag <tag>``, which clients compare. What a revert aims at may stand in the query or in a JSON body, the number
as `version` or `number`. Deletes may be repeated (promise I7): what was there and is gone is OK; a revert of "the
newest" is repeated safely under an ``Idempotency-Key``.
"""

from collections.abc import Sequence

import msgspec

import covey
from covey import errors, model, serve
from covey.client import oci
from covey.registry import catalog, manifests, upkeep, views

_KEY_LIMIT = 255


class TemplateApi:
    """Handlers of /registry/… and of the health paths."""

    def __init__(self, catalog: catalog.Catalog, upkeep: upkeep.Upkeep) -> None:
        self._catalog = catalog
        self._upkeep = upkeep
        self._items: dict[str, tuple[views.Repository, oci.TemplateItem]] = {}  # of the last list

    def routes(self) -> Sequence[serve.Route]:
        return [
            serve.Route("GET", "/registry/status", self.status),
            serve.Route("GET", "/registry/vm", self.list_v1),
            serve.Route("GET", "/registry/v2/vm", self.list_v2),
            serve.Route("POST", "/registry/v2/vm", self.hold_name),
            serve.Route("GET", "/registry/vm/info", self.info),
            serve.Route("PUT", "/registry/vm/arch", self.set_arch),
            serve.Route("DELETE", "/registry/vm", self.delete),
            serve.Route("DELETE", "/registry/revert", self.revert),
            serve.Route("GET", "/registry/disk", self.disk),
            serve.Route("GET", "/livez", self.live),
            serve.Route("GET", "/readyz", self.ready),
        ]

    async def status(self, _call: serve.Call) -> dict[str, object]:
        await self._upkeep.look()
        seen = self._upkeep.figures
        return {
            "status": "Running",
            "version": covey.__version__,
            "disk": oci.DiskView(total=seen.total_bytes, free=seen.free_bytes),
            "trouble": "; ".join(seen.troubles()),
            "storage": msgspec.structs.replace(seen, replica=None),
            **({"replica": seen.replica} if seen.replica is not None else {}),
        }

    async def list_v1(self, call: serve.Call) -> object:
        if call.query.get("id"):
            return await self.one(call)
        templates = await self._catalog.templates()
        return [{_id(template): template.versions[-1].release.name} for template in templates]

    async def list_v2(self, call: serve.Call) -> object:
        if call.query.get("id"):
            return await self.one(call)
        templates = await self._catalog.templates()
        pulled = await self._catalog.logs.pulled_s([template.name for template in templates])
        self._items = {template.name: self._item(template, pulled[template.name]) for template in templates}
        return [item for _, item in self._items.values()]

    def _item(self, template: views.Repository, pulled_s: int) -> tuple[views.Repository, oci.TemplateItem]:
        """What a list shows of a template: its sizes are added up once for each state that it is in."""
        known = self._items.get(template.name)
        if known is not None and known[0] is template and known[1].last_pull == pulled_s:
            return known
        return template, _item(template, pulled_s)

    async def one(self, call: serve.Call) -> oci.TemplateView:
        template = await self._catalog.template(call.query["id"])
        pulled = await self._catalog.logs.pulled_s([template.name])
        return _template(template, pulled[template.name])

    async def hold_name(self, call: serve.Call) -> oci.NameHeld:
        name = (await call.json(oci.NameAsk)).name
        manifests.check_template_name(name)
        return oci.NameHeld(id=await self._catalog.claim(name))

    async def info(self, call: serve.Call) -> oci.Resolved:
        template = await self._catalog.template(call.query.get("id", ""))
        number = _agreed("version", call.query.get("version", ""), call.query.get("number", ""))
        found = _pick(template, call.query.get("tag", ""), number)
        view = _version(found)
        return oci.Resolved(
            id=_id(template),
            name=found.release.name,
            **{field: getattr(view, field) for field in view.__struct_fields__},
        )

    async def set_arch(self, call: serve.Call) -> None:
        ask = await call.json(oci.ArchSet)
        await self._catalog.set_arch(ask.id, ask.arch)

    async def delete(self, call: serve.Call) -> None:
        await self._catalog.remove(call.query.get("id", ""))

    async def revert(self, call: serve.Call) -> None:
        ask, query = serve.parse(await call.read() or b"{}", oci.RevertAsk), call.query
        numbers = (query.get("version", ""), query.get("number", ""), str(ask.version), str(ask.number))
        number = _agreed("version", *numbers)
        target = views.Target(
            tag=_agreed("tag", query.get("tag", ""), ask.tag),
            version=None if not number else _number(number),
            digest=_agreed("digest", query.get("digest", ""), ask.digest),
        )
        request = call.headers.get("Idempotency-Key", "")
        if len(request) > _KEY_LIMIT:
            raise errors.Refused(f"Idempotency-Key: at most {_KEY_LIMIT} characters; use a shorter one")
        await self._catalog.revert(_agreed("id", query.get("id", ""), ask.id), target, request)

    async def disk(self, _call: serve.Call) -> oci.DiskView:
        space = await self._catalog.blobs.space()
        return oci.DiskView(total=space.total_bytes, free=space.free_bytes)

    async def live(self, _call: serve.Call) -> None:
        return None

    async def ready(self, call: serve.Call) -> object:
        """Green while templates can be read: also on a full disk (safety S25)."""
        if call.draining.is_set():
            raise errors.Unavailable("this registry is going down")
        return await self.status(call)


def _pick(template: views.Repository, tag: str, number: str) -> views.Numbered:
    """The version asked for. Both given must agree; none given: the newest. Raises Refused."""
    found = views.pick(template, views.Target(tag=tag, version=None if not number else _number(number)))
    if found is None:  # it was there once
        raise errors.Refused(f"No such tag {tag}" if tag else f"No such version {number}")
    return found


def _number(text: str) -> int:
    if not text.isascii() or not text.isdigit():
        raise errors.Refused(f"No such version {text}")
    return int(text)


def _agreed(field: str, *given: str) -> str:
    """What was given, in however many places. Raises Refused when they differ."""
    found = {text for text in given if text}
    if len(found) > 1:
        raise errors.Refused(f"{field}: given as {' and as '.join(sorted(found))}; give it once")
    return found.pop() if found else ""


def _id(template: views.Repository) -> model.TemplateId:
    return model.TemplateId(template.name.partition("/")[2])


def _item(template: views.Repository, pulled_s: int) -> oci.TemplateItem:
    newest = template.versions[-1].release
    return oci.TemplateItem(
        id=_id(template),
        name=newest.name,
        size=template.size_bytes(),
        arch=newest.arch,
        last_pull=pulled_s,
        last_push=template.pushed_s,
        creation_date=template.created_s,
    )


def _template(template: views.Repository, pulled_s: int) -> oci.TemplateView:
    item = _item(template, pulled_s)
    return oci.TemplateView(
        **{field: getattr(item, field) for field in item.__struct_fields__},
        versions=[_version(version) for version in template.versions],
    )


def _version(version: views.Numbered) -> oci.VersionView:
    release = version.release
    return oci.VersionView(
        tag=release.tag,
        number=version.number,
        digest=version.manifest.digest,
        size=views.size_of([version.manifest]),
        arch=release.arch,
        creation_date=version.pushed_s,
        description=release.description,
        images=[_name(file) for file in release.files if file.media_type.startswith(oci.DISK_PREFIX)],
        state_files=[_name(file) for file in release.files if file.media_type.startswith(oci.STATE)],
        nvram=next((_name(file) for file in release.files if file.media_type.startswith(oci.NVRAM)), ""),
        config_file=_name(release.config),
        vcpu=release.vcpu,
        ram_mb=release.ram_mb,
    )


def _name(file: views.File) -> str:
    return file.title or file.digest.removeprefix("sha256:")
