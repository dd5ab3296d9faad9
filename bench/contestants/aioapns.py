"""aioapns: the asyncio library most used for APNs (over the h2 package)."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import ssl
import sys
from collections.abc import Sequence
from importlib.metadata import version

from bench.building import Absent
from bench.contract import Meter, Task, tell
from bench.pki import KEY_ID, TEAM_ID, TOPIC
from bench.rounds import Contestant


def prepare() -> Sequence[str]:
    if importlib.util.find_spec("aioapns") is None:
        raise Absent("the Python package aioapns is not installed: it is in the dependency group `bench`")
    return [sys.executable, "-m", "bench.contestants.aioapns"]


CONTESTANTS = (Contestant("aioapns", "sender", prepare, share=0.025, warm=1000),)


async def main() -> None:
    import aioapns
    from aioapns.connection import APNsProductionClientProtocol

    task = Task.from_environment()
    # the library knows Apple's two addresses only
    APNsProductionClientProtocol.APNS_SERVER = "127.0.0.1"
    APNsProductionClientProtocol.APNS_PORT = task.port
    apns = aioapns.APNs(
        key=(task.data / "AuthKey.p8").read_text(),
        key_id=KEY_ID,
        team_id=TEAM_ID,
        topic=TOPIC,
        max_connections=task.connections,
        ssl_context=ssl_context(task),
    )
    message = json.loads(task.payload())

    async def send(count: int) -> int:
        tokens = iter(task.device_tokens(count))
        ok = 0

        async def worker() -> None:
            nonlocal ok
            for token in tokens:
                request = aioapns.NotificationRequest(token, message, push_type=aioapns.PushType.ALERT, priority=10)
                result = await apns.send_notification(request)
                ok += result.is_successful

        await asyncio.gather(*(worker() for _ in range(task.streams * task.connections)))
        return ok

    await send(task.warm)
    with Meter() as meter:
        ok = await send(task.n)
    tell("aioapns", version("aioapns"), task, ok, meter)


def ssl_context(task: Task) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=task.data / "ca.pem")
    context.set_alpn_protocols(["h2"])
    return context


if __name__ == "__main__":
    import uvloop

    uvloop.run(main())
