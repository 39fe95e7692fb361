"""The local page is read back: what is in its figures is what runs logged, and names are only text."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pytest
import yaml

from extract.command import compose
from extract.errors import BadInput
from train.dashboard import DashboardSettings, write_page
from train.dashboard_curves import points_each, read_run, thinned
from train.dashboard_page import COLOURS, MAX_CHOSEN
from train.metric_table import HISTOGRAM, METRICS, NUMBER


def log_lines(folder: Path, lines: list[object], settings: dict | None = None) -> Path:
    """A run's folder with these lines; a line that is text is written as it is, without an end."""
    folder.mkdir(parents=True)
    text = "".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    if settings is not None:
        (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    return folder


def written(outputs: Path, *more: str) -> str:
    settings = compose(DashboardSettings, ["experiment=demo", f"outputs={outputs}", "local=true", *more])
    return write_page(settings).read_text()


def figures_in(page: str) -> dict[str, dict]:
    """By section and title, each checked by plotly."""
    data = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    assert data is not None
    sections = json.loads(data[1])["sections"]
    found = {f"{section['name']}: {figure['title']}": figure for section in sections for figure in section["figures"]}
    own = ("run", "part")
    for figure in found.values():
        traces = [{key: value for key, value in trace.items() if key not in own} for trace in figure["data"]]
        go.Figure(data=traces, layout=figure["layout"])
    return found


def curves_in(figure: dict) -> list[tuple[int, str, list, list]]:
    return [(trace["run"], trace["part"], trace["x"], trace["y"]) for trace in figure["data"] if "run" in trace]


def test_curves_of_several_runs_side_by_side(tmp_path: Path):
    explained = {"train/variance_explained/base": 0.5, "train/variance_explained/simpo": None}
    log_lines(
        tmp_path / "runs" / "base_simpo", [{"step": 1, "train/loss": 4.0, **explained}, {"step": 2, "train/loss": 2}]
    )
    log_lines(tmp_path / "runs" / "base_simpo,k=7", [{"step": 5, "train/loss": 1.5}])
    log_lines(tmp_path / "runs" / "base_dpo", [{"step": 1, "train/loss": 9.0}])
    figures = figures_in(written(tmp_path, "pair=base_simpo"))
    assert curves_in(figures["Training: loss"]) == [(0, "", [1, 2], [4, 2]), (1, "", [5], [1.5])]
    assert [trace["name"] for trace in figures["Training: loss"]["data"]] == ["base_simpo", "base_simpo,k=7"]
    assert figures["Training: loss"]["layout"]["yaxis"]["type"] == "log"
    of_models = figures["Training: variance explained"]
    assert curves_in(of_models) == [(0, "base", [1], [0.5]), (0, "simpo", [1], [None])]
    assert [trace["name"] for trace in of_models["data"]] == [
        "base",
        "simpo",
        "base_simpo · base",
        "base_simpo · simpo",
    ]
    assert len({trace["line"]["dash"] for trace in of_models["data"]}) == 2


def test_every_number_and_histogram_of_a_command_has_a_figure(tmp_path: Path):
    """Of tokens and extraction too, from their own files."""
    names = [(re.sub(r"<\w+>", "m", metric.name), metric.kind) for metric in METRICS if metric.section != "analysis"]
    line = {name: {"edges": [0, 1, 2], "counts": [3, 4]} if kind == HISTOGRAM else 1.0 for name, kind in names}
    places = {"tokens": tmp_path / "tokens", "extract": tmp_path / "extraction"}
    for section in {name.partition("/")[0] for name in line} & places.keys():
        own = {name: line.pop(name) for name in [*line] if name.startswith(f"{section}/")}
        log_lines(places[section], [{"step": 1, **own}])
    log_lines(tmp_path / "runs" / "base_simpo", [{"step": 1, **line}])
    drawn = {key: figure for key, figure in figures_in(written(tmp_path)).items() if not key.startswith("Sweep")}
    assert len(drawn) == len(names) and all(kind in (NUMBER, HISTOGRAM) for _, kind in names)
    for figure in drawn.values():
        ((_, _, x, y),) = curves_in(figure)
        assert (x, y) in (([1], [1]), ([0, 1, 2], [3, 4, 0])), "a histogram's last count ends at its last edge"
        assert figure["layout"]["yaxis"]["title"]["text"] and figure["about"]


def test_runs_of_a_sweep_against_what_they_differ_in(tmp_path: Path):
    for k, values in ((10, [0.5, 0.75, 0.625]), (20, [0.875, 0.25])):
        lines = [{"step": i, "val/l0": k - i, "val/variance_explained/base": value} for i, value in enumerate(values)]
        log_lines(tmp_path / "runs" / f"base_simpo,k={k}", lines, {"hookpoint": "block1", "crosscoder": {"k": k}})
    figures = figures_in(written(tmp_path))
    against_l0 = curves_in(figures["Sweep: variance explained against L0"])
    assert against_l0 == [(0, "base", [8], [0.75]), (1, "base", [19], [0.875])], "largest against last"
    assert [x for _, _, x, _ in curves_in(figures["Sweep: variance explained against k"])] == [[10], [20]]
    assert "Sweep: variance explained against hookpoint" not in figures, "all have the same"


def test_owners_come_from_the_report(tmp_path: Path):
    log_lines(tmp_path / "runs" / "base_simpo", [])
    table = tmp_path / "report" / "tables" / "owners.csv"
    table.parent.mkdir(parents=True)
    table.write_text("pair,owner,count\nbase_simpo,base,3\nbase_simpo,shared,4\n")
    bars = figures_in(written(tmp_path))["Analysis: latents by owner"]["data"]
    assert [(bar["name"], bar["x"], bar["y"]) for bar in bars] == [
        ("base", ["base_simpo"], [3]),
        ("shared", ["base_simpo"], [4]),
    ]
    (tmp_path / "report" / "index.html").write_text("the report")
    assert '<a href="../report/index.html">' in written(tmp_path, f"page={tmp_path / 'a folder' / 'page.html'}")


def test_damaged_lines_are_left_out_and_counted_but_for_one_being_written(tmp_path: Path):
    lines = [
        {"step": 1, "train/loss": 3.0},
        "\n",
        "{broken\n",
        "[1]\n",
        '{"step": null}\n',
        {"step": 2, "train/loss": 2.0},
    ]
    folder = log_lines(tmp_path / "runs" / "base_simpo", [*lines, '{"step": 3, "train/lo'])
    run = read_run("base_simpo", folder, 100)
    assert (run.curves["train/loss"].values, run.num_damaged) == ([3.0, 2.0], 4)
    assert "base_simpo: 4 lines could not be read" in written(tmp_path)


def test_runs_are_in_the_order_of_their_numbers(tmp_path: Path):
    for name in ("base_simpo,k=5,lr=0.01", "base_simpo,k=10", "base_simpo,k=5,lr=1e-3", "10", "base"):
        log_lines(tmp_path / "runs" / name, [])
    names = re.findall(r'class="name">(.*?)<', written(tmp_path))
    assert names == ["10", "base", "base_simpo,k=5,lr=1e-3", "base_simpo,k=5,lr=0.01", "base_simpo,k=10"]


def test_a_run_that_has_logged_nothing_is_named(tmp_path: Path):
    (tmp_path / "runs" / "base_simpo").mkdir(parents=True)
    page = written(tmp_path)
    assert "nothing logged yet" in page and not figures_in(page)


def test_what_was_evaluated_afterwards_is_drawn_in_order_where_the_run_has_not_measured_it(tmp_path: Path):
    folder = log_lines(tmp_path / "runs" / "base_simpo", [{"step": 2, "val/l0": 5.0}])
    lines = [{"step": step, "of": "x", "val/l0": 9.0, "val/loss_recovered/base": step / 8} for step in (4, 2)]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = read_run("base_simpo", folder, 100).curves
    assert (curves["val/l0"].steps, curves["val/l0"].values) == ([2], [5])
    assert (curves["val/loss_recovered/base"].steps, curves["val/loss_recovered/base"].values) == ([2, 4], [0.25, 0.5])


def test_thinning_keeps_spikes_gaps_and_ends():
    values = np.sin(np.arange(10_000) / 500)
    values[3_333], values[7_777], values[5_000] = 50.0, -50.0, math.nan
    kept = thinned(values, 100)
    assert {0, 3_333, 5_000, 7_777, 9_999} <= set(kept.tolist()) and len(kept) <= 103
    assert (np.diff(kept) > 0).all() and thinned(values, 10_000).tolist() == list(range(10_000))


def test_a_page_of_many_long_runs_stays_small_and_says_so(tmp_path: Path):
    lines = [{"step": step, "train/loss": 1 / step, "train/l0": float(step)} for step in range(1, 301)]
    for number in range(MAX_CHOSEN + 3):
        log_lines(tmp_path / "runs" / f"base_simpo,k={number}", lines)
    page = written(tmp_path, "max_points=1000")
    each = points_each(1000, MAX_CHOSEN + 3)
    assert each == 20 and all(len(x) <= 23 for _, _, x, _ in curves_in(figures_in(page)["Training: loss"]))
    assert re.search(r"the longest 2\d of 300 values", page.replace("\n", " "))
    assert f"Of {MAX_CHOSEN + 3} runs, the {MAX_CHOSEN} that were written last" in page
    assert len(re.findall(r'<input type="checkbox" value="\d+" checked>', page)) == MAX_CHOSEN


def test_names_are_text_and_nothing_is_loaded(tmp_path: Path):
    name = "base_simpo,x=<img src=q onerror=alert(1)><\u2044script>&amp;"
    log_lines(tmp_path / "runs" / name, [{"step": 1, "train/loss": 1.0}])
    page = written(tmp_path)
    start, _, rest = page.partition("<script>")
    assert "<img" not in start and "&lt;img src=q" in start, "neither in the list of runs nor in the data"
    (trace,) = figures_in(page)["Training: loss"]["data"]
    assert trace["name"] == name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;"), "plotly takes HTML"
    own = start + rest.rpartition("<script>")[2]
    assert not re.search(r"(src|href)\s*=\s*[\"']?(https?:)?//", own) and "default-src 'none'" in start


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
# Run behind the page's own scripts: what is drawn at first, without the first run, and smoothed, as text in the page.
LOOKING = """<script>
const drawn = () => plots.map(plot => (plot.data ?? []).filter(trace => trace.run !== undefined)
  .map(trace => [trace.run, trace.opacity ?? 1, trace.y, trace.line.color]));
setTimeout(() => {
  const found = { first: drawn() };
  find.value = "k=7"; find.dispatchEvent(new Event("input"));
  document.getElementById("none").click();
  found.without = drawn();
  smoothing.value = "0.5"; smoothing.dispatchEvent(new Event("input"));
  found.smoothed = drawn();
  const out = document.createElement("pre");
  out.id = "found"; out.textContent = JSON.stringify(found); document.body.append(out);
}, 1500);
</script></body>"""


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium here")
def test_in_a_browser_runs_are_chosen_and_curves_smoothed(tmp_path: Path):
    """Under the page's own policy. Smoothing by 1/2: 4, then (2 * 1/2 + 4 * 1/4) / (3/4) = 8/3."""
    log_lines(tmp_path / "runs" / "base_simpo", [{"step": 1, "train/l0": 4.0}, {"step": 2, "train/l0": 2.0}])
    log_lines(tmp_path / "runs" / "base_simpo,k=7", [{"step": 1, "train/l0": 7.0}])
    log_lines(tmp_path / "extraction", [{"step": 1, "extract/shards": 1}])
    page = tmp_path / "looked_at.html"
    page.write_text(written(tmp_path).replace("</body>", LOOKING))
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'browser'}"]
    command = [BROWSER, *options, "--window-size=1500,3000", "--virtual-time-budget=20000", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    text = re.search(r'<pre id="found">(.*)</pre>', done.stdout)
    assert text is not None, done.stderr
    found = json.loads(text[1])
    first, second, extraction = [0, 1, [4, 2], COLOURS[0]], [1, 1, [7], COLOURS[1]], [0, 1, [1], COLOURS[0]]
    assert found["first"] == [[first, second], [extraction]]
    assert found["without"] == [[first], [extraction]], "only what was found is left out; extraction is of no run"
    (raw, (_, _, (start, end), _)), (shards,) = found["smoothed"]
    assert raw == [0, 0.25, [4, 2], COLOURS[0]] and shards == extraction
    assert (start, end) == (4, pytest.approx(8 / 3))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["local=true", "pair=base_dpo"], "no runs of base_dpo"),
        (["local=true"], "Train first, or name the folder"),
        (["page=x.html"], "Add local=true"),
        (["local=true", "max_points=0"], "max_points=0 must be at least 1"),
    ],
)
def test_bad_input(tmp_path: Path, arguments: list[str], message: str):
    with pytest.raises(BadInput, match=re.escape(message)):
        write_page(compose(DashboardSettings, ["experiment=demo", f"outputs={tmp_path}", *arguments]))


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path):
    log_lines(tmp_path / "runs" / "base_simpo", [])
    with pytest.raises(BadInput, match=r"metrics.jsonl/a.html cannot be written \(.*page=FILE"):
        written(tmp_path, f"page={tmp_path / 'runs' / 'base_simpo' / 'metrics.jsonl' / 'a.html'}")
