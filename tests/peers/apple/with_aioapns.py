"""The Python library aioapns. See `contract` for what it is told and tells.

Told port 443 it is used as it is, and whom it takes for Apple is another's doing.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path


async def main(key: str, pushes: Sequence[tuple[str, str, str, bytes]]) -> None:
    # By name: what the type checker says is not to hang on whether it is installed.
    aioapns = import_module("aioapns")
    tls = None
    if os.environ["APPLE_PORT"] != "443":
        protocol = import_module("aioapns.connection").APNsProductionClientProtocol
        protocol.APNS_SERVER = "localhost"  # it knows Apple's two addresses only
        protocol.APNS_PORT = int(os.environ["APPLE_PORT"])
        tls = ssl.create_default_context(cafile=os.environ["APPLE_CA"])
        tls.set_alpn_protocols(["h2"])
    client = aioapns.APNs(
        key=key,
        key_id=os.environ["APPLE_KEY_ID"],
        team_id=os.environ["APPLE_TEAM_ID"],
        topic="com.example.shop",  # it insists on one; the pushes say theirs
        ssl_context=tls,
        max_connections=1,
    )
    for id_, token, topic, payload in pushes:
        answer = await client.send_notification(
            aioapns.NotificationRequest(
                token,
                json.loads(payload),
                notification_id=None if id_ == "-" else id_,
                apns_topic=topic,
                push_type=aioapns.PushType.ALERT,
            )
        )
        told = {"status": int(answer.status), "id": answer.notification_id, "reason": answer.description}
        print(json.dumps({**told, "timestamp": answer.timestamp}))  # noqa: T201


if __name__ == "__main__":
    lines = [line.split() for line in os.environ["APPLE_PUSHES"].splitlines()]
    whole = [(id_, token, topic, Path(payload).read_bytes()) for id_, token, topic, payload in lines]
    asyncio.run(main(Path(os.environ["APPLE_KEY_FILE"]).read_text(), whole))
