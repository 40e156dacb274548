"""What was uploaded and is named by no manifest ends when another server takes the role (safety S35)."""

from pathlib import Path

from covey import model
from covey.client import oci
from covey.registry import uploaded
from tests.support import node


async def test_only_who_takes_the_role_after_itself_goes_on_with_what_it_has(tmp_path: Path) -> None:
    (one,) = node.several(tmp_path, 1)
    await one.push("a", "v1", b"needed")
    left = uploaded.Uploaded(one.base, one.catalog, one.care, fsync=False)

    async def has_both() -> bool:
        digest = (await one.content.put(b"not named")).digest
        found = await one.catalog.granted_blob("a", digest)
        assert await one.catalog.granted_blob("a", model.Digest(oci.digest_of(b"needed"))) is not None
        return found is not None

    async def upload() -> None:
        await one.logs.grant("a", (await one.content.put(b"not named")).digest)

    try:
        await left.took(1)
        await upload()
        for before, kept in ((1, True), (2, False), (3, False)):  # 2: it tried, and another one was first
            again = uploaded.Uploaded(one.base, one.catalog, one.care, fsync=False)
            await again.begin(before)
            assert await has_both() == kept
        await upload()
        await left.took(4)
        await left.begin(4)
        assert await has_both()
    finally:
        await one.close()
