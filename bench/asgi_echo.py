"""The least that an ASGI application can do for a push: read it, answer 200 with its apns-id."""

from __future__ import annotations

from typing import Any

NEW_ID = b"00000000-0000-4000-8000-000000000000"


async def app(scope: dict[str, Any], receive: Any, send: Any) -> None:
    if scope["type"] == "lifespan":
        while (await receive())["type"] == "lifespan.startup":
            await send({"type": "lifespan.startup.complete"})
        await send({"type": "lifespan.shutdown.complete"})
        return
    more = True
    while more:
        more = (await receive()).get("more_body", False)
    apns_id = next((value for name, value in scope["headers"] if name == b"apns-id"), NEW_ID)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"apns-id", apns_id)]})
    await send({"type": "http.response.body"})
