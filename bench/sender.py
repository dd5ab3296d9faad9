"""What one notification costs the bare sender: CPU, and how that compares with h2load.

h2load is the yardstick because it is C, does nothing but HTTP/2, and comes from Debian. It does less than a sender of
notifications: it makes no ids, reads no answer beyond its status and keeps no deadline.
"""

from __future__ import annotations

from bench.rounds import Options, Report, contestants, header, interleave, names, over, prepare, ratio

NUMBER = 200_000
YARDSTICK = "h2load"


def run(options: Options) -> Report:
    number = options.number or NUMBER
    report = Report(
        "sender",
        header(
            far_side="bench/sink.c, TLS 1.3, answers at once",
            connections=1,
            streams=1000,
            rounds=options.rounds,
            notifications=f"{number:,} a run (slow ones fewer: column n), payload of 118 octets",
            device_tokens="32 octets, each tenth of another length" if options.mixed_tokens else "32 octets",
        ),
    )
    commands = prepare(contestants("sender", options.only), report)
    rounds = interleave(commands, options, report, number=number)
    for name in names(rounds):
        first = rounds[0][name].answer
        report.rows.append(
            {
                "contestant": name,
                "version": first.version,
                "n": first.n,
                "CPU us / notification": over(rounds, name, lambda run: run.cpu_us),
                f"x {YARDSTICK}": ratio(rounds, name, YARDSTICK),
                "rate / s": over(rounds, name, lambda run: run.rate),
                "RSS MB": max(turn[name].answer.rss_mb for turn in rounds),
                "far side us": over(rounds, name, lambda run: run.far_side.cpu / run.far_side.requests * 1e6),
            }
        )
    report.notes.append("Read the CPU column: a rate near one million over the far side's microseconds is its limit.")
    return report
