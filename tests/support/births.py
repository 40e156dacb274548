"""Starts as the store takes them, and what it answers."""

from covey.store import commit_births
from tests.support import cloud, nouns


def start(count: int = 1, **changes: object) -> commit_births.Start:
    ids = tuple(nouns.instance_id() for _ in range(count))
    values: dict[str, object] = {"spec": nouns.spec(), "ids": ids, "who": "tester", "body": "b"}
    return commit_births.Start(**(values | changes))  # type: ignore[arg-type]


async def create(c: cloud.Cloud, what: commit_births.Start, until_ns: int = 0) -> commit_births.Answer:
    return await commit_births.create(c.writer, await c.look(), what, until_ns=until_ns)
