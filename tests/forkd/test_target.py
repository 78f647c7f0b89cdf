"""Finding a handler. Each is looked for in a process of its own, since a module that was imported stays."""

import subprocess
import sys
from pathlib import Path

import pytest

from forkd import target

ROOT = Path(__file__).parents[2]
ZOO = str(ROOT / "tests" / "handlers")
_LOOK = """
import sys
from forkd.target import BadTarget, load
try:
    print("async" if load(sys.argv[1], sys.argv[2:]).is_async else "plain")
except BadTarget as error:
    print(error)
    print(error.stack)
"""


def look(name: str, *path: str | Path) -> list[str]:
    """What becomes of a target, in lines."""
    command = [sys.executable, "-c", _LOOK, name, *map(str, path)]
    said = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30, check=True)
    return said.stdout.rstrip("\n").split("\n")


@pytest.mark.parametrize(
    ("name", "kind"),
    [("zoo:shows", "plain"), ("zoo:shows_async", "async"), ("zoo:thing", "plain"), ("zoo:Callable.__call__", "plain")],
)
def test_handlers(name: str, kind: str) -> None:
    assert look(name, ZOO) == [kind]


def test_partials_methods_and_decorated_functions(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(
        "import functools\n"
        "class Own:\n"
        "    async def answer(self, handoff): yield\n"
        "method = Own().answer\n"
        "def two(x, handoff): yield\n"
        "partial = functools.partial(two, 1)\n"
        "def logged(f):\n"
        "    @functools.wraps(f)\n"
        "    def wrapper(handoff): return f(handoff)\n"
        "    return wrapper\n"
        "@logged\n"
        "async def decorated(handoff): yield\n"
    )
    assert [look(f"own:{name}", tmp_path)[0] for name in ("method", "partial", "decorated")] == [
        "async",
        "plain",
        "async",
    ]


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("zoo:show", f"there is no show in {ZOO}/zoo.py; did you mean shows?"),
        ("zoo:thing.nothing", f"there is no thing.nothing in {ZOO}/zoo.py"),
        ("zoo:not_a_generator", "zoo:not_a_generator is no generator: there is no yield in it"),
        (
            "zoo:not_a_generator_either",
            "zoo:not_a_generator_either is no generator: it is async, but there is no yield",
        ),
        ("zoo:Callable", "zoo:Callable is no generator: there is no yield in it"),
        ("zoo:os", "zoo:os is no function but a module"),
        ("nowhere:x", f"there is no module nowhere in {ZOO}, nor where forkd is installed"),
        ("zoo.deeper:x", f"there is no module zoo.deeper in {ZOO}, nor where forkd is installed"),
    ],
)
def test_what_is_no_handler(name: str, why: str) -> None:
    assert look(name, ZOO)[0].startswith(why)


def test_a_module_of_no_path() -> None:
    assert look("nowhere:x")[0].startswith("there is no module nowhere (path: [DIRECTORY] says where to look), nor")


@pytest.mark.parametrize(
    ("source", "why", "last"),
    [
        ("import x.y", f"ModuleNotFoundError: No module named 'x' (install it where forkd is, {sys.prefix}", 1),
        ("def f(:", "SyntaxError: ", 1),
        ("\nraise SystemExit('no')", "SystemExit: no", 2),
        ("1 / 0", "ZeroDivisionError: division by zero", 1),
    ],
)  # fmt: skip
def test_a_module_that_breaks(tmp_path: Path, source: str, why: str, last: int) -> None:
    module = tmp_path / "own.py"
    module.write_text(source)
    first, *stack = look("own:f", tmp_path)
    assert first.startswith(f"importing own failed: {why}")
    assert f'  File "{module}", line {last}' in "\n".join(stack)
    assert "importlib" not in "\n".join(stack)
    assert stack[-1].startswith(why.partition(" (")[0])


@pytest.mark.parametrize("name", ["workers", "forkd"])
def test_modules_named_as_forkds_own(tmp_path: Path, name: str) -> None:
    (tmp_path / f"{name}.py").touch()
    assert look("own:f", tmp_path)[0] == f"{tmp_path} holds a module named {name}, which is forkd's own name: rename it"


def test_a_module_that_something_else_hides(tmp_path: Path) -> None:
    (tmp_path / "json.py").write_text("def answer(handoff): yield\n")
    (first,) = look("json:answer", tmp_path)
    assert first.startswith(f"{tmp_path}/json.py is hidden by ")
    assert first.endswith("json/__init__.py: give it another name")


@pytest.mark.parametrize("written", ["app", "app:", ":f", "app:f:g", "a b:f", "app/x:f", "app:1", "app.:f", ""])
def test_what_names_no_function(written: str) -> None:
    with pytest.raises(ValueError, match="a module and a function"):
        target.split(written)
