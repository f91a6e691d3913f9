"""The training loop of `LearnedTwist`: draws, the contrastive loss, Adam, and a final calibration.

    q_mix(x_1:t) = (p0(x_1:t) + q_psi(x_1:t)) / 2,     q_psi prop. to p0 psi token by token

Half of the draws come from the prior p0 and half from the twisted prior q_psi. All are weighted as draws from the mixture
(Veach and Guibas 1995), so that no weight exceeds twice the likelihood, however wrong the twist still is.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bayes_klrl.draws import Cost
from bayes_klrl.inference.svi.steps import MAX_GRADIENT_NORM, learning_rate_schedule
from bayes_klrl.inference.twists.losses import ctl_loss, ctl_weights
from bayes_klrl.models.decoding import decode
from bayes_klrl.models.programs.turns import PYRO_TURN
from bayes_klrl.models.twists.neural import LMFeatures, NeuralTwist, TwistHead, features_for
from bayes_klrl.models.twists.simple import log_evidence_of_pilot, prior_pilot
from bayes_klrl.models.twists.twisted_lm import TwistedLM
from bayes_klrl.posterior import Posterior
from bayes_klrl.progress import track
from bayes_klrl.randomness import Streams, check_seed, generator
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import Array, FloatArray, LanguageModel

__all__ = ["CALIBRATION_DRAWS", "PILOT_DRAWS", "train_twist"]

_STREAM = 35  # number of the stream of training draws, which differ from those of the run that uses the twist
PILOT_DRAWS = 256
CALIBRATION_DRAWS = 512


class TwistPlan(Protocol):
    """The options of the training; `LearnedTwist` has and documents them."""

    @property
    def num_steps(self) -> int:
        """Number of gradient steps."""

    @property
    def num_draws(self) -> int:
        """Number of completions per prompt and step."""

    @property
    def learning_rate(self) -> float:
        """Adam's first rate."""

    @property
    def hidden(self) -> int:
        """Number of units of the head's layers."""


@dataclass(frozen=True, eq=False)
class Batch:
    """The draws of one step: P prompts, N draws each."""

    sequences: Sequences
    log_likelihood: Tensor  # (P, N) float64
    inside: Tensor  # (P, N, T)
    tokens: Tensor  # (P, N, T), legal ones past the length
    model_tokens: int

    @property
    def log_base(self) -> Tensor:
        """Log-weights of the draws, all 0, (P, N); see `losses`."""
        return torch.zeros_like(self.log_likelihood)


def train_twist(recipe: TwistPlan, posterior: Posterior, *, seed: int, progress: bool) -> NeuralTwist:
    """Return the twist after `recipe.num_steps` steps; see `LearnedTwist.fit`."""
    start, rng = time.perf_counter(), generator(seed, _STREAM)
    losses: list[float] = []
    with PYRO_TURN, torch.random.fork_rng(devices=[]):  # torch, too, has one random state for all threads
        torch.manual_seed(check_seed(seed))
        twist, model_tokens = untrained(recipe, posterior, seed)
    parameters = [p for net in (twist.features, twist.head) for p in getattr(net, "parameters", list)()]
    optimiser = torch.optim.Adam(parameters, lr=recipe.learning_rate)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, learning_rate_schedule(recipe.num_steps, warm_up=0))
    with track("twist", recipe.num_steps, progress) as advance:
        for _ in range(recipe.num_steps):
            batch = draw_batch(posterior, replace(twist), recipe.num_draws, rng)
            loss = loss_of(posterior, twist, batch)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(parameters, MAX_GRADIENT_NORM)
            optimiser.step()
            schedule.step()
            losses.append(float(loss.detach()))
            model_tokens += batch.model_tokens
            advance(status=f"loss {losses[-1]:.3f}")
    twist, calibration_tokens = calibrated(replace(twist), posterior, recipe.num_draws, rng)
    cost = Cost(training_tokens=model_tokens + calibration_tokens, training_seconds=time.perf_counter() - start)
    return replace(twist, training=cost, history=np.array(losses))


