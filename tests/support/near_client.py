"""Nodes' clients of two registries, as a process of its own: each pulls one blob again and again, verified, until it is
ended, and says so when a pull fails.

    python -m tests.support.near_client URL,URL REPOSITORY DIGEST SIZE FOLDER SALT…
"""

import asyncio
import sys
from pathlib import Path

from covey import errors
from covey.client import http, registry

_PAUSE_S = 0.1


async def pulling(urls: list[str], repository: str, digest: str, size_bytes: int, target: Path, salt: str) -> None:
    async with http.Endpoints(urls, salt=salt, near=True, timeout_s=30) as endpoints:  # as an agent makes them
        source = registry.Registry(endpoints)
        while True:
            try:
                await source.fetch(repository, digest, size_bytes, target)
            except errors.CoveyError as error:
                sys.stdout.write(f"a pull failed: {error}\n")
                sys.stdout.flush()
            target.unlink(missing_ok=True)
            await asyncio.sleep(_PAUSE_S)


async def main(urls: str, repository: str, digest: str, size: str, folder: str, *salts: str) -> None:
    async with asyncio.TaskGroup() as group:
        for salt in salts:
            target = Path(folder) / f"pulled-{salt}"
            group.create_task(pulling(urls.split(","), repository, digest, int(size), target, salt))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
