"""What the tests of programs share: backends made of shell scripts, the handlers of docs/exec.md, who still lives."""

import contextlib
import re
from pathlib import Path
from typing import Any

import psutil

from tests.harness import wait_for

DOCS = Path(__file__).parents[2] / "docs" / "exec.md"
HEAD = r"printf 'HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nConnection: close\r\n\r\n'"


def shell(script: str, *, head: bool = True, **more: Any) -> dict[str, Any]:
    """A backend whose program is a shell script, which has written a head already unless told otherwise."""
    whole = f"{HEAD}; {script}" if head else script
    return {"provider": "exec", "command": ["sh", "-c", whole], **more}


def handlers(directory: Path) -> dict[str, Path]:
    """The examples of docs/exec.md, as files, by name."""
    found = re.findall(r"<!-- (handler\.\w+) -->\n```\w+\n(.*?)```", DOCS.read_text(), re.DOTALL)
    files = {}
    for name, text in found:
        file = directory / name
        file.write_text(text)
        file.chmod(0o755)
        files[name] = file
    return files


def marked(mark: str) -> list[int]:
    """The pids of all processes that have this word in their environment, as MARK."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("MARK") == mark:
                found.append(process.pid)
    return found


def wait_until_gone(mark: str) -> None:
    wait_for(lambda: not marked(mark), f"the programs marked {mark} are gone")
