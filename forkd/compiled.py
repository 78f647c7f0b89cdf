"""The hot modules, compiled by mypyc (https://mypyc.readthedocs.io): the same source, less CPU (docs/performance.md).

`scripts/compile.py` makes COMPILED, a directory of extension modules beside this file, with a manifest of what they are
and what they were made from. forkd runs on them if and only if every source that it has is still the one that was
compiled, for this version of Python, and every library the one that came of it: so who edits a module and starts forkd
again runs the edited one, and half an update is none. Without the directory, for want of a compiler say, everything
works as well, with more CPU. FORKD_COMPILED=0 in the environment asks for the source, whose frames a profiler and a
dump of a hanging worker's stack can show.
"""

import hashlib
import importlib.util
import json
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import EXTENSION_SUFFIXES, ExtensionFileLoader, ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Final

MODULES: Final = (
    "forkd.channel",
    "forkd.dispatcher",
    "forkd.generations",
    "forkd.handoff",
    "forkd.intake",
    "forkd.ledger",
    "forkd.listener",
    "forkd.logs",
    "forkd.master",
    "forkd.metrics",
    "forkd.moderation",
    "forkd.peer",
    "forkd.selector",
    "forkd.supervisor",
    "workers.backends.asking",
    "workers.backends.openai",
    "workers.bare",
    "workers.client",
    "workers.context",
    "workers.loop",
    "workers.main",
    "workers.paced",
    "workers.reception",
    "workers.relay",
    "workers.request",
    "workers.response",
    "workers.sse",
    "workers.stream",
    "workers.upstream.dns",
    "workers.upstream.exchange",
    "workers.upstream.fields",
    "workers.upstream.http1",
    "workers.upstream.http2",
    "workers.upstream.message",
    "workers.upstream.origin",
    "workers.upstream.pool",
    "workers.upstream.transport",
)
"""What every stream, handoff or token goes through, and nothing else. They are compiled as one and call each other
directly, so it is all of them or none.
"""
GROUP: Final = "forkd"
LIBRARY: Final = f"{GROUP}__mypyc"
"""The module that holds the code of all of them."""
PACKAGES: Final = Path(__file__).parent.parent
"""Where the packages are: a checkout or site-packages."""
COMPILED: Final = Path(__file__).with_name("_compiled")
MANIFEST: Final = "manifest.json"
SWITCH: Final = "FORKD_COMPILED"

UNASKED: Final = "it was not asked for"
"""As when forkd.cli is imported by another program than forkd.__main__."""
SWITCHED_OFF: Final = f"{SWITCH}=0"
NEVER: Final = "never compiled"


def source_of(module: str, packages: Path = PACKAGES) -> Path:
    """The file that a module was compiled from."""
    return packages.joinpath(*module.split(".")).with_suffix(".py")


def file_of(module: str) -> str:
    """The name of the file in COMPILED that is this module, or LIBRARY."""
    return f"{module}{EXTENSION_SUFFIXES[0]}"


def manifest(packages: Path, directory: Path) -> dict[str, str]:
    """What identifies this Python, each source, and each file made of them. What cannot be read has no fingerprint."""
    # 3.11.2 and 3.11.3 have the same binary interface: a distribution's update of Python is no reason to be slower.
    found = {"python": EXTENSION_SUFFIXES[0]}
    found |= {name: _fingerprint(source_of(name, packages)) for name in MODULES}
    # A file that was cut short may not only fail to load: it can kill the process.
    return found | {file_of(name): _fingerprint(directory / file_of(name)) for name in (LIBRARY, *MODULES)}


def _fingerprint(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError:
        return ""


def mismatch(packages: Path = PACKAGES, directory: Path = COMPILED) -> str:
    """Why what is compiled is not to be used, "" if it is."""
    if not directory.exists():
        return NEVER
    file = directory / MANIFEST
    try:
        written = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        return f"{file} cannot be read: {error}"
    if not isinstance(written, dict):
        return f"{file} is no manifest"
    current = manifest(packages, directory)
    changed = [name for name in current if written.get(name) != current[name] or not current[name]]
    if not changed:
        return ""
    if changed[0] == "python":
        return "compiled for another Python"
    more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
    return f"changed since it was compiled: {', '.join(changed[:3])}{more}"


class Finder:
    """Finds the compiled modules before anything else does (`sys.meta_path`)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def find_spec(self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None) -> ModuleSpec | None:
        """Called by the import system."""
        if name != LIBRARY and name not in MODULES:
            return None
        file = str(self._directory / file_of(name))
        return importlib.util.spec_from_file_location(name, file, loader=ExtensionFileLoader(name, file))


def prefer(environ: Mapping[str, str] = os.environ, directory: Path = COMPILED, packages: Path = PACKAGES) -> str:
    """Have the compiled modules imported from now on; returns "", or why the sources will be. Raises nothing.

    To be called before any of them is imported.
    """
    if environ.get(SWITCH) == "0":
        return SWITCHED_OFF
    if why_not := mismatch(packages, directory):
        return why_not
    loaded = [name for name in MODULES if name in sys.modules]
    if loaded:
        return f"{loaded[0]} is imported already"
    finder = Finder(directory)
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module(LIBRARY)
    except Exception as error:  # another machine's, made with another C library, or where nothing may be executed
        sys.meta_path.remove(finder)
        sys.modules.pop(LIBRARY, None)
        return f"cannot be loaded: {error}"
    return ""


def is_a_surprise(why_not: str) -> bool:
    """Whether somebody who compiled forkd might believe that it runs so, and it does not."""
    return why_not not in ("", UNASKED, SWITCHED_OFF, NEVER)
