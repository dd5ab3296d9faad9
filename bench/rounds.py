"""Interleaved rounds: A B C, A B C, ... so that what disturbs the machine disturbs all of them.

A ratio is taken inside a round, between runs that are seconds apart, and the median of those ratios is what is
reported: it survives a noisy neighbour that would ruin either figure alone.
"""

from __future__ import annotations

import os
import statistics
import subprocess
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Literal

import msgspec

from bench import machine
from bench.building import BENCH, Absent, Failed, last_words, say
from bench.contract import Answer, Task
from bench.far_side import Seen, sink
from bench.machine import CONTESTANT_CORE, on_core

TIME_LIMIT_S = 180
ROUNDS = 5


class Contestant(msgspec.Struct, frozen=True):
    """Somebody who takes part. A file in `contestants/` holds one or more, as `CONTESTANTS`."""

    name: str
    role: Literal["sender", "server"]
    prepare: Callable[[], Sequence[str]]
    """Builds what is to be built and returns the command line. Raises Absent."""
    share: float = 1.0
    """Of the N that the others send: slow ones send fewer, so that a round stays short."""
    warm: int = 5_000
    """More for those that compile while they run."""


class Options(msgspec.Struct, frozen=True):
    """What the command line said."""

    data: Path
    rounds: int
    number: int | None = None
    """None: what the bench thinks right."""
    only: frozenset[str] = frozenset()
    mixed_tokens: bool = False
    profile: bool = False
    """Show functions where the report says what CPU time goes into."""

    @property
    def tokens(self) -> Path:
        return self.data / ("tokens-mixed.txt" if self.mixed_tokens else "tokens.txt")


class Spread(msgspec.Struct, frozen=True):
    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def __str__(self) -> str:
        if self.low == self.high:
            return _digits(self.median)
        return f"{_digits(self.median)} ({_digits(self.low)}-{_digits(self.high)})"


Cell = str | int | float | Spread


class Report(msgspec.Struct):
    """What a bench found. `rows` are tables of one shape; `failures` make the command's exit status 1."""

    bench: str
    header: dict[str, str]
    rows: list[dict[str, Cell]] = []
    notes: list[str] = []
    failures: list[str] = []

    def text(self) -> str:
        head = [f"{name}: {value}" for name, value in self.header.items()]
        feet = [*self.notes, *(f"FAILED {failure}" for failure in self.failures)]
        return "\n".join([self.bench, *head, "", *_table(self.rows), "", *feet])


class Run(msgspec.Struct, frozen=True):
    """One contestant's turn in one round."""

    answer: Answer
    far_side: Seen

    @property
    def cpu_us(self) -> float:
        return self.answer.cpu / self.answer.n * 1e6

    @property
    def rate(self) -> float:
        return self.answer.n / self.answer.secs


def header(**facts: object) -> dict[str, str]:
    return machine.describe() | {name.replace("_", " "): str(value) for name, value in facts.items()}


def contestants(role: str, only: Iterable[str] = ()) -> list[Contestant]:
    """All of a role, or those named. Raises Failed for a name that nobody has."""
    found: list[Contestant] = []
    for file in sorted((BENCH / "contestants").glob("*.py")):
        found += (one for one in import_module(f"bench.contestants.{file.stem}").CONTESTANTS if one.role == role)
    unknown = set(only) - {one.name for one in found}
    if unknown:
        names = ", ".join(one.name for one in found)
        raise Failed(f"no {role} is called {', '.join(sorted(unknown))}; there are {names}")
    return [one for one in found if not only or one.name in only]


def prepare(candidates: Iterable[Contestant], report: Report) -> dict[Contestant, Sequence[str]]:
    """The command line of each that can take part; the others are named in the report."""
    commands: dict[Contestant, Sequence[str]] = {}
    for one in candidates:
        try:
            commands[one] = one.prepare()
        except Absent as why:
            report.notes.append(f"without {one.name}: {why}")
        except Failed as why:
            report.failures.append(f"{one.name}: {why}")
    return commands


