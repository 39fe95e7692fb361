"""The owners of planted latents: exclusive, shared, shrunk, decoupled, dedicated, of sets of models; the limits."""

import itertools

import numpy as np
import pytest
import torch

from analysis.config import OwnerConfig
from analysis.latents.owners import delta_norm_tags, holders, owners
from analysis.latents.scaling import decoder_gram, nu
from tests.analysis.latents.test_scaling import gather, orthogonal_case
from train.histograms import delta_norm


def owners_of(case, dedicated: list[int] | None = None) -> list[str]:
    sums, gram = gather(*case), decoder_gram(case[1])
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    dedicated_owner = np.full(len(norms), -1) if dedicated is None else np.array(dedicated)
    nus = [value.numpy() for value in nu(sums.total(), gram)]
    deltas = delta_norm(norms).numpy()
    fired_L, models = (case[0] > 0).any(dim=0).numpy(), ["pt", "it", "simpo"][: norms.shape[1]]
    return owners(deltas, *nus, fired_L, dedicated_owner, models, OwnerConfig()).tolist()


def test_owners_of_planted_latents() -> None:
    """0 base-only, 1 tuned-only, 2 shared, 3 shrunk to nothing in the base although the base uses it, 4 in between."""
    case = orthogonal_case({0: (1, 0), 1: (0, 1), 2: (1, 1), 3: (0, 1), 4: (0.6, 1)}, {3: (0.9, 1)})
    case[0][5] = 0
    assert owners_of(case) == ["pt", "it", "shared", "other", "other", "dead"]
    nu_error, _ = nu(gather(*case).total(), decoder_gram(case[1]))
    assert nu_error[3, 1, 0].item() == pytest.approx(0.9)
    assert nu_error[1, 1, 0].item() == pytest.approx(0.0)


@pytest.mark.parametrize(
    ("delta", "nu_error", "nu_reconstruction", "dedicated", "expected"),
    [
        (0.91, 0.19, 0.49, -1, "it"),
        (0.91, -0.19, -0.49, -1, "it"),
        (0.91, -0.21, 0.0, -1, "other"),  # an opposite use is a use
        (0.91, 0.0, -0.51, -1, "other"),
        (0.91, np.nan, 0.0, -1, "other"),
        (0.91, 0.0, np.nan, -1, "other"),
        (0.9, 0.0, 0.0, -1, "other"),
        (0.1, 0.0, 0.0, -1, "other"),
        (0.09, 0.0, 0.0, -1, "pt"),
        (0.4, 1.0, 1.0, -1, "shared"),
        (0.6, 1.0, 1.0, -1, "shared"),
        (0.61, 0.0, 0.0, -1, "other"),
        (0.5, 1.0, 1.0, 1, "other"),  # never `shared`: a dedicated latent was given to one model
        (1.0, 0.19, -0.74, 1, "it"),
        (1.0, 0.0, -0.76, 1, "other"),
        (1.0, -0.21, 0.0, 1, "other"),
    ],
)
def test_owners_at_the_limits(
    delta: float, nu_error: float, nu_reconstruction: float, dedicated: int, expected: str
) -> None:
    deltas = np.array([[[0.5, delta], [1 - delta, 0.5]]])
    nus = (np.full((1, 2, 2), value) for value in (nu_error, nu_reconstruction))
    found = owners(deltas, *nus, np.array([True]), np.array([dedicated]), ["pt", "it"], OwnerConfig())
    assert found.tolist() == [expected]


def test_decoupled_twins_are_not_owned() -> None:
    """One direction has two latents that always fire together, one a model: nu_reconstruction is 1, nu_error 0."""
    acts_BL = torch.tensor([[2.0, 2.0]], dtype=torch.float64)
    W_dec_LMD = torch.tensor([[[1.0, 0], [0, 0]], [[0, 0], [1, 0]]], dtype=torch.float64)
    x_BMD = torch.tensor([[[2.0, 0], [2.0, 0]]], dtype=torch.float64)
    case = (acts_BL, W_dec_LMD, torch.zeros(2, 2, dtype=torch.float64), x_BMD)
    nu_error, nu_reconstruction = nu(gather(*case).total(), decoder_gram(W_dec_LMD))
    assert (nu_error[0, 0, 1].item(), nu_error[1, 1, 0].item()) == (0, 0)
    assert (nu_reconstruction[0, 0, 1].item(), nu_reconstruction[1, 1, 0].item()) == (1, 1)
    assert owners_of(case) == ["other", "other"]


