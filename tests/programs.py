"""The foreign programs that tests run when they are there, and how to get each of those that are not.

Run as a script it prints the Debian packages that CI installs, so this table is their only list.
"""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass


@dataclass(frozen=True)
class Program:
    """`package` is Debian's. With `in_ci`, CI installs it, and there its absence is a failure and not a skip."""

    package: str
    in_ci: bool


PROGRAMS = {
    "curl": Program("curl", in_ci=True),
    "fish": Program("fish", in_ci=True),
    "gcc": Program("gcc", in_ci=True),
    "h2load": Program("nghttp2-client", in_ci=True),
    "nghttp": Program("nghttp2-client", in_ci=True),
    "nghttpd": Program("nghttp2-server", in_ci=True),
    "nghttpx": Program("nghttp2-proxy", in_ci=True),
    "openssl": Program("openssl", in_ci=True),
    "php": Program("php-cli", in_ci=True),
    "zsh": Program("zsh", in_ci=True),
    "cargo": Program("cargo", in_ci=False),
    "go": Program("golang", in_ci=False),
    "java": Program("default-jdk-headless", in_ci=False),
    "javac": Program("default-jdk-headless", in_ci=False),
    "mvn": Program("maven", in_ci=False),
    "node": Program("nodejs", in_ci=False),
    "npm": Program("npm", in_ci=False),
}

LIBRARIES = ("libc6-dev", "libnghttp2-dev", "libssl-dev")
"""What gcc needs for the benchmarks' far side."""


def absence(name: str) -> str:
    """The one line that a person reads when this program is not there."""
    return f"{name} is absent: apt-get install {PROGRAMS[name].package}"


def need(name: str) -> str:
    """The path of this program. Without it the test, or the module that asks while it is imported, is skipped; in CI it
    fails if CI should have installed the program.
    """
    import pytest  # here, because CI runs this file before anything is installed

    if path := shutil.which(name):
        return path
    if PROGRAMS[name].in_ci and os.environ.get("CI") == "true":
        raise pytest.fail.Exception(absence(name) + " (.ci/run should have done so)", pytrace=False)
    raise pytest.skip.Exception(absence(name), allow_module_level=True)


if __name__ == "__main__":
    print(*sorted({program.package for program in PROGRAMS.values() if program.in_ci} | set(LIBRARIES)))  # noqa: T201
