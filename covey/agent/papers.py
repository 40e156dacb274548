"""Manifests and configs of the templates that are on this node, byte for byte as a registry has them, for other nodes
that pull while no registry answers.

    papers/<hex>      named by its digest, which whoever fetches it verifies

Rules: they are a help and no truth; all of them may be lost at any time.
"""

import contextlib
from collections.abc import Set
from pathlib import Path

from covey import durable


class Papers:
    """The folder. Blocking, and small."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(exist_ok=True, mode=0o700)

    def path(self, digest: str) -> Path:
        return self._folder / digest.partition(":")[2]

    def keep(self, digest: str, content: bytes) -> None:
        """A disk that is full keeps none."""
        if not self.path(digest).exists():
            with contextlib.suppress(OSError):
                durable.replace(self.path(digest), content, fsync=False)

    def only(self, digests: Set[str]) -> None:
        """Throw away all others."""
        names = {self.path(digest).name for digest in digests}
        for path in self._folder.iterdir():
            if path.name not in names:
                durable.discard(path)
