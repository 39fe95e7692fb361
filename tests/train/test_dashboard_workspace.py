"""The workspace as W&B is sent it, without a server and to a stub of one."""

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from extract.command import compose
from extract.errors import BadInput
from tests.wandb_stub import StubServer
from train.dashboard import DashboardSettings, save_workspace
from train.dashboard_panels import RELATIONS, SECTIONS
from train.metric_table import METRICS, NUMBER, PAGE, TABLE

ROOT = Path(__file__).parents[2]
SNAPSHOT = Path(__file__).with_name("dashboard_workspace.yaml")
LINE, SCATTER, BARS, MEDIA, TABLES = "Run History Line Plot", "Scatter Plot", "Bar Chart", "Media Browser", "Weave"

Panels = dict[str, list[dict[str, Any]]]


def readable(spec: dict[str, Any]) -> Panels:
    """The panels of a serialised workspace by section: their types and settings, without ids, places and the tree that
    says how to find a table.
    """
    sections = spec["section"]["panelBankConfig"]["sections"]
    return {section["name"]: [_panel(panel) for panel in section["panels"]] for section in sections}


def _panel(panel: dict[str, Any]) -> dict[str, Any]:
    config = panel["config"]
    if panel["viewType"] == TABLES:
        config = {"table": config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]}
    return {"type": panel["viewType"], **{name: value for name, value in config.items() if value != []}}


@pytest.fixture(scope="module")
def spec() -> dict[str, Any]:
    from train.dashboard_workspace import workspace_of

    workspace = workspace_of(compose(DashboardSettings, ["experiment=demo"]), "somebody")
    found = workspace._to_model().spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    assert isinstance(found, dict)
    return found


@pytest.fixture(scope="module")
def panels(spec: dict[str, Any]) -> Panels:
    return readable(spec)


def test_the_definition_is_the_one_that_was_looked_at(panels: Panels):
    """To change it: python -m tests.train.test_dashboard_workspace writes the file; read its difference."""
    assert panels == yaml.safe_load(SNAPSHOT.read_text())


def test_every_metric_has_one_panel_with_its_unit(panels: Panels):
    shown = [panel for section, found in panels.items() if section != "Sweep" for panel in found]
    for metric in METRICS:
        example = re.sub(r"<\w+>", "x", metric.name)
        own = [panel for panel in shown if example in panel.get("metrics", []) or _finds(panel, example)]
        if metric.section == "analysis":
            continue  # named in full, below
        assert len(own) == 1, metric.name
        assert own[0]["type"] == LINE and own[0]["xAxis"] == "step"
        assert own[0]["yAxisTitle"] == ("learning rate" if metric.unit == "1" else metric.unit)
        assert own[0]["chartTitle"]
    titles = [[panel["chartTitle"] for panel in found if "chartTitle" in panel] for found in panels.values()]
    assert all(len(found) == len(set(found)) for found in titles)


def _finds(panel: dict[str, Any], name: str) -> bool:
    return "metricRegex" in panel and re.search(panel["metricRegex"], name) is not None


def test_the_analysis_of_every_pair_is_shown(panels: Panels):
    pairs = compose(DashboardSettings, ["experiment=demo"]).pairs
    others = ["shared", "other", "dead"]
    owners = {f"analysis/latents/{pair}/{owner}" for pair, models in pairs.items() for owner in [*models, *others]}
    (bars,) = (panel for panel in panels["Analysis"] if panel["type"] == BARS)
    tables = [panel["table"] for panel in panels["Analysis"] if panel["type"] == TABLES]
    media = [panel["mediaKeys"] for panel in panels["Analysis"] if panel["type"] == MEDIA]
    assert set(bars["metrics"]) == owners
    names = {kind: [metric.name for metric in METRICS if metric.kind == kind] for kind in (TABLE, PAGE)}
    compared = {f"analysis/comparisons/{level}_simpo_dpo" for level in ("class", "category")}
    assert compared < set(tables) and len(tables) == len(set(tables))
    assert set(tables) - compared == {name.replace("<pair>", pair) for name in names[TABLE] for pair in pairs} - {
        "analysis/comparisons/<comparison>"
    }
    assert media == [[name] for name in names[PAGE]]


def test_a_sweep_shows_variance_explained_against_l0_and_settings(panels: Panels):
    """Of every model, whose best value W&B keeps under the name of the metric's `best`."""
    drawn = {(panel["xAxis"], panel["yAxis"]) for panel in panels["Sweep"] if panel["type"] == SCATTER}
    for model in ("base", "simpo", "dpo"):
        explained = f"summary:val/variance_explained/{model}.max"
        assert ("summary:val/l0", explained) in drawn
        assert {("config:crosscoder.value.k", explained), ("config:hookpoint.value", explained)} <= drawn
    assert ("summary:val/l0", "summary:val/silent") in drawn
    assert len(drawn) == len(panels["Sweep"]) == sum(3 if "<model>" in relation.y else 1 for relation in RELATIONS)


