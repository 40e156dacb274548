"""The template views in the API's envelope: what the repositories hold, as the product's clients read it.

    GET    /registry/status                       version, space
    GET    /registry/vm[?id=]                     [{id: name}, …]; one template with its versions
    GET    /registry/v2/vm[?id=]                  [template, …]; one template with its versions
    POST   /registry/v2/vm {name}                 the id that holds this name, a fresh one for a new name
    GET    /registry/vm/info?id=&tag=&version=    one version; neither tag nor version: the newest
    DELETE /registry/vm?id=                       the whole template
    DELETE /registry/revert?id= {tag, version}    one version and all newer ones; neither: the newest
    GET    /registry/disk                         total and free bytes
    GET    /livez, /readyz                        200; readyz says in its body when the disk is full

`id` may be a template's name everywhere. An unknown one is 200 + FAIL ``Not found``; an unknown tag is
``No such tag <tag>``, which clients compare.
"""

from collections.abc import Sequence

import msgspec

import covey
from covey import errors, model, serve
from covey.client import oci
from covey.registry import catalog, views


class _Revert(msgspec.Struct):
    """The body of a revert."""

    tag: str = ""
    version: int | None = None


class TemplateApi:
    """Handlers of /registry/… and of the health paths."""

    def __init__(self, catalog: catalog.Catalog) -> None:
        self._catalog = catalog

    def routes(self) -> Sequence[serve.Route]:
        return [
            serve.Route("GET", "/registry/status", self.status),
            serve.Route("GET", "/registry/vm", self.list_v1),
            serve.Route("GET", "/registry/v2/vm", self.list_v2),
            serve.Route("POST", "/registry/v2/vm", self.hold_name),
            serve.Route("GET", "/registry/vm/info", self.info),
            serve.Route("DELETE", "/registry/vm", self.delete),
            serve.Route("DELETE", "/registry/revert", self.revert),
            serve.Route("GET", "/registry/disk", self.disk),
            serve.Route("GET", "/livez", self.live),
            serve.Route("GET", "/readyz", self.ready),
        ]

    async def status(self, _call: serve.Call) -> dict[str, object]:
        space = await self._catalog.blobs.space()
        return {
            "status": "Running",
            "version": covey.__version__,
            "disk": oci.DiskView(total=space.total_bytes, free=space.free_bytes),
            "trouble": "" if space.free_bytes else "the disk is full: pulls go on, pushes are refused",
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
        return [_item(template, pulled[template.name]) for template in templates]

    async def one(self, call: serve.Call) -> oci.TemplateView:
        template = await self._catalog.template(call.query["id"])
        pulled = await self._catalog.logs.pulled_s([template.name])
        return _template(template, pulled[template.name])

    async def hold_name(self, call: serve.Call) -> oci.NameHeld:
        name = (await call.json(oci.NameAsk)).name
        catalog.check_template_name(name)
        return oci.NameHeld(id=await self._catalog.claim(name))

    async def info(self, call: serve.Call) -> oci.Resolved:
        template = await self._catalog.template(call.query.get("id", ""))
        found = _pick(template, call.query.get("tag", ""), call.query.get("version", ""))
        view = _version(found)
        return oci.Resolved(
            id=_id(template),
            name=found.release.name,
            **{field: getattr(view, field) for field in view.__struct_fields__},
        )

    async def delete(self, call: serve.Call) -> None:
        template = await self._catalog.template(call.query.get("id", ""))
        await self._catalog.revert(_id(template), template.versions[0].number)

    async def revert(self, call: serve.Call) -> None:
        template = await self._catalog.template(call.query.get("id", ""))
        ask = serve.parse(await call.read() or b"{}", _Revert)
        found = _pick(template, ask.tag, "" if ask.version is None else str(ask.version))
        await self._catalog.revert(_id(template), found.number)

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


def _pick(template: views.Repository, tag: str, version: str) -> views.Numbered:
    """The version asked for. Both given must agree; none given: the newest."""
    found: views.Numbered | None = template.versions[-1]
    if tag:
        found = template.tagged(tag)
        if found is None:
            raise errors.Refused(f"No such tag {tag}")
    if version:
        number = int(version) if version.isascii() and version.isdigit() else -1
        if tag and found is not None and found.number != number:
            raise errors.Refused(f"tag {tag} is version {found.number}, not {version}")
        found = template.version(number)
        if found is None:
            raise errors.Refused(f"No such version {version}")
    assert found is not None  # noqa: S101  each branch has raised where it is
    return found


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
        nvram=next((_name(file) for file in release.files if file.media_type == oci.NVRAM), ""),
        config_file=_name(release.config),
        vcpu=release.vcpu,
        ram_mb=release.ram_mb,
    )


def _name(file: views.File) -> str:
    return file.title or file.digest.removeprefix("sha256:")
