"""The documents keep up with the code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from heliograph import reasons

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "heliograph"
HEADINGS = set(re.findall(r"^### (.+)$", (ROOT / "docs" / "errors.md").read_text(), re.MULTILINE))
CODES = re.compile(r'Problem\(\s*\d+,\s*"([A-Za-z]+)"|(?:Refused|ErrorItem)\(\s*"([A-Za-z]+)"')


def said() -> set[str]:
    """The codes that doors and admission name in so many words, and all of Apple's."""
    files = [SOURCE / "admission.py", *SOURCE.glob("doors/*.py"), *SOURCE.glob("relay/*.py")]
    found = {code for file in files for match in CODES.findall(file.read_text()) for code in match if code}
    return found | set(reasons.TABLE)


@pytest.mark.parametrize("code", sorted(said()))
def test_every_code_has_the_section_that_problems_link_to(code: str) -> None:
    title = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", " ", code).capitalize()
    assert title in HEADINGS


def test_codes_are_found_in_the_code_at_all() -> None:
    assert {"UnknownApp", "MissingTopic", "InvalidJson", "Unauthorized", "BadDeviceToken"} <= said()


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md")), ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", page.read_text())
    assert [target for target in targets if not (page.parent / target).exists()] == []
