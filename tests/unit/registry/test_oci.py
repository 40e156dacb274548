"""Spelling tags of any text in OCI's alphabet, and reading manifests that come from anywhere."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from covey import errors
from covey.client import oci

TEXTS = st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("_x#.- 0AéF")), min_size=1)


def unescape(spelled: str) -> str:
    """The inverse for everything that was not cut: exists to prove that no two texts share a spelling."""
    raw = re.sub(r"_x([0-9A-F]{2})", lambda found: f"\0{found[1]}", spelled)
    out = bytearray()
    for index, piece in enumerate(raw.split("\0")):
        out += piece.encode() if index == 0 else bytes([int(piece[:2], 16)]) + piece[2:].encode()
    return out.decode()


@given(TEXTS)
def test_every_text_has_a_spelling_that_oci_takes(text: str) -> None:
    assert oci.valid_tag(oci.escape_tag(text))


@given(TEXTS)
def test_a_spelling_leads_back_to_its_text(text: str) -> None:
    spelled = oci.escape_tag(text)
    if "_xh" not in spelled:
        assert unescape(spelled) == text


@given(st.text(min_size=100, max_size=300), st.text(min_size=100, max_size=300))
def test_long_texts_do_not_share_a_spelling(one: str, other: str) -> None:
    assert (oci.escape_tag(one) == oci.escape_tag(other)) == (one == other)


@pytest.mark.parametrize(
    ("text", "spelled"),
    [
        ("latest", "latest"),
        ("v1.0_rc-2", "v1.0_rc-2"),
        ("with space", "with_x20space"),
        ("#3", "_x233"),
        (".hidden", "_x2Ehidden"),
        ("-dash", "_x2Ddash"),
        ("a_x20b", "a_x5Fx20b"),
        ("é", "_xC3_xA9"),
    ],
)
def test_spellings(text: str, spelled: str) -> None:
    assert oci.escape_tag(text) == spelled


def test_a_long_tag_cannot_be_forged() -> None:
    long = "x y" * 200
    forged = oci.escape_tag(long)
    assert len(forged) == 128
    assert oci.escape_tag(forged) != forged


def test_an_empty_tag_is_refused() -> None:
    with pytest.raises(errors.Refused, match="tag needs a name"):
        oci.escape_tag("")


@pytest.mark.parametrize("name", ["a", "a/b", "library/x-y_z__q.9", "templates/0c1d"])
def test_repository_names(name: str) -> None:
    assert oci.valid_name(name)


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "..", "a/..", "_a", ".a", "A", "a___b", "a\n", "a" * 256])
def test_what_is_no_repository_name(name: str) -> None:
    assert not oci.valid_name(name)


def test_a_template_s_repository_leads_back_to_it() -> None:
    template = "12345678-1234-1234-1234-123456789abc"
    assert oci.template_of(oci.repository_of(template)) == template
    assert oci.template_of("templates/other") is None
    assert oci.template_of(template) is None


@given(st.binary(max_size=200))
def test_no_bytes_upset_the_parser(content: bytes) -> None:
    with pytest.raises(errors.Refused):
        oci.parse_manifest(content)