def test_dedicated_latents_are_judged_by_nu_alone() -> None:
    """The base rebuilds 0.6 of the direction: too much for an ordinary latent, little enough for a dedicated one."""
    acts_BL = torch.tensor([[2.0, 2.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    W_dec_LMD = torch.tensor([[[0.0, 0], [1, 0]], [[0.6, 0.8], [0, 1]]], dtype=torch.float64)
    x_BMD = torch.einsum("bl,lmd->bmd", acts_BL, W_dec_LMD)
    case = (acts_BL, W_dec_LMD, torch.zeros(2, 2, dtype=torch.float64), x_BMD)
    _, nu_reconstruction = nu(gather(*case).total(), decoder_gram(W_dec_LMD))
    # <d, sum_t f recons_base> = 4 * 0.6, over <d, sum_t f recons_tuned> = 8: with the third twin fired once, 0.3.
    assert nu_reconstruction[0, 1, 0].item() == pytest.approx(0.3)
    x2 = (acts_BL[:1], W_dec_LMD, case[2], x_BMD[:1])
    assert nu(gather(*x2).total(), decoder_gram(W_dec_LMD))[1][0, 1, 0].item() == pytest.approx(0.6)
    assert owners_of(x2)[0] == "other"
    assert owners_of(x2, dedicated=[1, -1])[0] == "it"
    assert owners_of(x2, dedicated=[0, -1])[0] == "other"


def test_delta_norm_and_its_tags() -> None:
    norms_LM = torch.tensor([[2.0, 0], [0, 3], [1, 1], [1, 0.5], [0, 0], [1, 1]])
    deltas = delta_norm(norms_LM)[:, 0, 1].numpy()
    np.testing.assert_array_equal(deltas, [0, 1, 0.5, 0.25, np.nan, 0.5])
    fired = np.array([True, True, True, True, True, False])
    tags = delta_norm_tags(deltas, fired, ("pt", "it"), OwnerConfig())
    assert tags.tolist() == ["pt-only", "it-only", "shared", "other", "other", "dead"]


def test_one_and_two_of_three_models_own_planted_latents() -> None:
    case = orthogonal_case({0: (1, 0, 0), 1: (0, 1, 0), 2: (0, 0, 1), 3: (1, 1, 0), 4: (1, 0, 1), 5: (0, 1, 1)}, {})
    assert owners_of(case) == ["pt", "it", "simpo", "pt+it", "pt+simpo", "it+simpo"]
    case[0][5] = 0
    assert owners_of(case)[5] == "dead"


def test_what_keeps_a_latent_from_two_of_three_models() -> None:
    """0 pt uses without a row of its own, of 1 pt has half a row, of 2 `it` has half a row, 3 all have, 4 nobody has.
    Of 5 pt and `it` have remnants, one twice the other: simpo's alone all the same.
    """
    norms = {0: (0, 1, 1), 1: (0.5, 1, 1), 2: (0, 0.5, 1), 3: (1, 1, 1), 4: (0, 0, 0), 5: (0.05, 0.1, 1)}
    case = orthogonal_case(norms, {0: (0.9, 1, 1)})
    assert owners_of(case) == ["other", "other", "other", "shared", "other", "simpo"]


def test_decoder_norms_allow_at_most_one_set_of_models() -> None:
    norms_LM = torch.tensor([[0.0, 0, 1], [0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0.5, 1]])
    held = holders(delta_norm(norms_LM).numpy(), np.full(5, -1), OwnerConfig())
    assert held.astype(int).tolist() == [[0, 0, 1], [0, 1, 1], [1, 0, 0], [1, 1, 1], [0, 0, 0]]
    dedicated = holders(delta_norm(norms_LM).numpy(), np.full(5, 1), OwnerConfig())
    assert dedicated.astype(int).tolist() == [[0, 1, 0]] * 5


def owner_by_trying(delta_MM, nu_error_MM, nu_reconstruction_MM, models: list[str]) -> str:
    """The owner of one ordinary latent: the rules of a pair, applied to every ordered pair of every set of models."""

    def shared(a: int, b: int) -> bool:
        return bool(0.4 <= delta_MM[min(a, b), max(a, b)] <= 0.6)

    def only(a: int, b: int) -> bool:
        without = delta_MM[a, b] < 0.1 if a < b else delta_MM[b, a] > 0.9
        return bool(without and abs(nu_error_MM[a, b]) < 0.2 and abs(nu_reconstruction_MM[a, b]) < 0.5)

    numbers = range(len(models))
    fitting = [
        members
        for size in range(1, len(models) + 1)
        for members in itertools.combinations(numbers, size)
        if all(shared(a, b) for a, b in itertools.permutations(members, 2))
        and all(only(a, b) for a in members for b in numbers if b not in members)
    ]
    assert len(fitting) <= 1
    if not fitting:
        return "other"
    return "shared" if len(fitting[0]) == len(models) else "+".join(models[m] for m in fitting[0])


@pytest.mark.parametrize(("num_models", "num_owners"), [(2, 4), (3, 8), (4, 16)])
def test_owners_equal_trying_every_set(num_models: int, num_owners: int) -> None:
    rng, models = np.random.default_rng(num_models), ["a", "b", "c", "d"][:num_models]
    norms_LM = rng.choice([0, 0.04, 0.19, 0.21, 0.8, 1.0], (4000, num_models), p=[0.3, 0.1, 0.03, 0.02, 0.15, 0.4])
    nus = [rng.choice([0, -0.19, 0.21, np.nan], (4000, *[num_models] * 2), p=[0.6, 0.36, 0.03, 0.01]) for _ in range(2)]
    nus[1] *= 2.5  # limits of 0.5 instead of 0.2
    deltas = delta_norm(torch.tensor(norms_LM)).numpy()
    found = owners(deltas, *nus, np.full(4000, True), np.full(4000, -1), models, OwnerConfig()).tolist()
    assert found == [owner_by_trying(*latent, models) for latent in zip(deltas, *nus, strict=True)]
    assert len(set(found)) == num_owners  # every set occurs, and `other`


@pytest.mark.parametrize(
    ("focus", "other", "expected"),
    [(1, 0, "other"), (2, 0, "other"), (1, 2, "b+c"), (2, 1, "b+c"), (0, 1, "b+c"), (0, 2, "b+c")],
)
def test_two_of_three_models_are_judged_by_nu_towards_the_third(focus: int, other: int, expected: str) -> None:
    nu_error = np.zeros((1, 3, 3))
    nu_error[0, focus, other] = 0.21
    deltas, free = delta_norm(torch.tensor([[0.0, 1, 1]])).numpy(), np.array([-1])
    for nus in ((nu_error, np.zeros((1, 3, 3))), (np.zeros((1, 3, 3)), 2.5 * nu_error)):
        assert owners(deltas, *nus, np.array([True]), free, ["a", "b", "c"], OwnerConfig()).tolist() == [expected]


@pytest.mark.parametrize(("other", "expected"), [(0, "other"), (1, "other"), (2, "c")])
def test_three_models_one_bad_nu_is_enough(other: int, expected: str) -> None:
    nu_error = np.zeros((1, 3, 3))
    nu_error[0, 2, other] = 0.21
    deltas = delta_norm(torch.tensor([[0.0, 0, 1]])).numpy()
    found = owners(
        deltas, nu_error, np.zeros((1, 3, 3)), np.array([True]), np.array([-1]), ["a", "b", "c"], OwnerConfig()
    )
    assert found.tolist() == [expected]
