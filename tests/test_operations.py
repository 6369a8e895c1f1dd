"""What operators import: the Grafana dashboard, the alert rules, the systemd unit. They name only what exists."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from tierkv.config import load
from tierkv.metrics import Histogram, Metrics

EXAMPLES = Path(__file__).parent.parent / "examples"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
ADDED = {"instance", "job"}
"""Labels that Prometheus adds."""


def series() -> dict[str, set[str]]:
    """Every series name that tierkv exports, with its labels."""
    names: dict[str, set[str]] = {}
    metrics = Metrics()
    for entry in fields(metrics):
        metric = getattr(metrics, entry.name)
        labels = set(metric.labels) | ADDED
        if isinstance(metric, Histogram):
            for suffix in ("_sum", "_count"):
                names[f"tierkv_{entry.name}{suffix}"] = labels
            names[f"tierkv_{entry.name}_bucket"] = labels | {"le"}
        else:
            names[f"tierkv_{entry.name}" + ("_total" if metric.kind == "counter" else "")] = labels
    return names


def dashboard() -> dict[str, Any]:
    return dict(json.loads((EXAMPLES / "grafana" / "dashboard.json").read_text(encoding="utf-8")))


def panels() -> list[dict[str, Any]]:
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((EXAMPLES / "grafana" / "alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def expressions() -> list[str]:
    return [target["expr"] for panel in panels() for target in panel["targets"]] + [rule["expr"] for rule in alerts()]


@pytest.mark.parametrize("expression", expressions())
def test_expression_names_only_metrics_and_labels_that_exist(expression: str) -> None:
    known = series()
    used = re.findall(r"\btierkv_\w+", expression)
    assert used or expression.startswith("up{")
    assert set(used) <= set(known)
    labels = set().union(*(known[name] for name in used)) | ADDED
    for group in re.findall(r"\bby \(([^)]*)\)", expression):
        assert {label.strip() for label in group.split(",")} <= labels
    for selector in re.findall(r"\{([^}]*)\}", expression):
        assert set(re.findall(r"(\w+)\s*[=!]", selector)) <= labels


def test_dashboard_and_rules_cover_the_daemon_s_metrics() -> None:
    used = set(re.findall(r"\btierkv_\w+", " ".join(expressions())))
    daemon = {name for name in series() if name.startswith("tierkv_daemon_") and not name.endswith(("_sum", "_count"))}
    assert daemon <= used


def test_legends_name_labels_that_their_expression_keeps() -> None:
    for panel in panels():
        for target in panel["targets"]:
            for label in re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]):
                assert label in target["expr"], (panel["title"], label)


def test_panels_have_ids_and_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    shown = dashboard()["panels"]
    assert len({panel["id"] for panel in shown}) == len(shown)
    for panel in shown:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & taken, panel["title"]
        taken |= cells


def test_every_query_goes_to_the_datasource_that_is_chosen() -> None:
    board = dashboard()
    first, *others = board["templating"]["list"]
    assert (first["name"], first["type"], first["query"]) == ("datasource", "datasource", "prometheus")
    assert all(variable["datasource"] == DATASOURCE for variable in others)
    for panel in panels():
        assert panel["datasource"] == DATASOURCE
        assert all(target["datasource"] == DATASOURCE for target in panel["targets"])
        assert panel["description"]
    assert board["id"] is None, "an import chooses the id"


def test_alerts_say_where_what_and_what_to_do() -> None:
    for rule in alerts():
        assert rule["alert"].startswith("Tierkv")
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert "{{ $labels.instance }}" in rule["annotations"]["summary"]
        assert rule["annotations"]["description"].endswith(".")
        assert "$labels.tier " not in rule["annotations"]["summary"] or "tier" in rule["expr"]


def test_configuration_in_the_unit_file_loads(tmp_path: Path) -> None:
    lines = (EXAMPLES / "tierkv.service").read_text(encoding="utf-8").splitlines()
    first = lines.index("#   [server]")
    given = [line.removeprefix("#   ") for line in lines[first:] if line.startswith("#   ")]
    (tmp_path / "tierkv.toml").write_text("\n".join(given), encoding="utf-8")
    config = load(tmp_path / "tierkv.toml").config
    assert config.server.listen == ("unix:///run/tierkv/tierkv.sock",)
    assert str(config.disk.path) == "/var/lib/tierkv/kv"
