"""The documents keep up with the code. `python -m tests.unit.test_docs` writes anew those that are made of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from heliograph import reasons
from heliograph.doors import exchange, openapi, problems, queries

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "heliograph"

MADE: dict[str, Callable[[], str]] = {
    "errors.md": problems.markdown,
    "openapi.json": lambda: openapi.encoded().decode(),
}
"""In docs/, with what makes them."""


@pytest.mark.parametrize("name", MADE)
def test_what_is_made_of_the_code_is_as_the_code_has_it(name: str) -> None:
    hint = "run python -m tests.unit.test_docs to write it anew"
    assert (ROOT / "docs" / name).read_text() == MADE[name](), hint


def test_every_event_that_is_logged_is_explained_to_operators() -> None:
    explained = (ROOT / "docs" / "operations.md").read_text()
    logged = {
        event
        for path in SOURCE.glob("**/*.py")
        if "simulator" not in path.parts
        for event in re.findall(r"_log\.(?:debug|info|warning|error)\(\s*\"([^\"]+)\"", path.read_text())
    }
    assert {"started", "listening", "gave_up"} <= logged
    assert [event for event in sorted(logged) if f"`{event}`" not in explained] == []


# -- codes -----------------------------------------------------------------------------------------------------------

WHERE_IS_THE_CODE = {"Problem": 1, "Refused": 0, "ErrorItem": 0}
SAYING = [SOURCE / "admission.py", *SOURCE.glob("doors/*.py"), *SOURCE.glob("payload/*.py")]
SAYING += [*SOURCE.glob("relay/*.py"), SOURCE / "protocols" / "apns.py"]


def said() -> dict[str, set[int]]:
    """The codes that are said in so many words, each with the statuses that stand beside it."""
    found: dict[str, set[int]] = {}
    for path in SAYING:
        module = ast.parse(path.read_text())
        for call in ast.walk(module):
            if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name)):
                continue
            place = WHERE_IS_THE_CODE.get(call.func.id)
            # `payload` has a Problem of its own, which has no code.
            if place is None or (path.parent.name == "payload" and place) or len(call.args) <= place:
                continue
            for code in words(call.args[place], module):
                statuses = found.setdefault(code, set())
                match call.args[0]:
                    case ast.Constant(int(status)):
                        statuses.add(status)
    return found


def words(node: ast.expr, module: ast.Module) -> Iterator[str]:
    """What an expression may be: a word, a reason of Apple, either of two, or a name that is given one of these."""
    match node:
        case ast.Constant(str(word)):
            yield word
        case ast.Attribute(ast.Attribute(ast.Name("reasons"), name), "word"):
            yield getattr(reasons, name).word
        case ast.IfExp():
            yield from words(node.body, module)
            yield from words(node.orelse, module)
        case ast.Name(name):
            for each in ast.walk(module):
                if isinstance(each, ast.Assign) and any(
                    isinstance(to, ast.Name) and to.id == name for to in each.targets
                ):
                    yield from words(each.value, module)


SAID = said()


@pytest.mark.parametrize("code", sorted(SAID))
def test_every_code_that_is_said_is_in_the_catalogue_with_its_status(code: str) -> None:
    entry = problems.CATALOGUE[code]
    assert SAID[code] <= set(entry.statuses)


def test_codes_are_found_in_the_code_at_all() -> None:
    assert {
        "UnknownApp",
        "MissingTopic",
        "InvalidJson",
        "Unauthorized",
        "BadDeviceToken",
        "BadEnvironment",
    } <= SAID.keys()
    assert SAID["UnknownApp"] >= {404}


def test_the_catalogue_has_what_the_code_says_and_what_apple_says_and_nothing_else() -> None:
    ours = {code for code, entry in problems.CATALOGUE.items() if entry.origin is problems.Origin.API}
    assert ours <= SAID.keys()
    assert {entry.code for entry in problems.of(problems.Origin.RECEIPTS)} == set(queries._OWN_REASONS)
    assert reasons.TABLE.keys() <= problems.CATALOGUE.keys()


@pytest.mark.parametrize("code", sorted(problems.CATALOGUE))
def test_problems_link_to_their_entry_by_its_title(code: str) -> None:
    entry = problems.CATALOGUE[code]
    answer = exchange.Problem(400, code, "x").answer().body.decode()
    assert f'"/docs/errors#{entry.slug}"' in answer
    assert f'"{entry.title}"' in answer
    # Where a page of Markdown is shown, links to a heading are made of it like this.
    assert entry.title.lower().replace(" ", "-") == entry.slug
    assert entry.meaning[-1] in ".)"
    assert not entry.remedy or entry.remedy[-1] == "."


@pytest.mark.parametrize("origin", problems.Origin)
def test_codes_are_in_the_order_of_the_alphabet(origin: problems.Origin) -> None:
    codes = [entry.code for entry in problems.of(origin)]
    assert codes == sorted(codes)


# -- links -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "page", sorted(ROOT.glob("*.md")) + sorted(ROOT.glob("docs/**/*.md")), ids=lambda page: str(page.relative_to(ROOT))
)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)  # Go has the same brackets
    targets = re.findall(r"\]\((?!https?:)([^)#]+)[^)]*\)", prose)
    assert [target for target in targets if not (page.parent / target).exists()] == []


if __name__ == "__main__":
    for name, make in MADE.items():
        (ROOT / "docs" / name).write_text(make())
