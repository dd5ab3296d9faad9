"""Files that the configuration names: secrets, certificates, also by a pipe."""

from __future__ import annotations

import os
import select
import stat
import time
from pathlib import Path

from heliograph.errors import ConfigError

MAX_SECRET_BYTES = 64 * 1024
"""No file of keys or certificates is longer."""
_WRITER_S = 5.0
"""How long somebody may take to open a pipe for writing."""
_WRITTEN_S = 120.0
"""How long who has opened it may take to write: a program may ask a person for a passphrase first."""
_OTHERS_MAY = 0o007


def read_secret(reference: str, setting: str) -> bytes:
    """The contents of the file that `file:PATH` or `credential:NAME` stands for.

    Raises ConfigError, also where other users of the machine could read the file. `setting` is for its text.
    """
    return read_file(secret_path(reference, setting), setting, secret=True)


def read_file(path: Path, setting: str, *, secret: bool = False, most: int = MAX_SECRET_BYTES) -> bytes:
    """The contents of a file of `most` octets at most, or what somebody writes into a pipe.

    `secret`: other users of the machine must not read it. Raises ConfigError; `setting` is for its text.
    """
    try:
        # Without O_NONBLOCK a pipe would have us wait for a writer, for ever if none comes.
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as opened:
            mode = os.fstat(opened.fileno()).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):
                raise ConfigError(f"{setting}: {path} is a device: name a file")
            # What is read-only to us, as secrets in containers are, nobody could change as we advise.
            if secret and mode & _OTHERS_MAY and not os.fstatvfs(opened.fileno()).f_flag & os.ST_RDONLY:
                raise ConfigError(
                    f"{setting}: every user of this machine can read {path}: run chmod 600 {path} "
                    "(or 640, with a group that only heliograph is in)"
                )
            if stat.S_ISFIFO(mode):
                content = _read_pipe(opened.fileno(), most + 1)
                if not content:
                    raise ConfigError(
                        f"{setting}: nothing came through the pipe {path}: see whether the program that writes into it "
                        "works, or name a file (a pipe can be read once only)"
                    )
            else:
                content = opened.read(most + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"{setting}: cannot be read, as there is no file {path}: correct the path, or put the file there"
        ) from None
    except TimeoutError as error:
        raise ConfigError(f"{setting}: {path} is a pipe, and {error}: start what should, or name a file") from None
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        why = getattr(error, "strerror", None) or error
        raise ConfigError(f"{setting}: {path} cannot be read ({why}): correct path or mode") from error
    if len(content) > most:
        raise ConfigError(f"{setting}: {path} is longer than {most} octets, the most that belongs here: name another")
    return content


def _read_pipe(descriptor: int, most: int) -> bytes:
    """What comes until its writers have closed it, `most` octets at most. Raises TimeoutError: what nobody does."""
    pipe = select.poll()
    pipe.register(descriptor, select.POLLIN)
    content = b""
    began = time.monotonic()
    while len(content) < most:
        ready = pipe.poll(_WRITER_S * 1000)
        try:
            part = os.read(descriptor, most - len(content))
        except BlockingIOError:  # there is a writer, which has nothing yet
            if time.monotonic() - began < _WRITTEN_S:
                continue
            raise TimeoutError(f"who writes into it has not ended within {_WRITTEN_S:.0f} s") from None
        if not part and not ready:
            raise TimeoutError(f"nobody writes into it within {_WRITER_S:.0f} s")
        if not part:
            break
        content += part
    return content


def secret_path(reference: str, setting: str) -> Path:
    """The file that `file:PATH` or `credential:NAME` stands for. Raises ConfigError."""
    scheme, _, rest = reference.partition(":")
    if scheme == "file":
        return Path(rest)
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    if not folder:
        raise ConfigError(
            f"{setting} names a credential, but $CREDENTIALS_DIRECTORY is not set: have systemd start heliograph with "
            "LoadCredential=, or write file:PATH"
        )
    if "/" in rest or rest in ("", ".", ".."):
        raise ConfigError(f"{setting}: write the credential's name alone, the name of a file in {folder}")
    return Path(folder) / rest
