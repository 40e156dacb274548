"""One bucket of an S3 store, in the few verbs that the registry needs, with faults in our own words.

Keys, ends and sizes are the caller's business. What this module promises:

* `create` is the store's own conditional PUT (If-None-Match): of any number of servers one wins (safety S29). When the
  answer was lost the object is read back before anybody is told (S30).
* `send` makes an object of a stream in bounded memory: parts of one size, so many at once. The object appears when all
  of it is there; when the stream raises, or the caller is cancelled, the multipart upload is aborted. Only a server
  that dies leaves its parts behind: a life-cycle rule of the bucket collects those (docs/operate/registry.md).
* A read is many short range requests, a few ahead of the reader, so that a slow reader holds no request open.

Addresses and credentials come from the usual AWS_* variables, which the S3 library reads by itself; they are never
logged, and errors are cut before what a server may have echoed.
"""

import asyncio
import contextlib
import datetime
import urllib.parse
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import msgspec
import obstore
import obstore.exceptions
from obstore import store

from covey import errors, world
from covey.registry import blobs, s3_join, s3_sign

if TYPE_CHECKING:
    from obstore.store import ClientConfig, S3Config

_READ = 8 << 20  # one range request
_AHEAD = 3  # range requests on their way for one reader
_AT_ONCE = 48  # small requests of one server
_RETRY = datetime.timedelta(seconds=20)
_FULL = ("507", "StorageFull", "QuotaExceeded", "EntityTooLarge")


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """Which bucket, and how to use it. `redirect_s`: how long an address that clients are sent to holds; 0: none."""

    bucket: str
    part_size_bytes: int = 8 << 20
    concurrency: int = 4
    path_style: bool = False
    skip_tls_verification: bool = False
    ca_cert: Path | None = None
    redirect_s: float = 0.0


class Found(NamedTuple):
    """An object. `changed_s` is by the store's clock."""

    key: str
    size_bytes: int
    changed_s: float
    version: str


