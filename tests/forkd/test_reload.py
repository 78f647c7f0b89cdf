"""Reading the configuration again: what may change, and a child that reads it, whatever happens to that child."""

import logging
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from forkd import config, reload
from forkd.config import ConfigError, Loaded
from forkd.reload import FIXED, TIMEOUT_SECS, Reader, settle
from forkd.selector import Ready, Selector
from forkd.settings import (
    ListenerSettings,
    Logging,
    Metrics,
    MockBackend,
    PoolSettings,
    Server,
    Settings,
    TypingBackend,
    Workers,
)
from tests.harness import fail, own_fds, wait_for


def server(**more: Any) -> Server:
    return Server(**{"socket_path": "/run/a.sock", **more})


# What may change.


def test_what_may_change_does() -> None:
    old = Settings(server=server())
    new = Settings(
        server=server(drain_timeout_secs=7, queue_size=9, linger_secs=1),
        workers=Workers(count=7, max_streams=5),
        default_backend="typing",
        backends={"typing": TypingBackend()},
        logging=Logging(level="debug", format="json", access=False),
    )
    assert settle(old, new) == (new, [])


@pytest.mark.parametrize(
    ("old", "new", "names"),
    [
        ({"server": server()}, {"server": server(socket_path="/run/b.sock")}, ["server.socket_path"]),
        (
            {"server": server()},
            {"server": server(max_connections=5, ledger=False, user="nobody", socket_type="stream")},
            ["server.socket_type", "server.max_connections", "server.ledger", "server.user"],
        ),
        ({}, {"metrics": Metrics(listen_addr=":1", enabled=False)}, ["metrics.enabled", "metrics.listen_addr"]),
        ({"logging": Logging(file="/a")}, {"logging": Logging(file="/b")}, ["logging.file"]),
        ({}, {"listeners": [ListenerSettings(path="/x")]}, ["listeners"]),
        (
            {"listeners": [ListenerSettings(path="/x")]},
            {"listeners": [ListenerSettings(path="/x", envelope=False)]},
            ["listeners"],
        ),
    ],
)
def test_what_only_a_restart_changes_is_kept_and_named(old: Any, new: Any, names: list[str]) -> None:
    before = Settings(**{"server": server(), **old})
    after, kept = settle(before, Settings(**{"server": server(), **new}))
    assert kept == names
    assert after == before


def test_what_is_kept_does_not_keep_its_neighbours() -> None:
    old = Settings(server=server(), logging=Logging(file="/a"))
    new = Settings(server=server(socket_path="/run/b.sock", linger_secs=1), logging=Logging(file="/b", level="error"))
    settled, kept = settle(old, new)
    assert kept == ["server.socket_path", "logging.file"]
    assert (settled.server.socket_path, settled.server.linger_secs) == ("/run/a.sock", 1)
    assert settled.logging == Logging(file="/a", level="error")


def test_a_listeners_backend_may_change() -> None:
    old = Settings(server=server(), listeners=[ListenerSettings(path="/x", backend="mock")])
    new = Settings(server=server(), listeners=[ListenerSettings(path="/x", backend="typing")])
    assert settle(old, new) == (new, [])


@pytest.mark.parametrize("own", [{"backend": "slow"}, {"protocol": "fdpass", "data": {"backend": "slow"}}])
def test_a_listener_that_is_kept_keeps_its_backend(own: dict[str, Any]) -> None:
    """The new configuration has neither of them."""
    old = Settings(
        server=server(),
        listeners=[ListenerSettings(path="/x", **own)],
        backends={"mock": MockBackend(), "slow": MockBackend(token_delay_ms=9)},
    )
    new = Settings(server=server(), backends={"mock": MockBackend(token_delay_ms=1)})
    settled, kept = settle(old, new)
    assert kept == ["listeners"]
    assert settled.listeners == old.listeners
    assert settled.backends == {"mock": MockBackend(token_delay_ms=1), "slow": MockBackend(token_delay_ms=9)}


