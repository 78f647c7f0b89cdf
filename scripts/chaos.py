"""Does to a running forkd what operators, deployments and the kernel do, under load, and counts who noticed.

    make chaos                              # the whole: three minutes
    .venv/bin/python scripts/chaos.py --short
    .venv/bin/python scripts/chaos.py --help

A daemon of its own (mock backend, everything else as by default), 300 new streams a second, each 2 s long, over real
TCP sockets that are handed over as Apache does it; `chaos_load.py` reads each to its end and compares it byte for
byte. Meanwhile, in phases:

    baseline    nothing
    reloads     20 SIGHUPs in a row, each as soon as the workers of the generation before are gone
    storm       20 more, each as soon as the generation before serves: up to two drain then
    upgrades    5 SIGUSR2 in a row, each as soon as the old master of the one before is gone
    resizes     two workers more by TTIN, two fewer by TTOU
    kills       50 SIGKILLs to random workers, one a second
    stopped     SIGSTOP to a worker
    frozen      SIGSTOP to every process at once, SIGCONT a while later; the load is frozen, too, as Apache would be

From the start to the last kill workers are recycled by `max_streams`, and to the end somebody scrapes the metrics every
second. Then a TERM.

What it promises is the list at the end of its report; it exits with 1 when a promise is broken. The ratio of the times
to first byte means nothing on a machine that does other things, so `--short`, which the tests run, only shows it.
"""

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import Any, Final

import psutil
import yaml
from chaos_load import COMPLETE, COMPLETE_AND_MORE, Outcome

ROOT: Final = Path(__file__).resolve().parents[1]
TEXT: Final = " ".join(f"word-{number:02}" for number in range(1, 19))
WORDS: Final = len(TEXT.split())
PATIENCE_SECS: Final = 60.0
REPLACED_SECS: Final = 2.0
"""How much later than `workers.timeout_secs` a stopped worker must have a successor."""
RATIO_MAX: Final = 3.0
"""Time to first byte, p99: during reloads, over that of the baseline."""


@dataclass(frozen=True)
class Plan:
    """How much of everything."""

    rate: float
    stream_secs: float
    workers: int
    baseline_secs: float
    reloads: int
    upgrades: int
    resizes: int
    kills: int
    kill_every_secs: float
    max_streams: int
    timeout_secs: float
    freeze_secs: float
    judges_ratio: bool


class Broken(Exception):
    """Something that was waited for never came."""


def wait_for(condition: Callable[[], Any], what: str, patience: float = PATIENCE_SECS) -> Any:
    """Ask until `condition()` is true, and return what it returned."""
    end = time.monotonic() + patience
    while not (result := condition()):
        if time.monotonic() >= end:
            raise Broken(f"never happened: {what}")
        time.sleep(0.02)
    return result


def expected_body() -> bytes:
    """What each stream has to say, built from the documentation and not from what forkd says."""
    words = [word + " " for word in TEXT.split()]
    words[-1] = words[-1].rstrip()
    events = [f'data: {{"content":"{word}"}}\n\n' for word in words]
    return "".join([*events, "data: [DONE]\n\n", "event: done\ndata: {}\n\n"]).encode()


