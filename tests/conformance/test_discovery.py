"""OCI distribution specification 1.1, "Content discovery": tags and referrers."""

import json
import re
from typing import Any

import pytest

from covey.client import oci
from tests.conformance import workflow
from tests.support import registry

TAGS = ["1", "1.0", "B", "_x", "a", "latest", "z9"]
NEXT = re.compile(r'<(.+)>; rel="next"')


async def push_tags(repo: workflow.Repo) -> None:
    _, manifest = await repo.push_image()
    for tag in reversed(TAGS):
        await repo.push(tag, manifest)


# ---- tags ----------------------------------------------------------------------------------------------------------


async def test_tags_are_listed_in_asciibetical_order(repo: workflow.Repo) -> None:
    await push_tags(repo)
    assert await repo.tags() == TAGS


async def test_tags_of_different_case_are_different(repo: workflow.Repo) -> None:
    lower, _ = await repo.push_image("tag", b"lower")
    upper, _ = await repo.push_image("TAG", b"upper")
    assert await repo.tags() == ["TAG", "tag"]
    for tag, digest in (("tag", lower), ("TAG", upper)):
        assert (await repo.call("HEAD", f"/manifests/{tag}"))[1]["Docker-Content-Digest"] == digest


async def test_a_repository_without_tags_has_an_empty_list(repo: workflow.Repo) -> None:
    await repo.push_image()
    assert await repo.tags() == []


async def test_an_unknown_repository_has_no_list(repo: workflow.Repo) -> None:
    assert await repo.error("GET", "/tags/list") == (404, "NAME_UNKNOWN")


async def test_n_limits_how_many_tags_come(repo: workflow.Repo) -> None:
    await push_tags(repo)
    for n in range(1, len(TAGS) + 2):
        _, headers, body = await repo.call("GET", f"/tags/list?n={n}")
        assert json.loads(body)["tags"] == TAGS[:n]
        assert ("Link" in headers) == (n < len(TAGS))


async def test_n_0_is_an_empty_list_without_a_link(repo: workflow.Repo) -> None:
    await push_tags(repo)
    _, headers, body = await repo.call("GET", "/tags/list?n=0")
    assert json.loads(body)["tags"] == []
    assert "Link" not in headers


async def test_last_is_where_the_list_goes_on(repo: workflow.Repo) -> None:
    await push_tags(repo)
    for index, last in enumerate(TAGS):
        assert await repo.tags(f"?last={last}") == TAGS[index + 1 :]
        assert await repo.tags(f"?n=2&last={last}") == TAGS[index + 1 : index + 3]
    assert await repo.tags("?last=b") == ["latest", "z9"]  # it need not be a tag that is there


@pytest.mark.parametrize("n", [1, 3, 7])
async def test_pages_are_linked(repo: workflow.Repo, n: int) -> None:
    await push_tags(repo)
    seen: list[str] = []
    path = f"/tags/list?n={n}"
    while path:
        _, headers, body = await repo.call("GET", path)
        page = json.loads(body)["tags"]
        assert 0 < len(page) <= n
        seen += page
        link = NEXT.fullmatch(headers.get("Link", ""))
        path = link[1] if link else ""
    assert seen == TAGS


@pytest.mark.parametrize("n", ["-1", "x", "1.5", "٣"])
async def test_an_n_that_is_no_number_is_400(repo: workflow.Repo, n: str) -> None:
    await repo.push_image("v")
    assert await repo.error("GET", f"/tags/list?n={n}") == (400, "PAGINATION_NUMBER_INVALID")


async def test_repositories_are_listed_in_pages(repo: workflow.Repo) -> None:
    names = [f"{repo.name}{end}" for end in ("", "-a", "-b/deep", "-c")]
    for name in names:
        await workflow.Repo(repo.server, name).push_image("v1")
    await workflow.Repo(repo.server, f"{repo.name}-d").push_blob(b"no manifest yet")
    _, _, body = await repo.server.call("GET", "/v2/_catalog")
    assert [name for name in json.loads(body)["repositories"] if name.startswith(repo.name)] == names
    _, headers, body = await repo.server.call("GET", f"/v2/_catalog?n=2&last={names[0]}")
    assert json.loads(body)["repositories"] == names[1:3]
    link = NEXT.fullmatch(headers["Link"])
    assert link is not None
    assert json.loads((await repo.server.call("GET", link[1]))[2])["repositories"][0] == names[3]


