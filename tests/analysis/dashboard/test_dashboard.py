"""Which latents the dashboard's filters let through, what it says of them, and whom it answers. Without a browser."""

from __future__ import annotations

import json
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from analysis.annotate.step import annotate
from analysis.compare.statistics import wilson
from analysis.config import AnalysisSettings
from analysis.dashboard.app import Study, make_app
from analysis.dashboard.comparing import Side, latents_of, share_table
from analysis.dashboard.crosscoders import folders_in, load, own_nu
from analysis.dashboard.documents import shown_documents
from analysis.dashboard.filters import NO_CATEGORY, PAGE, Filter, matching, num_pages, page_of
from analysis.dashboard.views import facts, parse_path, path_of, table
from analysis.human import HumanLabel, append_label
from analysis.taxonomy.step import categorise, load_taxonomy
from extract.errors import BadInput
from tests.analysis.made_study import NUM_LATENTS, make_study, write_examples, write_latents_of_many

ROOT = Path(__file__).parents[3]


def made(root: Path) -> tuple[AnalysisSettings, list[Path]]:
    settings, folders = make_study(root)
    settings.analysis.taxonomy.encoder = "tfidf"
    for folder in folders:
        annotate(settings, folder)
        categorise(settings, folder)
    return settings, folders


@pytest.fixture(scope="module")
def simpo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An annotated analysis folder of base_simpo, whose latents 300, 301 and 302 are SimPO's; read only."""
    return made(tmp_path_factory.mktemp("study"))[1][0]


def test_filters_by_owner_nu_and_text(simpo: Path) -> None:
    crosscoder = load(simpo)
    assert set(matching(crosscoder, Filter())) == set(range(NUM_LATENTS))
    assert set(matching(crosscoder, Filter(owners=("simpo",)))) == {300, 301, 302}
    assert set(matching(crosscoder, Filter(search="FINANCIAL  advice"))) == {300}
    below = set(matching(crosscoder, Filter(nu=((None, 0.3), (None, None)))).tolist())
    error, columns = crosscoder.nu["nu_error"], crosscoder.columns
    assert below == {i for i in range(NUM_LATENTS) if abs(error[i]) <= 0.3} >= {300, 301, 302}
    above = set(matching(crosscoder, Filter(nu=((0.3, None), (None, None)))).tolist())
    assert above == {i for i in range(NUM_LATENTS) if abs(error[i]) >= 0.3} and above
    between = set(matching(crosscoder, Filter(nu=((None, 0.3), (0.4, 0.6)))).tolist())
    reconstruction = crosscoder.nu["nu_reconstruction"]
    assert between == {i for i in below if 0.4 <= abs(reconstruction[i]) <= 0.6} and between < below
    # A bound leaves out the latents that never fired: they have no nu.
    dead = {i for i in range(NUM_LATENTS) if columns["owner"][i] == "dead"}
    assert dead and not dead & set(matching(crosscoder, Filter(nu=((0.0, None), (None, None)))))


def test_filters_by_category(simpo: Path) -> None:
    crosscoder = load(simpo)
    category = crosscoder.category(300)
    expected = {i for i in (300, 301, 302) if crosscoder.category(i) == category}
    assert category and set(matching(crosscoder, Filter(categories=(category,)))) == expected
    nowhere = matching(crosscoder, Filter(categories=(NO_CATEGORY,), owners=("simpo", "shared")))
    assert not {300, 301, 302} & set(nowhere.tolist()) and len(nowhere)


def test_orders_are_total_and_put_latents_without_a_value_last(simpo: Path) -> None:
    crosscoder = load(simpo)
    assert matching(crosscoder, Filter(order="latent")).tolist() == list(range(NUM_LATENTS))
    strongest = crosscoder.columns["max_activation"][matching(crosscoder, Filter(order="max_activation"))]
    assert (np.diff(strongest) <= 0).all()
    exclusive = matching(crosscoder, Filter())
    both = np.maximum(abs(crosscoder.nu["nu_error"]), abs(crosscoder.nu["nu_reconstruction"]))[exclusive]
    finite = np.isfinite(both)
    assert (np.diff(both[finite]) >= 0).all() and not finite[finite.sum() :].any()


def test_pages_hold_every_latent_once() -> None:
    latents = np.arange(2 * PAGE + 1)
    assert [num_pages(n) for n in (0, 1, PAGE, PAGE + 1, 2 * PAGE + 1)] == [1, 1, 1, 2, 3]
    assert sum((page_of(latents, page) for page in range(3)), []) == latents.tolist()


