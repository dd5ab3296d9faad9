"""The reference in docs/cli.md is made from the texts of the commands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.service.test_cli import all_commands, find

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "cli.md"


def test_the_reference_is_what_the_generator_makes() -> None:
    made = subprocess.run(
        [sys.executable, ROOT / "docs" / "generate.py"], capture_output=True, text=True, check=True
    ).stdout
    assert made == PAGE.read_text(), "run: python docs/generate.py > docs/cli.md"


def test_the_reference_has_every_command_and_every_option() -> None:
    page = PAGE.read_text()
    for path in all_commands():
        command = find(path)
        assert f"heliograph {' '.join(path)}".strip() in page
        for param in command.params:
            if param.opts[0].startswith("--"):
                assert f"- `{param.opts[0]}" in page
