"""Logs: one line each, whole, and never waited for."""

import fcntl
import json
import logging
import os
import socket
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forkd.logs import WINDOW_RECORDS, WINDOW_SECS, Access, Formatter, Logs, Sink, quoted

LINE = Access("req-1", "user", "::1", "mock", None, 200, 1234, 18, 5, 900, 2, "ok")


@pytest.fixture
def stderr() -> Iterator[Callable[[int], None]]:
    """Puts another fd in the place of this process's stderr, and takes it back."""
    before = os.dup(2)
    yield lambda fd: os.dup2(fd, 2)
    os.dup2(before, 2)
    os.close(before)


def test_a_file_is_appended_to(tmp_path: Path) -> None:
    file = tmp_path / "log"
    file.write_text("before\n")
    sink = Sink(str(file))
    sink.put("one")
    sink.put("two")
    assert file.read_text() == "before\n"
    sink.flush()
    sink.flush()
    assert file.read_text() == "before\none\ntwo\n"
    assert sink.take_dropped() == 0


def test_a_new_file_is_not_for_everybody(tmp_path: Path) -> None:
    Sink(str(tmp_path / "log"))
    assert not stat.S_IMODE((tmp_path / "log").stat().st_mode) & stat.S_IRWXO


def test_reopening_after_logrotate_keeps_the_number(tmp_path: Path) -> None:
    file = tmp_path / "log"
    sink = Sink(str(file))
    number = sink.fd
    file.rename(tmp_path / "log.1")
    sink.put("one")
    sink.reopen()
    assert sink.fd == number
    assert not os.get_inheritable(sink.fd)
    sink.flush()
    assert file.read_text() == "one\n"
    file.unlink()
    file.mkdir()
    with pytest.raises(IsADirectoryError):
        sink.reopen()
    sink.put("two")
    sink.flush()
    assert sink.take_dropped() == 0


def test_a_full_disk_drops_and_counts() -> None:
    sink = Sink("/dev/full")
    for number in range(5):
        sink.put(f"line {number}")
    sink.flush()
    assert sink.take_dropped() == 5
    assert sink.take_dropped() == 0


def test_a_full_pipe_drops_whole_lines(stderr: Callable[[int], None]) -> None:
    read_end, write_end = os.pipe()
    fcntl.fcntl(write_end, fcntl.F_SETPIPE_SZ, 4096)
    stderr(write_end)
    sink = Sink()
    assert os.get_blocking(2)  # shared with whoever started us
    for number in range(1000):
        sink.put(f"{number:0100d}")
    sink.flush()
    lines = os.read(read_end, 1 << 20).decode().splitlines(keepends=True)
    assert lines
    assert all(len(line) == 101 for line in lines)
    assert sink.take_dropped() == 1000 - len(lines)
    sink.put("room again")
    sink.flush()
    assert os.read(read_end, 100) == b"room again\n"
    os.close(read_end)
    sink.put("nobody there")
    sink.flush()
    assert sink.take_dropped() == 1
    os.close(write_end)
    os.close(sink.fd)


def test_a_full_socket_drops_whole_lines(stderr: Callable[[int], None]) -> None:
    """As under systemd, where stderr is a socket to the journal."""
    journal, ours = socket.socketpair()
    with journal, ours:
        stderr(ours.fileno())
        sink = Sink()
        for number in range(20_000):
            sink.put(f"{number:0100d}")
        sink.flush()
        dropped = sink.take_dropped()
        assert 0 < dropped < 20_000
        assert os.get_blocking(2)


def test_a_long_line_is_cut_and_stays_one(tmp_path: Path) -> None:
    sink = Sink(str(tmp_path / "log"))
    sink.put("x" * 10_000)
    sink.put("after")
    sink.flush()
    first, second = (tmp_path / "log").read_text().splitlines()
    assert first == "x" * 4095
    assert second == "after"


# Lines.


def test_an_access_line_as_text() -> None:
    assert Formatter("pretty", "worker 2").access(0.25, LINE) == (
        "1970-01-01T00:00:00.250Z ACCESS  worker 2: request_id=req-1 user_id=user remote=::1 backend=mock model=- "
        "status=200 bytes=1234 chunks=18 ttfb_ms=5 duration_ms=900 worker=2 reason=ok input_tokens=- output_tokens=-"
    )
    line = Formatter("pretty", "w").access(0, LINE._replace(user_id=None, backend="", ttfb_ms=None, model="gpt 4"))
    assert " user_id=- " in line
    assert " backend=- " in line
    assert ' model="gpt 4" ' in line
    assert " ttfb_ms=- " in line


def test_an_access_line_as_json() -> None:
    record = json.loads(Formatter("json", "worker 2").access(1.0, LINE))
    assert record == {"ts": "1970-01-01T00:00:01.000Z", "level": "ACCESS", "process": "worker 2", **LINE._asdict()}


