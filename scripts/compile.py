"""Compiles forkd's hot modules by mypyc: what `forkd.compiled` prefers to their sources.

    python scripts/compile.py [DIRECTORY]

DIRECTORY holds the packages forkd and workers; this checkout by default. forkd/_compiled in it is replaced as a whole, so
that a forkd that runs on the old one goes on undisturbed. Nothing is done where it is up to date. It takes most of a
minute, and needs what the extra `compile` of pyproject.toml names, a C compiler and Python's headers.
"""

import ast
import contextlib
import io
import json
import os
import shutil
import sys
import sysconfig
import tempfile
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIX = EXTENSION_SUFFIXES[0]


def main() -> int:
    """Compile; returns the exit status."""
    packages = Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT
    os.chdir(packages)
    sys.path.insert(0, str(packages))
    from forkd import compiled  # noqa: PLC0415 - of this directory, not of the one that is installed

    manifest = compiled.fingerprints(packages)
    directory = compiled.COMPILED
    with contextlib.suppress(OSError, ValueError):
        if json.loads((directory / compiled.MANIFEST).read_bytes()) == manifest:
            return 0
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.exists():
        print(f"forkd: not compiled: {headers} is missing (Debian: python3-dev)", file=sys.stderr)
        return 1
    print("forkd: compiling the hot modules (most of a minute)", flush=True)
    with tempfile.TemporaryDirectory() as work:
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                build([str(compiled.source_of(name, Path())) for name in compiled.MODULES], compiled.GROUP, work)
        except (Exception, SystemExit) as error:
            print(f"{said.getvalue()}\nforkd: not compiled: {error}", file=sys.stderr)
            return 1
        fresh = Path(work, "fresh")
        fresh.mkdir()
        for name in (compiled.LIBRARY, *compiled.MODULES):
            shutil.copy(Path(work, "lib", *name.split(".")).with_suffix(SUFFIX), fresh / f"{name}{SUFFIX}")
        (fresh / compiled.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(fresh, directory)
    return 0


def refuse_effects_in_slices(files: list[str]) -> None:
    """Raise ValueError for `x[f():]`: mypyc (seen with 2.4) calls f twice where it does not know the type of x."""
    for file in files:
        for node in ast.walk(ast.parse(Path(file).read_text(), file)):
            if isinstance(node, ast.Slice):
                inside = [*ast.walk(node)]
                if any(isinstance(one, ast.Call | ast.NamedExpr) and not _is_len(one) for one in inside):
                    raise ValueError(f"{file}:{node.lineno}: mypyc would do twice what is called in a slice")


def _is_len(node: ast.AST) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "len"


def build(files: list[str], group: str, work: str) -> None:
    """Have extension modules for these files in `work`/lib. Raises whatever the tools raise."""
    refuse_effects_in_slices(files)
    from mypyc.build import mypycify  # noqa: PLC0415 - takes a second
    from setuptools import Distribution  # noqa: PLC0415

    options = ["--config-file=", "--ignore-missing-imports", f"--cache-dir={work}/cache"]
    extensions = mypycify([*options, *files], group_name=group, target_dir=f"{work}/c", debug_level="0")
    command = Distribution({"ext_modules": extensions}).get_command_obj("build_ext")
    command.build_lib = f"{work}/lib"
    command.build_temp = f"{work}/temp"
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    sys.exit(main())
