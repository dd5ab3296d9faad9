"""A foreign program is there, or named as absent: skipped here, failed in CI."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.programs import PROGRAMS, need


@pytest.fixture
def no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CI", raising=False)


def test_a_program_that_is_there_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "nghttpd"
    program.touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert need("nghttpd") == str(program)


@pytest.mark.usefixtures("no_programs")
def test_an_absent_program_is_skipped_in_a_line_that_says_how_to_get_it() -> None:
    with pytest.raises(pytest.skip.Exception, match=r"^nghttpd is absent: apt-get install nghttp2-server$"):
        need("nghttpd")


@pytest.mark.usefixtures("no_programs")
@pytest.mark.parametrize("name", [name for name, program in PROGRAMS.items() if program.in_ci])
def test_in_ci_an_absent_program_that_ci_installs_is_a_failure(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.fail.Exception, match=f"^{name} is absent"):
        need(name)


@pytest.mark.usefixtures("no_programs")
def test_in_ci_an_absent_toolchain_is_still_only_skipped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CI", "true")
    with pytest.raises(pytest.skip.Exception, match="go is absent"):
        need("go")
