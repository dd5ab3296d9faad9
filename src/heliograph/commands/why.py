"""`heliograph why`: what became of a notification, and why, in plain sentences."""

# ruff: noqa: D301 - \b is how click is told to leave lines as they are

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode

import click

from heliograph.commands.calling import NOTIFICATIONS, Server, with_server
from heliograph.commands.status import exit_code_of, say_state
from heliograph.commands.telling import DONE, FAILED, WAITING, RefusedError, tell
from heliograph.errors import ConfigError

if TYPE_CHECKING:
    from heliograph.reasons import Reason

Receipt = dict[str, Any]

_ID = r"[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"
_is_id = re.compile(_ID, re.IGNORECASE).fullmatch
_is_connection = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*-[0-9a-f]{6}-[0-9]+").fullmatch
_is_of_proxy = re.compile(r"apple_proxy\.(?P<listener>.*?)(?P<durable>\.durable)?").fullmatch
_is_token = re.compile(r"(?:[0-9a-f]{2}){1,200}", re.IGNORECASE).fullmatch
_find_id = re.compile(_ID).search
_as_one_of_many = partial(re.compile(f" as {_ID}").sub, "")
"""What a receipt means, without what is its own alone."""

_PAGE = 1000
_MOST = 100_000
"""Notifications of a connection that are looked through."""
_LAST = 10
"""Notifications to a device token that are shown."""
_SHOWN = 8
"""Groups of a connection's notifications, and runs of identifiers in each."""
_WIDTH = 80


@click.command()
@click.argument("what", nargs=-1, required=True, metavar="WHAT...")
@click.option(
    "--identifier",
    type=click.IntRange(0, 0xFFFFFFFF),
    help="With a connection: only what its client called so.",
)
@click.option("--app", help="With a device token: of this app only.")
@with_server
def why(server: Server, what: Sequence[str], identifier: int | None, app: str | None) -> int:
    """Tell what became of a notification, and why.

    WHAT is the id of a notification, ours or the apns-id that its sender chose; the name of a connection of the legacy
    gateway, as in the log; or a device token.

    \b
    Examples:
      heliograph why 01a1b2c3-d4e5-7000-8000-000000000001
      heliograph why main-9f31c2-17 --identifier 42
      heliograph why 4f1cab8d02e6b739...b36be9a305 --app shop

    With --json there is a line for each notification that was found.

    Exit code: 0 Apple accepted what was found, of a device token the last, 1 it did not or nothing is known, 4 one
    still waits.
    """
    codes = [_tell_why(server, each, identifier, app) for each in what]
    return _worst(codes)


def _tell_why(server: Server, what: str, identifier: int | None, app: str | None) -> int:
    if _is_connection(what):
        return _of_connection(server, what, identifier)
    if identifier is not None:
        raise ConfigError(f"--identifier goes with the name of a connection, as main-9f31c2-17, and {what!r} is none")
    if _is_id(what):
        return _of_notification(server, what)
    token = re.sub("[<> ]", "", what)  # as iOS described it for a long time
    if _is_token(token):
        return _of_token(server, token.lower(), app)
    raise ConfigError(
        f"{what!r} is neither the id of a notification, nor a connection's name, as main-9f31c2-17, nor a device token "
        "in hex: see the answer to the request, the log, or `heliograph list`"
    )


def _worst(codes: Sequence[int]) -> int:
    return next((code for code in (FAILED, WAITING) if code in codes), DONE)


# -- one notification ------------------------------------------------------------------------------------------------


def _of_notification(server: Server, id: str) -> int:
    try:
        receipt: Receipt = server.ask("GET", f"{NOTIFICATIONS}/{quote(id, safe='')}")
    except RefusedError as error:
        if error.exit_code != FAILED:
            raise
        if server.as_json:
            tell({"id": id, "error": error.problem})
        else:
            click.echo(f"{id}  {click.style('not known', fg='red')}", err=True)
            _say(
                "No notification with this id was ever taken here, or its receipt was forgotten meanwhile "
                "(store.receipts_days in the configuration).",
                err=True,
            )
        return FAILED
    return _tell_one(server, receipt)