class Daemon:
    """The forkd that suffers. Its master may change; `pid` is the one that serves."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self._directory = directory
        self._plan = plan
        self.path = str(directory / "forkd.sock")
        self._file = directory / "forkd.yaml"
        self._log = directory / "forkd.log"
        self._output = directory / "output"
        self._read = 0
        self.lines: list[str] = []
        """Of the log, without access lines."""
        self.ends = True
        """It may: it has not started yet, or was told to stop."""
        self.seen: set[int] = set()
        """Every pid that ever belonged to it."""
        self.configure(max_streams=plan.max_streams)
        with self._output.open("wb") as output:
            environ = {name: value for name, value in os.environ.items() if not name.startswith(("DAEMON_", "OPENAI_"))}
            self._process = subprocess.Popen(
                [sys.executable, "-m", "forkd", "-c", str(self._file)],
                cwd=ROOT,
                env=environ,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        self.pid = self._process.pid
        wait_for(lambda: self.count(r"worker \d+ ready") >= plan.workers or self._process.poll() is not None, "a start")
        if self._process.poll() is not None:
            raise Broken(f"forkd does not start: {self._output.read_text()}")
        self.ends = False
        self._metrics_url = "http://" + self.find(r"metrics on http://(\S+)/metrics")[-1]

    def configure(self, **workers: int) -> None:
        """Write the configuration; the next reload or upgrade reads it."""
        plan = self._plan
        config = {
            "server": {"socket_path": self.path, "socket_mode": "0600"},
            "workers": {"count": plan.workers, "timeout_secs": plan.timeout_secs, **workers},
            "backends": {"mock": {"provider": "mock", "text": TEXT, "token_delay_ms": plan.stream_secs * 1000 / WORDS}},
            "metrics": {"listen_addr": "127.0.0.1:0", "dir": str(self._directory / "metrics")},
            "logging": {"file": str(self._log)},
        }
        self._file.write_text(yaml.safe_dump(config))

    def signal(self, number: signal.Signals) -> None:
        """Signal the master."""
        os.kill(self.pid, number)

    def log(self) -> list[str]:
        """The lines so far. Raises Broken when the master is gone, since all that anyone waits for here comes of it."""
        if self.gone(self.pid) and not self.ends:
            raise Broken("the master is gone")
        if self._log.exists():
            with self._log.open("rb") as file:
                file.seek(self._read)
                data = file.read()
            whole = data[: data.rfind(b"\n") + 1]
            self._read += len(whole)
            self.lines += [line for line in whole.decode("utf-8", "replace").splitlines() if " ACCESS " not in line]
        return self.lines

    def find(self, pattern: str, since: int = 0) -> list[str]:
        """What a pattern's group found, in the lines from `since` on."""
        return [match[match.re.groups] for line in self.log()[since:] if (match := re.search(pattern, line))]

    def count(self, pattern: str, since: int = 0) -> int:
        """How many lines match."""
        return len(self.find(pattern, since))

    def mark(self) -> int:
        """Where the log is now, for `since`."""
        return len(self.log())

    def ready(self) -> list[int]:
        """The pids of the living workers that ever were ready, youngest last."""
        alive = {child.pid for child in psutil.Process(self.pid).children()}
        return [pid for pid in map(int, self.find(r"worker \d+ ready \(pid (\d+)")) if pid in alive]

    def is_of_one_generation(self) -> bool:
        """Whether all workers are of the generation that serves."""
        current = self.find(r"generation (\d+) serves")[-1]
        return set(self.ready()) <= set(map(int, self.find(rf"ready \(pid (\d+), generation {current}\)")))

    def family(self) -> list[psutil.Process]:
        """The master and all its children."""
        master = psutil.Process(self.pid)
        found = [master, *master.children(recursive=True)]
        self.seen |= {process.pid for process in found}
        return found

    def upgraded(self, pid: int) -> None:
        """Another master serves now."""
        self.pid = pid

    def gone(self, pid: int) -> bool:
        """Whether a process has ended."""
        if pid == self._process.pid:
            return self._process.poll() is not None
        try:
            return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return True

    def counters(self) -> dict[str, float]:
        """Every sample of every counter and histogram. Raises OSError."""
        with urllib.request.urlopen(f"{self._metrics_url}/metrics", timeout=10) as answer:
            text = answer.read().decode()
        pairs = re.findall(r"^(\w+(?:_total|_count|_sum|_bucket)(?:{.*?})?) (\S+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in pairs}

    def left_over(self) -> list[str]:
        """Processes and files that should not be there after the end."""
        left = [f"process {pid}" for pid in sorted(self.seen) if not self.gone(pid)]
        return left + [file for file in (self.path, str(self._directory / "metrics" / "*")) if _exists(file)]

    def kill(self) -> None:
        """Whatever is left of it."""
        self.ends = True
        for pid in {*self.seen, self.pid, *map(int, self.find(r"\(pid (\d+)\)"))}:
            with contextlib.suppress(psutil.Error):
                process = psutil.Process(pid)
                if "forkd" in " ".join(process.cmdline()):
                    process.kill()
        self._process.wait()


def _exists(pattern: str) -> bool:
    return any(Path("/").glob(pattern.lstrip("/")))


class Scraper:
    """Prometheus: once a second, and remembers what fell."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._over = threading.Event()
        self._asleep = threading.Event()
        self._last: dict[str, float] = {}
        self.scrapes = 0
        self.missed: list[str] = []
        self.fallen: list[str] = []
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while not self._over.wait(1):
            if not self._asleep.is_set():
                self.scrape()

    def scrape(self) -> dict[str, float]:
        """One scrape, now."""
        try:
            now = self._daemon.counters()
        except OSError as error:
            self.missed.append(str(error))
            return self._last
        self.scrapes += 1
        fallen = {name for name, value in self._last.items() if now.get(name, -1) < value}
        self.fallen += [f"{name} from {self._last[name]!r} to {now.get(name)!r}" for name in sorted(fallen)]
        self._last = now
        return now

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Nobody scrapes a machine that is frozen."""
        self._asleep.set()
        try:
            yield
        finally:
            self._asleep.clear()

    def stop(self) -> None:
        """No more."""
        self._over.set()
        self._thread.join()


class Generator:
    """chaos_load.py, in a process of its own."""

    def __init__(self, daemon: Daemon, directory: Path, plan: Plan) -> None:
        expected, self._result = directory / "expected", directory / "result"
        expected.write_bytes(expected_body())
        command = [sys.executable, str(Path(__file__).with_name("chaos_load.py")), daemon.path, str(plan.rate)]
        self._process = subprocess.Popen(
            [*command, str(expected), str(self._result)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None
        if self._process.stdout.readline() != "ready\n":
            raise Broken("the load generator does not start")

    def tell(self, command: str) -> None:
        """One of its commands."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()

    def end(self) -> dict[str, Any]:
        """No new streams; what came of all of them, when the last has ended."""
        self.tell("end")
        if self._process.wait(PATIENCE_SECS):
            raise Broken("the load generator broke")
        result = json.loads(self._result.read_text())
        assert isinstance(result, dict)
        return result

    def kill(self) -> None:
        """End it, whatever it does."""
        self._process.kill()
        self._process.communicate()


@dataclass
class Phase:
    """A stretch of time, and what was done in it."""

    name: str
    begin: float
    end: float = 0.0
    done: str = ""
    ttfb_ms: list[float] = field(default_factory=list)
    verdicts: Counter[str] = field(default_factory=Counter)

    def other(self) -> dict[str, int]:
        """Verdicts that no phase may have."""
        known = (COMPLETE, COMPLETE_AND_MORE, "worker_lost")
        return {verdict: count for verdict, count in self.verdicts.items() if verdict not in known}


@dataclass
class Promise:
    """Kept or not, and why one thinks so."""

    what: str
    kept: bool
    figures: str = ""


class Chaos:
    """One run."""

    def __init__(self, directory: Path, plan: Plan, seed: int) -> None:
        self._plan = plan
        self._chance = random.Random(seed)
        self.phases: list[Phase] = []
        self.promises: list[Promise] = []
        self.daemon = Daemon(directory, plan)
        self.explanation = ""
        self.generator = Generator(self.daemon, directory, plan)
        self.scraper = Scraper(self.daemon)

    def run(self) -> None:
        """Everything, in order; then judge."""
        plan = self._plan
        self.generator.tell("go")
        time.sleep(plan.stream_secs)  # until as many end as begin
        acts: list[tuple[str, Callable[[], str]]] = [
            ("baseline", self._baseline),
            ("reloads", self._reload),
            ("storm", self._storm),
            ("upgrades", self._upgrade),
            ("resizes", self._resize),
            ("kills", self._kill),
            ("stopped", self._stop_one),
            ("frozen", self._freeze),
        ]
        for name, act in acts:
            phase = Phase(name, time.monotonic())
            self.phases.append(phase)
            print(f"{name} …", file=sys.stderr, flush=True)
            phase.done = act()
            phase.end = time.monotonic()
            self.daemon.family()
        result = self.generator.end()
        self.explanation = result["explanation"]
        outcomes = [Outcome(*each) for each in result["outcomes"]]
        with contextlib.suppress(Broken):  # counts lag by a second; whether they are right is judged later
            wait_for(lambda: self.scraper.scrape().get("daemon_handoffs_total", 0) >= len(outcomes), "all counted", 5)
        counters = self.scraper.scrape()
        self.scraper.stop()
        self._finish()
        self._judge(result, outcomes, counters)

    # What is done.

    def _baseline(self) -> str:
        time.sleep(self._plan.baseline_secs)
        return "nothing"

    def _turn_over(self) -> None:
        mark = self.daemon.mark()
        self.daemon.signal(signal.SIGHUP)
        wait_for(lambda: self.daemon.count(r"generation \d+ serves", mark), "the next generation serves")

    def _reload(self) -> str:
        for _ in range(self._plan.reloads):
            self._turn_over()
            wait_for(self.daemon.is_of_one_generation, "the generation before is gone")
        return f"{self._plan.reloads} SIGHUPs"

    def _storm(self) -> str:
        for _ in range(self._plan.reloads):
            self._turn_over()
        return f"{self._plan.reloads} SIGHUPs"

    def _upgrade(self) -> str:
        pattern = r"the new master \(pid (\d+)\) is ready"
        for _ in range(self._plan.upgrades):
            old, mark = self.daemon.pid, self.daemon.mark()
            self.daemon.family()
            self.daemon.signal(signal.SIGUSR2)
            new = wait_for(lambda mark=mark: self.daemon.find(pattern, mark), "the new master is ready")  # type: ignore[misc]
            self.daemon.upgraded(int(new[0]))
            wait_for(lambda old=old: self.daemon.gone(old), "the old master is gone")  # type: ignore[misc]
            wait_for(lambda mark=mark: self.daemon.count("the old master is gone", mark), "the new one knows")  # type: ignore[misc]
        return f"{self._plan.upgrades} SIGUSR2"

    def _resize(self) -> str:
        plan = self._plan
        for _ in range(plan.resizes):
            mark = self.daemon.mark()
            self.daemon.signal(signal.SIGTTIN)
            wait_for(lambda mark=mark: self.daemon.count(r"worker \d+ ready", mark), "one more is ready")  # type: ignore[misc]
        for _ in range(plan.resizes):
            mark = self.daemon.mark()
            self.daemon.signal(signal.SIGTTOU)
            wait_for(lambda mark=mark: self.daemon.count("workers wanted", mark), "one fewer is wanted")  # type: ignore[misc]
        # One may be there in place of another that is being recycled.
        wait_for(lambda: len(self.daemon.ready()) <= plan.workers + 1, "those that were too many are gone")
        return f"{plan.resizes} TTIN, {plan.resizes} TTOU"

    def _kill(self) -> str:
        plan = self._plan
        begin = time.monotonic()
        for number in range(plan.kills):
            time.sleep(max(0.0, begin + number * plan.kill_every_secs - time.monotonic()))
            wait_for(self._kill_one, "a worker is killed")
        time.sleep(plan.kill_every_secs)
        return f"{plan.kills} SIGKILLs"

    def _kill_one(self) -> bool:
        """False if there is none, or if it was recycled and left this instant: another will do."""
        ready = self.daemon.ready()
        self.daemon.family()
        if not ready:
            return False
        try:
            os.kill(self._chance.choice(ready), signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True

    def _stop_one(self) -> str:
        plan, daemon = self._plan, self.daemon
        daemon.configure(max_streams=0)
        self._turn_over()
        wait_for(lambda: len(daemon.ready()) == plan.workers, "the old ones are gone")
        victim, mark = self._chance.choice(daemon.ready()), daemon.mark()
        begin = time.monotonic()
        os.kill(victim, signal.SIGSTOP)
        wait_for(lambda: daemon.count(rf"\(pid {victim}\) was killed", mark), "it is killed")
        wait_for(lambda: daemon.count(r"worker \d+ ready", mark), "another is ready")
        secs = time.monotonic() - begin
        limit = plan.timeout_secs + REPLACED_SECS
        figures = f"{secs:.1f} s, limit {limit:g} s (timeout_secs {plan.timeout_secs:g} s and {REPLACED_SECS:g} s more)"
        self._promise("a stopped worker is replaced in time", secs <= limit, figures)
        time.sleep(plan.stream_secs)
        return "1 SIGSTOP"

    def _freeze(self) -> str:
        plan, daemon = self._plan, self.daemon
        self.generator.tell("pause")
        before, mark = daemon.ready(), daemon.mark()
        with self.scraper.paused():
            family = daemon.family()
            for process in family:
                process.suspend()
            time.sleep(plan.freeze_secs)
            for process in reversed(family):
                process.resume()
        self.generator.tell("go")
        time.sleep(plan.timeout_secs + 1)  # time enough to kill whoever is taken for hung
        deaths = daemon.find(r"(.*(?:was killed|is silent|exited with).*)", mark)
        same = sorted(before) == sorted(daemon.ready())
        self._promise("a frozen machine kills nobody", same and not deaths, "; ".join(deaths) or "same workers")
        return f"all stopped for {plan.freeze_secs:g} s"

    def _finish(self) -> None:
        daemon = self.daemon
        daemon.family()
        master, mark = daemon.pid, daemon.mark()
        daemon.ends = True
        daemon.signal(signal.SIGTERM)
        try:
            wait_for(lambda: daemon.gone(master), "the end")
            wait_for(lambda: not daemon.left_over(), "nothing is left", 5)
        except Broken:
            pass
        left = daemon.left_over()
        stopped = daemon.count("forkd stopped", mark) > 0
        self._promise("a TERM ends it, and nothing is left", stopped and not left, ", ".join(left) or "nothing")

    # What came of it.

    def _promise(self, what: str, kept: bool, figures: str = "") -> None:
        self.promises.append(Promise(what, kept, figures))

    def _phase_at(self, moment: float) -> Phase | None:
        return next((phase for phase in reversed(self.phases) if moment >= phase.begin), None)

    def _judge(self, result: dict[str, Any], outcomes: list[Outcome], counters: dict[str, float]) -> None:
        for each in outcomes:
            # One that was not complete belongs to the phase that it ended in: a stream outlives the one it began in.
            phase = self._phase_at(each.sent_at if each.verdict == COMPLETE else each.ended_at)
            if phase is not None:
                phase.verdicts[each.verdict] += 1
            began = self._phase_at(each.sent_at)
            if began is not None and each.first_at >= 0 and each.sent_at < began.end:
                began.ttfb_ms.append((each.first_at - each.sent_at) * 1000)
        total = Counter(each.verdict for each in outcomes)
        deadly = ("kills", "stopped")
        cut = {
            phase.name: {verdict: count for verdict, count in phase.verdicts.items() if verdict != COMPLETE}
            for phase in self.phases
            if phase.name not in deadly
        }
        cut = {name: verdicts for name, verdicts in cut.items() if verdicts}
        self._promise(
            "nothing is lost or cut by reloads, upgrades, resizes, recycling and a freeze",
            not cut,
            str(cut or f"{sum(p.verdicts[COMPLETE] for p in self.phases if p.name not in deadly)} streams complete"),
        )
        for phase in self.phases:
            if phase.name in deadly:
                told = phase.verdicts["worker_lost"]
                figures = f"{phase.verdicts[COMPLETE]} complete, {told} told, other: {phase.other() or 'none'}"
                what = f"{phase.name}: every stream is complete or told worker_lost, and none reset or ended in silence"
                self._promise(what, not phase.other() and told > 0, figures)
        self._promise(
            "somebody listens at every moment",
            not result["refused"],
            f"{len(result['refused'])} refused, {result['broken_pipes']} sent again after EPIPE, "
            f"{result['backlog_full']} times the backlog was full",
        )
        recovered = {
            outcome: int(counters.get(f'forkd_streams_recovered_total{{outcome="{outcome}"}}', 0))
            for outcome in ("redispatched", "ended", "poison", "closed")
        }
        told = total["worker_lost"] + total[COMPLETE_AND_MORE]
        self._promise(
            "forkd_streams_recovered_total and the clients agree",
            recovered["ended"] == told and recovered["poison"] == total["poison"],
            f"{recovered}; clients: {told} told ({total[COMPLETE_AND_MORE]} of them behind the last word)",
        )
        handoffs = int(counters.get("daemon_handoffs_total", 0))
        self._promise("every handoff is counted once", handoffs == len(outcomes), f"{handoffs} of {len(outcomes)}")
        recycled = self.daemon.count(" is replaced: it had ")
        self._promise("workers were recycled all the while", recycled > 0, f"{recycled} by max_streams")
        scraper = self.scraper
        self._promise(
            "no counter falls, and the port answers",
            not scraper.fallen and len(scraper.missed) <= self._plan.upgrades,
            f"{scraper.scrapes} scrapes, missed: {scraper.missed or 'none'}, fallen: {scraper.fallen or 'none'}",
        )
        bugs = self.daemon.count("a bug in the master")
        self._promise("the master met no bug of its own", not bugs, f"{bugs}")
        ratio = self.ratio()
        self._promise(
            f"time to first byte p99 during reloads is at most {RATIO_MAX:g} times that without",
            ratio <= RATIO_MAX or not self._plan.judges_ratio,
            f"{ratio:.2f}" + ("" if self._plan.judges_ratio else ", not judged in a run this short"),
        )

    def ratio(self) -> float:
        """Time to first byte, p99: reloads over baseline."""
        p99 = {phase.name: percentile(phase.ttfb_ms, 99) for phase in self.phases}
        return p99["reloads"] / p99["baseline"]

    def close(self) -> None:
        """End whatever is left."""
        self.generator.kill()
        self.scraper.stop()
        self.daemon.kill()


def percentile(values: Sequence[float], percent: float) -> float:
    """The nearest-rank percentile; nan if there are no values."""
    return sorted(values)[max(0, ceil(len(values) * percent / 100) - 1)] if values else float("nan")


def report(chaos: Chaos) -> str:
    """The table and the promises."""
    lines = [
        f"{'phase':9} {'what':24} {'secs':>6} {'complete':>8} {'told':>5} {'other':>5}   time to first byte, ms",
        f"{'':9} {'':24} {'':>6} {'':>8} {'':>5} {'':>5} {'p50':>8} {'p99':>8} {'max':>8}",
    ]
    for phase in chaos.phases:
        told = phase.verdicts["worker_lost"] + phase.verdicts[COMPLETE_AND_MORE]
        times = [percentile(phase.ttfb_ms, percent) for percent in (50, 99, 100)]
        lines.append(
            f"{phase.name:9} {phase.done:24} {phase.end - phase.begin:6.1f} {phase.verdicts[COMPLETE]:8} {told:5} "
            f"{sum(phase.other().values()):5} " + " ".join(f"{value:8.2f}" for value in times)
        )
    lines.append("")
    lines += [
        f"{'kept  ' if promise.kept else 'BROKEN'}  {promise.what}: {promise.figures}" for promise in chaos.promises
    ]
    if chaos.explanation:
        lines += ["", f"the first stream that nobody can explain: {chaos.explanation}"]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="chaos.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--short", action="store_true", help="a little of everything, in under half a minute")
    parser.add_argument("--rate", type=float, help="new streams a second (300; short: 100)")
    parser.add_argument("--workers", type=int, default=2, help="how many workers (%(default)s)")
    parser.add_argument("--kills", type=int, help="how many SIGKILLs (50; short: 4)")
    parser.add_argument("--freeze", type=float, metavar="SECS", help="how long all is frozen (10; short: 2.5)")
    parser.add_argument("--seed", type=int, help="chooses the victims; printed, to repeat a run")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="leave the daemon's log and the results there")
    return parser.parse_args(arguments)


def plan_of(options: argparse.Namespace) -> Plan:
    """How much of everything, by the options."""
    short = options.short
    rate = options.rate or (100 if short else 300)
    return Plan(
        rate=rate,
        stream_secs=1.0 if short else 2.0,
        workers=options.workers,
        baseline_secs=1 if short else 20,
        reloads=3 if short else 20,
        upgrades=1 if short else 5,
        resizes=2,
        kills=options.kills or (4 if short else 50),
        kill_every_secs=0.5 if short else 1,
        # So few that each worker has had them in half a second: before even the next reload, when there are such.
        max_streams=int(rate / options.workers / 2) or 1,
        timeout_secs=2 if short else 5,
        freeze_secs=options.freeze or (2.5 if short else 10),
        judges_ratio=not short,
    )


def main() -> int:
    """Run, print, and say by the exit status whether every promise was kept."""
    options = parse()
    seed = options.seed if options.seed is not None else random.SystemRandom().randrange(1 << 32)
    print(f"seed {seed}", file=sys.stderr)
    with contextlib.ExitStack() as stack:
        directory = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="forkd-chaos-")))
        directory.mkdir(parents=True, exist_ok=True)
        try:
            chaos = Chaos(directory.resolve(), plan_of(options), seed)
        except Broken as error:
            print(error, file=sys.stderr)
            return 1
        stack.callback(chaos.close)
        try:
            chaos.run()
        except (Broken, psutil.Error, OSError) as error:
            chaos.daemon.ends = True
            chaos.promises.append(Promise("the run comes to its end", False, str(error)))
            print("\n".join(chaos.daemon.log()[-40:]), file=sys.stderr)
        print(report(chaos))
    return 0 if all(promise.kept for promise in chaos.promises) else 1


if __name__ == "__main__":
    sys.exit(main())
