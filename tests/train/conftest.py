from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
from pool import close_pools

from extract import live
from train.config import TrainSettings
from train.online import OnlineActivations


@pytest.fixture(scope="session", autouse=True)
def no_processes_stay() -> Iterator[None]:
    """Ends the pools of processes after the last test."""
    yield
    close_pools()


@pytest.fixture
def online() -> Iterator[Callable[[TrainSettings], OnlineActivations]]:
    """Opens activations that are computed on the way, and closes them in the end."""
    opened = []

    def open_online(settings: TrainSettings) -> OnlineActivations:
        opened.append(OnlineActivations.open(settings))
        return opened[-1]

    yield open_online
    for data in opened:
        data.close()


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on no model may be loaded."""
    return lambda: monkeypatch.setattr(live, "load_blocks", lambda *_: pytest.fail("a model was loaded"))
