"""Prometheus' and Grafana's files: valid, and about metrics that exist. The alerts themselves: forkd.rules.test.yml.

`promtool` comes from Debian's package prometheus; `make test` unpacks it into build/ where it is not installed.
"""

import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import yaml

from forkd.metrics import SPECS
from forkd.reasons import REASONS

ROOT = Path(__file__).resolve().parents[2]
PROMETHEUS = ROOT / "etc" / "prometheus"
RULES = PROMETHEUS / "forkd.rules.yml"
RULES_TEST = Path(__file__).parent / "forkd.rules.test.yml"
DASHBOARD: dict[str, Any] = json.loads((ROOT / "etc" / "grafana" / "forkd.json").read_text())
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]

TARGET_LABELS = {"job", "instance"}
_NAME = re.compile(r"\b(?:daemon|forkd)_[a-z_]+\b")
_LABELS = re.compile(r"\b(?:by|on|without|ignoring|group_left|group_right) \(([^)]*)\)")
_SELECTOR = re.compile(r"\b((?:daemon|forkd)_[a-z_]+){([^}]*)}")
_STRING = re.compile(r'"[^"]*"')


def promtool(*arguments: object) -> str:
    tool = shutil.which("promtool") or str(ROOT / "build" / "promtool" / "promtool")
    done = subprocess.run(
        [tool, *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def base_name(sample: str) -> str:
    """The metric that a sample's name belongs to."""
    for suffix in ("_bucket", "_sum", "_count"):
        name = sample.removesuffix(suffix)
        if name != sample and name in SPECS and SPECS[name].kind == "histogram":
            return name
    assert sample not in SPECS or SPECS[sample].kind != "histogram", f"{sample} is a histogram: _bucket, _sum or _count"
    return sample


def labels_of(sample: str) -> set[str]:
    le = {"le"} if sample.endswith("_bucket") else set()
    return {*SPECS[base_name(sample)].labels, *le, *TARGET_LABELS}


def examine(expr: str) -> set[str]:
    """The metrics in an expression; fails when one of them, or one of their labels, does not exist."""
    samples = set(_NAME.findall(_STRING.sub("", expr)))
    unknown = {base_name(sample) for sample in samples} - SPECS.keys()
    assert not unknown, f"{unknown} of {expr!r} do not exist"
    for sample, selector in _SELECTOR.findall(expr):
        written = {part.partition("=")[0].strip(" !~") for part in _STRING.sub("", selector).split(",")}
        assert written <= labels_of(sample), f"{sample} has no labels {written - labels_of(sample)}"
    known = set[str]().union(*map(labels_of, samples)) if samples else TARGET_LABELS
    for labels in _LABELS.findall(expr):
        written = {label.strip() for label in labels.split(",")} - {""}
        assert written <= known, f"{expr!r} has no labels {written - known}"
    return {base_name(sample) for sample in samples}


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def expressions() -> Iterator[tuple[str, str]]:
    for panel in PANELS:
        for target in panel["targets"]:
            yield f"{panel['title']} {target['refId']}", target["expr"]
    for annotation in DASHBOARD["annotations"]["list"]:
        if "expr" in annotation:
            yield annotation["name"], annotation["expr"]


# Prometheus.


def test_the_configuration_is_valid() -> None:
    promtool("check", "config", PROMETHEUS / "forkd.yml")


def test_the_rules_are_valid() -> None:
    assert f"{len(rules())} rules found" in promtool("check", "rules", RULES)


def test_the_rules_do_what_they_say() -> None:
    promtool("test", "rules", RULES_TEST)


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert(rule: dict[str, Any]) -> None:
    examine(rule["expr"])
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert rule["annotations"].keys() == {"summary", "description", "runbook"}
    # That it fires when it should is a case of its own.
    assert rule["alert"] in RULES_TEST.read_text()


def test_names_are_unique() -> None:
    names = [rule["alert"] for rule in rules()]
    assert len(names) == len(set(names))


def test_codes_exist() -> None:
    for rule in rules():
        for code in re.findall(r"\bbackend_[a-z_]+", str(rule)):
            assert code in REASONS, code


# Grafana.


def test_every_expression_is_about_metrics_that_exist() -> None:
    shown = set[str]().union(*(examine(expr) for _, expr in expressions()))
    assert SPECS.keys() - shown == {"daemon_connections_total"}  # the same as daemon_handoffs_total


def test_every_expression_is_valid(tmp_path: Path) -> None:
    values = {"$__rate_interval": "5m", "$__range": "1h", "$job": "forkd", "$instance": ".*"}
    recorded = []
    for index, (_, expr) in enumerate(expressions()):
        filled = expr
        for variable, value in values.items():
            filled = filled.replace(variable, value)
        assert "$" not in filled
        recorded.append({"record": f"expression_{index}", "expr": filled})
    file = tmp_path / "rules.yml"
    file.write_text(yaml.safe_dump({"groups": [{"name": "dashboard", "rules": recorded}]}))
    promtool("check", "rules", file)


def test_every_expression_keeps_to_the_variables() -> None:
    for where, expr in expressions():
        selectors = [selector for _, selector in _SELECTOR.findall(expr)]
        assert len(selectors) == len(_NAME.findall(_STRING.sub("", expr))), where
        for selector in selectors:
            assert 'job="$job"' in selector, where
            assert 'instance=~"$instance"' in selector, where
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "job", "instance"]


def test_the_datasource_is_a_variable() -> None:
    for panel in PANELS:
        for owner in (panel, *panel["targets"]):
            assert owner["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


def test_legends_name_labels_that_are_left() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            kept = [set(re.split(r",\s*", labels)) for labels in re.findall(r"\bby \(([^)]*)\)", target["expr"])]
            left = set.intersection(*kept) if kept else None
            if left is None:
                samples = _NAME.findall(_STRING.sub("", target["expr"]))
                left = set.intersection(*map(labels_of, samples))
            assert set(re.findall(r"{{(\w+)}}", target["legendFormat"])) <= left, panel["title"]


def test_panels_have_ids_and_places_of_their_own() -> None:
    panels = DASHBOARD["panels"]
    ids = [panel["id"] for panel in panels]
    assert len(ids) == len(set(ids))
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells
    tops = [panel["gridPos"]["y"] for panel in panels]
    assert all(above <= below for above, below in pairwise(tops))


def test_panels_explain_themselves() -> None:
    for panel in PANELS:
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
