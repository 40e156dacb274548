"""The documentation keeps its word: links lead somewhere, every safety rule names its proof, decisions are in order."""

import re
from collections.abc import Iterator
from pathlib import Path

from tests.tidy import repo

RULES = [f"S{number}" for number in range(1, 39)]
NOT_BUILT = "Not built yet:"
PROOF = "Proof:"


def _rules() -> dict[str, str]:
    """docs/safety.md cut at its headings: {"S1": text}."""
    text = (repo.ROOT / "docs/safety.md").read_text()
    parts = re.split(r"^### (S\d+) .*$", text, flags=re.MULTILINE)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def test_every_safety_rule_is_told_in_order() -> None:
    assert list(_rules()) == RULES


def test_every_safety_rule_names_its_proof_or_says_that_it_is_not_built() -> None:
    silent = [rule for rule, text in _rules().items() if PROOF not in text and NOT_BUILT not in text]
    assert not silent


def test_every_proof_exists() -> None:
    known = repo.test_ids()
    named = [
        (rule, test) for rule, text in _rules().items() for test in re.findall(r"`(tests/[\w/]+\.py::[\w:]+)`", text)
    ]
    assert named
    assert [pair for pair in named if pair[1] not in known] == []


def test_the_page_of_the_oci_specification_names_every_test_of_it() -> None:
    """But those of bad input, of which it speaks as a whole."""
    named = re.findall(r"`(test_\w+\.py::\w+)`", (repo.ROOT / "docs/reference/oci.md").read_text())
    tests = {
        test.removeprefix("tests/conformance/") for test in repo.test_ids() if test.startswith("tests/conformance/")
    }
    assert sorted(named) == sorted(test for test in tests if not test.startswith("test_bad_input.py"))


def test_every_bug_on_record_can_be_shown_again() -> None:
    happened = (repo.ROOT / "docs/track-record.md").read_text().partition("## What the storm finds")[0]
    rows = [row for row in happened.splitlines() if row.startswith("| ")]
    bugs = [row for row in rows if not row.startswith(("| what ", "|---"))]
    known = repo.test_ids()
    unproved = [row for row in bugs if not set(re.findall(r"`(tests/[\w/]+\.py::[\w:]+)`", row)) & known]
    assert bugs
    assert not unproved


def test_a_rule_that_claims_a_proof_names_a_test() -> None:
    empty = [rule for rule, text in _rules().items() if PROOF in text and "`tests/" not in text.partition(PROOF)[2]]
    assert not empty


def test_rules_cited_in_code_exist() -> None:
    cited = {
        (str(path), rule)
        for path, text in repo.texts(suffix=".py")
        for rule in re.findall(r"\bsafety (S\d+)", text)
        if rule not in RULES
    }
    assert not cited


def test_links_lead_somewhere() -> None:
    broken = [f"{path}: {target}" for path, target in _links() if not (repo.ROOT / path.parent / target).exists()]
    assert not broken


def _links() -> Iterator[tuple[Path, str]]:
    for path, text in repo.texts(suffix=".md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
            if "://" not in target and not target.startswith("#"):
                yield path, target.partition("#")[0]


def test_every_page_is_reached_from_the_readme() -> None:
    reached, fresh = set[Path](), {Path("README.md")}
    links: dict[Path, set[Path]] = {}
    for path, target in _links():
        resolved = (repo.ROOT / path.parent / target).resolve()
        if resolved.is_relative_to(repo.ROOT):
            links.setdefault(path, set()).add(resolved.relative_to(repo.ROOT))
    while fresh:
        reached |= fresh
        fresh = {target for path in fresh for target in links.get(path, ())} - reached
    pages = {path for path in repo.files() if path.suffix == ".md" and path.parts[0] == "docs"}
    assert pages - reached == set()


def test_decisions_are_numbered_and_weigh_alternatives() -> None:
    folder = ("docs", "decisions")
    decisions = sorted(path for path in repo.files() if path.parts[:2] == folder and path.name != "README.md")
    assert [path.name[:5] for path in decisions] == [f"{number:04d}-" for number in range(1, len(decisions) + 1)]
    for path in decisions:
        text = (repo.ROOT / path).read_text()
        for heading in ("## Why", "## Alternatives", "## What follows"):
            assert heading in text, f"{path} has no {heading!r}"
