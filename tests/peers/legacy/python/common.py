"""What the clients in Python share; see ../contract.py.

They import libraries by name: what the type checker says is not to hang on whether they are installed.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from struct import pack, unpack_from
from typing import Any, NamedTuple

HOST = "localhost"


class Message(NamedTuple):
    identifier: int
    expiry: int
    priority: int
    token: str
    payload: str

    def frame(self) -> bytes:
        """Command 1."""
        token, payload = bytes.fromhex(self.token), self.payload.encode()
        head = pack("!BIIH", 1, self.identifier, self.expiry, len(token))
        return head + token + pack("!H", len(payload)) + payload


def messages() -> list[Message]:
    found = []
    for line in Path(os.environ["LEGACY_PUSHES"]).read_text().splitlines():
        identifier, expiry, priority, token, payload = line.split(" ", 4)
        found.append(Message(int(identifier), int(expiry), int(priority), token, payload))
    return found


def tell(**what: Any) -> None:
    print(json.dumps(what), flush=True)  # noqa: T201


def tell_error(packet: bytes, sent: list[Message]) -> list[Message]:
    """What is to be sent again."""
    _, status, identifier = unpack_from("!BBI", packet)
    at = next(index for index, message in enumerate(sent) if message.identifier == identifier)
    tell(status=status, token=sent[at].token)
    return sent[at + 1 :]


def tell_gone(content: bytes) -> None:
    while content:
        at, size = unpack_from("!IH", content)
        tell(token=content[6 : 6 + size].hex(), at=at)
        content = content[6 + size :]