def untrained(recipe: TwistPlan, posterior: Posterior, seed: int) -> tuple[NeuralTwist, int]:
    """Return a network that is the constant twist log Z-hat of a pilot, and the number of model tokens the pilot took."""
    pilot, log_likelihood = prior_pilot(posterior, PILOT_DRAWS, Streams.of(seed, PILOT_DRAWS))
    log_evidence = log_evidence_of_pilot(log_likelihood)
    features = features_for(posterior.prior, recipe.hidden)
    embedding = token_embedding(features, posterior.prior, recipe.hidden)
    frozen = isinstance(features, LMFeatures)
    head = TwistHead(features.width, posterior.max_new_tokens, recipe.hidden, embedding, frozen=frozen)
    if isinstance(features, LMFeatures):
        head = head.to(features.lm.device)
        sequences = pilot.sequences()
        inside = torch.as_tensor(sequences.mask, device=features.lm.device)
        head.standardise(features.everywhere(posterior.prompt_ids, sequences)[inside])
    twist = NeuralTwist(
        features,
        head,
        posterior.max_new_tokens,
        posterior.prompt_ids,
        log_evidence,
        log_evidence,
        np.zeros((posterior.num_prompts, posterior.max_new_tokens)),
    )
    return twist, pilot.model_tokens


def token_embedding(features: Any, prior: LanguageModel, hidden: int) -> Tensor:
    """Return the initial token embedding of the head: the prior's own if it has one, else one axis per token, else random."""
    if isinstance(features, LMFeatures):
        embedding: Tensor = features.token_embedding()
        return embedding
    if prior.vocab_size <= hidden:
        axes: Tensor = torch.eye(prior.vocab_size) * prior.vocab_size**0.5
        return axes
    return torch.randn(prior.vocab_size, hidden)


def draw_batch(posterior: Posterior, twist: NeuralTwist, num_draws: int, rng: np.random.Generator) -> Batch:
    """Return N draws per prompt, N even: half from the prior and half from the twisted prior."""
    models: tuple[LanguageModel, ...] = (posterior.prior, TwistedLM(posterior, twist))
    count = num_draws // 2
    tokens, lengths, rewards, model_tokens = [], [], [], 0
    for model in models:
        drawn = decode((model,), posterior.prompt_ids, count, posterior.max_new_tokens, rng)
        sequences, shape = drawn.sequences(), (posterior.num_prompts, count)
        rewards.append(posterior.reward_of_rows(drawn.tokens, drawn.lengths, drawn.prompt_index).reshape(shape))
        tokens.append(sequences.tokens)
        lengths.append(sequences.lengths)
        model_tokens += drawn.model_tokens
    together = Sequences(np.concatenate(tokens, axis=1), np.concatenate(lengths, axis=1))
    device = twist.head.first.weight.device
    log_likelihood = posterior.likelihood.log_likelihood(np.concatenate(rewards, axis=1))
    model_tokens += int(together.lengths.sum()) + together.lengths.shape[1] * sum(map(len, posterior.prompt_ids))
    return Batch(
        together,
        torch.as_tensor(log_likelihood, device=device),
        torch.as_tensor(together.mask, device=device),
        torch.as_tensor(np.where(together.mask, together.tokens, 0), device=device),
        model_tokens,
    )


def loss_of(posterior: Posterior, twist: NeuralTwist, batch: Batch) -> Tensor:
    """Return the contrastive loss on a batch, differentiable in the twist."""
    features, outputs = outputs_of(posterior, twist, batch)
    log_psi_next = scaled(twist, outputs)
    log_psi = taken(log_psi_next, batch.tokens)
    log_prior_next = prior_log_probs(posterior, twist, batch, features)
    log_prior, log_proposal = mixture(log_prior_next, log_prior_next + log_psi_next.detach(), batch)
    return ctl_loss(log_psi, log_prior, log_proposal, batch.log_likelihood, batch.inside, batch.log_base)


