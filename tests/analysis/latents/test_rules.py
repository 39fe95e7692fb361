"""How many latents each rule selects: by hand."""

from __future__ import annotations

import csv
import io

import numpy as np
import torch

from analysis.config import OwnerConfig
from analysis.latents.rules import exclusive_by_norm, exclusive_by_nu, rules_csv
from train.histograms import delta_norm


def table_of(
    norms: list, nus: list, fired: list[bool], owners: list[str], models: list[str], dedicated: int = 0
) -> dict[tuple, int]:
    """{(rule, delta_norm_low, max_nu_error, max_nu_reconstruction, owner): count}; `nus` (L,) are of all pairs.

    The first `dedicated` latents are dedicated ones.
    """
    deltas = delta_norm(torch.tensor(norms)).numpy()
    nu = np.broadcast_to(np.array(nus)[:, None, None], deltas.shape)
    is_dedicated = np.arange(len(norms)) < dedicated
    text = rules_csv(deltas, (nu, 2 * nu), np.array(fired), np.array(owners), is_dedicated, models, OwnerConfig())
    names = ("rule", "delta_norm_low", "max_nu_error", "max_nu_reconstruction", "owner")
    return {tuple(row[name] for name in names): int(row["count"]) for row in csv.DictReader(io.StringIO(text))}


def test_rules_of_a_pair() -> None:
    norms = [[1.0, 0.0], [0.0, 1.0], [0.3, 1.0], [1.0, 1.0], [0.0, 1.0], [0.0, 1.0]]
    nus = [0.04, 0.15, 0.15, 0.15, 0.9, 0.01]
    fired = [True, True, True, True, True, False]
    owners = ["pt", "it", "other", "shared", "other", "dead"]
    found = table_of(norms, nus, fired, owners, ["pt", "it"])
    assert found["delta_norm", "0.1", "", "", "pt"] == 1
    assert found["delta_norm", "0.1", "", "", "it"] == 2  # the last never fired
    assert found["delta_norm", "0.2", "", "", "it"] == 3  # norms 0.3 and 1: a Delta-norm of 0.85
    assert found["nu", "", "0.05", "0.1", "it"] == 1  # for both models alike: nu asks for no norm
    assert found["nu", "", "0.2", "0.5", "pt"] == found["nu", "", "0.2", "0.5", "it"] == 4
    assert found["nu", "", "0.1", "0.2", "it"] == 1
    assert found["delta_norm_and_nu", "0.1", "0.2", "0.5", "it"] == 1
    assert found["delta_norm_and_nu", "0.2", "0.2", "0.5", "it"] == 2
    configured = {key[-1]: count for key, count in found.items() if key[0].startswith("configured")}
    assert configured == {"pt": 1, "it": 1, "shared": 1, "other": 2, "dead": 1}


def test_the_rule_of_dedicated_latents_has_rows_with_its_own_thresholds() -> None:
    owners = ["it", "it", "dead", "it", "shared"]
    found = table_of([[0.0, 1.0]] * 5, [0.1] * 5, [True] * 5, owners, ["pt", "it"], dedicated=3)
    counts = {key: count for key, count in found.items() if key[0].startswith("configured")}
    ordinary, dedicated = ("configured", "0.1", "0.2", "0.5"), ("configured_dedicated", "", "0.2", "0.75")
    assert counts == {
        **{(*ordinary, name): count for name, count in {"pt": 0, "it": 1, "shared": 1, "other": 0, "dead": 0}.items()},
        **{(*dedicated, name): count for name, count in {"pt": 0, "it": 2, "shared": 0, "other": 0, "dead": 1}.items()},
    }


def test_with_three_models_a_rule_must_hold_towards_both_others() -> None:
    norms = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 1]])
    by_norm = exclusive_by_norm(delta_norm(norms).numpy(), 0.1, 0.9)
    assert by_norm.astype(int).tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1], [0, 0, 0]]
    error = np.zeros((1, 3, 3))
    error[0, 1, 2], error[0, 2, 0] = 0.21, np.nan
    assert exclusive_by_nu(error, np.zeros((1, 3, 3)), 0.2, 0.5).tolist() == [[True, False, False]]
    found = table_of(norms.tolist(), [0.0] * 4, [True] * 4, ["a", "b", "c", "b+c"], ["a", "b", "c"])
    assert found["configured", "0.1", "0.2", "0.5", "b+c"] == 1 and found["delta_norm", "0.1", "", "", "a"] == 1
