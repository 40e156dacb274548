"""Where a registry keeps its bytes: two small Protocols, and the layout on disk.

    BASE_PATH/
    ├── format                                   the number of this layout: a server refuses a newer one
    ├── blobs/<algorithm>/<2 hex>/<hex>          a finished blob or manifest, read-only, named by its content;
    │                                            the algorithm is sha256 (64 digits) or sha512 (128 digits)
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
    └── aside/<token>                            a small file on its way to its name

Rules
* A name appears by link() only, after its bytes are fsynced; a name is never written through (safety S29, S31).
* An entry's number is decided by link(): EEXIST means that somebody else was first; read again, decide again.
* Nothing relies on locks in one process: any number of servers may work on one BASE_PATH at once.
* Names of repositories follow the OCI grammar, in which no component begins with `_` or `.`: they cannot collide with
  the folders above, nor leave them.
* Removing unreferenced blobs is the collector's business; deleting here only takes names away.

After a crash at any moment: a blob is whole or absent, an entry is whole or absent, an upload session stands at the
last part that was recorded.
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import NewType, Protocol

from covey import errors, model

FORMAT = 1

SessionId = NewType("SessionId", str)  # 32 hexadecimal digits


class Blob(model.Noun, frozen=True, kw_only=True):
    """A finished blob. `path` is a local file that never changes, so that it can be sent by sendfile."""

    digest: model.Digest
    size_bytes: int
    path: Path


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


class Blobs(Protocol):
    """Content and uploads. Order of calls: begin → write… (offset) → finish → abort."""

    async def stat(self, digest: model.Digest) -> Blob | None:
        """A finished blob, or None."""
        ...

    async def get(self, digest: model.Digest) -> bytes:
        """The bytes of a small blob (a manifest, a config). Raises FileNotFoundError."""
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

    async def write(self, session: SessionId, start: int, chunks: AsyncIterator[bytes]) -> int:
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

    async def append(self, log: str, number: int, entry: bytes) -> bool:
        """Enter `entry` as that number, durable. False: the number is taken by another entry. Entries carry a unique
        id, so that ours is recognised when the answer of the file system was lost (safety S30)."""
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