@torch.no_grad()
def calibrated(
    twist: NeuralTwist, posterior: Posterior, num_draws: int, rng: np.random.Generator
) -> tuple[NeuralTwist, int]:
    """Return the twist with constants that give psi_t, on average over prefixes, the scale of the likelihood, and the cost.

        exp(constant_{c,t}) = E_p0[exp(r / alpha) 1(|x| >= t)] / E_p0[psi_t(x_1:t) 1(|x| >= t)]

    Contrastive learning does not determine them, and finished particles are weighted by their likelihood (theory.md 3.5, 3.8).
    """
    weights, model_tokens = [], 0
    for _ in range(-(-CALIBRATION_DRAWS // num_draws)):
        batch = draw_batch(posterior, twist, num_draws, rng)
        features, outputs = outputs_of(posterior, twist, batch)
        log_psi_next = scaled(twist, outputs)
        log_prior_next = prior_log_probs(posterior, twist, batch, features)
        log_prior, log_proposal = mixture(log_prior_next, log_prior_next + log_psi_next, batch)
        log_psi = taken(log_psi_next, batch.tokens)
        weights.append(
            ctl_weights(log_psi, log_prior, log_proposal, batch.log_likelihood, batch.inside, batch.log_base)
        )
        model_tokens += batch.model_tokens
    positive, negative = (torch.cat(parts, dim=1) for parts in zip(*weights, strict=True))
    shift = (positive.logsumexp(dim=1) - negative.logsumexp(dim=1)).cpu().numpy()
    log_evidence = (positive[..., 0].logsumexp(dim=1) - np.log(positive.shape[1])).cpu().numpy()
    constants = np.where(np.isfinite(shift), shift, 0.0)
    log_evidence = np.where(np.isfinite(log_evidence), log_evidence, twist.log_evidence)
    return replace(twist, constants=constants, log_evidence=log_evidence), model_tokens


def outputs_of(posterior: Posterior, twist: NeuralTwist, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the features at every position, (P, N, T, F), and the head's outputs, (P, N, T, V)."""
    features = twist.features.everywhere(posterior.prompt_ids, batch.sequences)
    positions = torch.arange(posterior.max_new_tokens, device=features.device)
    return features, twist.head(features, positions)


def scaled(twist: NeuralTwist, outputs: Tensor) -> Tensor:
    """Return log psi, (P, N, T, V), from the head's outputs for the P prompts of the training."""
    offsets = torch.as_tensor(twist.offsets, device=outputs.device).to(outputs)[:, None, None, None]
    constants = torch.as_tensor(twist.constants, device=outputs.device).to(outputs)[:, None, :, None]
    return outputs + offsets + constants


@torch.no_grad()
def prior_log_probs(posterior: Posterior, twist: NeuralTwist, batch: Batch, features: Tensor) -> Tensor:
    """Return log p0(. | x_<t) at every position, (P, N, T, V), float32; computed from features if these are the prior's."""
    prior, everywhere = posterior.prior, getattr(posterior.prior, "position_log_probs", None)
    if isinstance(twist.features, LMFeatures):
        log_probs: Array = twist.features.lm.log_probs_from(features)
    elif everywhere is not None:
        log_probs = everywhere(posterior.prompt_ids, batch.sequences)
    else:
        log_probs = stepped_log_probs(prior, posterior, batch)
    return torch.as_tensor(log_probs, device=features.device).float()


def stepped_log_probs(prior: LanguageModel, posterior: Posterior, batch: Batch) -> FloatArray:
    """Return log p0(. | x_<t) at every position, (P, N, T, V), for a model that can only decode step by step."""
    shape = batch.sequences.tokens.shape
    tokens = batch.tokens.cpu().numpy().reshape(-1, shape[2])
    state = prior.select(prior.prefill(posterior.prompt_ids), np.repeat(np.arange(shape[0]), shape[1]))
    rows = []
    for t in range(shape[2]):
        if t:
            state = prior.append(state, tokens[:, t - 1])
        rows.append(torch.as_tensor(prior.next_log_probs(state)).float())
    stacked: FloatArray = torch.stack(rows, dim=1).reshape(*shape, -1).numpy()
    return stacked


def taken(values: Tensor, tokens: Tensor) -> Tensor:
    """Return the entries of the drawn tokens, (P, N, T), float64."""
    return values.gather(-1, tokens[..., None])[..., 0].double()


def mixture(log_prior_next: Tensor, scores: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return log p0(x_1:t) and log q_mix(x_1:t) of every prefix, (P, N, T), constant past each length.

    `scores` are log p0(a | x_<t) + log psi_t(x_<t a) of every next token a, shape (P, N, T, V).
    """
    drawn_prior = taken(log_prior_next, batch.tokens)
    drawn_twisted = taken(scores, batch.tokens) - scores.logsumexp(dim=-1).double()
    log_prior = torch.where(batch.inside, drawn_prior, 0.0).cumsum(dim=-1)
    log_twisted = torch.where(batch.inside, drawn_twisted, 0.0).cumsum(dim=-1)
    return log_prior, torch.logaddexp(log_prior, log_twisted) - np.log(2.0)
