"""Score-function gradients token by token: any objective, any critic, as a Pyro `ELBO`.

    surrogate = sum_t A_t log q(x_t | x_<t)  (A_t without a gradient), whose gradient is minus that of the loss

A_t is the draw's weight under the objective, the same at every token, or with a critic the advantage of the token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayes_klrl.arrays import to_host
from bayes_klrl.draws import Draws
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.objectives import Objective
from bayes_klrl.inference.svi.objectives.critics import Critic, Rows, advantages
from bayes_klrl.inference.svi.objectives.replay import Replay
from bayes_klrl.inference.svi.pyro_backend.elbo import ElboTerms, SequenceELBO, model_tokens, own_likelihood
from bayes_klrl.models.programs.pyro_program import distinct_completions, to_sequences
from bayes_klrl.models.programs.turns import PYRO_TURN, in_turn
from bayes_klrl.sequences import Sequences

__all__ = ["ScoreELBO"]

_MOVING = 0.9


class ScoreELBO(SequenceELBO):
    """The scores of whole completions, weighted by an objective; or of tokens, weighted by a critic's advantages.

    Parameters
    ----------
    num_particles
        N, completions per prompt.
    objective
        The objective; a critic is for the ELBO.
    critic
        The critic; None: every token of a draw has the draw's weight.
    discount
        lambda of the critic's advantages.
    per_pass
        Completions per prompt that are differentiated at once; None: all. The gradient is the same up to rounding.
    alpha
        Function that returns the present alpha, at which rewards of earlier draws count.
    """

    def __init__(
        self,
        num_particles: int,
        objective: Objective,
        critic: Critic | None = None,
        discount: float = 1.0,
        per_pass: int | None = None,
        alpha: Callable[[], float] = lambda: 1.0,
    ) -> None:
        super().__init__(num_particles)
        self.objective, self.critic, self.discount, self.per_pass = objective, critic, discount, per_pass
        self.log_evidence: dict[int, float] = {}
        again = getattr(objective, "replay", 0)
        size = again.shape[1] if isinstance(again, Draws) else int(again)
        self.replay = Replay(size) if size else None
        self.alpha = alpha

    @in_turn(PYRO_TURN)
    def loss_and_grads(self, model: Callable[..., Any], guide: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
        """See `ELBO.loss_and_grads`; completions are differentiated `per_pass` at a time."""
        if self.per_pass is None:
            return super().loss_and_grads(model, guide, *args, **kwargs)
        with torch.no_grad():
            loss = float(self.differentiable_loss(model, guide, *args, **kwargs))
        site, weights = self.last_site, self._weights
        sequences = to_sequences(site["value"], site["fn"].lm)
        num_draws = sequences.tokens.shape[1]
        for start in range(0, num_draws, self.per_pass):
            part = slice(start, start + self.per_pass)
            chunk = Sequences(sequences.tokens[:, part], sequences.lengths[:, part])
            log_q = torch.as_tensor(site["fn"].lm.token_log_probs(site["fn"].prompt_ids, chunk)).double()
            (-self._scale * (weights[:, part] * log_q).sum() / num_draws).backward()
        return loss

    def state(self) -> dict[str, Tensor]:
        """Return the moving log Z-hats, for a checkpoint."""
        prompts = sorted(self.log_evidence)
        kept = {} if self.replay is None else self.replay.state()
        return {f"replay.{name}": torch.as_tensor(value) for name, value in kept.items()} | {
            "prompts": torch.tensor(prompts, dtype=torch.int64, device="cpu"),
            "evidence": torch.tensor([self.log_evidence[p] for p in prompts], dtype=torch.float64, device="cpu"),
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` returned."""
        self.log_evidence = dict(zip(state["prompts"].tolist(), state["evidence"].tolist(), strict=True))
        if self.replay is not None:
            prefix = "replay."
            self.replay.load_state({n.removeprefix(prefix): a for n, a in state.items() if n.startswith(prefix)})

    def terms(self, model_trace: Any, guide_trace: Any) -> ElboTerms:
        """Return log w and the surrogate."""
        zero = bool(getattr(self.objective, "zero_likelihood", False))
        log_lik = own_likelihood(model_trace, guide_trace, zero=zero)
        x, guide, prior = guide_trace.nodes["x"]["value"], guide_trace.nodes["x"]["fn"], model_trace.nodes["x"]["fn"]
        chosen = to_host(guide_trace.nodes["prompts"]["value"]).astype(np.int64)
        sequences = to_sequences(x, guide.lm)
        distinct, index = distinct_completions(sequences)
        log_q = tokens_of(guide, distinct, index)  # (P, N, T)
        with torch.no_grad():
            log_p = tokens_of(prior, distinct, index)
        ratio = log_q.detach() - log_p
        log_w = log_lik - ratio.sum(dim=2).T
        self.follow_evidence(chosen, log_w)
        if self.critic is None:
            evidence = torch.tensor([self.log_evidence[int(p)] for p in chosen], dtype=log_w.dtype, device=log_w.device)
            weights = checked_weights(self.objective, log_w, evidence)
            if zero:  # before the first possible draw there is no evidence to compare with
                weights = torch.where(torch.isneginf(evidence), 0.0, weights)
            weights = weights.T[:, :, None].expand_as(log_q)
        else:
            weights = self.critics_weights(chosen, sequences, ratio, log_lik)
        self._weights, self._scale = weights.detach(), guide_trace.nodes["x"]["scale"]
        surrogate = (weights * log_q).sum(dim=2).T
        if self.replay is not None:
            surrogate = self.with_replay(self.replay, chosen, sequences, guide, log_q, log_p.sum(dim=2), log_lik.T)
        log_guide, log_ratio = log_q.detach().sum(dim=2).T, ratio.sum(dim=2).T if zero else None
        return ElboTerms(log_w, log_lik, log_guide, surrogate, model_tokens(guide_trace), log_ratio)

    def with_replay(
        self,
        replay: Replay,
        chosen: np.ndarray,
        sequences: Sequences,
        guide: Any,
        log_q: Tensor,
        log_prior: Tensor,
        log_lik: Tensor,
    ) -> Tensor:
        """Return the surrogate of new and earlier draws together, (N + M, P); the new ones are then kept."""
        earlier = replay.of(chosen.tolist())
        replay.add(
            chosen.tolist(),
            sequences.tokens,
            sequences.lengths,
            to_host(log_prior).copy(),
            to_host(log_lik) * self.alpha(),
        )
        new = log_q.sum(dim=2)
        joint = (log_prior + log_lik).to(new)
        if earlier is not None:
            tokens, lengths, prior, reward = earlier
            again = guide.lm.token_log_probs(guide.prompt_ids, Sequences(tokens, lengths))
            new = torch.cat([new, torch.as_tensor(again).double().sum(dim=2)], dim=1)
            joint = torch.cat([joint, torch.as_tensor(prior + reward / self.alpha()).to(joint)], dim=1)
        weights = self.objective.weights((joint - new.detach()).T, torch.zeros(0), torch)
        surrogate: Tensor = weights * new.T
        return surrogate

    def follow_evidence(self, chosen: np.ndarray, log_w: Tensor) -> None:
        """Move log Z-hat of each prompt towards that of the present draws."""
        found = (torch.logsumexp(log_w, 0) - np.log(len(log_w))).tolist()
        for p, now in zip(chosen.tolist(), found, strict=True):
            before = self.log_evidence.get(p, now)
            before = now if np.isneginf(before) else before
            self.log_evidence[p] = float(np.logaddexp(np.log(_MOVING) + before, np.log(1 - _MOVING) + now))

    def critics_weights(self, chosen: np.ndarray, sequences: Sequences, ratio: Tensor, log_lik: Tensor) -> Tensor:
        """Return the advantages of all tokens, (P, N, T); the critic then learns from the same draws."""
        assert self.critic is not None
        _, num_draws, num_tokens = sequences.tokens.shape
        rows = Rows(
            np.repeat(chosen, num_draws), sequences.tokens.reshape(-1, num_tokens), sequences.lengths.reshape(-1)
        )
        log_ratio = to_host(ratio).reshape(-1, num_tokens)
        likelihood = to_host(log_lik.T).reshape(-1)
        values = self.critic.values(rows)
        found = advantages(values, log_ratio, likelihood, rows.lengths, self.discount)
        self.critic.learn(rows, log_ratio, likelihood)
        return torch.as_tensor(found.reshape(ratio.shape), device=ratio.device)


