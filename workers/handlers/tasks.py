"""Async generators: a task each, all on one asyncio loop in one thread of this worker.

A handler that blocks there (`time.sleep`, `requests`, a computation) stops its neighbours, and nothing can interrupt
it. So the loop is asked once a second whether it still answers. One that has not for LATE_SECS gets no new streams:
these go to another loop in another thread, until it answers again. Those that it has may time out.
"""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

from forkd.handler import Handoff
from workers.backends.handler import HandlerBackend
from workers.handlers.mailbox import Mailbox
from workers.handlers.run import BadYield, Ended, Run, described
from workers.handlers.source import HandlerSource

LATE_SECS: Final = 2.0
HOSTS_MAX: Final = 8


class TaskRun(Run):
    """A run in a task. `host`, `task` and `gate` are None before it begins. `lives`: it has taken its first step,
    and is not on its way out.
    """

    __slots__ = ("gate", "host", "lives", "task")

    lives: bool
    host: "Host | None"
    task: "asyncio.Task[None] | None"
    gate: "asyncio.Future[None] | None"

    async def wait(self) -> None:
        """Wait while the handler is held."""
        while self.held:
            gate = self.gate = asyncio.get_running_loop().create_future()
            self.waits = True
            if self.held:
                await gate
            self.waits = False

    def go_on(self) -> None:
        """Let it go on; in the asyncio loop's thread."""
        if self.gate is not None and not self.gate.done():
            self.gate.set_result(None)

    async def live(self) -> None:
        """Run the handler to its end."""
        failure: BaseException | None = None
        generator: object = None
        self.lives = True
        try:
            if not self.cancelled:
                generator = self.function(self.handoff)
                if not isinstance(generator, AsyncGenerator):
                    raise BadYield(f"it returned {type(generator).__name__} instead of an async generator")
                async for value in generator:
                    if self.cancelled:
                        break
                    self.give(value)
                    if self.held:
                        await self.wait()
                    if self.cancelled:
                        break
        except asyncio.CancelledError as error:
            failure = None if self.cancelled else error
        except BaseException as error:  # SystemExit too, which would end the loop and all who are on it
            failure = error
        self.lives = False
        if isinstance(generator, AsyncGenerator):
            try:
                await generator.aclose()
            except asyncio.CancelledError as error:
                failure = failure or (None if self.cancelled else error)
            except BaseException as error:
                failure = failure or error
        self.end(failure)


class Host:
    """One asyncio loop and the thread that runs it. All but `_main` and what it calls is for the worker's thread."""

    def __init__(self, mailbox: Mailbox) -> None:
        """Raises RuntimeError or OSError when there is no thread, or no fd, to be had."""
        self._mailbox = mailbox
        self.runs: dict[TaskRun, HandlerSource] = {}
        self.late = False
        self.broken = ""
        self._asked_at = 0.0
        self.loop = asyncio.new_event_loop()
        try:
            threading.Thread(target=self._main, name="asyncio", daemon=True).start()
        except RuntimeError:
            self.loop.close()
            raise

    def begin(self, run: TaskRun) -> None:
        run.host = self
        self._soon(self._spawn, run)

    def wake(self, run: TaskRun) -> None:
        self._soon(TaskRun.go_on, run)

    def cancel(self, run: TaskRun) -> None:
        self._soon(_cancel, run)

    def look(self, now: float) -> None:
        """Ask whether it answers, and judge by whether it did the last time."""
        self.late = self._asked_at > 0 and now - self._asked_at >= LATE_SECS
        if not self._asked_at and self.runs:
            self._asked_at = now
            try:
                self.loop.call_soon_threadsafe(self._answer)
            except RuntimeError:
                pass

    def blocked(self, now: float) -> str:
        """Who keeps the loop from answering, and for how long."""
        task = asyncio.current_task(self.loop)
        asked_at = self._asked_at or now  # it may have answered since we looked
        return f"{task.get_name() if task else 'a callback'} blocks its asyncio loop for {now - asked_at:.0f} s"

    def stop(self) -> None:
        """End the thread, with nothing on it or not."""
        try:
            self.loop.call_soon_threadsafe(self.loop.stop)
        except RuntimeError:
            pass

    def take(self, broken: str) -> None:
        """The thread has ended: nobody who is left comes to an end by himself."""
        self.broken = broken or "it was stopped"
        for source in list(self.runs.values()):
            source.take(Ended("handler_error", f"the asyncio loop has ended: {self.broken}"))

    def crashed(self, error: Exception) -> None:
        raise error

    def _soon(self, function: Callable[[TaskRun], Any], run: TaskRun) -> None:
        try:
            self.loop.call_soon_threadsafe(function, run)
        except RuntimeError:  # closed: its last letter is on the way
            pass

    def _answer(self) -> None:
        self._asked_at = 0.0

    def _spawn(self, run: TaskRun) -> None:
        run.task = self.loop.create_task(run.live(), name=run.label)

    def _main(self) -> None:
        broken = ""
        try:
            asyncio.set_event_loop(self.loop)
            self.loop.run_forever()
        except BaseException as error:  # a task of the user's own that called sys.exit
            broken = described(error)
        self.loop.close()
        self._mailbox.put(self, broken)


