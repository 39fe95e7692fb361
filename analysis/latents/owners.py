"""Which models a latent belongs to: by the norms of its decoder rows, then by nu.

Shapes: L latents, M models. Pairs of models index the last two axes, focus first.
"""

from __future__ import annotations

import numpy as np

from analysis.config import OwnerConfig
from analysis.latents.columns import owner_name


def delta_norm_tags(
    delta_norm_L: np.ndarray, fired_L: np.ndarray, names: tuple[str, str], owner: OwnerConfig
) -> np.ndarray:
    """`<first>-only`, `<second>-only`, `shared` or `other` by the Delta-norm of one pair; `dead` if it never fired."""
    conditions = [
        ~fired_L,
        delta_norm_L < owner.delta_norm_low,
        delta_norm_L > owner.delta_norm_high,
        (delta_norm_L >= owner.shared_low) & (delta_norm_L <= owner.shared_high),
    ]
    return np.select(conditions, ["dead", f"{names[0]}-only", f"{names[1]}-only", "shared"], "other")


def holders(delta_norm_LMM: np.ndarray, dedicated_owner_L: np.ndarray, owner: OwnerConfig) -> np.ndarray:
    """(L, M): the models that the weights alone allow to own latent j, all False if there is no such set of models.

    Of an ordinary latent, every pair within the set has a Delta-norm in the shared range, and every model of the set
    one beyond the thresholds towards every model outside; how these compare among each other does not matter. At most
    one set fulfils that. The Delta-norm of a dedicated latent is 0 or 1 by construction and proves nothing, so the
    model that it is dedicated to holds it.
    """
    num_models = delta_norm_LMM.shape[1]
    upper = np.triu(np.ones((num_models, num_models), dtype=bool), 1)
    shared_LMM = upper & (delta_norm_LMM >= owner.shared_low) & (delta_norm_LMM <= owner.shared_high)
    second_LMM = upper & (delta_norm_LMM > owner.delta_norm_high)
    # [j, a, b]: a has the latent and b lacks it. The set is those that lack it compared with nobody.
    only_LMM = (upper & (delta_norm_LMM < owner.delta_norm_low)) | second_LMM.swapaxes(1, 2)
    held_LM = np.invert(only_LMM.any(axis=1))
    alike_LMM = shared_LMM | shared_LMM.swapaxes(1, 2) | np.eye(num_models, dtype=bool)
    agrees_LMM = np.where(held_LM[:, None, :], alike_LMM, only_LMM)
    agreed_L11 = np.all(agrees_LMM | ~held_LM[:, :, None], axis=(1, 2), keepdims=True)
    dedicated_L1 = dedicated_owner_L[:, None]
    return np.where(dedicated_L1 >= 0, dedicated_L1 == np.arange(num_models), held_LM & agreed_L11[:, :, 0])


def owners(
    delta_norm_LMM: np.ndarray,
    nu_error_LMM: np.ndarray,
    nu_reconstruction_LMM: np.ndarray,
    fired_L: np.ndarray,
    dedicated_owner_L: np.ndarray,
    models: list[str],
    owner: OwnerConfig,
) -> np.ndarray:
    """The owner of every latent: the set of models that share it and that the others lack (`columns.owner_name`).

    dead    it never fired
    a, a+b  its `holders`, if with each of them as focus |nu_error| and |nu_reconstruction| are small towards every
            model outside
    shared  all models hold it
    other   the rest; a nu that is NaN passes no threshold
    """
    held_LM = holders(delta_norm_LMM, dedicated_owner_L, owner)
    max_reconstruction_L = np.where(
        dedicated_owner_L < 0, owner.max_nu_reconstruction, owner.max_nu_reconstruction_dedicated
    )
    exclusive_LMM = (np.abs(nu_error_LMM) < owner.max_nu_error) & (
        np.abs(nu_reconstruction_LMM) < max_reconstruction_L[:, None, None]
    )
    asked_LMM = held_LM[:, :, None] & ~held_LM[:, None, :]
    held_LM &= (exclusive_LMM | ~asked_LMM).all(axis=(1, 2))[:, None]
    sets_SM, set_L = np.unique(held_LM, axis=0, return_inverse=True)
    names_S = np.array([owner_name([models[m] for m in np.flatnonzero(set_M)], models) for set_M in sets_SM])
    return np.where(fired_L, names_S[set_L.reshape(-1)], "dead")
