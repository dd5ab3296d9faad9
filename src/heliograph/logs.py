"""How events are logged: lines for people or JSON, with device tokens and payloads redacted by type."""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Mapping

import structlog
from msgspec import Struct

from heliograph.model import DeviceToken


def configure_logging(*, json: bool = False, level: str = "info") -> None:
    """One line an event on stderr, key=value or JSON; what other libraries log as well. Call it once.

    `level`: debug, info, warning or error, and what is above. Of other libraries, warnings and errors. Device tokens
    and all octets, as payloads are, are shown redacted, whoever logs them.
    """
    least: int = getattr(logging, level.upper())
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    shared: list[structlog.typing.Processor] = [structlog.processors.add_log_level, stamp, _redact_event]
    # Plain tracebacks: the others show local variables, and so device tokens and payloads.
    final: list[structlog.typing.Processor] = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
        if json
        else [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty() and not os.environ.get("NO_COLOR"),
                exception_formatter=structlog.dev.plain_traceback,
                pad_event_to=0,
            )
        ]
    )
    structlog.configure(
        processors=[*shared, *final],
        wrapper_class=structlog.make_filtering_bound_logger(least),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler()
    handler.addFilter(_redact_record)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *final],
        )
    )
    logging.basicConfig(handlers=[handler], level=max(least, logging.WARNING), force=True)


def redacted(value: object) -> object:
    """The value without what may be a device token or a payload, by type, however deep in containers."""
    match value:
        case DeviceToken():
            return repr(value)
        case bytes() | bytearray() | memoryview():
            return f"<{len(value)} octets>"
        case Mapping():
            return {redacted(key): redacted(each) for key, each in value.items()}
        case list() | tuple() | set() | frozenset() | deque():
            return [redacted(each) for each in value]
        case str() | int() | float() | None | BaseException():
            return value
        case Struct() if type(value).__repr__ is Struct.__repr__:  # it would show all the fields
            return f"<{type(value).__name__}>"
        case _:
            return repr(value)


_FOR_STRUCTLOG = ("exc_info", "_record", "_from_structlog")
"""Entries of an event that are not shown as they are."""


def _redact_event(
    _: structlog.typing.WrappedLogger, __: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    return {key: value if key in _FOR_STRUCTLOG else redacted(value) for key, value in event.items()}


def _redact_record(record: logging.LogRecord) -> bool:
    """Before its text is put together."""
    if isinstance(record.args, Mapping):
        record.args = {key: redacted(value) for key, value in record.args.items()}
    elif record.args:
        record.args = tuple(redacted(value) for value in record.args)
    return True