def test_the_nu_of_an_owner_is_its_worst() -> None:
    """Three models: the owner's own nu towards each other model; of a latent without owner, the longest row's."""
    models = ["a", "b", "c"]
    norms_of = [[0, 1, 3, 0], [1, 0, 2, 0], [0, 1, 1, 0]]
    columns = {"owner": np.array(["b", "a+c", "shared", "dead"])}
    columns |= {f"norm_{m}": np.array(norms) for m, norms in zip(models, norms_of, strict=True)}
    nan = float("nan")
    nu = {
        "a_b": [9, 0.1, 0.5, nan],
        "a_c": [9, 9, -0.7, nan],
        "b_a": [0.1, 9, 9, nan],
        "b_c": [-0.3, 9, 9, nan],
        "c_a": [9, 9, 9, nan],
        "c_b": [9, -0.2, 9, nan],
    }
    columns |= {f"nu_error_{pair}": np.array(values, dtype=float) for pair, values in nu.items()}
    found = own_nu(columns, models, "nu_error")
    assert found[:3].tolist() == [-0.3, -0.2, -0.7] and np.isnan(found[3])


def test_crosscoders_of_many_models_and_without_annotations_are_shown(tmp_path: Path) -> None:
    folder = tmp_path / "analysis" / "three"
    folder.mkdir(parents=True)
    models = ["base", "simpo", "dpo"]
    write_latents_of_many(folder / "latents.parquet", models, {"simpo": {300}, "simpo+dpo": {301}})
    write_examples(folder / "examples.sqlite", {300: "some words that fire"})
    crosscoder = load(folder)
    assert list(crosscoder.owners()) == ["simpo", "simpo+dpo", "other"]
    assert set(matching(crosscoder, Filter(nu=((None, 0.3), (None, 0.3))))) == {300, 301}
    shown = str(facts(crosscoder, 301))
    assert "not annotated" in shown and "ν error of dpo towards base" in shown and "Δ-norm of dpo against base" in shown
    assert "300" in str(table(crosscoder, [300, 301], 300))


def test_labels_by_hand_take_the_place_of_the_annotators(tmp_path: Path) -> None:
    folder = made(tmp_path)[1][0]
    before = load(folder)
    append_label(folder, HumanLabel(300, "money talk", "Creative Generation", "sure of it", "anna", "now"))
    append_label(folder, HumanLabel(301, "", "other", "", "anna", "now"))
    append_label(folder, HumanLabel(302, "a slip", "other", "", "anna", "now"))
    append_label(folder, HumanLabel(302, "", "", "withdrawn", "anna", "now"))
    after = load(folder)
    assert (after.label(300), after.category(300)) == ("money talk", "Creative Generation")
    assert (after.label(301), after.category(301)) == (before.label(301), "other")
    assert (after.label(302), after.category(302)) == (before.label(302), before.category(302))
    assert set(matching(after, Filter(by_hand=True))) == {300, 301}
    assert set(matching(after, Filter(search="money"))) == {300}
    # What the annotator said can still be found, and is shown beside it.
    assert set(matching(after, Filter(search="financial advice"))) == {300}
    assert before.annotations[300].label in str(facts(after, 300)) and "anna" in str(facts(after, 300))
    assert Side(after, "simpo").counts()["Creative Generation"] >= 1
    assert (Side(before, "simpo").counted, Side(after, "simpo").counted) == ("(3)", "(3, 2 of them by hand)")
    assert "simpo in base_simpo (3, 2 of them by hand)" in str(
        share_table(Side(after, "simpo"), Side(after, "dpo"), "category", lambda one: one.counts())
    )
    append_label(folder, HumanLabel(5, "nobody's", "other", "", "anna", "now"))
    assert Side(load(folder), "simpo").latents() == [300, 301, 302] and 5 in load(folder).human


def test_every_nu_is_shown_with_its_interval(simpo: Path) -> None:
    crosscoder = load(simpo)
    nu, low, high = (f"{crosscoder.columns[f'nu_error_simpo{end}'][300]:.3g}" for end in ("", "_low", "_high"))
    shown = str(facts(crosscoder, 300))
    assert f"Dd('{nu} ({low} to {high})')" in shown
    # The base has no decoder row of it: no nu, and no interval.
    assert "Dt('ν error of base'), Dd('–')" in shown


def test_near_duplicates_are_linked(simpo: Path) -> None:
    """301 is one of 300."""
    links = {latent: str(facts(load(simpo), latent)).count("/latent/base_simpo/") for latent in (300, 301, 302)}
    assert links == {300: 1, 301: 1, 302: 0}
    assert "/latent/base_simpo/301" in str(facts(load(simpo), 300))


def test_shares_are_compared_with_their_intervals(simpo: Path) -> None:
    side, other = Side(load(simpo), "simpo"), Side(load(simpo), "dpo")
    shown = str(share_table(side, other, "category", lambda one: one.counts()))
    for count in side.counts().values():
        low, high = wilson(count, 3)
        assert f"{count / 3:.1%} ({low:.1%} to {high:.1%})" in shown
    # Of no latents any share may be.
    assert "dpo in base_simpo (0)" in shown and "0.0% (0.0% to 100.0%)" in shown


