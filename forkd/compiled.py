"""The hot modules, compiled by mypyc (https://mypyc.readthedocs.io): the same source, a fifth less CPU.

`scripts/compile` makes COMPILED, a directory of extension modules beside this file, with a list of what they were made
from. forkd runs on them if and only if every source that it has is still the one that was compiled, by this very
Python: so who edits a module and starts forkd again runs the edited one, and half an update is none. Without the
directory, for want of a compiler say, everything works as well, with more CPU. FORKD_COMPILED=0 in the environment asks
for the source, whose frames a profiler and a dump of a hanging worker's stack can show.
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
    "forkd.handoff",
    "forkd.intake",
    "forkd.ledger",
    "forkd.metrics",
    "forkd.moderation",
    "forkd.sender",
    "workers.bare",
    "workers.client",
    "workers.context",
    "workers.loop",
    "workers.paced",
    "workers.reception",
    "workers.relay",
    "workers.request",
    "workers.response",
    "workers.sse",
    "workers.stream",
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


def source_of(module: str, packages: Path = PACKAGES) -> Path:
    """The file that a module was compiled from."""
    return packages.joinpath(*module.split(".")).with_suffix(".py")


def fingerprints(packages: Path = PACKAGES) -> dict[str, str]:
    """The manifest: what identifies each source, and this Python. Raises OSError."""
    found = {name: hashlib.sha256(source_of(name, packages).read_bytes()).hexdigest() for name in MODULES}
    return {"python": f"{sys.version} {EXTENSION_SUFFIXES[0]}", **found}


class Finder:
    """Finds the compiled modules before anything else does (`sys.meta_path`)."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def find_spec(
        self, name: str, _path: Sequence[str] | None, _target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Called by the import system."""
        if name != LIBRARY and name not in MODULES:
            return None
        file = str(self._directory / f"{name}{EXTENSION_SUFFIXES[0]}")
        return importlib.util.spec_from_file_location(name, file, loader=ExtensionFileLoader(name, file))


def prefer(environ: Mapping[str, str] = os.environ, directory: Path = COMPILED, packages: Path = PACKAGES) -> str:
    """Have the compiled modules imported from now on; returns "", or why the sources will be.

    To be called before any of them is imported.
    """
    if environ.get(SWITCH) == "0":
        return f"{SWITCH}=0"
    try:
        manifest = json.loads((directory / MANIFEST).read_bytes())
    except FileNotFoundError:
        return "not compiled"
    except (OSError, ValueError) as error:
        return f"{directory / MANIFEST} cannot be read: {error}"
    current = fingerprints(packages)
    if manifest != current:
        changed = [name for name in current if not isinstance(manifest, dict) or manifest.get(name) != current[name]]
        return f"compiled from another {' '.join(changed)}"
    loaded = [name for name in MODULES if name in sys.modules]
    if loaded:
        return f"{loaded[0]} is imported already"
    finder = Finder(directory)
    sys.meta_path.insert(0, finder)
    try:
        importlib.import_module(LIBRARY)
    except ImportError as error:  # another machine's, or made with another C library
        sys.meta_path.remove(finder)
        return str(error)
    return ""
