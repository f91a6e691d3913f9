"""Turning a policy, tuned here or by another trainer, into a `LanguageModel` on the prior's vocabulary."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from bayes_klrl.checks import check_posterior_given
from bayes_klrl.draws import Cost, Draws
from bayes_klrl.errors import BayesKLRLError, CheckpointError
from bayes_klrl.inference.sampling.drawing import draw
from bayes_klrl.inference.svi.bayesian.recipe import BayesianFit
from bayes_klrl.inference.svi.fit import Fit
from bayes_klrl.models.checkpoint_files import TRAINER_STATE, checkpoint_number, why_not_whole
from bayes_klrl.models.ngram_lm.lm import NgramLM
from bayes_klrl.posterior import Posterior, check_context, check_language_model
from bayes_klrl.randomness import Streams
from bayes_klrl.typing import GuideRecipe, LanguageModel

__all__ = ["PolicyDraws", "as_policy", "check_of", "covers_prior", "policy_draws", "policy_folder"]

_CONFIGS = ("config.json", "adapter_config.json")
_MOST_ENTRIES = 10_000_000  # largest n-gram tables whose zeros are compared
_PROBE = "A quick test: 3 naïve foxes, isn't it?\n"


def as_policy(policy: Any, posterior: Posterior) -> LanguageModel:
    """Return a policy that draws and scores completions of this posterior's prompts.

    Parameters
    ----------
    policy
        A language model, a `Fit` (for a `BayesianFit`, its predictive policy), or a folder: what a `BayesianFit` saved, a
        Hugging Face model, a PEFT adapter, or the output of a TRL trainer, whose last `checkpoint-N` is taken if the model
        itself was not saved (and is refused by name while it is being written). A folder is loaded at the prior's
        temperature, with the prior's EOS ids and on its device, because these three are part of the problem. An adapter that
        names no base model is put on the prior.
    posterior
        The posterior. The policy must have the vocabulary of its prior.

    Raises
    ------
    CheckpointError
        If the folder holds no model, or if its vocabulary, EOS ids or tokenizer differ from the prior's.
    BayesKLRLError
        If `policy` is none of these, or if prompt and completion together exceed its context.
    """
    was_loaded = isinstance(policy, str | os.PathLike)
    if isinstance(policy, Fit):
        policy = policy.guide
    elif isinstance(policy, str | os.PathLike) and BayesianFit.is_saved_in(Path(policy)):
        policy = BayesianFit.load(Path(policy), posterior).guide
    elif isinstance(policy, str | os.PathLike):
        policy = load_policy(Path(policy), posterior.prior)
    elif isinstance(policy, GuideRecipe):
        raise BayesKLRLError("An SVI is a recipe for a policy: fit it first, and pass svi.fit(posterior, seed=...).")
    check_language_model("The policy", policy)
    check_same_vocabulary(policy, posterior.prior)
    check_context(posterior.prompt_ids, posterior.max_new_tokens, policy)
    if not was_loaded and getattr(policy, "self_check", None) is not None:
        policy.check_numbers()  # training has changed it since the check at its loading
    return policy  # type: ignore[no-any-return]


def check_of(lm: LanguageModel) -> str:
    """Return how a model's log-probs were checked, in words; empty for a model without a self-check."""
    if not hasattr(lm, "self_check"):
        return ""
    return "not checked (check=False)" if lm.self_check is None else str(lm.self_check)


def policy_draws(
    posterior: Posterior, policy: LanguageModel, num_draws: int, streams: Streams, *, progress: bool = False
) -> Draws:
    """Return N draws per prompt from a policy, equally weighted, (P, N), scored under policy and prior while decoding."""
    drawn = draw(
        (policy, posterior.prior),
        posterior,
        num_draws,
        streams,
        description="drawing from the policy",
        progress=progress,
    )
    draws = Draws.equally_weighted(
        posterior,
        drawn.sequences,
        method="policy",
        reward=drawn.reward,
        log_prior=drawn.log_probs[1],
        log_proposal=drawn.log_probs[0],
        cost=Cost(0.0, drawn.model_tokens),
    )
    return replace(draws, info=drawn.info)


@dataclass(frozen=True)
class PolicyDraws:
    """`policy_draws` as an algorithm, so that its prompts can be spread over workers."""

    policy: LanguageModel
    num_draws: int

    @property
    def rows_per_prompt(self) -> int:
        """Completions per prompt; see `runners.blocks`."""
        return self.num_draws

    def run(self, posterior: Posterior, *, seed: int, progress: bool = False) -> Draws:
        """See `Algorithm.run`."""
        check_posterior_given(posterior)
        return policy_draws(posterior, self.policy, self.num_draws, Streams.of(seed), progress=progress)


def covers_prior(policy: LanguageModel, prior: LanguageModel) -> bool:
    """Return whether a policy is known to give positive probability to all that the prior does.

    It is known if the policy has full support or is the prior itself; for two n-gram models, their tables are compared. In all
    other cases the answer is False.
    """
    if policy is prior or policy.full_support:
        return True
    if prior.full_support or not (isinstance(policy, NgramLM) and isinstance(prior, NgramLM)):
        return False
    if policy.vocab_size ** max(policy.order, prior.order) > _MOST_ENTRIES:
        return False
    # a shorter context is any longer one that ends in it, and leading axes broadcast
    return bool((np.isfinite(policy.log_probs) | np.isneginf(prior.log_probs)).all())


