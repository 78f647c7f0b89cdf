"""The one table of error codes."""

import ast
import re
from http import HTTPStatus
from pathlib import Path

from forkd.reasons import REASONS, Metric

ROOT = Path(__file__).parents[2]


def test_every_reason_can_be_told() -> None:
    for code, reason in REASONS.items():
        assert code == reason.code
        assert re.fullmatch(r"[a-z][a-z_]*[a-z]", code)
        assert reason.status == 0 or HTTPStatus(reason.status) >= 400
        assert isinstance(reason.metric, Metric)
        assert reason.text
        assert reason.text.isascii()
        assert reason.text.isprintable()
        assert '"' not in reason.text  # it stands in JSON that is put together by hand


def test_the_references_reasons_are_a_closed_set() -> None:
    assert set(Metric) == {"client_disconnected", "timeout", "canceled", "network", "other"}


def test_every_code_that_the_program_names_exists() -> None:
    """Codes are given as words; a misspelt one would be found by its first victim."""
    takers = {
        "handoff_failed",
        "stream_failed",
        "fail",
        "_give_up",
        "give_up_all",
        "_refuse",
        "refuse_rest",
        "client_gone",
    }
    named: set[str] = set()
    for file in (*ROOT.glob("forkd/*.py"), *ROOT.glob("workers/**/*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in takers:
                named |= {
                    each.value for each in node.args if isinstance(each, ast.Constant) and isinstance(each.value, str)
                }
            elif (
                isinstance(node, ast.Assign)
                and any(isinstance(each, ast.Name) and each.id == "code" for each in node.targets)
                and isinstance(node.value, ast.Constant)
                and isinstance(node.value.value, str)
            ):
                named.add(node.value.value)
    assert len(named) > 10
    assert named - {""} <= REASONS.keys()