# ---- referrers -----------------------------------------------------------------------------------------------------


async def attach(repo: workflow.Repo, subject: bytes, kind: str, **more: Any) -> dict[str, Any]:
    """Push an artifact about `subject`: its descriptor in a list of referrers."""
    about = registry.descriptor(oci.OCI_MANIFEST, subject)
    content = registry.image_manifest(workflow.EMPTY, artifactType=kind, subject=about, annotations={"k": kind}, **more)
    await repo.push("", content)
    return {**registry.descriptor(oci.OCI_MANIFEST, content), "artifactType": kind, "annotations": {"k": kind}}


def by_digest(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(found, key=lambda item: str(item["digest"]))


async def test_referrers_are_an_image_index_of_descriptors(repo: workflow.Repo) -> None:
    digest, manifest = await repo.push_image("v1")
    expected = [await attach(repo, manifest, kind) for kind in ("x/sbom", "x/signature")]
    assert by_digest(await repo.referrers(digest)) == by_digest(expected)


async def test_many_referrers_come_in_pages_that_clients_can_read(repo: workflow.Repo) -> None:
    digest, manifest = await repo.push_image("v1")
    about = registry.descriptor(oci.OCI_MANIFEST, manifest)
    for number in range(5):
        await repo.push_image("", subject=about, artifactType="x/y+z", annotations={str(number): "a" * 2_000_000})
    for query in ("", "?artifactType=x/y%2Bz"):
        seen: list[str] = []
        path, pages = f"/referrers/{digest}{query}", 0
        while path:
            _, headers, body = await repo.call("GET", path)
            assert len(body) <= oci.MANIFEST_LIMIT
            seen += [item["digest"] for item in json.loads(body)["manifests"]]
            link = NEXT.fullmatch(headers.get("Link", ""))
            path, pages = (link[1] if link else ""), pages + 1
            assert headers.get("OCI-Filters-Applied", "") == ("artifactType" if query else "")
        assert (len(seen), len(set(seen)), pages) == (5, 5, 3)


async def test_referrers_pushed_before_their_subject_are_listed(repo: workflow.Repo) -> None:
    await repo.push_blob(workflow.EMPTY)
    manifest = registry.image_manifest(workflow.EMPTY, annotations={"pushed": "later"})
    before = await attach(repo, manifest, "x/before")
    digest, _ = await repo.push("v1", manifest)
    after = await attach(repo, manifest, "x/after")
    assert by_digest(await repo.referrers(digest)) == by_digest([before, after])


async def test_referrers_are_filtered_by_artifact_type(repo: workflow.Repo) -> None:
    digest, manifest = await repo.push_image("v1")
    sbom = await attach(repo, manifest, "application/vnd.example.sbom+json")
    await attach(repo, manifest, "x/signature")
    kind = "application/vnd.example.sbom%2Bjson"
    _, headers, _ = await repo.call("GET", f"/referrers/{digest}?artifactType={kind}")
    assert headers["OCI-Filters-Applied"] == "artifactType"
    assert await repo.referrers(digest, f"?artifactType={kind}") == [sbom]
    assert await repo.referrers(digest, "?artifactType=x/none") == []
    for query in ("", "?artifactType="):
        assert len(await repo.referrers(digest, query)) == 2
        assert "OCI-Filters-Applied" not in (await repo.call("GET", f"/referrers/{digest}{query}"))[1]


async def test_a_referrer_without_artifact_type_has_its_config_s(repo: workflow.Repo) -> None:
    digest, manifest = await repo.push_image("v1")
    about = registry.descriptor(oci.OCI_MANIFEST, manifest)
    await repo.push_image("", subject=about)
    (found,) = await repo.referrers(digest)
    assert found["artifactType"] == "application/vnd.oci.image.config.v1+json"


async def test_an_index_may_refer_and_without_a_type_has_none(repo: workflow.Repo) -> None:
    digest, manifest = await repo.push_image("v1")
    about = registry.descriptor(oci.OCI_MANIFEST, manifest)
    plain, content = await repo.push_index("", subject=about, annotations={"a": "b"})
    typed, _ = await repo.push_index("", subject=about, artifactType="x/index")
    found = {item["digest"]: item for item in await repo.referrers(digest)}
    assert found[plain] == {**registry.descriptor(oci.OCI_INDEX, content), "annotations": {"a": "b"}}
    assert found[typed]["artifactType"] == "x/index"


async def test_what_nothing_refers_to_has_an_empty_list(repo: workflow.Repo) -> None:
    for digest in (workflow.unknown(), workflow.unknown(oci.SHA512)):
        assert await repo.referrers(digest) == []  # not even the repository is there
    digest, _ = await repo.push_image("v1")
    assert await repo.referrers(digest) == []


async def test_referrers_of_a_malformed_digest_are_400(repo: workflow.Repo) -> None:
    for digest in ("sha256:12", "md5:" + "0" * 32, "latest"):
        assert await repo.error("GET", f"/referrers/{digest}") == (400, "DIGEST_INVALID")


async def test_a_referrer_that_is_deleted_is_listed_no_more(repo: workflow.Repo) -> None:
    digest, manifest = await repo.push_image("v1")
    gone, stays = await attach(repo, manifest, "x/gone"), await attach(repo, manifest, "x/stays")
    assert (await repo.call("DELETE", f"/manifests/{gone['digest']}"))[0] == 202
    assert await repo.referrers(digest) == [stays]
    assert (await repo.call("DELETE", f"/manifests/{digest}"))[0] == 202
    assert await repo.referrers(digest) == [stays]  # the subject is gone, what was said of it is not


def fallback(digest: str) -> str:
    """The specification's "referrers tag" of a digest."""
    algorithm, _, encoded = digest.partition(":")
    return f"{algorithm}-{encoded[:64]}"


async def test_referrers_named_by_a_fallback_tag_are_listed_once(repo: workflow.Repo) -> None:
    digest, manifest = await repo.push_image("v1")
    found = await attach(repo, manifest, "x/sbom")
    await repo.push_index(fallback(digest), manifests=[found])
    assert await repo.referrers(digest) == [found]
    status, _, body = await repo.call("GET", f"/manifests/{fallback(digest)}")  # a client that knows only the tag
    assert (status, json.loads(body)["manifests"]) == (200, [found])


@pytest.mark.parametrize("algorithm", [oci.SHA256, oci.SHA512])
async def test_a_fallback_tag_holds_nothing_and_may_name_what_is_gone(repo: workflow.Repo, algorithm: str) -> None:
    _, manifest = await repo.push_image("v1")
    tag = fallback(oci.digest_of(manifest, algorithm))
    first, second = await attach(repo, manifest, "x/one"), await attach(repo, manifest, "x/two")
    await repo.push_index(tag, manifests=[first, second])
    assert (await repo.call("DELETE", f"/manifests/{first['digest']}"))[0] == 202
    await repo.push_index(tag, manifests=[second, first], annotations={"rewritten": "by a client that knows no better"})
    assert (await repo.call("DELETE", f"/manifests/{tag}"))[0] == 202
    index = workflow.index(manifests=[first, second])
    assert (await repo.put("v2", index, oci.OCI_INDEX))[0] == 404  # an ordinary index may not


async def test_an_index_that_gets_an_ordinary_tag_too_holds_what_it_names(repo: workflow.Repo) -> None:
    digest, manifest = await repo.push_image("v1")
    found = await attach(repo, manifest, "x/sbom")
    await repo.push_index(fallback(digest), manifests=[found])
    await repo.push_index("kept", manifests=[found])
    assert await repo.error("DELETE", f"/manifests/{found['digest']}") == (405, "UNSUPPORTED")
