"""Independent completions of a model with their log-probs and rewards, for importance sampling and for guides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from bayes_klrl.models.decoding import draw_blocks, scoring_gap
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import track
from bayes_klrl.randomness import Streams, prompt_keys
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel

__all__ = ["Drawn", "draw"]


@dataclass(frozen=True, eq=False)
class Drawn:
    """N completions for each of P prompts, with their log-probs and rewards.

    Parameters
    ----------
    sequences
        The completions.
    log_probs
        The log-prob of each completion under each model in nats, shape (models, P, N).
    reward
        The reward of each completion, shape (P, N).
    model_tokens
        Number of tokens that went through a model.
    info
        For a model in half precision `scoring_gap`, shape (P,): the largest difference between decoded and teacher-forced
        log-probs in the first block, in nats. Where memory or the lengths of the prompts allow fewer completions at once,
        `particles_per_pass`, shape (P,): the largest number, over all prompts, that was decoded at once. Otherwise empty.
    """

    sequences: Sequences
    log_probs: FloatArray
    reward: FloatArray
    model_tokens: int
    info: Mapping[str, FloatArray]


def draw(
    models: Sequence[LanguageModel],
    posterior: Posterior,
    num_draws: int,
    streams: Streams,
    *,
    description: str,
    progress: bool,
    prompts: IntArray | None = None,
    first: int = 0,
) -> Drawn:
    """Return N completions per prompt drawn from `models[0]`, scored by all models and by the reward.

    Rewards are computed block by block, so that a reward that fails does so early. The draws of a prompt depend neither on N
    nor on the other prompts.

    Parameters
    ----------
    models
        The models; the first one draws, and all of them score.
    posterior
        The posterior whose prompts and reward are used.
    num_draws
        N, the number of completions per prompt.
    streams
        The random numbers.
    description, progress
        Text of the progress display, and whether to show it.
    prompts
        Indices of the prompts to draw for; P is then their number. None: all prompts of the posterior.
    first
        The draws are those with the numbers `first`, `first` + 1, ... in each prompt's stream.
    """
    index = np.arange(posterior.num_prompts) if prompts is None else prompts
    prompt_ids = [posterior.prompt_ids[p] for p in index]
    every_key = prompt_keys(posterior.prompt_ids)
    keys = [every_key[p] for p in index]
    tokens, lengths, log_probs, rewards, model_tokens = [], [], [], [], 0
    info: dict[str, FloatArray] = {}
    with track(description, num_draws, progress) as advance:
        for block in draw_blocks(
            models, prompt_ids, num_draws, posterior.max_new_tokens, streams, keys=keys, first=first
        ):
            sequences = block.sequences()
            shape = sequences.lengths.shape
            reward = posterior.reward_of_rows(block.tokens, block.lengths, index[block.prompt_index])
            rewards.append(reward.reshape(shape))
            log_probs.append(block.log_probs.reshape(len(models), *shape))
            tokens.append(sequences.tokens)
            lengths.append(sequences.lengths)
            model_tokens += block.model_tokens
            if block.particles_per_pass < block.finished.size:
                info["particles_per_pass"] = np.full(len(index), block.particles_per_pass)
            if "scoring_gap" not in info and any(getattr(model, "half_precision", False) for model in models):
                info["scoring_gap"] = scoring_gap(block, models, prompt_ids)
            advance(shape[1])
    return Drawn(
        Sequences(np.concatenate(tokens, axis=1), np.concatenate(lengths, axis=1)),
        np.concatenate(log_probs, axis=2),
        np.concatenate(rewards, axis=1),
        model_tokens,
        info,
    )