def test_what_sections_and_relations_name_exists():
    assert {metric.section for metric in METRICS} == {name for names in SECTIONS.values() for name in names}
    numbers = {metric.name for metric in METRICS if metric.kind == NUMBER}
    settings = compose(DashboardSettings, ["experiment=demo"])
    for relation in RELATIONS:
        assert relation.y in numbers and (relation.x in numbers or "/" not in relation.x)
        value: Any = settings
        for part in relation.x.split(".") if "/" not in relation.x else []:
            value = getattr(value, part)


def test_a_missing_package_is_named_with_the_way_without(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    monkeypatch.delitem(sys.modules, "train.dashboard_workspace", raising=False)
    for name in [name for name in sys.modules if name.startswith("wandb_workspaces.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(BadInput, match=r"crossdiff\[dashboard\].*local=true"):
        save_workspace(compose(DashboardSettings, ["experiment=demo"]))


class ViewServer(StubServer):
    """A server that keeps views, of the project `crossdiff` of `somebody`."""

    def __init__(self) -> None:
        super().__init__()
        self.views: list[dict[str, Any]] = []

    def answer(self, query: dict[str, Any]) -> dict[str, Any]:
        variables = query.get("variables") or {}
        if "upsertView" in query["query"]:
            self.views.append(variables)
            view = {"id": "view1", "name": variables["name"]}
            return {"data": {"upsertView": {"view": view, "inserted": "id" not in variables}}}
        if "allViews" in query["query"]:
            node = {"id": "view1", "displayName": "crossdiff: demo", "spec": self.views[-1]["spec"]}
            return {"data": {"project": {"allViews": {"edges": [{"node": node}]}}}}
        if re.search(r"query\s+GetProject\b", query["query"]):
            return {"data": {"project": self._project(variables)}}
        return super().answer(query)

    def _project(self, variables: dict[str, Any]) -> dict[str, Any] | None:
        if variables["name"] != "crossdiff":
            return None
        user = {"id": "u", "name": "somebody", "username": "somebody", "email": None, "admin": False, "flags": "{}"}
        user |= {"entity": "somebody", "deletedAt": None, "apiKeys": {"edges": []}, "teams": {"edges": []}}
        times = {"createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False}
        return {"id": "p1", "name": "crossdiff", "entityName": "somebody", **times, "user": user}


@pytest.fixture
def server() -> Iterator[ViewServer]:
    with ViewServer() as server:
        yield server


def saved(outputs: Path, environment: dict[str, str], *more: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "train.dashboard", "experiment=demo", f"outputs={outputs}", *more]
    own = {"PATH": "/usr/bin:/bin", "HOME": str(outputs), "WANDB_ERROR_REPORTING": "false", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=own | environment, capture_output=True, text=True, timeout=250)


@pytest.mark.slow
def test_saving_again_updates_the_same_workspace(tmp_path: Path, server: ViewServer, panels: Panels):
    environment = {name: value for name, value in server.environment.items() if name != "WANDB_MODE"}
    first, second = saved(tmp_path, environment), saved(tmp_path, environment)
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    assert first.stdout == second.stdout and first.stdout.startswith(f"workspace: {server.url}/somebody/crossdiff?nw=")
    new, again = server.views
    assert "id" not in new and again["id"] == "view1" and new["name"] == again["name"]
    assert (new["entityName"], new["projectName"], new["displayName"]) == ("somebody", "crossdiff", "crossdiff: demo")
    assert readable(json.loads(new["spec"])) == readable(json.loads(again["spec"])) == panels


@pytest.mark.slow
def test_an_unknown_project_is_named(tmp_path: Path, server: ViewServer):
    done = saved(tmp_path, server.environment, "tracking.project=other")
    assert done.returncode == 2 and "error: tracking.project=other does not exist for somebody" in done.stderr
    assert "local=true" in done.stderr and not server.views


@pytest.mark.slow
def test_no_network_is_one_line_with_the_way_without(tmp_path: Path, server: ViewServer):
    server.kill()
    done = saved(tmp_path, server.environment)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "local=true" in done.stderr
    assert f"W&B's server {server.url} cannot be reached" in done.stderr


@pytest.mark.slow
def test_no_login_is_one_line_with_the_way_without(tmp_path: Path, server: ViewServer):
    done = saved(tmp_path, {"WANDB_BASE_URL": server.url})
    assert done.returncode == 2 and "error: There is no W&B login" in done.stderr and "local=true" in done.stderr


if __name__ == "__main__":
    from train.dashboard_workspace import workspace_of

    model = workspace_of(compose(DashboardSettings, ["experiment=demo"]), "somebody")._to_model()
    text = yaml.safe_dump(
        readable(model.spec.model_dump(mode="json", by_alias=True, exclude_none=True)), sort_keys=False, width=120
    )
    SNAPSHOT.write_text(text)
