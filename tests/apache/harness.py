"""A private, real Apache for tests: its own ServerRoot, a loopback port, our module from `apache/build`.

    with Apache(mpm="prefork", docroot=..., prefix=..., extra_conf="...") as apache:
        requests.get(apache.url + "/index.php")

`mpm` is "prefork" (PHP by mod_php), "worker" or "event" (PHP by a private php-fpm). Every process is a child of the
fixture and ends with it. Run by root, Apache serves as www-data, which must be able to reach `docroot` and `prefix`:
`public_dir()` makes such directories. Run by anybody else, Apache serves as that user.
"""

import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

ROOT = Path(__file__).resolve().parents[2]
MODULE = ROOT / "apache" / "build" / "mod_socket_handoff.so"
MODULE_DIR = Path("/usr/lib/apache2/modules")
APACHE = shutil.which("apache2", path="/usr/sbin:/usr/bin:/bin") or "apache2"
SERVER_USER = "www-data"
WAIT_SECS = 30.0

_MODULES = (
    "authn_core",
    "authz_core",
    "authz_host",
    "alias",
    "deflate",
    "dir",
    "env",
    "filter",
    "headers",
    "mime",
    "proxy",
    "remoteip",
    "rewrite",
    "setenvif",
    "socache_shmcb",
    "ssl",
    "status",
    "unique_id",
)


def wait_until(condition: Callable[[], object], what: str, secs: float = WAIT_SECS) -> None:
    """Return when `condition()` is true; fail with `what` if it is not within `secs`."""
    deadline = time.monotonic() + secs
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {secs} s in vain: {what}")
        time.sleep(0.01)


@contextlib.contextmanager
def public_dir(mode: int = 0o755) -> Iterator[Path]:
    """A temporary directory that the server's user can reach, unlike pytest's own; short enough for Unix sockets."""
    path = Path(tempfile.mkdtemp(prefix="handoff-"))
    path.chmod(mode)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)


def build_module() -> Path:
    """Bring `apache/build/mod_socket_handoff.so` up to date and return its path."""
    with open(ROOT / "apache" / "Makefile") as lock:  # several processes test at the same time
        fcntl.flock(lock, fcntl.LOCK_EX)
        subprocess.run(["make", "-s", "-C", str(ROOT / "apache"), "module"], check=True, stdout=subprocess.DEVNULL)
    return MODULE


def free_port() -> int:
    """A port nobody listened on a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def php_library() -> Path:
    """mod_php of the installed PHP, or that of a package which was only unpacked (see scripts/bootstrap)."""
    found = sorted([*MODULE_DIR.glob("libphp*.so"), *(ROOT / "build" / "mod_php").glob("**/libphp*.so")])
    if not found:
        raise FileNotFoundError(f"no libphp*.so in {MODULE_DIR}: install libapache2-mod-php")
    return found[-1]


def php_fpm() -> str:
    """The installed php-fpm."""
    found = sorted(Path("/usr/sbin").glob("php-fpm*"))
    if not found:
        raise FileNotFoundError("no php-fpm in /usr/sbin: install php-fpm")
    return str(found[-1])


class Apache:
    """One server. After `with` has been entered: `url`, `port`, `root` (its ServerRoot) and the methods below.

    `workers` is the number of requests served at once (prefork: exactly that many processes). `modules` are further
    ones of Debian's by short name ("http2"), `without` names some of the usual ones to leave out. `nofile` is the
    server's RLIMIT_NOFILE. `extra_conf` comes last, at server level.
    """

    def __init__(
        self,
        mpm: str,
        docroot: Path,
        prefix: Path,
        extra_conf: str = "",
        *,
        workers: int = 8,
        modules: tuple[str, ...] = (),
        without: tuple[str, ...] = (),
        nofile: int | None = None,
        log_level: str = "warn",
    ) -> None:
        self.mpm = mpm
        self.docroot = Path(docroot)
        self.prefix = Path(prefix)
        self.extra_conf = extra_conf
        self.workers = workers
        self.modules = tuple(name for name in (*_MODULES, *modules) if name not in without)
        self.nofile = nofile
        self.log_level = log_level
        self.port = 0
        self.url = ""
        self._server: subprocess.Popen[bytes] | None = None
        self._fpm: subprocess.Popen[bytes] | None = None
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        build_module()
        self.root = self._stack.enter_context(public_dir())
        try:
            self.prepare()
            if self.mpm != "prefork":
                self._start_fpm()
            self._start_server()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()

    # What a test may ask.

    def error_log(self) -> str:
        """Everything logged so far."""
        return self._read("error.log")

    def access_log(self) -> list[str]:
        """One line per logged request: `PATH STATUS BYTES NOTE`, the note being `%{socket_handoff}n`."""
        return self._read("access.log").splitlines()

    def children(self) -> list[int]:
        """The pids of the serving processes."""
        if not self._server:
            return []
        return sorted(child.pid for child in psutil.Process(self._server.pid).children())

    def check_conf(self) -> subprocess.CompletedProcess[str]:
        """`apache2 -t`: whether the configuration is accepted, and what it says."""
        return subprocess.run(self._command("-t"), capture_output=True, text=True, env=self._environment(), check=False)

    def close(self) -> None:
        """End every process and remove the ServerRoot. Twice is harmless."""
        for process, stop in ((self._server, signal.SIGTERM), (self._fpm, signal.SIGTERM)):
            if process and process.poll() is None:
                process.send_signal(stop)
                try:
                    process.wait(WAIT_SECS)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
        self._server = self._fpm = None
        self._stack.close()

    # How it is made.

    def prepare(self, root: Path | None = None) -> None:
        """Write the configuration into `root` (default: the ServerRoot) without starting anything."""
        self.root = root or self.root
        (self.root / "run").mkdir(exist_ok=True)
        (self.root / "php.ini").write_text(
            "output_buffering = 4096\ndisplay_errors = Off\nlog_errors = On\npost_max_size = 64M\n"
            f"error_log = {self.root}/php.log\nmemory_limit = 256M\n"
        )
        (self.root / "mime.types").write_text("text/html html\ntext/css css\ntext/javascript js\ntext/plain txt\n")
        self._write_conf(free_port())

    def _write_conf(self, port: int) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        (self.root / "httpd.conf").write_text(self._conf())

    def _conf(self) -> str:
        if self.mpm == "prefork":
            php = (
                f"LoadModule php_module {php_library()}\nPHPIniDir {self.root}\n"
                '<FilesMatch "\\.php$">\nSetHandler application/x-httpd-php\n</FilesMatch>'
            )
            processes = (
                f"StartServers {self.workers}\nMinSpareServers 1\nMaxSpareServers {self.workers}\n"
                f"ServerLimit {self.workers}\nMaxRequestWorkers {self.workers}"
            )
        else:
            php = (
                f"LoadModule proxy_fcgi_module {MODULE_DIR}/mod_proxy_fcgi.so\n"
                f'<FilesMatch "\\.php$">\nSetHandler "proxy:unix:{self.root}/run/fpm.sock|fcgi://localhost"\n</FilesMatch>'
            )
            processes = (
                f"StartServers 1\nServerLimit 1\nThreadsPerChild {self.workers}\nMaxRequestWorkers {self.workers}\n"
                f"MinSpareThreads 1\nMaxSpareThreads {self.workers}"
            )
        loads = "\n".join(
            f"LoadModule {name}_module {MODULE_DIR}/mod_{name}.so" for name in (f"mpm_{self.mpm}", *self.modules)
        )
        user = f"User {SERVER_USER}\nGroup {SERVER_USER}\n" if os.geteuid() == 0 else ""
        return f"""
