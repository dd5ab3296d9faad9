"""What a foreign APNs client of this folder is told, and what it tells.

Told, in its environment: APPLE_PORT on localhost, APPLE_CA, APPLE_KEY_FILE, APPLE_KEY_ID, APPLE_TEAM_ID, for those that
make none themselves APPLE_PROVIDER_TOKEN, and APPLE_PUSHES: a line each with apns-id (- for none), device token, topic
and the file of the payload. All are alerts, sent one after the other. Where there are APPLE_PEM and APPLE_P12, the
client's certificate with its key, without a passphrase, it shows that and no provider token.

It tells, a line of JSON for each push, what its library says of the answer: `status`; `reason`, `timestamp` (UNIX
milliseconds) and `id` (the apns-id), where there is one and the library shows it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from uuid import UUID

from heliograph.simulator.threaded import ThreadedSimulator

TOPIC, OTHERS_TOPIC = "com.example.shop", "com.example.other"
GOOD, DEAD, FOREIGN = "a1b2c3d4" * 8, "deadbeef" * 8, "c0ffee00" * 8
SINCE = 1_700_000_000_000  # of whole seconds: apns2 drops the rest


class Push(NamedTuple):
    """One push, and Apple's answer to it (Apple, "Handling notification responses from APNs")."""

    id: str | None
    """None: the client names none."""
    token: str
    topic: str
    payload: Path
    answer: dict[str, Any]


def prepare(apple: ThreadedSimulator, folder: Path) -> list[Push]:
    """Have the simulator know what the pushes are about."""
    apple.add_app(TOPIC)
    apple.unregister(DEAD, since=SINCE)
    apple.register(FOREIGN, topic=OTHERS_TOPIC)
    small, large = folder / "small.json", folder / "large.json"
    small.write_text('{"aps":{"alert":"hello"}}')
    large.write_text(json.dumps({"aps": {"alert": "x" * 5000}}))
    pushes: list[tuple[str, str, Path, dict[str, Any]]] = [
        (GOOD, TOPIC, small, {"status": 200}),
        (DEAD, TOPIC, small, {"status": 410, "reason": "Unregistered", "timestamp": SINCE}),
        (GOOD, OTHERS_TOPIC, small, {"status": 400, "reason": "TopicDisallowed"}),
        (FOREIGN, TOPIC, small, {"status": 400, "reason": "DeviceTokenNotForTopic"}),
        (GOOD, TOPIC, large, {"status": 413, "reason": "PayloadTooLarge"}),
    ]
    return [Push(f"0191d5a8-0000-7000-8000-{number:012d}", *push) for number, push in enumerate(pushes, 1)]


def listed(pushes: Sequence[Push]) -> str:
    return "\n".join(f"{each.id or '-'} {each.token} {each.topic} {each.payload}" for each in pushes)


def environment(apple: ThreadedSimulator, pushes: Sequence[Push]) -> dict[str, str]:
    return {
        "APPLE_PORT": str(apple.port),
        "APPLE_CA": str(apple.ca_file),
        "APPLE_KEY_FILE": str(apple.key_file),
        "APPLE_KEY_ID": apple.key_id,
        "APPLE_TEAM_ID": apple.team_id,
        "APPLE_PROVIDER_TOKEN": apple.provider_token(),
        "APPLE_PUSHES": listed(pushes),
    }


def check(apple: ThreadedSimulator, pushes: Sequence[Push], told: Sequence[dict[str, Any]], *, shows_id: bool) -> None:
    """The client's own view of each answer is Apple's, and only the first push got through."""
    check_told(pushes, told, shows_id=shows_id)
    (received,) = apple.received
    assert (received.id, received.token, received.topic) == (pushes[0].id, GOOD, TOPIC)
    assert json.loads(received.payload) == {"aps": {"alert": "hello"}}


def check_told(pushes: Sequence[Push], told: Sequence[dict[str, Any]], *, shows_id: bool) -> None:
    """The client's own view of each answer is Apple's. An id that it did not name is any."""
    names = ["status", "reason", "timestamp", *(["id"] if shows_id else [])]
    given = [each.id or (told[index].get("id") if index < len(told) else None) for index, each in enumerate(pushes)]
    expected = [{**each.answer, "id": id_} for each, id_ in zip(pushes, given, strict=True)]
    seen = [[each.get(name) for name in names] for each in told]
    assert seen == [[each.get(name) for name in names] for each in expected]
    if shows_id:
        assert all(str(UUID(id_)) == id_ for id_ in given)
