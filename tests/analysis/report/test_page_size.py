"""A whole page is no larger than it may be, and says so where its figures and tables alone are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from analysis.annotate.step import annotate
from analysis.report import page
from analysis.report import step as report
from analysis.taxonomy.step import categorise
from tests.analysis.made_study import make_study


def test_a_page_keeps_its_size_or_says_that_it_cannot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings, (folder, _) = make_study(tmp_path, num_cards=30)
    settings.analysis.taxonomy.encoder = "tfidf"
    annotate(settings, folder)
    categorise(settings, folder)
    taken: list[tuple[Any, ...]] = []
    monkeypatch.setattr(report, "render", lambda *context: taken.append(context) or page.render(*context))
    whole = report.report(settings, [folder]).read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', whole)
    assert policy and "form-action 'none'; base-uri 'none'" in policy[1]
    size, config = len(whole.encode()), settings.analysis.report
    config.max_megabytes = (size - 30_000) / 1e6
    capsys.readouterr()
    smaller = page.render(*taken[0])
    assert size - 45_000 < len(smaller.encode()) <= size - 30_000 and "show fewer documents" in smaller
    assert "Without any card" not in smaller and not capsys.readouterr().out
    config.max_megabytes = 0.1
    assert re.search(r"Without any card this page is \d\.\d MB, more than the 0\.1 MB", page.render(*taken[0]))
    assert "analysis.report.max_megabytes=0.1" in capsys.readouterr().out
