"""Compiles forkd's hot modules by mypyc: what `forkd.compiled` prefers to their sources.

    python scripts/compile.py [--check] [DIRECTORY]

DIRECTORY holds the packages forkd and workers; this checkout by default. forkd/_compiled in it is replaced as a whole,
by renaming, so that a forkd that runs on the old one goes on undisturbed, and none ever sees half of it. Nothing is
done where it is up to date; --check only says by its exit status whether it is. It takes most of a minute, and needs
what the extra `compile` of pyproject.toml names, a C compiler and Python's headers.
"""

import argparse
import ast
import contextlib
import importlib.util
import io
import json
import os
import shlex
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


class CompileError(Exception):
    """It cannot be compiled; the text says why."""


def main() -> int:
    """Compile; returns the exit status."""
    parser = argparse.ArgumentParser(description="Compiles forkd's hot modules; nothing where that is done already.")
    parser.add_argument("directory", nargs="?", type=Path, default=ROOT, help="holds forkd and workers")
    parser.add_argument("--check", action="store_true", help="only say, by the exit status, whether it is up to date")
    options = parser.parse_args()
    packages = options.directory.resolve()
    compiled = load(packages)
    why = compiled.mismatch(packages, packages / "forkd/_compiled")
    if options.check or not why:
        return 1 if why else 0
    try:
        check_tools()
        print("forkd: compiling the hot modules (most of a minute)", flush=True)
        compile_all(compiled, packages)
    except CompileError as error:
        print(f"forkd: not compiled: {error}", file=sys.stderr)
        return 1
    return 0


def load(packages: Path) -> ModuleType:
    """The module forkd.compiled of these packages, which need not be those that are installed."""
    spec = importlib.util.spec_from_file_location("compiled", packages / "forkd/compiled.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check_tools() -> None:
    """Raise CompileError where something is missing that a minute's work would end at."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    headers = Path(sysconfig.get_path("include"), "Python.h")
    if not headers.exists():
        raise CompileError(f"{headers} is missing (Debian: python{version}-dev)")
    compiler = shlex.split(os.environ.get("CC") or sysconfig.get_config_var("CC") or "cc")[0]
    if shutil.which(compiler) is None:
        raise CompileError(f"there is no C compiler, {compiler} (Debian: gcc libc6-dev)")
    missing = [name for name in ("mypyc", "setuptools") if importlib.util.find_spec(name) is None]
    if missing:
        raise CompileError(f"missing: {' and '.join(missing)} (the extra `compile` of pyproject.toml)")


def compile_all(compiled: ModuleType, packages: Path) -> None:
    """Replace forkd/_compiled of these packages. Raises CompileError, and then it is as it was."""
    with tempfile.TemporaryDirectory() as work:
        before = compiled.manifest(packages, Path(work))
        said = io.StringIO()
        os.chdir(packages)  # for short names of files in stack traces
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                build([str(compiled.source_of(name, Path())) for name in compiled.MODULES], compiled.GROUP, work)
        except (Exception, SystemExit) as error:
            raise CompileError(f"{error}\n{said.getvalue()}".rstrip()) from error
        if compiled.manifest(packages, Path(work)) != before:
            raise CompileError("a source was edited meanwhile")
        built = {name: Path(work, "lib", *name.split(".")) for name in (compiled.LIBRARY, *compiled.MODULES)}
        suffix = compiled.file_of("")
        with tempfile.TemporaryDirectory(prefix="_compiled_", dir=packages / "forkd") as place:  # the same file system
            fresh, directory = Path(place, "new"), packages / "forkd/_compiled"
            fresh.mkdir()
            for name, file in built.items():
                shutil.copyfile(file.with_suffix(suffix), fresh / compiled.file_of(name))
            manifest = compiled.manifest(packages, fresh)
            (fresh / compiled.MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
            with contextlib.suppress(FileNotFoundError):
                directory.rename(Path(place, "old"))
            fresh.rename(directory)


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
    command: Any = Distribution({"ext_modules": extensions}).get_command_obj("build_ext")
    command.build_lib = f"{work}/lib"
    command.build_temp = f"{work}/temp"
    command.ensure_finalized()
    command.run()


if __name__ == "__main__":
    sys.exit(main())
