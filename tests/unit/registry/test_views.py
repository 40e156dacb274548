"""The fold of a repository's log and the decisions on it, entry by entry."""

from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey import errors, model
from covey.client import oci
from covey.registry import views

EMPTY = views.Repository(name="templates/x")


def file(content: str, size: int = 10) -> views.File:
    return views.File(digest=oci.digest_of(content.encode()), size_bytes=size, media_type=oci.DISK_RAW, title=content)


def template(tag: str, *layers: str, name: str = "mac") -> views.Known:
    """A template's manifest with these layers of 10 bytes, a config of 1, itself of 100."""
    digest = oci.digest_of(f"{name}{tag}{layers}".encode())
    release = views.Release(
        name=name,
        tag=tag,
        arch=model.Arch.AMD64,
        config=file("config", 1),
        files=tuple(file(layer) for layer in layers),
    )
    return views.Known(digest=digest, media_type=oci.OCI_MANIFEST, size_bytes=100, release=release)


def image(content: str) -> views.Known:
    return views.Known(digest=oci.digest_of(content.encode()), media_type=oci.OCI_MANIFEST, size_bytes=100)


def push(
    repository: views.Repository, known: views.Known, tag: str | None = None, *, force: bool = False, at_s: int = 7
) -> views.Repository:
    spelled = tag if tag is not None else known.release.tag if known.release else ""
    entry = views.decide_push(repository, known, spelled, force=force, id="id", now_s=at_s)
    return repository if entry is None else views.fold(repository, [entry])


def delete(repository: views.Repository, reference: str) -> views.Repository:
    entry = views.decide_delete(repository, reference, id="id", now_s=9)
    assert entry is not None
    return views.fold(repository, [entry])


def versions(repository: views.Repository) -> list[tuple[int, str]]:
    return [(version.number, version.release.tag) for version in repository.versions]


def test_versions_are_numbered_from_0_in_push_order() -> None:
    repository = push(push(push(EMPTY, template("b")), template("a")), template("c"))
    assert versions(repository) == [(0, "b"), (1, "a"), (2, "c")]


def test_the_same_push_again_is_no_entry() -> None:
    repository = push(EMPTY, template("a"))
    assert views.decide_push(repository, template("a"), "a", force=False, id="id", now_s=8) is None
    assert views.decide_push(repository, template("a"), "", force=False, id="id", now_s=8) is None


def test_an_existing_tag_is_refused_unless_forced() -> None:
    repository = push(EMPTY, template("a", "one"))
    with pytest.raises(errors.Refused, match="tag 'a' of template 'mac' exists"):
        push(repository, template("a", "two"))
    assert versions(push(repository, template("a", "two"), force=True)) == [(1, "a")]


def test_a_number_is_never_given_twice() -> None:
    repository = push(push(EMPTY, template("a")), template("b"))
    assert versions(push(delete(repository, "b"), template("c"))) == [(0, "a"), (2, "c")]


def test_a_template_without_versions_is_dead_for_ever() -> None:
    repository = delete(push(EMPTY, template("a")), "a")
    assert repository.dead
    with pytest.raises(errors.Refused, match="was deleted"):
        push(repository, template("b"))
    assert not EMPTY.dead


def test_a_template_keeps_its_name() -> None:
    with pytest.raises(errors.Refused, match="named 'mac', not 'win'"):
        push(push(EMPTY, template("a")), template("b", name="win"))


def test_a_manifest_pushed_by_digest_becomes_a_version_when_it_is_tagged() -> None:
    repository = push(EMPTY, template("a"), "")
    assert (versions(repository), len(repository.manifests)) == ([], 1)
    entry = views.decide_push(repository, template("a"), "a", force=False, id="id", now_s=8)
    assert entry is not None
    assert (entry.kind, entry.manifest) == (views.Kind.TAG, None)
    assert versions(views.fold(repository, [entry])) == [(0, "a")]


def test_a_plain_image_has_tags_that_move_and_no_versions() -> None:
    repository = push(push(EMPTY, image("one"), "latest"), image("two"), "latest")
    assert repository.tags == {"latest": image("two").digest}
    assert (repository.versions, len(repository.manifests)) == ((), 2)


def test_deleting_a_manifest_takes_its_tags_and_versions() -> None:
    known = template("a")
    repository = delete(push(push(EMPTY, known), template("b")), known.digest)
    assert (versions(repository), set(repository.tags)) == ([(1, "b")], {"b"})
    assert known.digest not in repository.manifests


def test_what_is_not_there_cannot_be_deleted() -> None:
    assert views.decide_delete(push(EMPTY, template("a")), "b", id="id", now_s=9) is None


def revert(
    repository: views.Repository, tag: str = "", version: int | None = None, digest: str = "", request: str = ""
) -> views.Entry | None:
    target = views.Target(tag=tag, version=version, digest=digest)
    return views.decide_revert(repository, target, request=request, id="id", now_s=9)