def _tell_one(server: Server, receipt: Receipt) -> int:
    if server.as_json:
        tell(receipt)
    else:
        click.echo(f"{click.style(receipt['id'], bold=True)}  {_outcome(receipt)}")
        for sentence in _sentences(server, receipt):
            _say(sentence)
        click.echo(f"  device token  {receipt['token'] or 'cannot be read any more'}")
    earlier = _find_id(receipt["meaning"]) if receipt["reason"] == "SentBefore" else None
    return exit_code_of(receipt["state"]) if earlier is None else _of_notification(server, earlier[0])


def _outcome(receipt: Receipt) -> str:
    answer = " ".join(str(each) for each in (receipt["status"], receipt["reason"]) if each is not None)
    return f"{say_state(receipt['state'])}  {answer}".rstrip() if receipt["reason"] else say_state(receipt["state"])


def _sentences(server: Server, receipt: Receipt) -> Iterator[str]:
    yield _how_it_came(receipt)
    yield receipt["meaning"]
    yield from _what_came_before(server, receipt)
    yield _tries(receipt)
    reason = _reason(receipt)
    if receipt["state"] == "rejected" and reason is not None:
        yield from _what_follows(receipt, reason)


def _how_it_came(receipt: Receipt) -> str:
    where = f"for the app {receipt['app']}"
    if receipt["environment"] is not None:
        where += f" in {receipt['environment']}"
    listener = _proxy(receipt)
    if listener is not None:
        way = f"by the Apple-shaped proxy {listener}"
    elif receipt["connection"] is not None:
        way = f"by the connection {receipt['connection']}"
        if receipt["identifier"] is not None:
            way += f", whose client gave it the identifier {receipt['identifier']}"
    else:
        way = "by the HTTP API"
    own = "" if receipt["apns_id"] is None else f" Its sender gave it the apns-id {receipt['apns_id']}."
    return f"It came on {_time(receipt['created_at'])} {where}, {way}.{own}"


def _proxy(receipt: Receipt) -> str | None:
    """The listener of the Apple-shaped proxy that brought it; None: it came another way."""
    found = _is_of_proxy(receipt["connection"] or "")
    return None if found is None else found["listener"]


def _tries(receipt: Receipt) -> str:
    tries = receipt["attempts"]
    times = {1: "once", 2: "twice"}.get(tries, f"{tries} times")
    if receipt["state"] == "queued" and not receipt["cancelling"]:
        so_far = f"It was sent {times} so far" if tries else "It was not sent yet"
        again = receipt["next_attempt_at"]
        return f"{so_far}; the next try is on {_time(again)}." if again else f"{so_far}."
    was_sent = f"It was sent {times}" if tries else "It was never sent"
    changed = receipt["updated_at"]
    of_proxy = _is_of_proxy(receipt["connection"] or "")
    if of_proxy is not None and not of_proxy["durable"] and receipt["state"] == "cancelled":
        return f"Its sender was answered on {_time(changed or receipt['created_at'])}."
    if changed is None:
        return f"{was_sent}."
    if receipt["state"] in ("queued", "sent", "unknown"):
        return f"{was_sent}. Its state is {receipt['state']} since {_time(changed)}."
    return f"{was_sent}, and {receipt['state']} on {_time(changed)}."


def _reason(receipt: Receipt) -> Reason | None:
    """What our table says of it."""
    from heliograph import reasons

    word, status = receipt["reason"], receipt["status"]
    return None if word is None or status is None else reasons.find(word, status)


def _what_follows(receipt: Receipt, reason: Reason) -> Iterator[str]:
    """From Apple's no, for the device token and for a client of the binary protocol."""
    held_until = _held_until(receipt)
    if reason.token_dies:
        yield f"{_dead(receipt)} New ones to it are refused, until it is registered again."
    elif held_until is not None:
        yield f"Nothing goes to its device token until {_time(held_until)}, as Apple did not know it."
    if receipt["connection"] is not None and _proxy(receipt) is None:
        if reason.legacy_status is None:
            yield "Its client is told by the feedback service, as Apple's own gateway did it."
        else:
            yield (
                f"Its client was sent an error packet with status {reason.legacy_status} and identifier "
                f"{receipt['identifier'] or 0}, if its connection was still open."
            )


