"""Where a registry keeps its bytes: small Protocols, and the layout on disk.

    BASE_PATH/
    ├── format                                   the number of this layout: a server refuses a newer one
    ├── blobs/<algorithm>/<2 hex>/<hex>          a finished blob or manifest, read-only, named by its content;
    │                                            the algorithm is sha256 (64 digits) or sha512 (128 digits)
    ├── trash/<algorithm>-<hex>/<token>          one that nothing refers to, under a new token each time it comes here;
    │                                            whoever asks for it links it back
    ├── quarantine/<algorithm>-<hex>             one whose bytes are not what its name says; never served
    ├── repositories/<name>/
    │   ├── _log/<10 digits>                     numbered entries: push, tag, delete, revert; dense, never rewritten
    │   ├── _blobs/<64 or 128 hex>               empty: this repository may read that blob; the length of the name
    │   │                                        tells the algorithm
    │   └── _pulled                              empty: its mtime is the time of the last pull
    ├── repositories/_names/<64 hex>/_log/…      who holds a template name (SHA-256 of the name)
    ├── uploads/<session>/
    │   ├── data.<token>                         bytes of one PATCH, opened with O_EXCL by one request only
    │   ├── part.<20 digits>                     record of a part that is durable; the number is its offset
    │   └── whole.<token>                        the parts copied together, while a session of several is finished
    ├── notes/<name>                             what servers tell each other of their care: last collection, last scrub
    └── aside/
        ├── entry.<token>                        a log entry on its way to its number: pending, and read as a reference
        └── <token>                              another small file on its way to its name

Rules
* A name appears by link() only, after its bytes are fsynced; a name is never written through (safety S29, S31).
* An entry's number is decided by link(): EEXIST means that somebody else was first; read again, decide again.
* Nothing relies on locks in one process: any number of servers may work on one BASE_PATH at once.
* Names of repositories follow the OCI grammar, in which no component begins with `_` or `.`: they cannot collide with
  the folders above, nor leave them.
* Removing unreferenced blobs is the collector's business (`Care`, `sweep`); deleting here only takes names away.

After a crash at any moment: a blob is whole or absent, an entry is whole or absent, an upload session stands at the
last part that was recorded.
"""

from collections.abc import AsyncIterable, AsyncIterator, Awaitable, Callable, Mapping, Sequence
from enum import StrEnum
from pathlib import Path
from typing import NewType, Protocol, runtime_checkable

from covey import errors, model, room

FORMAT = 1

SessionId = NewType("SessionId", str)  # 32 hexadecimal digits


class Blob(model.Noun, frozen=True, kw_only=True):
    """A finished blob. `path` is a local file that never changes, so that it can be sent by sendfile; None where the
    bytes are elsewhere (`Blobs.read`)."""

    digest: model.Digest
    size_bytes: int
    path: Path | None = None


class Space(model.Noun, frozen=True, kw_only=True):
    """Room of the file system, in bytes. `free_bytes` is what may still be written: the reserve is taken off."""

    total_bytes: int
    free_bytes: int


class Cut(errors.CoveyError):
    """The bytes of an upload ended early: the client went away, or the server is stopping."""


class WrongOffset(errors.CoveyError):
    """A part does not begin where its session stands. ``offset`` is where it stands."""

    def __init__(self, offset: int) -> None:
        super().__init__(f"the upload stands at {offset}")
        self.offset = offset


class WrongDigest(errors.CoveyError):
    """The bytes are not what their digest claims."""


class NoSession(errors.CoveyError):
    """The upload session is not known: never begun, finished, aborted or expired."""


class DiskFull(errors.CoveyError):
    """No room for what was to be written; whatever was begun has been removed."""


@runtime_checkable
class Direct(Protocol):
    """Chunks that can also be had in their reader's own memory, with fewer copies; one way or the other, not both."""

    def __aiter__(self) -> AsyncIterator[bytes]: ...

    async def fill(self, into: room.Room) -> None:
        """Fill it, up to the end of the bytes. Raises Cut; what came before is in it."""
        ...


class Blobs(Protocol):
    """Content and uploads. Order of calls: begin → write… (offset) → finish → abort."""

    async def stat(self, digest: model.Digest) -> Blob | None:
        """A finished blob, or None. One in the trash is taken back in the same step: either it is whole from now on,
        or the collector was first and the answer is None. One in quarantine is None."""
        ...

    async def get(self, digest: model.Digest) -> bytes:
        """The bytes of a small blob (a manifest, a config). Raises FileNotFoundError."""
        ...

    def read(self, blob: Blob, start: int = 0, end: int | None = None) -> AsyncIterator[bytes]:
        """The bytes of a blob from `start` to before `end`, in pieces. Raises FileNotFoundError on the way."""
        ...

    async def address(self, blob: Blob) -> str:
        """Where a client may fetch it by itself, for a while; "": only here."""
        ...

    async def put(self, content: bytes, digest: model.Digest | None = None) -> Blob:
        """Store a small blob whole, under its sha256 unless `digest` names another of its digests (raises WrongDigest).
        Durable when it returns; harmless when it exists."""
        ...

    async def begin(self) -> SessionId:
        """Open an upload session. It outlives this server and may go on at another one on the same directory."""
        ...

    async def offset(self, session: SessionId) -> int:
        """The durable offset: where the next part begins. Raises NoSession."""
        ...

    async def write(self, session: SessionId, start: int, chunks: AsyncIterable[bytes]) -> int:
        """Write one part and return the new durable offset. When `chunks` raises Cut, what came before it is kept
        durable, and Cut is raised again. Raises WrongOffset, also when another request was first at this offset."""
        ...

    async def finish(self, session: SessionId, digest: model.Digest) -> Blob:
        """Publish the session's bytes if they are what `digest` says. The session stays until `abort`, so that whoever
        crashes in between can repeat this; on WrongDigest and DiskFull it is removed at once."""
        ...

    async def abort(self, session: SessionId) -> None:
        """Remove a session with all its bytes. Harmless when there is none."""
        ...

    async def space(self) -> Space:
        """How much room there is."""
        ...