def test_a_listeners_pool_and_the_pools_may_change() -> None:
    old = Settings(server=server(), listeners=[ListenerSettings(path="/x")])
    new = Settings(
        server=server(), listeners=[ListenerSettings(path="/x", pool="heavy")], pools={"heavy": PoolSettings(count=2)}
    )
    assert settle(old, new) == (new, [])
    assert settle(new, old) == (old, [])


def test_listeners_that_are_kept_keep_their_pools_and_no_others() -> None:
    old = Settings(
        server=server(),
        listeners=[ListenerSettings(path="/x", pool="a"), ListenerSettings(path="/y", pool="b")],
        pools={"a": PoolSettings(count=2), "b": PoolSettings(count=3)},
    )
    new = Settings(
        server=server(),
        listeners=[ListenerSettings(path="/x", pool="a"), ListenerSettings(path="/z", pool="c")],
        pools={"a": PoolSettings(count=5), "c": PoolSettings(count=6)},
    )
    settled, kept = settle(old, new)
    assert kept == ["listeners"]
    assert settled.listeners == old.listeners
    assert settled.pools == {"a": PoolSettings(count=5), "b": PoolSettings(count=3)}


def test_every_key_that_is_fixed_exists() -> None:
    for section, keys in FIXED.items():
        for key in keys:
            getattr(getattr(Settings(), section), key)


# The child.


class Desk:
    """A Reader and its answers."""

    def __init__(self, load: Callable[[], Loaded]) -> None:
        self.selector: Selector[Ready] = Selector(fail)
        self.answers: list[Loaded | list[str]] = []
        self.reader = Reader(self.selector, logging.getLogger("test"), load, self.answers.append)

    def until(self, answers: int) -> list[Loaded | list[str]]:
        end = time.monotonic() + 20
        while len(self.answers) < answers:
            assert time.monotonic() < end
            self.selector.serve(self.selector.select(1))
        return self.answers


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = own_fds()
    yield
    assert own_fds() <= before + 1  # the selector's own, which goes with it
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)


def test_the_settings_come_back_whole(tmp_path: Path) -> None:
    file = tmp_path / "forkd.yaml"
    file.write_text("workers: {count: 7}\nbackends: {openai: {api_key: sk-secret, default_model: m}}\n")
    environ = {"DAEMON_TOKEN_DELAY_MS": "9", "RUST_LOG": "x"}
    desk = Desk(lambda: config.load(str(file), environ))
    desk.reader.ask()
    assert desk.reader.pid
    assert desk.until(1) == [config.load(str(file), environ)]
    (answer,) = desk.answers
    assert isinstance(answer, Loaded)
    assert answer.warnings
    assert desk.reader.pid == 0


def test_a_large_answer_comes_in_many_pieces() -> None:
    settings = Settings(server=server(), backends={"mock": MockBackend(text="word " * 500_000)})
    desk = Desk(lambda: Loaded(settings, []))
    desk.reader.ask()
    assert desk.until(1) == [(settings, [])]


def test_faults_come_back_all_of_them(tmp_path: Path) -> None:
    file = tmp_path / "forkd.yaml"
    file.write_text("workers: {count: many}\nserver: {linger: 1}\n")
    desk = Desk(lambda: config.load(str(file), {}))
    desk.reader.ask()
    (faults,) = desk.until(1)
    assert isinstance(faults, list)
    assert sorted(fault.partition(":")[0] for fault in faults) == ["server.linger", "workers.count"]


def test_each_reading_sees_the_file_as_it_is_then(tmp_path: Path) -> None:
    file = tmp_path / "forkd.yaml"
    desk = Desk(lambda: config.load(str(file), {}))
    for count in (3, 4):
        file.write_text(f"workers: {{count: {count}}}")
        desk.reader.ask()
        answer = desk.until(count - 2)[-1]
        assert isinstance(answer, Loaded)
        assert answer.settings.workers.count == count


