"""Nodes' clients of two registries, as a process of its own: each pulls one blob again and again, verified, until it is
ended, and says so when a pull fails. They would all use the first one, if it were not for its distance.

    python -m tests.support.near_client URL,URL REPOSITORY DIGEST SIZE FOLDER COUNT
"""

import asyncio
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from covey import errors
from covey.client import balance, http, registry

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


def _salts(far: str, near: str) -> Iterator[str]:
    """Of clients that like the far one better, and soon go back to a near one that recovered."""
    for salt in map(str, itertools.count()):
        one = balance.Balance([far, near], salt=salt, near=True)
        liked = one.order(0.0)[0]
        one.failed(near, 1.0)
        one.looked(near, 20.0, 0.001)
        one.looked(far, 20.0, 0.1)
        if liked == far and one.order(22.0)[0] == near:
            yield salt


async def main(urls: str, repository: str, digest: str, size: str, folder: str, count: str) -> None:
    far, near = urls.split(",")
    async with asyncio.TaskGroup() as group:
        for salt in itertools.islice(_salts(far, near), int(count)):
            target = Path(folder) / f"pulled-{salt}"
            group.create_task(pulling([far, near], repository, digest, int(size), target, salt))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
