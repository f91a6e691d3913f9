"""What several ranks refuse before the first step: trainings that they cannot share, and ranks that do not train the same."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.checkpoint import differences_of
from bayes_klrl.inference.svi.optimizers import Natural, optimizer_of
from bayes_klrl.inference.svi.ranks.group import Ranks
from bayes_klrl.typing import JaxModel, LanguageModel

__all__ = ["check_can_share", "check_same_training"]


def check_can_share(recipe: Any, prior: LanguageModel, ranks: Ranks) -> None:
    """Refuse a training that several ranks cannot share; nothing has to be computed for it.

    Raises
    ------
    BayesKLRLError
        If there are more ranks than particles, if the prior is on JAX, if the optimizer is the natural gradient, or, where
        parameters are spread over the ranks, if the critic reads hidden states.
    """
    if ranks.size == 1:
        return
    if isinstance(prior, JaxModel):
        raise BayesKLRLError(
            f"{ranks.size} ranks share a training on torch; the prior is a {type(prior).__name__}, on JAX. Use a "
            "bk.TorchLM, or start one process."
        )
    if ranks.size > recipe.num_particles:
        raise BayesKLRLError(
            f"{ranks.size} ranks cannot share num_particles={recipe.num_particles} completions per prompt: some would have "
            f"none to compute. Start at most {recipe.num_particles} processes, or raise num_particles."
        )
    if recipe.optimizer is not None and isinstance(optimizer_of(recipe.optimizer), Natural):
        raise BayesKLRLError(
            f'optimizer="natural" is for one process, not for {ranks.size} ranks. It needs the products of the scores of all '
            'draws with one another, which every rank would have to compute in full. Use "kl_sgd" or "adam", or start one '
            "process."
        )
    if ranks.spreads and isinstance(recipe.twist, str) and recipe.twist == "hidden_states":
        raise BayesKLRLError(
            'twist="hidden_states" reads hidden states apart from the head, and with FSDP the model is called as a whole. Use '
            "bk.PartialRewardTwist() or 'none', or start the ranks without FSDP."
        )


def check_same_training(belongs_to: Mapping[str, Any], ranks: Ranks) -> None:
    """Refuse to begin where ranks have different posteriors, recipes or seeds, and name the differences.

    Parameters
    ----------
    belongs_to
        What `checkpoint.fingerprint` returns on this rank.
    ranks
        The group.

    Raises
    ------
    BayesKLRLError
        On all ranks, if one of them differs from rank 0.
    """
    everybodys = ranks.objects(json.dumps(belongs_to))
    first = json.loads(everybodys[0])
    for rank, text in enumerate(everybodys):
        words = differences_of(first, json.loads(text), "on rank 0", f"on rank {rank}")
        if words:
            raise BayesKLRLError(
                f"The {ranks.size} ranks do not train the same guide ({words}). All ranks run the same file with the same "
                "options and seed; a file that draws at random must do so from a seed."
            )