def _dead(receipt: Receipt) -> str:
    since = receipt["unregistered_at"] or receipt["updated_at"]
    return f"Its device token is dead, as Apple says: since {_time(since)}."


def _held_until(receipt: Receipt) -> str | None:
    """When a device token that Apple did not know is sent to again; None where it is not held back."""
    from heliograph.policy import QUARANTINE_S

    if (receipt["reason"], receipt["status"]) != ("BadDeviceToken", 400) or receipt["updated_at"] is None:
        return None
    until = datetime.fromisoformat(f"{receipt['updated_at'][:19]}+00:00") + timedelta(seconds=QUARANTINE_S)
    return until.isoformat() if until > datetime.now(UTC) else None


def _what_came_before(server: Server, receipt: Receipt) -> Iterator[str]:
    """Why it was cancelled together with others: the one of its connection that Apple refused."""
    if receipt["state"] != "cancelled" or receipt["connection"] is None or receipt["reason"] == "SentBefore":
        return
    if _proxy(receipt) is not None:
        return
    try:
        rejected = [each for each in _of(server, receipt["connection"], state="rejected") if each["id"] < receipt["id"]]
    except RefusedError as error:
        if error.status == 403:  # who may ask for what it knows the id of, may still not look for others
            return
        raise
    refused = list(filter(_draws_error, rejected))
    if refused:
        first = refused[-1]
        yield (
            f"On this connection Apple refused the notification with identifier {first['identifier'] or 0}: "
            f"{first['status']} {first['reason']}. What was behind it and had not gone out was cancelled. That one's "
            f"id is {first['id']}."
        )


def _draws_error(receipt: Receipt) -> bool:
    reason = _reason(receipt)
    return reason is not None and reason.legacy_status is not None


# -- a connection ----------------------------------------------------------------------------------------------------


def _of_connection(server: Server, name: str, identifier: int | None) -> int:
    found = list(_of(server, name))
    more = len(found) >= _MOST
    if identifier is not None:
        found = [each for each in found if each["identifier"] == identifier]
    if not found:
        _nothing_came(server, name, identifier)
        return FAILED
    found.reverse()  # as they came
    if identifier is not None or len(found) == 1:
        return _worst([_tell_one(server, each) for each in found])
    if server.as_json:
        for each in found:
            tell(each)
    else:
        _sum_up(name, found, more=more)
    return _worst([exit_code_of(each["state"]) for each in found if each["reason"] != "SentBefore"])


def _of(server: Server, connection: str, **more: str) -> Iterator[Receipt]:
    """What it brought, newest first, as far as `_MOST` goes."""
    return _listed(server, _MOST, connection=connection, **more)


def _listed(server: Server, most: int, **filters: str) -> Iterator[Receipt]:
    count, wanted = 0, dict(filters)
    while count < most:
        page = server.ask("GET", f"{NOTIFICATIONS}?{urlencode({**wanted, 'limit': min(_PAGE, most - count)})}")
        yield from page["notifications"]
        count += len(page["notifications"])
        if page["next"] is None:
            return
        wanted["cursor"] = page["next"]


def _nothing_came(server: Server, name: str, identifier: int | None) -> None:
    which = name if identifier is None else f"{name} with the identifier {identifier}"
    text = (
        f"Nothing is known that came by {which}: it was not taken, or its receipt was forgotten meanwhile. What could "
        "not be read is in the server's log alone: look for legacy_error_packet with the name of the connection."
    )
    if server.as_json:
        tell({"connection": name, "identifier": identifier, "error": {"code": "UnknownNotification", "detail": text}})
    else:
        _say(text, err=True)