def _cancel(run: TaskRun) -> None:
    # A task that is cancelled before its first step never takes it, and nobody hears of its end: so let it take it, and
    # see for itself. Later it would be cut short in its `finally`.
    if run.task is not None and run.lives:
        run.task.cancel()


class Tasks:
    """The asyncio loop of one worker; several only while one is late. Every backend's async handlers share it."""

    def __init__(self, mailbox: Mailbox) -> None:
        self._mailbox = mailbox
        self._hosts: list[Host] = []

    def make(
        self, backend: HandlerBackend, handoff: Handoff, label: str, mailbox: Mailbox, source: HandlerSource
    ) -> Run:
        """See `Runner`, as the others."""
        run = TaskRun(backend.target.function, handoff, label, mailbox, source)
        run.lives = False
        run.gate = run.host = run.task = None
        return run

    def begin(self, source: HandlerSource) -> None:
        run = source.run
        assert isinstance(run, TaskRun)
        try:
            host = self._host()
        except (OSError, RuntimeError) as error:
            source.refuse(f"no asyncio loop is free and another cannot be started: {error}")
            return
        host.runs[run] = source
        source.begins()
        host.begin(run)

    def withdraw(self, source: HandlerSource) -> None:
        """Nobody waits here."""

    def wake(self, run: Run) -> None:
        assert isinstance(run, TaskRun)
        if run.host is not None:
            run.host.wake(run)

    def cancel(self, run: Run) -> None:
        assert isinstance(run, TaskRun)
        if run.host is not None:
            run.host.cancel(run)

    def ended(self, source: HandlerSource, run: Run) -> None:
        assert isinstance(run, TaskRun)
        if run.host is not None:
            run.host.runs.pop(run, None)

    def lose(self, source: HandlerSource) -> None:
        """It holds nothing that others need."""

    def look(self, now: float) -> None:
        """Called each second."""
        for host in self._hosts:
            host.look(now)
        self._hosts = [host for host in self._hosts if not host.broken]
        spare = [host for host in self._hosts if not host.late and not host.runs]
        if len(spare) == len(self._hosts):
            del spare[:1]
        for host in spare:
            self._hosts.remove(host)
            host.stop()

    def blocked(self, now: float) -> list[str]:
        """Of each loop that is late, who holds it up."""
        return [host.blocked(now) for host in self._hosts if host.late]

    @property
    def exhausted(self) -> bool:
        """Too many loops are held up: another worker would do better."""
        return sum(host.late for host in self._hosts) >= HOSTS_MAX

    def close(self) -> None:
        """End every loop that still answers."""
        for host in self._hosts:
            host.stop()

    def _host(self) -> Host:
        for host in self._hosts:
            if not host.late and not host.broken:
                return host
        if len(self._hosts) >= HOSTS_MAX:
            raise RuntimeError(f"{len(self._hosts)} are held up")
        self._hosts.append(Host(self._mailbox))
        return self._hosts[-1]
