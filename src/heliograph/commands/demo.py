"""`heliograph demo`: a server, a simulator, and first pushes."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from heliograph.commands.calling import NOTIFICATIONS, call
from heliograph.commands.local import free_port, make_folder, program, run_loop, write_private
from heliograph.commands.telling import json_option, tell

if TYPE_CHECKING:
    from heliograph.config import AppSettings
    from heliograph.service import Running
    from heliograph.simulator.server import Simulator

TOPIC = "com.example.demo"
ALIVE = "a1b2c3d4" * 8
"""A device token that the simulator takes."""

_BATCH = 1000
_PATIENCE_S = 20.0


@click.command()
@click.option("--port", type=click.IntRange(1, 65535), default=8080, show_default=True, help="Of the HTTP API.")
@click.option(
    "--data", type=click.Path(path_type=Path, file_okay=False), help="Keep the data there.  [default: a new folder]"
)
@click.option("--exit-after-first", is_flag=True, help="End after the first pushes; exit 1 if one went astray.")
@json_option
def demo(port: int, data: Path | None, *, exit_after_first: bool, as_json: bool) -> int:
    """See it work, without an Apple account.

    Starts a server and a simulator of Apple, sends first pushes, and says how to go on.

    With --json there is one object once the first pushes are through: where all is, and what became of each.

    \b
    Example:
      heliograph demo
    """
    import shutil
    import tempfile

    from heliograph import logs

    logs.configure_logging(level="warning")
    say = _nothing if as_json else click.echo
    free = free_port(port)
    if free != port:
        say(f"Port {port} is taken, so the API listens on {free}.\n")
    fresh = data is None
    folder = Path(tempfile.mkdtemp(prefix="heliograph-demo-")) if data is None else data.absolute()
    run = _Demo(folder, free, exit_after_first=exit_after_first, as_json=as_json)
    try:
        run_loop(run.run())
    finally:
        if fresh:
            shutil.rmtree(folder, ignore_errors=True)
    say("Stopped." if not fresh else f"Stopped; {folder} is deleted.")
    return 0 if run.well else 1


class _Demo:
    """One run of the demo."""

    def __init__(self, folder: Path, port: int, *, exit_after_first: bool, as_json: bool) -> None:
        self._folder = folder
        self._port = port
        self._exit_after_first = exit_after_first
        self._as_json = as_json
        self._say: Callable[[str], None] = _nothing if as_json else click.echo
        self._pushes: list[dict[str, Any]] = []
        self._journal = folder / "simulator.jsonl"
        # Another one each time: with --data the server would remember it, and refuse it at the door.
        self._dead = "deadbeef" * 6 + os.urandom(8).hex()
        self.well = True
        """Everything became what it should."""

    async def run(self) -> None:
        from heliograph import service
        from heliograph.config import ApiSettings, Config
        from heliograph.simulator.server import Simulator

        make_folder(self._folder)
        async with Simulator(journal=self._journal) as apple:
            apple.add_app(TOPIC)
            apple.unregister(self._dead, since=1_700_000_000_000)
            config = Config(
                data=str(self._folder),
                api=ApiSettings(port=self._port),
                apps={"demo": demo_app(apple, self._folder / "simulator")},
            )

            async def started(running: Running) -> None:
                if not self._as_json:
                    _say_where(running, apple, self._folder)
                await self._first_pushes(running)
                if self._as_json:
                    self._tell(running)
                if self._exit_after_first:
                    running.stop.set()
                elif not self._as_json:
                    _say_next_steps(running, self._first_id, self._journal)

            await service.run(config, started=started)

    async def _first_pushes(self, running: Running) -> None:
        self._say("First pushes: through the HTTP API, a queue on disk and HTTP/2 with TLS")
        whole = {"app": "demo", "title": "Hello", "body": "from the heliograph demo", "wait": 20}
        self._first_id = await self._push(running, "one notification", {**whole, "token": ALIVE}, "accepted")
        await self._push(running, "to a device that deleted the app", {**whole, "token": self._dead}, "rejected")
        await self._push(running, "5,000 octets of text", {**whole, "token": ALIVE, "body": "x" * 5000}, "refused")
        await self._push_many(running)

    async def _push(self, running: Running, what: str, content: dict[str, Any], expected: str) -> str:
        """Send one and show what became of it. Returns its id."""
        import asyncio

        loop = asyncio.get_running_loop()
        started = loop.time()
        reply = await asyncio.to_thread(call, running.url, running.key, "POST", NOTIFICATIONS, content)
        took_ms = (loop.time() - started) * 1000
        body = reply.body
        state = body.get("state", "refused")
        reason = f"{body['reason']} ({body['status']})" if body.get("reason") else str(body.get("code", ""))
        self._show(what, state, reason, took_ms, well=state == expected)
        notification_id = str(body.get("id", ""))
        if notification_id:
            self._say(f"      id {notification_id}")
        for line in _wrapped(str(body.get("meaning") or body.get("detail", ""))):
            self._say(f"      {line}")
        return notification_id

    async def _push_many(self, running: Running) -> None:
        import asyncio

        from heliograph.model import State

        loop = asyncio.get_running_loop()
        content = {
            "app": "demo",
            "tokens": [f"{number:064x}" for number in range(1, _BATCH + 1)],
            "payload": {"aps": {"alert": "One payload for a thousand devices"}},
        }
        started = loop.time()
        reply = await asyncio.to_thread(call, running.url, running.key, "POST", NOTIFICATIONS, content)
        durable_ms = (loop.time() - started) * 1000
        ids = reply.body.get("ids", [])
        accepted = 0
        while ids and loop.time() < started + _PATIENCE_S:
            receipts = await running.relay.receipts(ids)
            accepted = sum(receipt is not None and receipt.state is State.ACCEPTED for receipt in receipts)
            if accepted == len(ids):
                break
            await asyncio.sleep(0.005)
        took_ms = (loop.time() - started) * 1000
        self._show("one payload for 1,000 tokens", "accepted", "", took_ms, well=accepted == _BATCH)
        self._say(f"      {accepted} of {_BATCH} accepted; on disk and answered with 202 after {durable_ms:.0f} ms")
        self._say("")

    def _show(self, what: str, state: str, reason: str, took_ms: float, *, well: bool) -> None:
        self.well = self.well and well
        self._pushes.append({"what": what, "state": state, "reason": reason or None, "ms": round(took_ms, 1)})
        colour = {"accepted": "green", "rejected": "yellow", "refused": "yellow"}.get(state, "red")
        shown = click.style(f"{state:<9}", fg=colour if well else "red", bold=True)
        self._say(f"  {what:<34}{shown} {reason:<22}{took_ms:>6.0f} ms")

    def _tell(self, running: Running) -> None:
        where = {"url": running.url, "key_file": str(self._folder / "api-key"), "data": str(self._folder)}
        sent = {"app": "demo", "token": ALIVE, "simulator_journal": str(self._journal)}
        tell({"well": self.well, **where, **sent, "pushes": self._pushes})


def _say_where(running: Running, apple: Simulator, folder: Path) -> None:
    click.echo(click.style("heliograph demo", bold=True))
    click.echo(f"  API        {running.url}")
    click.echo(f"  Apple      a simulator on 127.0.0.1:{apple.port}")
    click.echo(f"  app        demo, topic {TOPIC}, signing key {apple.signing_key.key_id}")
    click.echo(f"  data       {folder}")
    click.echo("")


def _say_next_steps(running: Running, first_id: str, journal: Path) -> None:
    this = program()
    say = click.echo
    say(click.style("Now you", bold=True))
    say("")
    say("Send one:")
    say("")
    say(f"curl -sS '{running.url}{NOTIFICATIONS}?wait=5' \\")
    say(f"  -H 'Authorization: Bearer {running.key}' \\")
    say("""  -d '{"title": "Hello",""")
    say(f"""       "token": "{ALIVE}"}}'""")
    say("")
    say("See what became of one; this id is that of the first push above:")
    say("")
    say(f"curl -sS {running.url}{NOTIFICATIONS}/{first_id} \\")
    say(f"  -H 'Authorization: Bearer {running.key}'")
    say("")
    say("See what the simulator was sent, line by line:")
    say("")
    say(f"tail -f {journal}")
    say("")
    say("Send to Apple: write these lines to heliograph.toml, with what the developer account shows")
    say("under Keys, and put the key file beside it (chmod 600).")
    say("")
    say("[apps.shop]")
    say('topic = "com.example.shop"       # the bundle id')
    say('key = "AuthKey_ABC123DEFG.p8"    # as Apple issued it')
    say('team_id = "DEF123GHIJ"')
    say('environment = "production"       # or development, for apps run from Xcode')
    say("")
    say(f"{this} serve --config heliograph.toml")
    say(f"{this} send --app shop --title Hello DEVICE_TOKEN")
    say("")
    say("Ctrl-C ends the demo.")


def demo_app(apple: Simulator, folder: Path) -> AppSettings:
    """The app `demo`, whose key only `apple` knows, with its files in `folder`."""
    from heliograph.config import AppSettings

    key = write_private(folder / f"AuthKey_{apple.signing_key.key_id}.p8", apple.signing_key.pem)
    return AppSettings(
        key=f"file:{key}",
        team_id=apple.signing_key.team_id,
        topic=TOPIC,
        host="127.0.0.1",
        port=apple.port,
        ca=str(write_private(folder / "ca.pem", apple.ca_pem)),
    )


def _wrapped(text: str) -> list[str]:
    import textwrap

    return textwrap.wrap(text, 74)


def _nothing(_: str) -> None: ...
