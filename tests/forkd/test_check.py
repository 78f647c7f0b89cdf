"""`forkd check`: every line it may say. The backends' own answers are test_probe's."""

import json
import os
import pwd
import resource
import shutil
import socket
import stat
import sys
from pathlib import Path
from threading import Event
from typing import Any, ClassVar

import pytest
import yaml

from forkd import check, probe
from forkd.cli import main
from forkd.finding import Finding, Level
from tests.forkd.test_status import STATUS, answering
from tests.harness import own_fds

KEY = "sk-very-secret-0123456789"


class Checked:
    """What it said."""

    def __init__(self, status: int, out: str) -> None:
        self.status = status
        self.out = out
        self.lines = [(line[:8].strip(), line[8:24].strip(), line[25:]) for line in out.splitlines()[:-1]]
        self.verdict = out.splitlines()[-1]

    def about(self, subject: str) -> list[tuple[str, str]]:
        return [(level, text) for level, about, text in self.lines if about == subject]

    def the(self, subject: str) -> tuple[str, str]:
        (only,) = self.about(subject)
        return only


class Checker:
    """Checks a configuration in `directory`, in which nothing is wrong beforehand."""

    def __init__(self, directory: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.directory = directory
        self.file = directory / "forkd.yaml"
        self._capsys = capsys

    def __call__(self, *arguments: str, **sections: Any) -> Checked:
        base: dict[str, Any] = {
            "server": {"socket_path": str(self.directory / "forkd.sock"), "max_connections": 100},
            "metrics": {"listen_addr": "127.0.0.1:0"},
        }
        for section, keys in sections.items():
            base[section] = {**base.get(section, {}), **keys} if isinstance(keys, dict) else keys
        self.file.write_text(yaml.safe_dump(base))
        status = main(["check", "-c", str(self.file), *arguments])
        said = self._capsys.readouterr()
        assert KEY not in said.out + said.err
        assert said.err == ""
        return Checked(status, said.out)


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Checker:
    for name in list(os.environ):
        if name.startswith(("DAEMON_", "OPENAI_")):
            monkeypatch.delenv(name)
    return Checker(tmp_path, capsys)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the backends that are asked; nobody is, really."""
    names: list[str] = []

    def noted(name: str, _backend: object) -> Finding:
        names.append(name)
        return Finding(Level.OK, f"backend {name}", "takes the key")

    monkeypatch.setattr(check, "probe", noted)
    return names


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")


def test_all_is_well(run: Checker) -> None:
    said = run(workers={"count": 3})
    assert said.status == 0
    assert {level for level, *_ in said.lines} <= {"ok", "warning"}
    assert said.the("configuration") == ("ok", str(run.file))
    assert said.the("workers") == ("ok", "3")
    assert said.the("socket") == ("ok", f"{run.directory}/forkd.sock: free")
    assert said.the("log") == ("ok", "stderr")
    assert said.the("backend mock") == ("ok", "answers by itself")
    assert not (run.directory / "forkd.sock.lock").exists()


def test_verdicts(run: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert run().verdict == "All is well."
    assert run(logging={"file": "/nowhere/log"}).verdict == "1 fault."
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("RUST_LOG", "debug")
    assert run(logging={"file": "/nowhere/log"}).verdict == "1 fault, 2 warnings."


def test_a_user_that_cannot_be_become(run: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 2)
    assert run(server={"user": "bin"}).status == 0
    assert not run(server={"user": "bin"}).about("user")
    said = run(server={"user": "daemon"})
    assert said.the("user") == ("warning", "only root can become server.user: forkd would run as bin")


def test_a_wrong_configuration_is_told_completely(run: Checker) -> None:
    said = run(workers={"count": "many"}, logging={"levell": "info"})
    assert said.status == 2
    assert said.out.count("fault   configuration ") == 2
    assert said.verdict == "2 faults."
    assert "workers.count" in said.out
    assert "logging.level" in said.out


def test_a_file_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "/nowhere/forkd.yaml"]) == 2
    assert "/nowhere/forkd.yaml" in capsys.readouterr().out


def test_the_file_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "-c", "a", "b"]) == 2
    assert "once" in capsys.readouterr().err


def test_warnings_of_the_configuration(run: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RUST_LOG", "debug")
    assert any(level == "warning" and "RUST_LOG" in text for level, text in run().about("configuration"))


def test_auto_is_resolved(run: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("forkd.cpus.available", lambda: 7)
    assert run().the("workers") == ("ok", "7 (auto: one for each CPU there is for us)")


def test_pools_are_told(run: Checker) -> None:
    listeners = [{"path": f"{run.directory}/{name}.sock", "pool": pool} for name, pool in (("a", "h"), ("b", "h"))]
    said = run(workers={"count": 3}, listeners=listeners, pools={"h": {"count": 2}})
    assert said.status == 0
    assert said.the("workers") == ("ok", "3")
    assert said.the("pool h") == ("ok", f"2 workers of its own, for {run.directory}/a.sock, {run.directory}/b.sock")


class TestCapacity:
    @pytest.fixture(autouse=True)
    def _limit(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As if the limit could not be raised."""
        monkeypatch.setattr(resource, "setrlimit", self._refuse)

    @staticmethod
    def _refuse(*_arguments: object) -> None:
        raise ValueError

    @pytest.mark.parametrize(
        ("limit", "wanted", "level", "says"),
        [
            (20_000, 1000, "ok", "1,000 streams at once; the limit of open files is 20,000 here"),
            (2000, 1500, "warning", "1,000 streams at once; the limit of open files is 2,000 here, too low for"),
            (2000, 100_000, "ok", "1,000 streams at once;"),
            (40, 1500, "fault", "the limit of open files is 40, too low for 2 workers"),
        ],
    )
    def test_is_what_the_limit_of_open_files_leaves(
        self, run: Checker, monkeypatch: pytest.MonkeyPatch, limit: int, wanted: int, level: str, says: str
    ) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (limit, limit))
        said = run(server={"max_connections": wanted}, workers={"count": 2})
        assert said.the("capacity")[0] == level
        assert said.the("capacity")[1].startswith(says)

    def test_is_reckoned_with_the_workers_of_all_pools(self, run: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (60, 60))
        listener = {"path": f"{run.directory}/a.sock", "pool": "h"}
        said = run(workers={"count": 2}, listeners=[listener], pools={"h": {"count": 3}})
        assert said.the("capacity") == ("fault", "the limit of open files is 60, too low for 5 workers")

    def test_without_a_ledger_there_is_no_limit(self, run: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(resource, "getrlimit", lambda _: (2000, 2000))
        said = run(server={"max_connections": 50_000, "ledger": False}, workers={"count": 2})
        assert said.the("capacity")[1].startswith("50,000 streams at once")


class TestSocket:
    def test_a_forkd_that_runs_is_no_fault(self, run: Checker) -> None:
        path = str(run.directory / "forkd.sock")
        Path(path + ".lock").write_text("4711\n")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
            listener.bind(path)
            listener.listen()
            assert run().the("socket") == ("ok", f"{path}: forkd (pid 4711) listens on it now")

    def test_another_program_is(self, run: Checker) -> None:
        path = str(run.directory / "forkd.sock")
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen()
            said = run()
        assert (said.status, said.the("socket")) == (1, ("fault", f"{path}: another program listens on it"))
        assert run().the("socket") == ("ok", f"{path}: free")  # a stale one is replaced

    def test_what_is_no_socket_stays(self, run: Checker) -> None:
        (run.directory / "forkd.sock").write_text("precious")
        level, text = run().the("socket")
        assert (level, "is no socket" in text) == ("fault", True)

    def test_directories_are_made(self, run: Checker) -> None:
        path = run.directory / "a" / "b" / "forkd.sock"
        assert run(server={"socket_path": str(path)}).the("socket") == ("ok", f"{path}: free")
        assert not (run.directory / "a").exists()

    def test_but_not_below_a_file(self, run: Checker) -> None:
        (run.directory / "a").write_text("")
        level, text = run(server={"socket_path": str(run.directory / "a" / "forkd.sock")}).the("socket")
        assert (level, "a is no directory" in text or "Not a directory" in text) == ("fault", True)

    def test_every_listener_is_looked_at(self, run: Checker) -> None:
        said = run(listeners=[{"path": str(run.directory / "second.sock"), "backend": "typing"}])
        assert [text for _, text in said.about("socket")] == [
            f"{run.directory}/forkd.sock: free",
            f"{run.directory}/second.sock: free",
        ]
        assert said.the("backend typing") == ("ok", "answers by itself")

    def test_a_group_that_one_is_not_in(self, run: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
        monkeypatch.setattr(os, "getgroups", lambda: [1000, 34567])
        assert run(server={"socket_group": 34567}).the("socket")[0] == "ok"
        level, text = run(server={"socket_group": 45678}).the("socket")
        assert (level, "cannot be given to the group 45678" in text) == ("fault", True)


class TestLog:
    def test_appended_to(self, run: Checker) -> None:
        file = run.directory / "log"
        assert run(logging={"file": str(file)}).the("log") == ("ok", f"{file}: will be made")
        assert not file.exists()
        file.write_text("old\n")
        assert run(logging={"file": str(file)}).the("log") == ("ok", str(file))
        assert file.read_text() == "old\n"

    @pytest.mark.parametrize(("name", "says"), [("", "is a directory"), ("no/log", "its directory does not exist")])
    def test_that_cannot_be(self, run: Checker, name: str, says: str) -> None:
        level, text = run(logging={"file": str(run.directory / name)}).the("log")
        assert (level, text.endswith(says)) == ("fault", True)


class TestMetrics:
    def test_off(self, run: Checker) -> None:
        assert run(metrics={"enabled": False}).the("metrics") == ("ok", "switched off")

    def test_any_port(self, run: Checker) -> None:
        assert run().the("metrics")[0] == "ok"

    def test_free(self, run: Checker) -> None:
        with socket.create_server(("127.0.0.1", 0)) as lately:
            address = f"127.0.0.1:{lately.getsockname()[1]}"
        assert run(metrics={"listen_addr": address}).the("metrics") == ("ok", f"{address}: free")

    def test_taken_by_forkd(self, run: Checker) -> None:
        with answering(json.dumps(STATUS).encode()) as address:
            said = run(metrics={"listen_addr": address})
        assert said.the("metrics") == ("ok", f"{address}: forkd 1.2.3 (pid 4711) serves them now")

    def test_taken_by_another(self, run: Checker) -> None:
        with answering(b"hello") as address:
            said = run(metrics={"listen_addr": address})
        assert said.status == 1
        assert said.the("metrics") == ("fault", f"{address}: Address already in use; there would be no metrics")

    def test_an_address_of_another_machine(self, run: Checker) -> None:
        assert run(metrics={"listen_addr": "no-such-host.invalid:9090"}).the("metrics")[0] == "fault"

    def test_directory(self, run: Checker) -> None:
        assert run(metrics={"dir": str(run.directory / "new")}).the("metrics.dir") == ("ok", f"{run.directory}/new")
        (run.directory / "file").write_text("")
        assert run(metrics={"dir": str(run.directory / "file")}).the("metrics.dir")[0] == "fault"


class TestDataDir:
    def test_there(self, run: Checker) -> None:
        assert run(server={"data_dir": str(run.directory)}).the("data_dir") == ("ok", str(run.directory))

    def test_not_there(self, run: Checker) -> None:
        assert run(server={"data_dir": str(run.directory / "no")}).the("data_dir")[0] == "fault"


@as_root
class TestAsAnotherUser:
    """Root may read everything; the user that forkd drops to may not, and it is that user who is looked through."""

    USER = "nobody"

    @pytest.fixture(autouse=True)
    def _open(self, tmp_path: Path) -> None:
        for directory in (tmp_path, *tmp_path.parents):
            if directory.stat().st_uid == 0 and directory != Path("/"):
                directory.chmod(directory.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)

    def test_a_data_dir_of_ones_own(self, run: Checker) -> None:
        directory = run.directory / "data"
        directory.mkdir(mode=0o700)
        server = {"user": self.USER, "data_dir": str(directory)}
        assert run(server=server).the("data_dir") == ("fault", f"{directory}: workers may not read it")
        directory.chmod(0o755)
        assert run(server=server).the("data_dir")[0] == "warning"
        os.chown(directory, pwd.getpwnam(self.USER).pw_uid, -1)
        assert run(server=server).the("data_dir") == ("ok", str(directory))

    def test_what_a_reload_reads(self, run: Checker) -> None:
        key = run.directory / "key"
        key.write_text(KEY)
        key.chmod(0o600)
        own = {"provider": "openai", "api_base": "http://127.0.0.1:1/v1", "api_key_file": str(key)}
        said = run("--no-probe", server={"user": self.USER}, backends={"own": own})
        assert said.the("api_key_file")[0] == "warning"
        key.chmod(0o644)
        assert not run("--no-probe", server={"user": self.USER}, backends={"own": own}).about("api_key_file")
        run.file.chmod(0o600)
        said = run("--no-probe", server={"user": self.USER})
        assert said.about("configuration")[-1][0] == "warning"

    def test_root_without_a_user_is_warned(self, run: Checker) -> None:
        assert run().the("user")[0] == "warning"
        assert not run(server={"user": self.USER}).about("user")


class TestBackends:
    OWN: ClassVar[dict[str, Any]] = {"provider": "openai", "api_base": "http://127.0.0.1:1/v1", "api_key": KEY}

    def test_asked_are_those_in_use(self, run: Checker, asked: list[str]) -> None:
        run(
            default_backend="first",
            backends={"first": {**self.OWN}, "unused": {**self.OWN}, "mock": {"provider": "mock"}},
            listeners=[{"path": str(run.directory / "s"), "backend": "langgraph"}],
        )
        assert sorted(asked) == ["first", "langgraph", "unused"]

    def test_one_that_is_written_as_it_is_anyway(self, run: Checker, asked: list[str]) -> None:
        run(backends={"openai": {"provider": "openai"}})
        assert asked == ["openai"]

    def test_one_with_a_key_in_the_environment(
        self, run: Checker, asked: list[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        run()
        assert asked == ["openai"]

    def test_nobody_is_asked_without_reason(self, run: Checker, asked: list[str]) -> None:
        run()
        assert asked == []

    def test_no_probe(self, run: Checker, asked: list[str]) -> None:
        said = run("--no-probe", backends={"own": self.OWN, "free": {**self.OWN, "api_key": None}})
        assert (said.status, asked) == (0, [])
        assert said.the("backend own") == ("ok", "http://127.0.0.1:1/v1: not asked, with a key")
        assert said.the("backend free") == ("ok", "http://127.0.0.1:1/v1: not asked, without a key")

    def test_one_that_does_not_answer_is_a_fault(self, run: Checker) -> None:
        said = run(backends={"own": self.OWN})
        assert said.status == 1
        assert said.the("backend own")[0] == "fault"

    def test_they_are_told_in_order_however_slow(self, run: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
        last = Event()

        def slow(name: str, _backend: object) -> Finding:
            if name == "b":
                last.set()
            else:
                assert last.wait(20)
            return Finding(Level.OK, f"backend {name}", "")

        monkeypatch.setattr(check, "probe", slow)
        said = run(backends={"a": {**self.OWN}, "b": {**self.OWN}})
        assert [subject for _, subject, _ in said.lines if "backend" in subject] == [
            "backend mock",
            "backend a",
            "backend b",
        ]

    def test_one_that_never_ends_is_given_up(self, run: Checker, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(check, "probe", lambda *_: Event().wait())
        monkeypatch.setattr(check, "ANSWER_SECS", 0.0)
        monkeypatch.setattr(check, "_GRACE_SECS", 0.0)
        said = run(backends={"own": {**self.OWN, "connect_timeout_secs": 0.05}})
        assert (said.status, said.the("backend own")[0]) == (1, "fault")
        assert probe.ANSWER_SECS > 1


class TestHandlers:
    @pytest.mark.parametrize(
        ("source", "level", "said"),
        [
            ("print('noise')\ndef f(h): yield", "ok", "own:f can be imported"),
            ("def f(h): pass", "fault", "own:f: own:f is no generator: there is no yield in it"),
            ("import os\nos._exit(9)", "fault", "own:f: importing it ended the process, which exited with status 9"),
            (
                "import os\nos.kill(os.getpid(), 9)",
                "fault",
                "own:f: importing it ended the process, which was killed by SIGKILL",
            ),
            ("1 / 0", "fault", "own:f: importing own failed: ZeroDivisionError: division by zero"),
            (
                "import time\ntime.sleep(99)",
                "fault",
                "own:f: importing it takes longer than 1.1 s (workers.timeout_secs)",
            ),
        ],
    )
    def test_they_are_imported_in_a_child(self, run: Checker, source: str, level: str, said: str) -> None:
        (run.directory / "own.py").write_text(source)
        own = {"provider": "python", "target": "own:f", "path": [str(run.directory)]}
        fds = own_fds()
        checked = run(backends={"own": own}, workers={"timeout_secs": 1.1})
        assert checked.the("backend own") == (level, said)
        assert checked.status == (0 if level == "ok" else 1)
        assert "own" not in sys.modules
        assert own_fds() == fds
        with pytest.raises(ChildProcessError):
            os.waitpid(-1, os.WNOHANG)


def test_programs_are_looked_for_and_not_started(run: Checker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = tmp_path / "plain"
    plain.touch(0o644)
    handler = tmp_path / "handler"
    handler.write_text("#!/bin/sh\ntouch started\n")
    handler.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    commands: dict[str, dict[str, Any]] = {
        "good": {"command": [str(handler)], "max_processes": 7},
        "searched": {"command": ["sh", "-c", "true"]},
        "within": {"command": ["./handler"], "directory": str(tmp_path)},
        "relative": {"command": ["./handler"]},
        "missing": {"command": ["/nowhere/handler"]},
        "unknown": {"command": ["no-such-program"]},
        "plain": {"command": [str(plain)]},
        "folder": {"command": [str(tmp_path)]},
        "nowhere": {"command": ["sh"], "directory": "/nowhere"},
    }
    said = run(backends={name: {"provider": "exec", **own} for name, own in commands.items()})
    assert said.status == 1
    assert {name: said.the(f"backend {name}") for name in commands} == {
        "good": ("ok", f"starts {handler}, at most 7 at once"),
        "searched": ("ok", f"starts {shutil.which('sh')}, at most 64 at once"),
        "within": ("ok", f"starts {handler}, at most 64 at once"),
        "relative": (
            "warning",
            "./handler: looked for where forkd is started, which may be elsewhere; write it, or directory, in full",
        ),
        "missing": ("fault", "/nowhere/handler: there is no such program"),
        "unknown": ("fault", "no-such-program: there is no such program in PATH"),
        "plain": ("fault", f"{plain}: is not executable (chmod +x)"),
        "folder": ("fault", f"{tmp_path}: is no program but a directory"),
        "nowhere": ("fault", "/nowhere: there is no such directory"),
    }
    assert not (tmp_path / "started").exists()


@as_root
def test_a_program_is_looked_at_as_who_is_to_start_it(run: Checker, open_directory: Path) -> None:
    handler = open_directory / "handler"
    handler.write_text("#!/bin/sh\n")
    handler.chmod(0o700)
    own = {"own": {"provider": "exec", "command": [str(handler)]}}
    assert run(backends=own).the("backend own")[0] == "ok"
    said = run(server={"user": "nobody"}, backends=own)
    assert said.the("backend own") == ("fault", f"{handler}: is not executable (chmod +x)")
