"""Where computation runs: the one reading of every `device` setting."""

from __future__ import annotations

import torch

from extract.errors import BadInput


def choose_device(name: str, setting: str) -> torch.device:
    """The device that `setting` names; "auto" is a GPU where there is one. BadInput for one that is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise BadInput(
            f"{setting}={name} cannot be used here ({str(error).splitlines()[0]}). Use {setting}=auto."
        ) from error
    return device
