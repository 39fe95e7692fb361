"""Latent scaling against regressions over an explicit (tokens x width) design, and the owners on planted latents."""

import itertools

import numpy as np
import pytest
import torch

from analysis.config import OwnerConfig
from analysis.scaling import Codes, ScalingSums, decoder_gram, delta_norm_tags, holders, nu, owners
from train.histograms import delta_norm

D = 6


def planted(num_models: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """(codes (B, L), W_dec (L, M, D), b_dec (M, D), x (B, M, D)) with noise, so that no regression is trivial."""
    generator = torch.Generator().manual_seed(seed)
    acts_BL = torch.relu(torch.randn(50, 7, generator=generator, dtype=torch.float64) - 0.5)
    W_dec_LMD = torch.randn(7, num_models, D, generator=generator, dtype=torch.float64)
    b_dec_MD = torch.randn(num_models, D, generator=generator, dtype=torch.float64)
    noise_BMD = torch.randn(50, num_models, D, generator=generator, dtype=torch.float64)
    return acts_BL, W_dec_LMD, b_dec_MD, torch.einsum("bl,lmd->bmd", acts_BL, W_dec_LMD) + noise_BMD


def gather(acts_BL, W_dec_LMD, b_dec_MD, x_BMD, chunk: int = 50) -> ScalingSums:
    sums = ScalingSums(acts_BL.shape[1], W_dec_LMD.shape[1])
    for acts_bL, x_bMD in zip(acts_BL.split(chunk), x_BMD.split(chunk), strict=True):
        codes = Codes.from_dense(acts_bL)
        recons_bMD = codes.decode(W_dec_LMD.flatten(1)).unflatten(1, b_dec_MD.shape) + b_dec_MD
        sums.add(codes, x_bMD, recons_bMD, W_dec_LMD)
    return sums


def regression(f_B: torch.Tensor, d_D: torch.Tensor, y_BD: torch.Tensor) -> float:
    """The beta that minimises sum_t ||y_t - beta f_t d||^2, over every entry of the (B * D, 1) design."""
    design = torch.outer(f_B, d_D).reshape(-1, 1).numpy()
    return float(np.linalg.lstsq(design, y_BD.reshape(-1).numpy(), rcond=None)[0][0])


def nu_by_regression(acts_BL, W_dec_LMD, b_dec_MD, x_BMD, j: int, focus: int, other: int) -> tuple[float, float]:
    recons_BMD = torch.einsum("bl,lmd->bmd", acts_BL, W_dec_LMD) + b_dec_MD
    without_j = acts_BL.clone()
    without_j[:, j] = 0
    # The error target by its meaning: what is left of x when every latent but j (and the bias) is taken away.
    rest_BMD = x_BMD - torch.einsum("bl,lmd->bmd", without_j, W_dec_LMD) - b_dec_MD
    f_B, d_D = acts_BL[:, j], W_dec_LMD[j, focus]
    betas = [(regression(f_B, d_D, y[:, other]), regression(f_B, d_D, y[:, focus])) for y in (rest_BMD, recons_BMD)]
    return tuple(beta_other / beta_focus for beta_other, beta_focus in betas)


@pytest.mark.parametrize("num_models", [2, 3])
def test_nu_equals_the_regressions(num_models: int) -> None:
    case = planted(num_models)
    nu_error, nu_reconstruction = nu(gather(*case), decoder_gram(case[1]))
    for j in range(7):
        for focus in range(num_models):
            for other in range(num_models):
                expected = nu_by_regression(*case, j, focus, other)
                assert nu_error[j, focus, other].item() == pytest.approx(expected[0], rel=1e-9, abs=1e-9)
                assert nu_reconstruction[j, focus, other].item() == pytest.approx(expected[1], rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("chunk", [1, 7, 49])
def test_streaming_in_chunks_equals_one_batch(chunk: int) -> None:
    whole, streamed = gather(*planted(2)), gather(*planted(2), chunk=chunk)
    assert streamed.num_tokens == whole.num_tokens == 50
    assert torch.equal(streamed.num_active, whole.num_active)
    for name in ("sum_f", "sum_f2", "max_f", "error", "recons"):
        torch.testing.assert_close(getattr(streamed, name), getattr(whole, name), rtol=1e-12, atol=1e-12)


def test_small_temporaries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gather(*planted(3))
    monkeypatch.setattr("analysis.scaling.CHUNK_VALUES", 80)
    case = planted(3)
    torch.testing.assert_close(gather(*case).error, whole.error, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(decoder_gram(case[1]), torch.einsum("jad,jmd->jam", case[1], case[1]))


def test_sums_by_hand() -> None:
    acts_BL = torch.tensor([[2.0, 0, 0], [0, 3, 0], [4, 0, 0]], dtype=torch.float64)
    sums = ScalingSums(3, 1)
    W_dec_LMD = torch.tensor([[[1.0, 0]], [[0, 1]], [[1, 1]]], dtype=torch.float64)
    x_BMD = torch.tensor([[[2.5, 9]], [[7, 3]], [[4, 9]]], dtype=torch.float64)
    recons_BMD = torch.tensor([[[2.0, 0]], [[0, 3]], [[4, 0]]], dtype=torch.float64)
    sums.add(Codes.from_dense(acts_BL), x_BMD, recons_BMD, W_dec_LMD)
    assert sums.num_active.tolist() == [2, 1, 0]
    assert sums.sum_f.tolist() == [6, 3, 0]
    assert sums.sum_f2.tolist() == [20, 9, 0]
    assert sums.max_f.tolist() == [4, 3, 0]
    # Latent 0: 2 * (2.5 - 2) + 4 * (4 - 4) = 1 of the error and 2 * 2 + 4 * 4 = 20 of the reconstruction.
    assert sums.error.flatten().tolist() == [1, 0, 0]
    assert sums.recons.flatten().tolist() == [20, 9, 0]


def orthogonal_case(decoder: dict[int, tuple[float, ...]], x_gain: dict[int, tuple[float, ...]]):
    """Latents along the axes that fire one at a time, with decoder norms and true gains given by model, base first."""
    num_models = len(decoder[0])
    acts_BL = 2.0 * torch.eye(D, dtype=torch.float64)
    W_dec_LMD, x_BMD = (torch.zeros(D, num_models, D, dtype=torch.float64) for _ in range(2))
    for j, norms in decoder.items():
        for m in range(num_models):
            W_dec_LMD[j, m, j] = norms[m]
            x_BMD[j, m, j] = 2.0 * x_gain.get(j, norms)[m]
    return acts_BL, W_dec_LMD, torch.zeros(num_models, D, dtype=torch.float64), x_BMD


def owners_of(case, dedicated: list[int] | None = None) -> list[str]:
    sums, gram = gather(*case), decoder_gram(case[1])
    norms = gram.diagonal(dim1=1, dim2=2).sqrt()
    dedicated_owner = np.full(len(norms), -1) if dedicated is None else np.array(dedicated)
    nus = [value.numpy() for value in nu(sums, gram)]
    deltas = delta_norm(norms).numpy()
    fired_L, models = sums.num_active.numpy() > 0, ["pt", "it", "simpo"][: norms.shape[1]]
    return owners(deltas, *nus, fired_L, dedicated_owner, models, OwnerConfig()).tolist()


def test_owners_of_planted_latents() -> None:
    """0 base-only, 1 tuned-only, 2 shared, 3 shrunk to nothing in the base although the base uses it, 4 in between."""
    case = orthogonal_case({0: (1, 0), 1: (0, 1), 2: (1, 1), 3: (0, 1), 4: (0.6, 1)}, {3: (0.9, 1)})
    case[0][5] = 0
    assert owners_of(case) == ["pt", "it", "shared", "other", "other", "dead"]
    nu_error, _ = nu(gather(*case), decoder_gram(case[1]))
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
    nu_error, nu_reconstruction = nu(gather(*case), decoder_gram(W_dec_LMD))
    assert (nu_error[0, 0, 1].item(), nu_error[1, 1, 0].item()) == (0, 0)
    assert (nu_reconstruction[0, 0, 1].item(), nu_reconstruction[1, 1, 0].item()) == (1, 1)
    assert owners_of(case) == ["other", "other"]


def test_dedicated_latents_are_judged_by_nu_alone() -> None:
    """The base rebuilds 0.6 of the direction: too much for an ordinary latent, little enough for a dedicated one."""
    acts_BL = torch.tensor([[2.0, 2.0], [2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    W_dec_LMD = torch.tensor([[[0.0, 0], [1, 0]], [[0.6, 0.8], [0, 1]]], dtype=torch.float64)
    x_BMD = torch.einsum("bl,lmd->bmd", acts_BL, W_dec_LMD)
    case = (acts_BL, W_dec_LMD, torch.zeros(2, 2, dtype=torch.float64), x_BMD)
    _, nu_reconstruction = nu(gather(*case), decoder_gram(W_dec_LMD))
    # <d, sum_t f recons_base> = 4 * 0.6, over <d, sum_t f recons_tuned> = 8: with the third twin fired once, 0.3.
    assert nu_reconstruction[0, 1, 0].item() == pytest.approx(0.3)
    x2 = (acts_BL[:1], W_dec_LMD, case[2], x_BMD[:1])
    assert nu(gather(*x2), decoder_gram(W_dec_LMD))[1][0, 1, 0].item() == pytest.approx(0.6)
    assert owners_of(x2)[0] == "other"
    assert owners_of(x2, dedicated=[1, -1])[0] == "it"
    assert owners_of(x2, dedicated=[0, -1])[0] == "other"


def test_nan_rules() -> None:
    """Never fired: all NaN. A zero row: NaN as focus, 0 as the other. beta_focus = 0: NaN. None of them is owned."""
    acts_BL, W_dec_LMD, b_dec_MD, x_BMD = orthogonal_case({0: (1, 1), 1: (0, 1), 2: (1, 1)}, {2: (0, 1)})
    acts_BL[0] = 0
    nu_error, nu_reconstruction = nu(gather(acts_BL, W_dec_LMD, b_dec_MD, x_BMD), decoder_gram(W_dec_LMD))
    assert nu_error[0].isnan().all() and nu_reconstruction[0].isnan().all()
    assert nu_error[1, 0].isnan().all() and nu_error[1, 1, 0] == 0
    # The base never uses latent 2: recons holds 2 e_2, x nothing, so beta_error of the base is -1 + 1 = 0.
    assert nu_error[2, 0].isnan().all() and nu_error[2, 1, 0] == 0


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


def test_codes_decode_like_the_dense_product() -> None:
    acts_BL, W_dec_LMD, _, _ = planted(2)
    acts_BL[3] = 0
    weight_LK = W_dec_LMD.flatten(1)
    torch.testing.assert_close(Codes.from_dense(acts_BL).decode(weight_LK), acts_BL @ weight_LK)


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_batch_in_which_nothing_fires(num_tokens: int) -> None:
    codes = Codes.from_dense(torch.zeros(num_tokens, 4))
    x_BMD, W_dec_LMD = torch.randn(num_tokens, 2, D), torch.randn(4, 2, D)
    assert codes.decode(W_dec_LMD.flatten(1)).tolist() == [[0.0] * 2 * D] * num_tokens
    sums = ScalingSums(4, 2)
    sums.add(codes, x_BMD, torch.zeros_like(x_BMD), W_dec_LMD)
    assert sums.num_tokens == num_tokens and not sums.num_active.any() and not sums.error.any()
