"""How the rate grows with connections when the far side is 20 ms away, as Apple may be.

One connection carries 1,000 requests a round trip, so 50,000 a second at best; more needs more connections, and a
sender that is not slowed down by waiting.
"""

from __future__ import annotations

from bench.rounds import Options, Report, contestants, header, interleave, names, over, prepare

LATENCY_MS = 20
CONNECTIONS = (1, 4, 10)
RATE_LIMIT = 1000 / (LATENCY_MS / 1000)
SECONDS = 2
"""How long a run takes when the round trip is the only limit."""
DEFAULT = frozenset({"heliograph", "h2load"})
"""Those whose CPU does not decide already at one connection; others by --only."""


def run(options: Options) -> Report:
    report = Report(
        "rtt",
        header(
            far_side=f"bench/sink.c, TLS 1.3, answers {LATENCY_MS} ms later",
            streams="1000 on each connection",
            rounds=options.rounds,
            notifications=options.number or f"what the round trip allows in {SECONDS} s",
        ),
    )
    commands = prepare(contestants("sender", options.only or DEFAULT), report)
    for connections in CONNECTIONS:
        number = options.number or int(RATE_LIMIT * SECONDS * connections)
        rounds = interleave(commands, options, report, number=number, connections=connections, latency_ms=LATENCY_MS)
        report.rows += (
            {
                "connections": connections,
                "contestant": name,
                "rate / s": over(rounds, name, lambda run: run.rate),
                "of the round trip's limit": over(
                    rounds,
                    name,
                    lambda run, c=connections: run.rate / (RATE_LIMIT * c),  # type: ignore[misc]
                ),
                "CPU us / notification": over(rounds, name, lambda run: run.cpu_us),
                "connections seen": max(turn[name].far_side.connections for turn in rounds),
            }
            for name in names(rounds)
        )
    report.notes.append("h2load runs twice, and so is seen with twice as many connections.")
    return report