@given(st.text() | st.integers() | st.none(), st.text(), st.text())
def test_whatever_comes_in_stays_in_its_field(user_id: str | int | None, remote: str, model: str) -> None:
    line = LINE._replace(user_id=user_id, remote=remote, model=model)
    text = Formatter("pretty", "w").access(0.0, line)
    assert len(text.splitlines()) == 1
    decoder = json.JSONDecoder()
    found: dict[str, str] = {}
    rest = text.partition(": ")[2]
    while rest:
        key, _, rest = rest.partition("=")
        if rest.startswith('"'):
            found[key], end = decoder.raw_decode(rest)
        else:
            end = len(rest.split(" ", 1)[0])
            found[key] = rest[:end]
        rest = rest[end + 1 :]
    assert list(found) == list(Access._fields)
    assert found["remote"] == (remote[:200] or "-")
    assert found["reason"] == "ok"
    record = json.loads(Formatter("json", "w").access(0.0, line))
    assert record["reason"] == "ok"


@given(st.text(st.characters(), min_size=1, max_size=300))
def test_quoted_is_one_word_or_json(value: str) -> None:
    shown = quoted(value)
    if shown.startswith('"'):
        assert json.loads(shown) == value[:200]
        assert shown.isascii()
        assert shown.isprintable()
    else:
        assert shown == value
        assert not set(shown) & set(' ="\n\r')


@pytest.mark.parametrize("character", ["x", '"', "\n", "\U0001f600", "\ud800"])
def test_json_lines_are_never_cut_inside(tmp_path: Path, character: str) -> None:
    sink = Sink(str(tmp_path / "log"))
    formatter = Formatter("json", "w")
    sink.put(formatter.access(0.0, LINE._replace(user_id=character * 100_000, remote=character * 5_000)))
    sink.put(formatter.format(logging.makeLogRecord({"msg": character * 10_000, "levelname": "INFO"})))
    sink.flush()
    access, message = (json.loads(line) for line in (tmp_path / "log").read_text().splitlines())
    assert access["user_id"] == character * len(access["user_id"])
    assert len(access["user_id"]) > 100
    assert access["request_id"] == "req-1"
    assert len(message["message"]) > 100


# Records.


def test_records_are_written_at_once_at_their_level(tmp_path: Path) -> None:
    logs = Logs(Sink(str(tmp_path / "log")), "info", "pretty", access=True)
    logs.rename("worker 3")
    logs.logger.debug("not this")
    logs.logger.info("%d %s", 1, "that")
    try:
        raise ValueError("why")
    except ValueError:
        logs.logger.exception("broke")
    text = (tmp_path / "log").read_text()
    assert "not this" not in text
    assert "INFO    worker 3: 1 that\n" in text
    assert "ERROR   worker 3: broke\nTraceback" in text
    assert text.endswith("ValueError: why\n")
    logs.access(0.0, LINE)
    logs.sink.flush()
    assert "request_id=req-1" in (tmp_path / "log").read_text()


def test_a_record_as_json_carries_its_stack(tmp_path: Path) -> None:
    logs = Logs(Sink(str(tmp_path / "log")), "info", "json", access=True)
    try:
        raise ValueError("why")
    except ValueError:
        logs.logger.exception("broke")
    (line,) = (tmp_path / "log").read_text().splitlines()
    record = json.loads(line)
    assert record["level"] == "ERROR"
    assert record["message"].startswith("broke\nTraceback")


def test_what_one_place_says_again_and_again_is_counted_instead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = Logs(Sink(str(tmp_path / "log")), "info", "pretty", access=False)
    clock = [1000.0]
    monkeypatch.setattr("forkd.logs.time.time", lambda: clock[0])
    # Two kinds from one place, which is where all that the compiled modules say seems to come from.
    for message, count in (("it is down: %d", WINDOW_RECORDS + 30), ("something else: %d", 1)):
        for number in range(count):
            logs.logger.warning(message, number)
    for number in range(WINDOW_RECORDS + 30):
        logs.logger.info("good news are never left out: %d", number)
    logs.tell_repeats()
    lines = (tmp_path / "log").read_text().splitlines()
    assert sum("it is down" in line for line in lines) == WINDOW_RECORDS
    assert sum("something else" in line for line in lines) == 1
    assert sum("good news" in line for line in lines) == WINDOW_RECORDS + 30
    clock[0] += WINDOW_SECS
    logs.tell_repeats()
    logs.tell_repeats()
    (told,) = [line for line in (tmp_path / "log").read_text().splitlines() if "left out: " in line and "more" in line]
    assert "30 more like this in 10 s were left out: it is down: 79" in told
    logs.logger.warning("it is down: %d", 99)  # a new window
    assert "it is down: 99" in (tmp_path / "log").read_text()


def test_journald_is_told_how_serious_a_line_is(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    found = os.fstat(2)
    monkeypatch.setenv("JOURNAL_STREAM", f"{found.st_dev}:{found.st_ino}")
    logs = Logs(Sink(), "info", "pretty", access=True)
    logs.logger.error("bad\nworse")
    logs.logger.info("fine")
    logs.access(0.0, LINE)
    logs.sink.flush()
    lines = capfd.readouterr().err.splitlines()
    assert [line[:3] for line in lines] == ["<3>", "<3>", "<6>", "<6>"]
    monkeypatch.setenv("JOURNAL_STREAM", "1:2")  # somebody else's
    assert not Sink().is_journal
