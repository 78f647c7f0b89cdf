"""Measures forkd beside floor.c, the least that any program can do for a stream. See README.md in this folder."""

import argparse
import resource
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from subprocess import CalledProcessError

from api_host import UPSTREAMS
from compiler import build
from daemon import ROOT
from driver import LoadError
from limits import check
from measure import Run, measure
from moderation import MODERATED_UPSTREAMS, PAUSES_MS, write_moderation_plot
from plot import write_plot
from report import table, write_json
from results import KEPT, Comparison, Pair
from rivals.daemons import RIVALS, Rival
from shape import DEFAULT, QUICK, Shape, shape_for_live
from subjects import BACKENDS, Floor, Forkd, Subject
from trial import TrialError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line. What is None afterwards was not said, and its default depends on --quick and --live."""
    parser = argparse.ArgumentParser(prog="bench.py", description=__doc__)
    add = parser.add_argument
    add("--streams", type=_positive_int, metavar="N", help="streams per run (5000)")
    add("--over", type=_duration, metavar="SECS", help="hand them over evenly in so many seconds (5)")
    add("--events", type=_positive_int, metavar="N", help="events per stream, not counting [DONE] (18)")
    add("--delay-ms", type=_duration, metavar="MS", help="between two events (500)")
    add("--runs", type=_positive_int, metavar="N", help="pairs per configuration (5; for --moderation 3)")
    add(
        "--workers",
        type=_numbers,
        metavar="N,M",
        help="one configuration for each number of workers (1,2; for a relay 1)",
    )
    add("--backend", choices=sorted(BACKENDS), default="mock", help="what forkd streams from (mock)")
    add(
        "--upstream",
        type=_upstreams,
        metavar="P,Q",
        help="with --backend openai: one configuration for each protocol of the fake API: http1, h2, h2-tls (http1)",
    )
    add("--rivals", action="store_true", help="with http1: the same relay with aiohttp, and with FastAPI and httpx")
    add("--rival", action="append", choices=sorted(RIVALS), default=[], help="one of them")
    add(
        "--rival-streams", type=_positive_int, metavar="N", help="streams for FastAPI (--streams; it can serve a tenth)"
    )
    add("--moderation", action="store_true", help="the effect of the workers' pause when busy: see README.md")
    add("--ledger", choices=("on", "off"), default="on", help="forkd's server.ledger (on)")
    add("--benchmark", action="store_true", help="start forkd with --benchmark")
    add("--scrape", action="store_true", help="ask forkd for its metrics every second")
    add("--tcp", action="store_true", help="clients on loopback TCP, not AF_UNIX socketpairs")
    add("--persistent", action="store_true", help="forkd once more, all handed over by one connection")
    add("--only", choices=("floor", "forkd"), help="measure one of the two")
    add("--quick", action="store_true", help="a short look: 500 streams over 0.5 s, 6 events 200 ms apart, 2 pairs")
    add("--live", type=_positive_int, metavar="N", help="hold N streams at once, 1000 new ones a second, forkd alone")
    add("--check", action="store_true", help="exit 1 when a limit is exceeded")
    add("--out", type=Path, metavar="DIR", default=ROOT / "build" / "bench", help="for results and C programs")
    args = parser.parse_args(argv)
    if args.moderation:
        args.backend, args.workers = "openai", args.workers or [1]
        args.upstream = args.upstream or list(MODERATED_UPSTREAMS)
    if args.backend == "openai":
        args.upstream = args.upstream or ["http1"]
    elif args.upstream:
        parser.error("--upstream needs --backend openai")
    args.rival = list(RIVALS) if args.rivals else args.rival
    if args.rival and (not args.upstream or "http1" not in args.upstream or args.moderation):
        parser.error("rivals are measured beside --backend openai --upstream http1")
    return args


def shape_of(args: argparse.Namespace) -> Shape:
    """The load: the defaults of the mode, and over them what was said."""
    base = QUICK if args.quick else DEFAULT
    if args.live:
        base = shape_for_live(args.live, args.delay_ms or base.delay_ms)
    said = {"streams": args.streams, "over_secs": args.over, "events": args.events, "delay_ms": args.delay_ms}
    return replace(base, tcp=args.tcp, **{name: value for name, value in said.items() if value is not None})


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; 0, 1 when --check found a limit exceeded, 2 when it could not be run, 130 after a Ctrl-C."""
    args = parse(argv)
    shape = shape_of(args)
    only = args.only or ("forkd" if args.live else None)
    runs = args.runs or (1 if args.live else 2 if args.quick else 3 if args.moderation else 5)
    raise_fd_limit()
    try:
        load, floor = build("load", args.out), Floor(build("floor", args.out))
        comparisons = [Comparison(subject, shape, bool(args.live)) for subject in subjects_of(args, only)]
        for number in range(1, runs + 1):
            for comparison in comparisons:
                floor_run = None if only == "forkd" else observe(floor, shape, load, number, runs)
                forkd_run = None if only == "floor" else observe(comparison.subject, shape, load, number, runs)
                rivals: dict[str, Run] = {}
                for rival in rivals_of(args, comparison.subject):
                    its_shape = rival.shape(shape, args.rival_streams or shape.streams)
                    rivals[rival.name] = observe(rival, its_shape, load, number, runs)
                if args.persistent and forkd_run is not None:
                    rivals[KEPT] = observe(comparison.subject, replace(shape, persistent=True), load, number, runs)
                comparison.pairs.append(Pair(floor_run, forkd_run, rivals))
    except (TrialError, LoadError, CalledProcessError) as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    for comparison in comparisons:
        print(f"\n{table(comparison)}")
    name = "moderation" if args.moderation else "bench"
    write_json(args.out / f"{name}.json", comparisons)
    (write_moderation_plot if args.moderation else write_plot)(args.out / f"{name}.png", comparisons)
    print(f"\n{args.out / name}.json\n{args.out / name}.png")
    exceeded = [one for comparison in comparisons if comparison.forkd_runs for one in check(comparison) if not one.ok]
    return 1 if args.check and exceeded else 0