THREE = push(push(push(EMPTY, template("a")), template("b")), template("c"))


def test_revert_takes_a_version_and_all_newer_ones() -> None:
    entry = revert(THREE, version=1)
    assert entry is not None
    assert versions(views.fold(THREE, [entry])) == [(0, "a")]
    with pytest.raises(errors.Refused, match="No such version 3"):
        revert(THREE, version=3)
    with pytest.raises(errors.Refused, match="No such tag d"):
        revert(THREE, tag="d")


@pytest.mark.parametrize("aim", [{"tag": "b"}, {"version": 1}, {"request": "r"}, {"version": 1, "tag": "b"}])
def test_what_was_taken_back_is_not_taken_back_again(aim: dict[str, Any]) -> None:
    entry = revert(THREE, **aim)
    assert entry is not None
    after = views.fold(THREE, [entry])
    assert after.versions
    assert revert(after, **aim) is None


def test_a_request_id_stands_for_one_request() -> None:
    entry = revert(THREE, request="r")
    assert entry is not None
    with pytest.raises(errors.Refused, match="was used for another request"):
        revert(views.fold(THREE, [entry]), version=0, request="r")


def test_a_revert_of_a_version_that_is_another_by_now_is_refused() -> None:
    with pytest.raises(errors.Refused, match="version 2 is sha256"):
        revert(THREE, version=2, digest=oci.digest_of(b"other"))
    assert revert(THREE, version=2, digest=THREE.versions[2].manifest.digest) is not None


def test_a_tag_that_was_pushed_again_is_a_new_thing_to_take_back() -> None:
    entry = revert(THREE, tag="c")
    assert entry is not None
    again = push(views.fold(THREE, [entry]), template("c"))
    found = revert(again, tag="c")
    assert found is not None and found.version == 3


def test_an_architecture_that_was_corrected_holds_until_the_next_push() -> None:
    entry = views.decide_arch(THREE, model.Arch.ARM64, id="id", now_s=9)
    assert entry is not None
    after = push(views.fold(THREE, [entry]), template("d"))
    assert [version.release.arch for version in after.versions] == ["arm64", "arm64", "arm64", "amd64"]
    assert views.decide_arch(THREE, model.Arch.AMD64, id="id", now_s=9) is None
    assert (after.size_bytes(), after.next_version) == (push(THREE, template("d")).size_bytes(), 4)


def test_shared_layers_count_once_and_every_tag_changes_the_size() -> None:
    first = push(EMPTY, template("a", "base"))
    assert first.size_bytes() == 100 + 1 + 10
    second = push(first, template("b", "base", "more"))
    assert second.size_bytes() == 2 * 100 + 1 + 2 * 10
    assert push(second, template("c", "base", "more")).size_bytes() > second.size_bytes()


def test_an_entry_of_a_newer_kind_changes_nothing_but_the_count() -> None:
    repository = push(EMPTY, template("a"))
    after = views.fold(repository, [views.Entry(id="id", kind="sealed", at_s=9, tag="a")])
    assert (after.count, after.tags, versions(after)) == (2, repository.tags, versions(repository))


MOVES = st.lists(
    st.tuples(st.sampled_from(["push", "force", "delete", "revert"]), st.sampled_from("abc"), st.sampled_from("xyz")),
    max_size=25,
)


def history(moves: Sequence[tuple[str, str, str]]) -> list[views.Entry]:
    """The log that these moves leave, refused ones left out."""
    log: list[views.Entry] = []
    for verb, tag, layer in moves:
        repository = views.fold(EMPTY, log)
        try:
            if verb == "delete":
                entry = views.decide_delete(repository, tag, id="id", now_s=9)
            elif verb == "revert":
                entry = revert(repository, version=ord(layer) - ord("x"))
            else:
                known = template(tag, layer)
                entry = views.decide_push(repository, known, tag, force=verb == "force", id="id", now_s=9)
        except errors.Refused:
            continue
        log += [] if entry is None else [entry]
    return log


@given(MOVES, st.integers(0, 25))
def test_folding_in_two_steps_is_folding_at_once(moves: list[tuple[str, str, str]], cut: int) -> None:
    log = history(moves)
    assert views.fold(views.fold(EMPTY, log[:cut]), log[cut:]) == views.fold(EMPTY, log)


@given(MOVES)
def test_what_holds_after_every_history(moves: list[tuple[str, str, str]]) -> None:
    log = history(moves)
    repository = views.fold(EMPTY, log)
    given_numbers = [entry.version for entry in log if entry.kind in ("push", "tag")]
    assert given_numbers == sorted(set(given_numbers))
    assert {version.tag: version.manifest.digest for version in repository.versions} == repository.tags
    assert all(digest in repository.manifests for digest in repository.tags.values())
    assert [version.number for version in repository.versions] == sorted(v.number for v in repository.versions)
