"""A key for the tests' server of the Messages API, where a test asks for one."""

from __future__ import annotations

import pytest


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ANTHROPIC_API_KEY", "key-of-the-test")
    monkeypatch.delenv("ANTHROPIC_AUTH_TOKEN", raising=False)
