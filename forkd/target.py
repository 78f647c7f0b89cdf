"""Finding the function that a backend with ``provider: python`` names: ``target: "module:function"``.

Done by each worker after its fork, so that a reload finds the code as it is then, and by `forkd check` in a child. The
master never does it: whatever importing somebody's code may do (hang, exit, start threads) is not to happen to it.

Modules are found in `path` after all that forkd itself can import, so nobody's `json.py` becomes forkd's. Of the other
way round, a module of the user's that something else hides, the user is told.
"""

import difflib
import importlib
import importlib.machinery
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, Final, NamedTuple

from forkd.handler import Handoff

RESERVED: Final = ("forkd", "workers")
"""Module names that are forkd's own."""


class BadTarget(Exception):
    """There is no such handler. The message is one line; `stack` has more lines about an exception of the user's code,
    or is empty.
    """

    def __init__(self, why: str, stack: str = "") -> None:
        super().__init__(why)
        self.stack = stack


class Target(NamedTuple):
    """A handler: a generator function, or an async one."""

    function: Callable[[Handoff], Any]
    is_async: bool


def split(target: str) -> tuple[str, str]:
    """`module:function` as its two parts, each of which may have dots. ValueError if it is not of this form."""
    module, colon, name = target.partition(":")
    if not colon or not all(part.isidentifier() for part in (*module.split("."), *name.split("."))):
        raise ValueError('a module and a function such as "app.chat:answer"')
    return module, name


def load(target: str, path: Sequence[str]) -> Target:
    """Import the module of `target` and return the handler in it. Raises BadTarget.

    The directories of `path` stay in sys.path: the module may import its neighbours at any time.
    """
    module_name, name = split(target)
    for directory in path:
        for own in RESERVED:
            if any(os.path.exists(os.path.join(directory, entry)) for entry in (own, f"{own}.py")):
                raise BadTarget(f"{directory} holds a module named {own}, which is forkd's own name: rename it")
        if directory not in sys.path:
            sys.path.append(directory)
    importlib.invalidate_caches()
    # A source that was changed within a second, to the same length, is taken for what was compiled before. Nor are
    # people to find files of ours among their own.
    sys.dont_write_bytecode = True
    module = _imported(module_name, path)
    _check_hidden(module_name.partition(".")[0], path)
    found: Any = module
    for part in name.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            near = difflib.get_close_matches(part, vars(module), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            where = getattr(module, "__file__", None) or module_name
            raise BadTarget(f"there is no {name} in {where}{hint}") from None
    return Target(found, _is_async(found, target))


def _imported(name: str, path: Sequence[str]) -> ModuleType:
    try:
        return importlib.import_module(name)
    except BaseException as error:  # SystemExit too: whatever it is, there is no handler
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        if missing and (name == missing or name.startswith(f"{missing}.")):
            places = f"in {', '.join(path)}, nor " if path else "(path: [DIRECTORY] says where to look), nor "
            raise BadTarget(f"there is no module {missing} {places}where forkd is installed") from None
        said = traceback.format_exception_only(error)[-1].strip()
        if missing:
            said += f" (install it where forkd is, {sys.prefix}, or add its directory to path)"
        raise BadTarget(f"importing {name} failed: {said}", _stack(error)) from None


def _stack(error: BaseException) -> str:
    """Where it was raised, without the import machinery's own frames."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen importlib") and frame.filename not in (__file__, importlib.__file__)
    ]
    return "".join([*traceback.format_list(frames), *traceback.format_exception_only(error)]).rstrip()


def _check_hidden(top: str, path: Sequence[str]) -> None:
    """Raises BadTarget if `path` has a module of this name and another was found before it: forkd's, or a neighbour's
    of whom another backend has made use.
    """
    meant = importlib.machinery.PathFinder.find_spec(top, list(path)) if path else None
    found = getattr(sys.modules.get(top), "__spec__", None)
    if meant is not None and found is not None and meant.origin != found.origin:
        where = found.origin or "a module of Python"
        raise BadTarget(f"{meant.origin} is hidden by {where}: give it another name")


def _is_async(found: Any, target: str) -> bool:
    """Whether it is an async generator function; False: a plain one. Raises BadTarget if it is neither."""
    if not callable(found):
        raise BadTarget(f"{target} is no function but a {type(found).__name__}")
    # As it is, below its decorators, or an object that is called like a function.
    faces = (found, inspect.unwrap(found), inspect.unwrap(type(found).__call__))
    if any(map(inspect.isasyncgenfunction, faces)):
        return True
    if any(map(inspect.isgeneratorfunction, faces)):
        return False
    is_coroutine = any(map(inspect.iscoroutinefunction, faces))
    raise BadTarget(f"{target} is no generator: {'it is async, but ' if is_coroutine else ''}there is no yield in it")
