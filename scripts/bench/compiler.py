"""Builds the C programs of the benchmark when they are older than their source."""

import os
import subprocess
from pathlib import Path

SOURCES = Path(__file__).resolve().parent
FLAGS = ("-O2", "-Wall", "-Wextra", "-Werror")


def build(name: str, directory: Path) -> Path:
    """Compile `name`.c from this folder into `directory`, with $CC or cc, and return the program's path."""
    source, program = SOURCES / f"{name}.c", (directory / name).resolve()
    if not program.exists() or program.stat().st_mtime < source.stat().st_mtime:
        directory.mkdir(parents=True, exist_ok=True)
        subprocess.run([os.environ.get("CC", "cc"), *FLAGS, "-o", str(program), str(source)], check=True)
    return program