def test_a_burst_is_one_reading_more(tmp_path: Path) -> None:
    started = tmp_path / "started"

    def load() -> Loaded:
        with started.open("a") as file:
            file.write("x")
        return Loaded(Settings(server=server()), [])

    desk = Desk(load)
    for _ in range(100):
        desk.reader.ask()
    desk.until(2)
    assert started.read_text() == "xx"
    assert desk.reader.pid == 0


def test_a_child_that_hangs_is_killed_in_time() -> None:
    desk = Desk(signal.pause)  # type: ignore[arg-type]
    desk.reader.ask()
    now = time.monotonic()
    desk.reader.tick(now + TIMEOUT_SECS - 1)
    assert not desk.selector.select(0)
    desk.reader.tick(now + TIMEOUT_SECS)
    assert desk.until(1) == [["the process that reads the configuration was killed by SIGKILL"]]


def test_a_child_that_hangs_ends_by_itself_when_there_is_no_master(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "TIMEOUT_SECS", 0.1)
    desk = Desk(signal.pause)  # type: ignore[arg-type]
    desk.reader.ask()
    assert desk.until(1) == [["the process that reads the configuration was killed by SIGALRM"]]


def test_whoever_asked_while_it_hung_gets_another_reading(tmp_path: Path) -> None:
    hangs = tmp_path / "hangs"
    hangs.touch()
    settings = Settings(server=server())

    def load() -> Loaded:
        if hangs.exists():
            signal.pause()
        return Loaded(settings, [])

    desk = Desk(load)
    desk.reader.ask()
    desk.reader.ask()
    wait_for(lambda: "S (sleeping)" in Path(f"/proc/{desk.reader.pid}/status").read_text(), "it hangs")
    hangs.unlink()
    desk.reader.tick(time.monotonic() + TIMEOUT_SECS)
    assert desk.until(2)[1] == (settings, [])


@pytest.mark.parametrize(
    ("act", "fault"),
    [
        (lambda: os._exit(3), "the process that reads the configuration exited with status 3"),
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            "the process that reads the configuration was killed by SIGKILL",
        ),
        (lambda: {}["sk-secret"], "a bug in forkd keeps it from being read: KeyError"),
    ],
)
def test_a_child_that_crashes_is_a_fault_too(act: Callable[[], Loaded], fault: str) -> None:
    desk = Desk(act)
    desk.reader.ask()
    assert desk.until(1) == [[fault]]
    desk.reader.ask()  # and the next is not impaired
    assert desk.until(2) == [[fault]] * 2


def test_a_config_error_without_a_file() -> None:
    def load() -> Loaded:
        raise ConfigError(["one", "two"])

    desk = Desk(load)
    desk.reader.ask()
    assert desk.until(1) == [["one", "two"]]


def test_a_child_owns_nothing_but_its_pipe(tmp_path: Path) -> None:
    found = tmp_path / "fds"

    def load() -> Loaded:
        fds = os.listdir("/proc/self/fd")
        found.write_text(str(len(fds)))
        return Loaded(Settings(server=server()), [])

    with (tmp_path / "open").open("w"):
        desk = Desk(load)
        desk.reader.ask()
        desk.until(1)
    assert found.read_text() == "5"  # 0, 1, 2, the pipe, and the directory that is listed


def test_no_process_to_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_fork() -> int:
        raise OSError(11, "Resource temporarily unavailable")

    desk = Desk(lambda: Loaded(Settings(server=server()), []))
    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", no_fork)
        desk.reader.ask()
    assert desk.answers == [
        ["cannot start a process to read the configuration: Resource temporarily unavailable"],
    ]
    desk.reader.ask()
    assert isinstance(desk.until(2)[1], Loaded)


def test_a_master_that_leaves_ends_the_child() -> None:
    desk = Desk(signal.pause)  # type: ignore[arg-type]
    desk.reader.ask()
    desk.reader.ask()
    desk.reader.cancel()
    assert desk.reader.pid == 0
    assert not desk.selector.registered
    desk.reader.cancel()
    assert desk.answers == []