class Bucket:
    """Nothing is asked before the first call."""

    def __init__(self, config: Config, environ: Mapping[str, str], world: world.World) -> None:
        self.config = config
        self._joiner = _joiner(config, environ, world)
        self._busy = asyncio.Semaphore(_AT_ONCE)
        endpoint = _endpoint(environ)
        client: ClientConfig = {
            "allow_http": endpoint.startswith("http://"),
            "allow_invalid_certificates": config.skip_tls_verification,
            "connect_timeout": "5s",
            "timeout": "120s",
        }
        if config.ca_cert is not None:
            client["root_certificate"] = config.ca_cert.read_bytes()
        where: S3Config = {"virtual_hosted_style_request": not config.path_style}
        if endpoint:
            where["aws_endpoint_url_s3"] = spelled(endpoint, config)
        if "AWS_ACCESS_KEY_ID" in environ:  # else: where the library finds some, the machine's role for one
            where["access_key_id"] = environ["AWS_ACCESS_KEY_ID"]
            where["secret_access_key"] = environ.get("AWS_SECRET_ACCESS_KEY", "")
        if token := environ.get("AWS_SESSION_TOKEN"):
            where["session_token"] = token
        if region := _region(environ):
            where["region"] = region
        try:
            self._store = store.S3Store(
                config.bucket,
                config=where,
                client_options=client,
                retry_config={"max_retries": 6, "retry_timeout": _RETRY},
            )
        except obstore.exceptions.BaseError as error:
            raise errors.SettingError(f"BACKEND_S3_BUCKET {config.bucket}: {_short(error)}") from error

    # ---- small objects ---------------------------------------------------------------------------------------------

    async def get(self, key: str) -> bytes:
        """The whole object. Raises FileNotFoundError."""
        async with self._busy:
            with self._told("read"):
                found = await obstore.get_async(self._store, key)
                return bytes(await found.bytes_async())

    async def find(self, key: str) -> Found | None:
        async with self._busy:
            with self._told("look"), contextlib.suppress(FileNotFoundError):
                return _found(await obstore.head_async(self._store, key))
        return None

    async def put(self, key: str, content: bytes) -> None:
        async with self._busy:
            with self._told("write"):
                await obstore.put_async(self._store, key, content, use_multipart=False)

    async def create(self, key: str, content: bytes) -> bool:
        """Make an object that was not there. False: there is one with other content."""
        async with self._busy:
            with self._told("write"):
                try:
                    await obstore.put_async(self._store, key, content, mode="create")
                    return True
                except obstore.exceptions.AlreadyExistsError:
                    pass  # somebody's, or our own of an attempt whose answer was lost
        return await self.get(key) == content

    async def touch(self, key: str) -> bool:
        """Give an empty object the present time. False: there is none (and none is made)."""
        found = await self.find(key)
        if found is None:
            return False
        async with self._busy:
            with self._told("write"):
                try:
                    await obstore.put_async(self._store, key, b"", mode={"e_tag": found.version}, use_multipart=False)
                except (obstore.exceptions.PreconditionError, FileNotFoundError):
                    return False
        return True

    async def copy(self, source: str, target: str, size_bytes: int) -> None:
        """The target is whole at once, and has the present time. Raises FileNotFoundError."""
        if size_bytes <= s3_join.COPY_BYTES:
            with self._told("copy"):
                await obstore.copy_async(self._store, source, target)
        elif self.joins([s3_join.Source(source, size_bytes)]):
            await self.join(target, [s3_join.Source(source, size_bytes)])
        else:
            await self.send(target, self.read(source, 0, size_bytes), size_bytes)

    def joins(self, sources: Sequence[s3_join.Source]) -> bool:
        """Whether `join` can make an object of these."""
        return self._joiner is not None and s3_join.fits(sources)

    async def join(self, target: str, sources: Sequence[s3_join.Source]) -> None:
        """One object of several, within the store; as `copy`."""
        assert self._joiner is not None  # noqa: S101  asked before
        size_bytes = sum(source.size_bytes for source in sources)

        async def there() -> bool:
            found = await self.find(target)
            return found is not None and found.size_bytes == size_bytes

        await self._joiner.join(target, sources, there)

    async def delete(self, keys: Sequence[str]) -> None:
        """Harmless when there are none."""
        if keys:
            with self._told("delete"), contextlib.suppress(FileNotFoundError):
                await obstore.delete_async(self._store, list(keys))

    async def below(self, prefix: str, after: str = "") -> list[Found]:
        """Everything below `prefix` ("uploads/"), by key."""
        found: list[Found] = []
        with self._told("list"):
            async for page in obstore.list(self._store, prefix.rstrip("/"), offset=after or None):
                found += map(_found, page)
        return sorted(found)

    async def folders(self, prefix: str) -> list[str]:
        """The names directly below `prefix` that have something below them."""
        async with self._busy:
            with self._told("list"):
                listed = await obstore.list_with_delimiter_async(self._store, prefix.rstrip("/"))
        return [name.rstrip("/").rpartition("/")[2] for name in listed["common_prefixes"]]

    # ---- large objects ---------------------------------------------------------------------------------------------

    async def read(self, key: str, start: int, end: int) -> AsyncIterator[bytes]:
        """The bytes from `start` to before `end`. Raises FileNotFoundError."""
        edges = iter(range(start, end, _READ))
        ahead: deque[asyncio.Task[bytes]] = deque()

        def ask() -> None:
            for edge in edges:
                ahead.append(asyncio.create_task(self._range(key, edge, min(edge + _READ, end))))
                return

        try:
            for _ in range(_AHEAD):
                ask()
            while ahead:
                piece = await ahead[0]
                ahead.popleft()
                ask()
                yield piece
        finally:
            for task in ahead:
                task.cancel()
            await asyncio.gather(*ahead, return_exceptions=True)

    async def _range(self, key: str, start: int, end: int) -> bytes:
        with self._told("read"):
            return bytes(await obstore.get_range_async(self._store, key, start=start, end=end))

    async def send(self, key: str, batches: AsyncIterator[bytes], size_bytes: int | None = None) -> None:
        """Make an object of `batches`, which run in the caller's own task. What they raise is raised, and there is no
        object then."""
        queue: asyncio.Queue[bytes | Exception | None] = asyncio.Queue(1)

        async def fed() -> AsyncIterator[bytes]:
            while (item := await queue.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item

        part = max(self.config.part_size_bytes, -(-(size_bytes or 0) // 9_000))  # S3: at most 10,000 parts
        put = obstore.put_async(self._store, key, fed(), chunk_size=part, max_concurrency=self.config.concurrency)
        sending = asyncio.ensure_future(put)
        try:
            with self._told("write"):
                async for batch in batches:
                    await _hand(queue, batch, sending)
                await _hand(queue, None, sending)
                await asyncio.shield(sending)
        except BaseException:
            while not queue.empty():
                queue.get_nowait()
            queue.put_nowait(_Given())
            await asyncio.gather(sending, return_exceptions=True)
            raise

    async def sign(self, key: str) -> str:
        """An address at which anybody may read the object for a while; "" when that is not wanted."""
        if not self.config.redirect_s:
            return ""
        with self._told("sign"):
            hold = datetime.timedelta(seconds=self.config.redirect_s)
            return await obstore.sign_async(self._store, "GET", key, hold)

    @contextlib.contextmanager
    def _told(self, what: str) -> Iterator[None]:
        """Faults of the store as ours. FileNotFoundError stays what it is."""
        try:
            yield
        except (obstore.exceptions.PreconditionError, obstore.exceptions.AlreadyExistsError):
            raise
        except (obstore.exceptions.BaseError, PermissionError) as error:
            text = f"bucket {self.config.bucket}: cannot {what} ({_short(error)})"
            if any(word in str(error) for word in _FULL):
                raise blobs.DiskFull(text) from error
            raise errors.Unavailable(text) from error


def _endpoint(environ: Mapping[str, str]) -> str:
    names = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
    return next((environ[name] for name in names if environ.get(name)), "")


def _region(environ: Mapping[str, str]) -> str:
    return environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION") or ""


def _joiner(config: Config, environ: Mapping[str, str], world: world.World) -> s3_join.Joiner | None:
    """None without credentials in the environment."""
    if not environ.get("AWS_ACCESS_KEY_ID"):
        return None
    region = _region(environ) or "us-east-1"
    mine = s3_sign.Credentials(
        environ["AWS_ACCESS_KEY_ID"],
        environ.get("AWS_SECRET_ACCESS_KEY", ""),
        environ.get("AWS_SESSION_TOKEN", ""),
        region,
    )
    url = spelled(_endpoint(environ) or f"https://s3.{region}.amazonaws.com", config)
    trust = False if config.skip_tls_verification else config.ca_cert
    return s3_join.Joiner(config.bucket, f"{url}/{config.bucket}" if config.path_style else url, mine, world, trust)


class _Given(errors.CoveyError):
    """The caller has given the object up."""


async def _hand(
    queue: asyncio.Queue[bytes | Exception | None], item: bytes | None, sending: asyncio.Future[Any]
) -> None:
    """Pass one batch on, or raise what became of the upload meanwhile."""
    if not queue.full():
        queue.put_nowait(item)
        return
    putting = asyncio.ensure_future(queue.put(item))
    try:
        await asyncio.wait((putting, sending), return_when=asyncio.FIRST_COMPLETED)
    finally:
        if not putting.done():
            putting.cancel()
    if sending.done():
        sending.result()


def _found(meta: "obstore.ObjectMeta") -> Found:
    return Found(meta["path"], meta["size"], meta["last_modified"].timestamp(), meta["e_tag"] or "")


def spelled(endpoint: str, config: Config) -> str:
    """The endpoint as the library wants it: with the bucket's name in the host, unless it is in the path."""
    if config.path_style:
        return endpoint.rstrip("/")
    parts = urllib.parse.urlsplit(endpoint)
    if parts.netloc.startswith(config.bucket + "."):
        return endpoint.rstrip("/")
    return urllib.parse.urlunsplit(parts._replace(netloc=f"{config.bucket}.{parts.netloc}")).rstrip("/")


def _short(error: BaseException) -> str:
    """The first line, without what a server has echoed."""
    text = str(error).strip().partition("\n")[0].partition(": <?xml")[0]
    return text[:200]
