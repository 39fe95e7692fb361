"""With a key, short waits between retries, and a ledger."""

from __future__ import annotations

from pathlib import Path

import pytest

from analysis.llm import client


@pytest.fixture(autouse=True)
def key_and_haste(key: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "FIRST_DELAY_S", 0.02)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "requests.sqlite"