def load_policy(folder: Path, prior: LanguageModel) -> LanguageModel:
    """Return the model in a folder: an `NgramLM` of ours, or else a `TorchLM` at the prior's temperature.

    The `TorchLM` has no tokenizer of its own: the prior's tokenizer reads all completions, and trainers often save one with a
    padding token for which the model has no logit. That both tokenizers give each id the same meaning is still checked.
    """
    if folder.is_dir() and NgramLM.is_saved_in(folder):
        return NgramLM.from_pretrained(folder)
    from bayes_klrl.models.torch_lm.checkpoint import load
    from bayes_klrl.models.torch_lm.lm import TorchLM, output_size

    model, tokenizer = load(model_folder(folder), None, base=prior.module if isinstance(prior, TorchLM) else None)
    check_same_size(output_size(model), prior)
    check_same_tokens(tokenizer, prior.tokenizer)
    return TorchLM(
        model,
        device=getattr(prior, "device", None),
        eos_token_id=prior.eos_token_ids,
        temperature=getattr(prior, "temperature", 1.0),
    )


def policy_folder(policy: Any) -> Path | None:
    """Return the folder that `as_policy` reads a policy of Hugging Face's format from; None for all other policies."""
    if not isinstance(policy, str | os.PathLike):
        return None
    folder = Path(policy)
    return None if BayesianFit.is_saved_in(folder) or NgramLM.is_saved_in(folder) else model_folder(folder)


def model_folder(folder: Path) -> Path:
    """Return the folder itself if it holds a model, else its last `checkpoint-N` as written by a trainer.

    Raises
    ------
    CheckpointError
        If there is no such folder, or the last checkpoint is not whole: an earlier one would be another policy.
    """
    if not folder.is_dir():
        raise CheckpointError(f"There is no folder {str(folder)!r} to load a policy from.")
    if any((folder / name).is_file() for name in _CONFIGS) or any(folder.glob("*.gguf")):
        return folder
    numbers = {path: number for path in folder.iterdir() if (number := checkpoint_number(path)) is not None}
    if not numbers:
        raise CheckpointError(
            f"{str(folder)!r} is not a model: it has neither a config.json or adapter_config.json nor a checkpoint-N in it."
        )
    last = sorted(path for path, number in numbers.items() if number == max(numbers.values()))
    if len(last) > 1:
        raise CheckpointError(
            f"{' and '.join(path.name for path in last)} in {str(folder)!r} have the same number, so none of them is the "
            "last. Give the folder of the one that you mean."
        )
    if (reason := why_not_whole(last[0], any((path / TRAINER_STATE).is_file() for path in numbers))) is not None:
        raise CheckpointError(
            f"The last checkpoint in {str(folder)!r} is {last[0].name}, and {reason}. If the trainer is writing it, wait; or "
            "give the folder of an earlier checkpoint."
        )
    return last[0]


def check_same_vocabulary(policy: LanguageModel, prior: LanguageModel) -> None:
    """Raise a `CheckpointError` if the policy's token ids do not mean the same as the prior's."""
    check_same_size(policy.vocab_size, prior)
    if policy.eos_token_ids != prior.eos_token_ids:
        raise CheckpointError(
            f"Completions of the policy end with EOS {sorted(policy.eos_token_ids)}, the prior's with "
            f"{sorted(prior.eos_token_ids)}. They must share one vocabulary: give both the same eos_token_id."
        )
    check_same_tokens(policy.tokenizer, prior.tokenizer)


def check_same_size(vocab_size: int, prior: LanguageModel) -> None:
    """Raise a `CheckpointError` if the policy has more or fewer tokens than the prior."""
    if vocab_size != prior.vocab_size:
        raise CheckpointError(
            f"The policy has {vocab_size} tokens, the prior {prior.vocab_size}. They must share one vocabulary: certify "
            "against the model that the policy was tuned from. If tokens were added for the tuning, use the model that has "
            "them."
        )


def check_same_tokens(theirs: Any | None, ours: Any | None) -> None:
    """Raise a `CheckpointError` if an id means different things in two tokenizers; a missing one (None) is not checked."""
    if theirs is None or ours is None or theirs is ours:
        return
    policy_tokens, prior_tokens = tokens_by_id(theirs), tokens_by_id(ours)
    # an id that only one of them has is no conflict: trainers add a padding token
    common = policy_tokens.keys() & prior_tokens.keys()
    differing = sorted(i for i in common if policy_tokens[i] != prior_tokens[i])
    if differing:
        first = differing[0]
        raise CheckpointError(
            f"The policy's tokenizer is not the prior's: id {first} stands for {policy_tokens[first]!r} in the one and "
            f"{prior_tokens[first]!r} in the other. Certify against the model that the policy was tuned from."
        )


def tokens_by_id(tokenizer: Any) -> dict[int, Any]:
    """Return the meaning of every id of a tokenizer.

    A tokenizer without a vocabulary is represented by the ids that it gives to a probe text, by position.
    """
    get_vocab = getattr(tokenizer, "get_vocab", None)
    if callable(get_vocab):
        return {int(i): token for token, i in get_vocab().items()}
    characters = getattr(tokenizer, "characters", None)
    return dict(enumerate(characters if characters is not None else tokenizer.encode(_PROBE)))
