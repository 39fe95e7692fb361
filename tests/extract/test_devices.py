"""What a `device` setting means."""

from __future__ import annotations

import pytest
import torch

from extract.devices import choose_device
from extract.errors import BadInput


def test_auto_is_a_gpu_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, kind in ((False, "cpu"), (True, "cuda")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda there=there: there)
        assert choose_device("auto", "training.device").type == kind
    assert choose_device("cpu", "training.device") == torch.device("cpu")


@pytest.mark.parametrize("name", ["quantum", "cuda:99"])
def test_an_impossible_device_is_named(name: str) -> None:
    with pytest.raises(BadInput, match=f"activations.device={name} cannot be used here.*activations.device=auto"):
        choose_device(name, "activations.device")