class Logs(Protocol):
    """The repositories' logs, and which blobs a repository may read."""

    async def read(self, positions: Mapping[str, int]) -> dict[str, list[bytes]]:
        """For each log named: its entries from that number on (an unknown log has none)."""
        ...

    async def append(
        self, log: str, number: int, entry: bytes, check: Callable[[], Awaitable[None]] | None = None
    ) -> bool:
        """Enter `entry` as that number, durable. False: the number is taken by another entry, or ours was so long on
        its way that it was given up; decide again. Entries carry a unique id, so that ours is recognised when the
        answer of the file system was lost (safety S30). `check` runs while the entry is pending: what it finds, no
        collector takes, because `LogCare.pending` shows the entry from before the check until it has its number.
        What `check` raises is raised, and then nothing was entered."""
        ...

    async def names(self, folder: str) -> Sequence[str]:
        """The logs directly below `folder` ("templates"), in no order."""
        ...

    async def grant(self, repository: str, digest: model.Digest) -> None:
        """Let a repository read a blob, durably."""
        ...

    async def granted(self, repository: str, digests: Sequence[str]) -> frozenset[str]:
        """Those of `digests` that the repository may read. Touches them: the collector leaves a blob alone for a day
        after any repository asked for it (safety S32)."""
        ...

    async def withdraw(self, repository: str, digest: model.Digest) -> bool:
        """Take the right away; False when there was none."""
        ...

    async def mark_pulled(self, repository: str) -> None:
        """Remember that a manifest was pulled just now; not durable on purpose."""
        ...

    async def pulled_s(self, repositories: Sequence[str]) -> dict[str, int]:
        """When each was last pulled, Unix seconds; 0 for never."""
        ...


# ---- care: what the collector, the scrub and the verification need -------------------------------------------------


class Place(StrEnum):
    """Where a whole blob may lie."""

    SHELF = "blobs"
    TRASH = "trash"
    QUARANTINE = "quarantine"


class Held(model.Noun, frozen=True, kw_only=True):
    """A blob in one place. `since_s`: when it came there, or was last stored again; by the storage's clock. `mark`:
    which time it came there, where that matters."""

    digest: model.Digest
    size_bytes: int
    since_s: float
    mark: str = ""


class Leftover(model.Noun, frozen=True, kw_only=True):
    """What unfinished work left behind: an upload session, or a file on its way to its name."""

    name: str
    size_bytes: int
    since_s: float  # when something last moved there


class Note(model.Noun, frozen=True, kw_only=True):
    """A small record that all servers of one storage see, and when it was written."""

    content: bytes
    at_s: float


class Care(Protocol):
    """Upkeep of content. Any number of servers may do it at once, beside pushes and pulls; nobody locks. All times are
    of the storage's own clock (safety S30)."""

    async def clock_s(self) -> float:
        """The storage's present time, Unix seconds."""
        ...

    def held(self, place: Place) -> AsyncIterator[Held]:
        """What lies there, in no order; what comes or goes meanwhile may be missing."""
        ...

    async def move(self, digest: model.Digest, source: Place, target: Place) -> bool:
        """Take a blob from one place to another; False when it is not there. Once this has returned, a `Blobs.stat`
        that had found it on the shelf began before. A crash leaves it in one place or in both."""
        ...

    async def destroy(self, held: Held, place: Place) -> int:
        """Delete what was found in the trash or in quarantine, never from the shelf: how many bytes went. If it was
        taken back meanwhile and has come there again, it is another one and stays: whoever moved it will look at what
        is needed since. Of this and a `Blobs.stat` that takes it back, one is first and the other sees it."""
        ...

    def read(
        self, digest: model.Digest, place: Place = Place.SHELF, *, past_cache: bool = False
    ) -> AsyncIterator[bytes]:
        """The bytes, in large pieces; with `past_cache` from the medium itself. Raises FileNotFoundError."""
        ...

    async def expire(self, before_s: float, *, dry_run: bool = False) -> Sequence[Leftover]:
        """Remove upload sessions and files on their way in which nothing has moved since `before_s`. Whoever goes on
        with one afterwards is told so (NoSession; `Logs.append` says False)."""
        ...

    async def note(self, name: str, content: bytes) -> None:
        """Replace one note; of two at once, one stays. Not durable on purpose."""
        ...

    async def notes(self, prefix: str) -> Mapping[str, Note]:
        """The notes whose names begin so."""
        ...


class LogCare(Protocol):
    """Upkeep of logs. Order of calls: `pending` before the logs, so that an entry is seen in one or the other."""

    async def logs(self) -> Sequence[str]:
        """Every log that has an entry or grants, those of names too."""
        ...

    async def numbers(self, log: str) -> Sequence[int]:
        """The numbers of a log's entries, in no order: dense, unless somebody took one away."""
        ...

    async def pending(self) -> Sequence[bytes]:
        """Entries that are being checked, and remains of those whose server died."""
        ...

    async def grants(self, repository: str) -> Mapping[model.Digest, float]:
        """The blobs that a repository may read, and when it last asked for each."""
        ...
