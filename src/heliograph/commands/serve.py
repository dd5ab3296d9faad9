"""`heliograph serve`."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from heliograph.commands.demo import demo_app
from heliograph.commands.local import config_option, load_config, run_loop

if TYPE_CHECKING:
    from heliograph.config import Config
    from heliograph.model import App


@click.command()
@config_option
@click.option("--simulator", is_flag=True, help="Send to a simulator in this process instead of to Apple.")
@click.option(
    "--log-format",
    type=click.Choice(["console", "json"]),
    default="console",
    show_default=True,
    envvar="HELIOGRAPH_LOG_FORMAT",
    show_envvar=True,
    help="On stderr.",
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    default="info",
    show_default=True,
    envvar="HELIOGRAPH_LOG_LEVEL",
    show_envvar=True,
    help="What is logged, and all that is graver.",
)
@click.option("--json", "as_json", is_flag=True, help="The same as --log-format json.")
def serve(config: Path | None, log_format: str, log_level: str, *, simulator: bool, as_json: bool) -> None:
    """Run the server until Ctrl-C or SIGTERM.

    SIGHUP has the apps of the configuration read again. heliograph config shows which settings count.

    \b
    Examples:
      heliograph serve --config heliograph.toml
      HELIOGRAPH_API__PORT=9000 heliograph serve
      heliograph serve --simulator

    \b
    A heliograph.toml for one app:
      [apps.shop]
      topic = "com.example.shop"        # the bundle id
      key = "AuthKey_ABC123DEFG.p8"     # as Apple issued it
      team_id = "DEF123GHIJ"
      environment = "production"        # or development, or both
    """
    from heliograph import logs, service

    settings = load_config(config)
    logs.configure_logging(json=as_json or log_format == "json", level=log_level)

    def reread() -> Config:
        return load_config(config)

    run_loop(_serve_simulated(settings, reread) if simulator else service.run(settings, reread=reread))


async def _serve_simulated(config: Config, reread: Callable[[], Config]) -> None:
    from msgspec.structs import replace

    from heliograph import service
    from heliograph.apps import Instead
    from heliograph.model import SigningKey
    from heliograph.simulator.server import Simulator

    async with Simulator() as apple:

        def learn(app: App) -> None:
            for access in app.access:
                key = access.credentials if isinstance(access.credentials, SigningKey) else apple.signing_key
                apple.add_key(key)
                for topic in app.topics:
                    apple.add_app(topic, key.team_id)

        def with_demo(config: Config) -> Config:
            return replace(config, apps=config.apps or {"demo": demo_app(apple, Path(config.data) / "simulator")})

        instead = Instead("127.0.0.1", apple.port, apple.ca_pem, apple.signing_key, learn)
        await service.run(with_demo(config), reread=lambda: with_demo(reread()), instead=instead)
