"""How far descriptions can be trusted: figures and parts of the page where the files exist."""

from __future__ import annotations

from pathlib import Path

from matplotlib.colors import to_rgba

from analysis.report import figure_quality, figures
from analysis.report.quality import parts_of
from analysis.tables import Table

FLOW = """pair,model,stage,outcome,count
base_simpo,simpo,selected,selected,80
base_simpo,simpo,annotated,refused,9
base_simpo,simpo,annotated,described,71
base_simpo,simpo,categorised,placed,62
base_simpo,simpo,categorised,other,9
"""
SCORES = """kind,control,owner,num_latents,balanced_accuracy,low,high
detection,none,simpo,80,0.83,0.79,0.87
detection,shuffled,simpo,80,0.51,0.47,0.55
fuzzing,none,simpo,0,,,
"""
AGREEMENT = """measure,between,level,value,low,high,num_latents
krippendorff_alpha,repeats,category,0.81,0.74,0.87,80
cohen_kappa,a-model and people,category,-0.2,-0.4,0.0,30
"""


COLOURS = figures.model_colours([["base", "simpo"]])


def table(text: str) -> Table:
    columns, *rows = [line.split(",") for line in text.splitlines()]
    return Table("table", "", columns, [list(row) for row in rows], columns, rows)


def test_the_flow_shows_what_went_on_first_and_then_the_losses() -> None:
    axes = figure_quality.flow(table(FLOW), COLOURS).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][0] == "simpo (base_simpo) · selected"
    bars = [(bar.get_x(), bar.get_width()) for bar in axes.patches]
    assert bars == [(0, 80), (0, 71), (71, 9), (0, 62), (62, 9)]
    assert [text.get_text() for text in axes.get_legend().get_texts()] == [
        "went on (in the model's colour)",
        "other",
        "refused",
    ]
    # One colour per model throughout; losses are greys, and named behind their bar.
    colours = [bar.get_facecolor() for bar in axes.patches]
    own = to_rgba(COLOURS["simpo"])
    assert [colour == own for colour in colours] == [True, True, False, True, False]
    assert all(len({*colour[:3]}) == 1 for colour in colours if colour != own)
    assert [text.get_text() for text in axes.texts] == ["80", "71, 9 refused", "62, 9 other"]


def test_a_model_without_latents_is_a_row_of_zero() -> None:
    axes = figure_quality.flow(table(FLOW + "base_simpo,base,selected,selected,0\n"), COLOURS).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()][-1] == "base (base_simpo) · selected"
    assert axes.texts[-1].get_text() == "0"


def test_scores_are_points_with_intervals_and_the_control_is_hollow() -> None:
    axes = figure_quality.scores(table(SCORES), COLOURS).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == ["simpo, detection (80)", "simpo, detection, shuffled (80)"]  # nothing was scored by fuzzing
    points = [(line.get_xdata()[0], line.get_markerfacecolor()) for line in axes.lines if line.get_marker() == "o"]
    assert [value for value, _ in points] == [0.83, 0.51]
    assert [fill for _, fill in points] == [COLOURS["simpo"], "white"]
    segments = [segment[:, 0].tolist() for each in axes.collections for segment in each.get_segments()]
    assert segments == [[0.79, 0.87], [0.47, 0.55]]


def test_agreement_below_chance_is_within_the_axis() -> None:
    axes = figure_quality.agreement(table(AGREEMENT)).axes[0]
    assert [label.get_text()[0] for label in axes.get_yticklabels()] == ["α", "κ"]
    assert axes.get_xlim()[0] <= -0.4 and axes.get_xlim()[1] == 1


def test_parts_are_shown_where_their_files_exist(tmp_path: Path) -> None:
    folder = tmp_path / "analysis" / "base_simpo"
    folder.mkdir(parents=True)
    flow = Table("flow", "", ["pair", "model", "stage", "outcome", "count"], [], [], [])
    rows = [line.split(",") for line in FLOW.splitlines()[1:]]
    flow = Table("flow", "caption", flow.columns, [list(row) for row in rows], flow.columns, rows)
    assert [part.source for part in parts_of(tmp_path, [folder], flow, COLOURS)] == ["tables/flow.csv"]
    (folder / "score_summary.csv").write_text(SCORES)
    (folder / "agreement.csv").write_text(AGREEMENT.splitlines()[0] + "\n")
    (tmp_path / "analysis" / "costs.csv").write_text("kind,model,requests,usd\ndescribe,a-model,80,0.5\n")
    (tmp_path / "analysis" / "agreement.csv").write_text(AGREEMENT)
    parts = parts_of(tmp_path, [folder], flow, COLOURS)
    assert [part.heading for part in parts] == [
        "From selected latents to categories",
        "Do annotators agree?",
        "Are the descriptions right? (base_simpo)",
        "What the annotation cost",
    ]
    assert parts[1].source == "../analysis/agreement.csv" and parts[1].figure
    drawn = parts[2].figure
    assert drawn and drawn.sources == ["../analysis/base_simpo/score_summary.csv"]
    assert (tmp_path / "report" / "figures" / f"{drawn.name}.pdf").is_file()
    for part in parts[1:]:  # as CSV and LaTeX, like every other table
        assert all((tmp_path / "report" / "tables" / f"{part.table.name}.{kind}").is_file() for kind in ("csv", "tex"))
    assert (tmp_path / "report" / "tables" / "costs.csv").read_text().endswith("describe,a-model,80,0.5\n")
    caption = (tmp_path / "report" / "figures" / f"{drawn.name}.txt").read_text()
    assert caption == drawn.caption + "\n" and "over latents" in caption