def _sum_up(name: str, found: Sequence[Receipt], *, more: bool) -> None:
    first, last = found[0], found[-1]
    began, ended = _time(first["created_at"]), _time(last["created_at"])
    when = f"on {began}" if began == ended else f"from {began} to {ended}"
    count = f"the last {len(found):,}" if more else f"{len(found):,}"
    click.echo(f"{click.style(name, bold=True)}  {count} notifications")
    _say(f"They came {when} for the app {first['app']}.")
    for state, number in Counter(each["state"] for each in found).most_common():
        click.echo(f"  {number:>9,}  {say_state(state)}")
    groups: dict[str, list[Receipt]] = {}
    for each in found:
        if each["state"] != "accepted":
            groups.setdefault(_as_one_of_many(each["meaning"]), []).append(each)
    for meaning, those in list(groups.items())[:_SHOWN]:
        click.echo()
        click.echo(f"{_outcome(those[0])}  {_names(those)}")
        _say(meaning)
    if len(groups) > _SHOWN:
        click.echo()
        click.echo(f"There are {len(groups) - _SHOWN} more kinds: heliograph list --connection {name}")
    if groups:
        one = next(iter(groups.values()))[0]
        which = one["id"] if one["identifier"] is None else f"{name} --identifier {one['identifier']}"
        click.echo()
        click.echo(f"More on the first of these: heliograph why {which}")


def _names(those: Sequence[Receipt]) -> str:
    """What the client called them, or the ids that we did."""
    if any(each["identifier"] is None for each in those):
        more = f" and {len(those) - 1:,} more" if len(those) > 1 else ""
        return f"{those[0]['id']}{more}"
    runs: list[list[int]] = []
    for each in those:
        number = each["identifier"]
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    some = ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in runs[:_SHOWN])
    more = f" and {len(runs) - _SHOWN:,} more" if len(runs) > _SHOWN else ""
    return f"{'identifier' if len(those) == 1 else 'identifiers'} {some}{more}"


# -- a device token --------------------------------------------------------------------------------------------------


def _of_token(server: Server, token: str, app: str | None) -> int:
    filters = {"token": token} if app is None else {"token": token, "app": app}
    found = list(_listed(server, _LAST, **filters))
    if server.as_json:
        for each in found:
            tell(each)
        if not found:
            tell({"token": token, "error": {"code": "UnknownNotification", "detail": _NOTHING_TO_IT}})
    else:
        click.echo(f"device token {click.style(token, bold=True)}")
        apps = sorted({each["app"] for each in found}) if app is None else [app]
        removals = list(_removals(server, token, apps or [None]))
        for sentence in _about_token(found, removals):
            _say(sentence)
        for each in found:
            reason = f"  {each['reason']}" if each["reason"] else ""
            click.echo(f"{each['id']}  {each['created_at'][:19]}Z  {say_state(each['state'])}{reason}")
    return exit_code_of(found[0]["state"]) if found else FAILED


def _removals(server: Server, token: str, apps: Sequence[str | None]) -> Iterator[dict[str, Any]]:
    """Where it is removed; None: in the only app, if there is only one."""
    for app in apps:
        which = {"token": token} if app is None else {"app": app, "token": token}
        try:
            yield from server.ask("GET", f"/v1/removals?{urlencode(which)}")["removals"]
        except RefusedError as error:
            if error.problem.get("code") not in ("UnknownApp", "MissingApp"):  # there was one, or there are several
                raise


def _about_token(found: Sequence[Receipt], removals: Sequence[dict[str, Any]]) -> Iterator[str]:
    for each in removals:
        yield (
            f"It is removed: Apple says that it is dead since {_time(each['since'])} (app {each['app']}, "
            f"{each['environment']}). What is to go to it is refused, until the app registers it again: POST "
            "/v1/registrations tells the server."
        )
    if not found:
        yield _NOTHING_TO_IT
        return
    last = found[0]
    until = _held_until(last) if last["state"] == "rejected" else None
    if until is not None and not removals:
        yield f"Apple did not know it, so that it is held back until {_time(until)}, unless it is registered again."
    if not removals and any((reason := _reason(each)) is not None and reason.token_dies for each in found):
        yield "Apple called it dead before. It was registered again since, or that is long ago."
    yield f"{'The last of them' if len(found) > 1 else 'What went to it'}: {last['meaning']}"


_NOTHING_TO_IT = "No notification to it is known here: none was taken, or their receipts were forgotten meanwhile."


# -- words -----------------------------------------------------------------------------------------------------------


def _say(text: str, *, err: bool = False) -> None:
    """A paragraph, two blanks to the right."""
    click.echo(click.wrap_text(text, _WIDTH, "  ", "  "), err=err)


def _time(text: str) -> str:
    """As a person says it: the API has RFC 3339."""
    return f"{text[:10]} at {text[11:19]} UTC"
