"""The W&B workspace of a study, in code: a panel for every metric, and what came of a sweep's runs.

Only `save` needs a server. What is saved is a view of the whole project; where it lies is kept in the study's outputs,
so that saving it again changes it rather than adding another.
"""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path
from typing import Any
from urllib.error import HTTPError

import wandb_workspaces.reports.v2 as panels
import wandb_workspaces.workspaces as workspaces
from wandb_workspaces.reports.v2.interface import PanelTypes

from extract.errors import BadInput
from extract.publish import publish
from train.config import TrainSettings
from train.dashboard_panels import RELATIONS, SECTIONS, SWEEP, Panel, Relation, panels_of, regex_of, row_of
from train.metric_table import PAGE, TABLE

STEP = "step"  # logged with every line, unlike W&B's own count, which restarts
TIMEOUT_S = 20
LOCAL = "Without W&B: local=true draws the same panels from the runs' files."
# Latents of an analysis belong to a model or to one of these.
NO_MODELS = ("shared", "other", "dead")


def save(settings: TrainSettings) -> str:
    """Save the workspace; its URL. BadInput where there is no login, no network or no such project."""
    import wandb

    os.environ.setdefault("WANDB_SILENT", "true")  # what fails is said in one line
    _check_reachable(wandb.setup().settings.base_url)
    if not wandb.login(prompt=False, verify=False):
        raise BadInput(f"There is no W&B login: run `wandb login` or set WANDB_API_KEY. {LOCAL}")
    try:
        return _save(settings)
    except BadInput:
        raise
    except Exception as error:  # W&B's libraries raise what they please; each is about login, network or rights
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BadInput(f"W&B did not take the workspace: {reason}. {LOCAL}") from error


def _check_reachable(base_url: str) -> None:
    """W&B itself would try for minutes."""
    try:
        urllib.request.urlopen(base_url, timeout=TIMEOUT_S).close()
    except HTTPError as error:
        error.close()  # an answer all the same
    except OSError as error:
        raise BadInput(f"W&B's server {base_url} cannot be reached from here ({error}). {LOCAL}") from error


def _save(settings: TrainSettings) -> str:
    import wandb

    api = wandb.Api(timeout=TIMEOUT_S)
    entity, project = settings.tracking.entity or api.default_entity or "", settings.tracking.project
    if not _exists(api, entity, project):
        raise BadInput(
            f"tracking.project={project} does not exist for {entity or 'this account'}. Log a run to it first "
            f"(tracking.mode=online, or wandb sync), or set tracking.project and tracking.entity. {LOCAL}"
        )
    workspace, kept = workspace_of(settings, entity), Path(settings.outputs) / "wandb" / "workspace"
    earlier = _earlier(kept)
    if earlier is not None and (earlier.entity, earlier.project) == (entity, project):
        earlier.name, earlier.sections, earlier.settings = workspace.name, workspace.sections, workspace.settings
        workspace = earlier
    workspace.save()
    publish(kept, workspace.url.encode())
    return str(workspace.url)


def _exists(api: Any, entity: str, project: str) -> bool:
    try:
        return bool(api.project(project, entity).id)
    except ValueError:
        return False


def _earlier(kept: Path) -> workspaces.Workspace | None:
    """The workspace that was saved before; None where there is none, or where it was deleted since."""
    if not kept.exists():
        return None
    try:
        return workspaces.Workspace.from_url(kept.read_text())
    except ValueError:
        return None


def workspace_of(settings: TrainSettings, entity: str) -> workspaces.Workspace:
    """The definition of the workspace: sections of panels, of the models and pairs that the settings select."""
    sections = [
        workspaces.Section(name=name, panels=_panels(name, settings), is_open=name in ("Training", SWEEP))
        for name in SECTIONS
    ]
    return workspaces.Workspace(
        entity=entity,
        project=settings.tracking.project,
        name=f"crossdiff: {settings.study}",
        sections=sections,
        settings=workspaces.WorkspaceSettings(x_axis=STEP, max_runs=20),
        auto_generate_panels=False,
    )


def _panels(section: str, settings: TrainSettings) -> list[PanelTypes]:
    if section == SWEEP:
        models = list(dict.fromkeys(member for members in settings.needed_pairs.values() for member in members))
        return [plot for relation in RELATIONS for plot in _scatters(relation, models)]
    return [plot for panel in panels_of(section) for plot in _plots(panel, settings.needed_pairs)]


def _plots(panel: Panel, pairs: dict[str, list[str]]) -> list[PanelTypes]:
    """What draws a metric: one plot, but one for each pair of a table that every pair has."""
    name, title = panel.metric.name, panel.title_with_unit
    if panel.metric.kind == PAGE:
        return [panels.MediaBrowser(title=title, media_keys=[name])]
    if panel.metric.kind == TABLE:
        names = _of_comparisons(name, pairs) if "<comparison>" in name else _of_pairs(name, pairs)
        return [panels.WeavePanelSummaryTable(table_name=table) for table in names]
    if panel.metric.section == "analysis":
        return [panels.BarPlot(title=title, metrics=[*_of_pairs(name, pairs)], orientation="v")]
    return [_line(panel, title)]


def _of_pairs(name: str, pairs: dict[str, list[str]]) -> list[str]:
    """A name for every pair, and for every owner of each, as far as it has placeholders for these."""
    names = [(name.replace("<pair>", pair), [*members, *NO_MODELS]) for pair, members in pairs.items()]
    return list(dict.fromkeys(of_pair.replace("<owner>", owner) for of_pair, owners in names for owner in owners))


def _of_comparisons(name: str, pairs: dict[str, list[str]]) -> list[str]:
    """A name for every comparison of the report: the first tuned model of a base with each of the others."""
    tuned = dict[str, list[str]]()
    for base, *others in pairs.values():
        tuned.setdefault(base, []).extend(others)
    compared = [f"{first}_{other}" for first, *others in tuned.values() for other in others]
    return [name.replace("<comparison>", f"{level}_{models}") for models in compared for level in ("class", "category")]


def _line(panel: Panel, title: str) -> panels.LinePlot:
    """A curve for each run, and for each model where the metric is of one; of a histogram, W&B draws a heat map."""
    name, is_exact = panel.metric.name, "<" not in panel.metric.name
    return panels.LinePlot(
        title=title,
        x=STEP,
        y=[name] if is_exact else [],
        metric_regex=None if is_exact else f"^{regex_of(name)}$",
        title_x=panel.x_title,
        title_y=panel.y_title,
        log_y=True if panel.is_logarithmic else None,
    )


def _scatters(relation: Relation, models: list[str]) -> list[panels.ScatterPlot]:
    """A point for each run; a plot for each model where the metric is of one."""
    of_models = {relation.y.replace("<model>", model): f"{relation.title}, {model}" for model in models}
    titles = of_models if "<model>" in relation.y else {relation.y: relation.title}
    x = _summary(relation.x) if "/" in relation.x else panels.Config(relation.x)
    return [panels.ScatterPlot(title=title, x=x, y=_summary(name)) for name, title in titles.items()]


def _summary(name: str) -> panels.SummaryMetric:
    """What stands for a run: W&B keeps the last value under the name itself, the best one under `<name>.max`."""
    best = row_of(name).best
    return panels.SummaryMetric(name if best == "last" else f"{name}.{best}")