def run_sender(name: str, command: Sequence[str], task: Task, core: int = CONTESTANT_CORE) -> Answer:
    """Start a sender, wait for it and check what it says. Raises Failed."""
    with on_core(core):
        process = subprocess.Popen(
            command,
            env=os.environ | task.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=BENCH.parent,
        )
    try:
        output, errors = process.communicate(timeout=TIME_LIMIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        raise Failed(f"{name} was not done after {TIME_LIMIT_S} s: {last_words(errors)}") from None
    if process.returncode:
        raise Failed(f"{name} ended with {process.returncode}: {last_words(output + errors)}")
    try:
        answer = msgspec.json.decode(output.strip().rpartition("\n")[2], type=Answer)
    except msgspec.DecodeError as why:
        raise Failed(f"{name} printed no result ({why}): {last_words(output + errors)}") from None
    if answer.ok != answer.n or answer.n != task.n:
        raise Failed(f"{name}: {answer.ok} of {task.n} answers were 200")
    return answer


def run_once(one: Contestant, command: Sequence[str], task: Task, latency_ms: int = 0) -> Run:
    """One sender against a fresh sink. `task.port` is filled in here."""
    with sink(task.data, latency_ms=latency_ms, max_streams=task.streams) as far_side:
        task = msgspec.structs.replace(task, port=far_side.port)
        answer = run_sender(one.name, command, task)
    seen = far_side.seen
    assert seen is not None
    if seen.bad or seen.fault:
        raise Failed(f"{one.name}: the far side refused {seen.bad} requests: {seen.fault}")
    if seen.requests < task.n:
        raise Failed(f"{one.name}: the far side saw {seen.requests} requests, not {task.n}")
    return Run(answer, seen)


def interleave(
    commands: dict[Contestant, Sequence[str]],
    options: Options,
    report: Report,
    *,
    number: int,
    connections: int = 1,
    latency_ms: int = 0,
) -> list[dict[str, Run]]:
    """The rounds. A contestant that fails once is out, and the report says why."""
    rounds: list[dict[str, Run]] = []
    out: set[str] = set()
    for turn in range(options.rounds):
        rounds.append({})
        for one, command in commands.items():
            if one.name in out:
                continue
            n = max(1000, int(number * one.share))
            task = Task(0, n, one.warm, connections, 1000, options.data, options.tokens)
            try:
                run = run_once(one, command, task, latency_ms)
            except Failed as why:
                out.add(one.name)
                report.failures.append(str(why))
                continue
            rounds[-1][one.name] = run
            say(f"round {turn + 1} of {options.rounds}: {one.name} {run.cpu_us:.2f} us, {run.rate:,.0f}/s")
    return [{name: run for name, run in turn.items() if name not in out} for turn in rounds]


def names(rounds: Sequence[dict[str, Run]]) -> list[str]:
    """Who took part, cheapest first."""
    return sorted(rounds[0], key=lambda name: statistics.median(turn[name].cpu_us for turn in rounds)) if rounds else []


def over(rounds: Sequence[dict[str, Run]], name: str, figure: Callable[[Run], float]) -> Spread:
    return Spread.of([figure(turn[name]) for turn in rounds])


def ratio(rounds: Sequence[dict[str, Run]], name: str, yardstick: str) -> Cell:
    """CPU for each notification as a multiple of the yardstick's, by round."""
    if yardstick not in rounds[0]:
        return "-"
    return Spread.of([turn[name].cpu_us / turn[yardstick].cpu_us for turn in rounds])


def _digits(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _cell(value: Cell) -> str:
    return _digits(value) if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)


def _table(rows: Sequence[dict[str, Cell]]) -> list[str]:
    """Markdown, padded, so that it can be read as it is and pasted where it is rendered."""
    if not rows:
        return []
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, *([_cell(row.get(column, "-")) for column in columns] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    texts = ["| " + " | ".join(line) + " |" for line in padded]
    return [texts[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *texts[1:]]