ServerRoot {self.root}
ServerName localhost
Listen 127.0.0.1:{self.port}
{loads}
LoadModule socket_handoff_module {MODULE}
{user}PidFile {self.root}/run/apache.pid
DefaultRuntimeDir {self.root}/run
Mutex file:{self.root}/run default
TypesConfig {self.root}/mime.types
ErrorLog {self.root}/error.log
LogLevel {self.log_level}
LogFormat "%U %>s %b %{{socket_handoff}}n" handoff
CustomLog {self.root}/access.log handoff
{processes}
GracefulShutdownTimeout 1
{php}
DocumentRoot {self.docroot}
<Directory />
Require all granted
</Directory>
DirectoryIndex index.html index.php
SocketHandoffAllowedPrefix {self.prefix}
{self.extra_conf}
"""

    def _environment(self) -> dict[str, str]:
        return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C"}

    def _command(self, *flags: str) -> list[str]:
        return [APACHE, "-d", str(self.root), "-f", str(self.root / "httpd.conf"), *flags]

    def _start_server(self) -> None:
        limit = ["sh", "-c", f'ulimit -n {self.nofile} && exec "$@"', "sh"] if self.nofile else []
        for _ in range(5):
            self._server = subprocess.Popen(
                [*limit, *self._command("-DFOREGROUND")],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=(self.root / "stderr").open("wb"),
                env=self._environment(),
                start_new_session=True,
            )
            wait_until(lambda: self._server is None or self._server.poll() is not None or self._answers(), "Apache")
            if self._server.poll() is None:
                return
            said = self._read("stderr") + self.error_log()
            if "Address already in use" not in said:
                break
            self._write_conf(free_port())  # somebody was faster
        raise RuntimeError(f"Apache did not start:\n{said}")

    def _start_fpm(self) -> None:
        sock = self.root / "run" / "fpm.sock"
        user = f"user = {SERVER_USER}\ngroup = {SERVER_USER}\n" if os.geteuid() == 0 else ""
        (self.root / "fpm.conf").write_text(
            f"[global]\nerror_log = {self.root}/fpm.log\ndaemonize = no\n"
            f"[www]\nlisten = {sock}\nlisten.mode = 0666\n{user}pm = static\npm.max_children = 4\n"
        )
        root_flag = ["-R"] if os.geteuid() == 0 else []
        self._fpm = subprocess.Popen(
            [php_fpm(), "-F", "-y", str(self.root / "fpm.conf"), "-c", str(self.root / "php.ini"), *root_flag],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=self._environment(),
            start_new_session=True,
        )
        wait_until(lambda: sock.exists() or (self._fpm and self._fpm.poll() is not None), "php-fpm")
        if self._fpm.poll() is not None:
            raise RuntimeError(f"php-fpm did not start:\n{self._read('fpm.log')}")

    def _answers(self) -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 5):
            # Not only the port: the port may be another's, so our own pid file must be there too.
            return (self.root / "run" / "apache.pid").exists()
        return False

    def _read(self, name: str) -> str:
        with contextlib.suppress(FileNotFoundError):
            return (self.root / name).read_text(errors="replace")
        return ""