def checked_weights(objective: Objective, log_weights: Tensor, log_evidence: Tensor) -> Tensor:
    """Return an objective's weights of draws, (N, P).

    Raises
    ------
    BayesKLRLError
        If its function raises an error, or returns anything but a finite weight per draw (where log w is finite).
    """
    try:
        found: Any = objective.weights(log_weights, log_evidence, torch)
    except BayesKLRLError:
        raise
    except Exception as error:  # whatever a user's function raises
        raise BayesKLRLError(f"The weights of {objective!r} raised {type(error).__name__}: {error}.") from error
    if not isinstance(found, Tensor) or found.shape != log_weights.shape:
        shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise BayesKLRLError(
            f"The weights of {objective!r} must be a tensor of one per draw, (N, P) = {tuple(log_weights.shape)}; got {shape}."
        )
    if not torch.isfinite(found[torch.isfinite(log_weights)]).all():
        raise BayesKLRLError(
            f"The weights of {objective!r} are not finite, at finite log-weights. Look for a division by 0, or an overflow."
        )
    return found


def tokens_of(site: Any, distinct: Sequences, index: np.ndarray) -> Tensor:
    """Return the log-prob of every token of draws (P, N, T), float64, each distinct completion scored once."""
    scores = torch.as_tensor(site.lm.token_log_probs(site.prompt_ids, distinct))
    rows = torch.as_tensor(index, device=scores.device)[..., None].expand(-1, -1, scores.shape[2])
    return scores.gather(1, rows).double()