def subjects_of(args: argparse.Namespace, only: str | None) -> list[Forkd]:
    """forkd in each configuration asked for."""
    workers = args.workers or ([2] if args.live else [1] if args.backend == "openai" else [1, 2])
    subjects = [
        Forkd(count, args.ledger == "on", args.benchmark, args.backend, upstream, pause_ms, args.scrape)
        for upstream in args.upstream or [None]
        for count in workers
        for pause_ms in (PAUSES_MS if args.moderation else (None,))
    ]
    return subjects[:1] if only == "floor" else subjects


def rivals_of(args: argparse.Namespace, subject: Forkd) -> list[Rival]:
    """Who is measured beside this configuration."""
    return [RIVALS[name] for name in args.rival] if subject.upstream == "http1" else []


def observe(subject: Subject, shape: Shape, load: Path, number: int, runs: int) -> Run:
    """Measure once, and say on stderr what came of it: a whole benchmark takes minutes."""
    run = measure(subject, shape, load)
    print(f"{number}/{runs}  {subject.name:<44} {run.cpu_us:8.1f} µs per stream, {run.lost} lost", file=sys.stderr)
    return run


def raise_fd_limit() -> None:
    """As many fds as allowed, for the daemons as well, which inherit it: each holds one or two per stream."""
    wanted = 1 << 20
    with suppress(ValueError, OSError):  # only root, and only up to fs.nr_open
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, wanted))
        return
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _positive_int(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("expected a number above 0")
    return number


def _duration(text: str) -> float:
    duration = float(text)
    if not 0 < duration < 1e6:
        raise argparse.ArgumentTypeError("expected a duration above 0")
    return duration


def _numbers(text: str) -> list[int]:
    return [_positive_int(part) for part in text.split(",")]


def _upstreams(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in UPSTREAMS:
            raise argparse.ArgumentTypeError(f"expected one of {', '.join(UPSTREAMS)}, got {name!r}")
    return names


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