def test_long_lists_of_latents_are_cut(simpo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = str(latents_of(Side(load(simpo), "simpo"), None))
    assert "3 latents'" in whole and whole.count("Li(") == 3
    monkeypatch.setattr("analysis.dashboard.comparing.LISTED", 2)
    cut = str(latents_of(Side(load(simpo), "simpo"), None))
    assert "3 latents, the first 2:" in cut and cut.count("Li(") == 2


def test_files_that_change_are_read_again_and_others_are_not(tmp_path: Path) -> None:
    folder = made(tmp_path)[1][0]
    first = load(folder)
    assert load(folder) is first
    append_label(folder, HumanLabel(5, "by hand", "", "", "anna", "now"))
    assert load(folder) is not first and load(folder).columns is first.columns


def test_documents_of_every_kind_show_their_heat(tmp_path: Path) -> None:
    folder = made(tmp_path)[1][0]
    shown = json.dumps(shown_documents(folder, 300, "top", 64).to_plotly_json(), default=lambda c: c.to_plotly_json())
    assert shown.count('"className": "document"') == 8
    # Made latents fire with 10, 9.5, ... in their first document: the strongest token has the deepest colour.
    assert "rgba(230, 90, 20, 0.90)" in shown and "activation 9.5" in shown
    silent = sqlite3.connect(folder / "examples.sqlite")
    with silent:
        silent.execute("DELETE FROM samples")
        silent.execute("INSERT INTO samples VALUES (300, 'silent', NULL, 0, 0.0, '[]', NULL)")
    silent.close()
    assert "never fires" in str(shown_documents(folder, 300, "silent", 10))
    assert "No documents of this kind" in str(shown_documents(folder, 300, "near_miss", 10))


def test_near_misses_show_where_they_are_nearest(tmp_path: Path) -> None:
    folder = made(tmp_path)[1][0]
    with sqlite3.connect(folder / "examples.sqlite") as database:
        words = json.dumps([f" w{i}" for i in range(300)])
        database.execute("UPDATE documents SET text_tokens = ? WHERE document = 0", (words,))
        database.execute("INSERT INTO samples VALUES (300, 'near_miss', NULL, 0, 0.5, '[]', 250)")
    database.close()
    shown = str(shown_documents(folder, 300, "near_miss", 10))
    assert " w250" in shown and " w0 " not in shown and "below the threshold 0.5, at “ w250”" in shown


def test_samples_of_an_earlier_version_are_not_shown(tmp_path: Path) -> None:
    folder = made(tmp_path)[1][0]
    with sqlite3.connect(folder / "examples.sqlite") as database:
        database.execute("ALTER TABLE samples DROP COLUMN position")
    database.close()
    assert "No documents of this kind" in str(shown_documents(folder, 300, "silent", 10))


def test_addresses_name_a_latent_or_nothing(tmp_path: Path) -> None:
    settings, _ = made(tmp_path)
    study = Study("made", tmp_path, load_taxonomy())
    assert parse_path(path_of("a b/c,k=2", 7)) == ("a b/c,k=2", 7)
    found = study.latent("/latent/base_dpo/350")
    assert found and found[0].name == "base_dpo" and found[1] == 350
    for path in (None, "/", "/latent/base_dpo", f"/latent/base_dpo/{NUM_LATENTS}", "/latent/..%2F..%2Fetc/1", "/x/1/2"):
        assert study.latent(path) is None


def test_only_this_machine_is_answered_and_no_foreign_script_may_run(tmp_path: Path) -> None:
    made(tmp_path)
    client = make_app(Study("made", tmp_path, load_taxonomy())).server.test_client()
    for host in ("localhost:8501", "127.0.0.1:9", "[::1]:80"):
        response = client.get("/", headers={"Host": host})
        assert response.status_code == 200
    assert client.get("/", headers={"Host": "evil.example:8501"}).status_code == 403
    for origin, status in (("http://evil.example", 403), ("null", 403), ("http://localhost:8501", 200)):
        assert client.get("/", headers={"Host": "localhost:8501", "Origin": origin}).status_code == status
    policy = response.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy and "unsafe-inline" not in policy.split("script-src")[1].split(";")[0]


def test_nothing_analysed_is_said(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="Nothing is analysed"):
        folders_in(tmp_path)


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "analysis.dashboard", "experiment=demo", *arguments]
    return subprocess.run(line, capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_the_command_refuses_what_it_cannot_do(tmp_path: Path) -> None:
    done = command(f"outputs={tmp_path}")
    assert done.returncode == 2 and done.stderr.startswith("error: Nothing is analysed in")
    made(tmp_path)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = command(f"outputs={tmp_path}", f"port={taken.getsockname()[1]}")
    assert done.returncode == 2 and "cannot be used" in done.stderr and done.stderr.count("\n") == 1
