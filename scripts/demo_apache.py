"""The demo page under a real Apache: a private server on a loopback port, PHP, our module, and forkd behind it.

Nothing of the system's own Apache is touched: everything lives in a temporary directory and ends with this process.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

from harness import Apache, public_dir, wait_until

PAGE = Path(__file__).parents[1] / "apache" / "htdocs"


def main() -> int:
    """Run until interrupted; returns the exit status."""
    written = os.environ.get("PORT") or "8081"
    if not written.isascii() or not written.isdecimal() or not 0 < int(written) < 65536:
        print(f"PORT={written}: expected a number from 1 to 65535", file=sys.stderr)
        return 2
    port = int(written)
    mpm = os.environ.get("MPM", "prefork")
    if mpm not in ("prefork", "event", "worker"):
        print(f"MPM={mpm}: expected prefork, event or worker", file=sys.stderr)
        return 2
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: sys.exit(0))
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            print(
                f"cannot serve on port {port}: {error.strerror}; choose another: make demo-apache PORT=8091",
                file=sys.stderr,
            )
            return 1
    with public_dir() as site, public_dir(0o777) as run:
        docroot = site / "htdocs"
        shutil.copytree(PAGE, docroot)
        path = run / "forkd.sock"
        conf = (
            f"Listen 127.0.0.1:{port}\nSetEnv FORKD_SOCKET {path}\nDirectoryIndex index.html\n"
            "SocketHandoffFormat envelope\n"
        )
        config = run / "forkd.yaml"
        config.write_text(
            f'server: {{socket_path: {path}, socket_mode: "0666", shutdown_timeout_secs: 3}}\n'
            "workers: {count: 2}\nmetrics: {enabled: false}\n"
        )
        daemon = subprocess.Popen([sys.executable, "-m", "forkd", "-c", str(config)], process_group=0)
        try:
            wait_until(lambda: path.exists() or daemon.poll() is not None, "forkd listens")
            if daemon.poll() is not None:
                return 1
            with Apache(mpm, docroot, run, conf):
                print(f"\n  Apache ({mpm}) with PHP, mod_socket_handoff and forkd: http://127.0.0.1:{port}/")
                print(f"  curl -N 'http://127.0.0.1:{port}/stream.php?prompt=Hello'")
                print("  Ctrl-C stops everything. forkd's log:\n", flush=True)
                daemon.wait()
        except KeyboardInterrupt:
            pass
        finally:
            daemon.terminate()
            daemon.wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
