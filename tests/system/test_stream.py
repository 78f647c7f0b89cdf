"""The main job: a handoff becomes a stream."""

from pathlib import Path

from tests.harness import running


def test_a_stream_arrives_whole_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with running(tmp_path) as forkd:
        before = forkd.idle_fds()
        answer = forkd.ask(b'{"prompt":"Hello","user_id":42,"request_id":"req-1"}', tcp=True)
        assert answer.status == 200
        assert answer.header("content-type") == "text/event-stream"
        assert answer.header("x-request-id") == "req-1"
        assert answer.complete
        assert answer.text == (
            "Hello! I am forkd's mock backend. Each of these words comes to you as its own server-sent event."
        )
        forkd.wait_for_metric("daemon_chunks_sent_total", 18)
        forkd.wait_for_metric("daemon_active_connections", 0)
        assert forkd.idle_fds() == before
        (line,) = forkd.access_lines()
        assert line["request_id"] == "req-1"
        assert line["user_id"] == "42"
        assert line["remote"] == "127.0.0.1"
        assert line["backend"] == "mock"
        assert line["status"] == "200"
        assert line["bytes"] == str(len(answer.raw))
        assert line["reason"] == "ok"
        assert forkd.stop() == 0
        assert not Path(forkd.path).exists()


def test_a_write_timeout_of_a_month_is_no_harm_to_tcp_clients(tmp_path: Path) -> None:
    """TCP_USER_TIMEOUT is a C int of milliseconds."""
    with running(tmp_path, config={"server": {"write_timeout_secs": 2_592_000}}) as forkd:
        assert forkd.ask(tcp=True).complete
        assert "was killed" not in forkd.log()
