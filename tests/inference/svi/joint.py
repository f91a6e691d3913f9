"""Joint programs of completions and continuous latents, written once for Pyro and NumPyro, and their one truth."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

import bayes_klrl as bk
from tests.helpers.truth import completions, full_table, t_square_p
from tests.inference.svi.ppl import Ppl, Program, flat_gradient

__all__ = [
    "ALPHA",
    "CASES",
    "PROMPTS",
    "Problem",
    "agrees",
    "coin_posterior",
    "count_of_0",
    "observed_theta",
    "p_value",
    "theta",
    "value_and_gradient",
    "with_sites",
]

ALPHA = 0.7
PREFERENCES = np.array([1.0, 1.0, -1.0, 2.0])  # f(winner) - f(loser)
PROMPTS = ((0,), (1,))
CASES = [  # orders and numbers of prompts
    ("independent", 1),
    ("independent", 2),
    ("x, then theta", 1),
    ("x, then theta", 2),
    ("theta, then x", 1),
    ("theta, then x", 2),
    ("z of each prompt", 2),
]


def value_and_gradient(value: Callable[[dict[str, Tensor]], Tensor], params: Mapping[str, Any]) -> tuple[float, Any]:
    """A function of parameters and its gradient as one vector, in the order of the names."""
    at = {name: torch.tensor(start, dtype=torch.float64, requires_grad=True) for name, start in params.items()}
    found = value(at)
    found.backward()  # type: ignore[no-untyped-call]
    return float(found.detach()), flat_gradient(list(at.values()))


def p_value(runs: np.ndarray, exact: np.ndarray) -> float:
    """The p-value of mean = exact, in at most as many projections as the noise has dimensions: a table's rows sum to 0."""
    noise = np.linalg.svd(runs - runs.mean(axis=0), compute_uv=False)
    return t_square_p(runs, exact, min(8, int((noise > 1e-4 * noise[0]).sum())))


def agrees(runs: np.ndarray, exact: np.ndarray) -> bool:
    """Whether the mean of runs is the exact gradient, in projections and in every coordinate."""
    spread = runs.std(axis=0, ddof=1) / np.sqrt(len(runs))
    moving = spread > 1e-7
    z = (runs.mean(axis=0) - exact)[moving] / spread[moving]
    still = np.abs(exact[~moving]).max(initial=0.0) < 1e-9
    return bool(p_value(runs, exact) > 0.005 and np.abs(z).max() < 4 and still)


def count_of_0(tokens: Any, lengths: Any) -> Any:
    return 1.0 * (tokens == 0).sum(axis=1)


class Problem:
    """theta ~ N(0, 1), preferences ~ Bernoulli(sigma(theta d)), x_p ~ p0(. | prompt p), factor theta f(x_p) / alpha.

    Guides: q(theta) prod q(x_p); prod q(x_p) q(theta | x); q(theta) prod q(x_p | theta); and with a z_p for each prompt in
    theta's place, prod q(x_p) q(z_p | x_p).
    """

    def __init__(self, ppl: Ppl, order: str, num_prompts: int = 1, *, subsample: int | None = None) -> None:
        self.ppl, self.order, self.num_prompts, self.subsample = ppl, order, num_prompts, subsample
        self.num_preferences, self.num_tokens = len(PREFERENCES), 2
        logits = np.random.default_rng(7).standard_normal((3, 3))
        self.prior = bk.NgramLM(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)), eos_token_id=2)
        self.start = full_table(self.prior, 3, noise=0.5, seed=2)
        self.params: dict[str, Any] = {"loc": 0.3, "log_sd": -0.5}
        if order in ("x, then theta", "z of each prompt"):
            self.params["slope"] = 0.4
        self.params |= self.sequence_params()

    # -- what a problem of one language may replace --------------------------------------------------------------

    def sequence_params(self) -> dict[str, Any]:
        """The parameters of q(x)."""
        if self.order != "theta, then x":
            return {"logits": self.start.log_probs.reshape(-1, 3)}
        self.num_tokens = 1
        return {"base": np.array([0.2, -0.4, 0.1]), "tilt": 0.6}

    def family(self, params: Any, theta: Any, chosen: Any) -> Any:
        """q(x | theta) as a distribution."""
        if self.order != "theta, then x":
            table = self.ppl.table(self.start, params["logits"])
            return self.ppl.completions(table, PROMPTS, chosen, self.num_tokens)
        logits = params["base"] + params["tilt"] * theta[..., None] * self.ppl.array([1.0, 0.0, -1.0])
        return self.ppl.dist.Categorical(logits=logits[..., None, :]).to_event(1)

    def log_q(self, params: dict[str, Tensor], prompts: list[int], theta: Tensor) -> Tensor:
        """log q(x | theta) of theta (J,) and all completions, (J, P, M) or with J = 1; the truth of `family`."""
        if self.order != "theta, then x":
            return self.scores(params["logits"], prompts)[None]
        tilted = params["base"] + params["tilt"] * theta[:, None] * torch.tensor([1.0, 0.0, -1.0])
        return tilted.log_softmax(-1)[:, None].expand(-1, len(prompts), -1)

    def draw(self, family: Any) -> Any:
        """Draw x."""
        return self.ppl.sample("x", family)

    def features(self, family: Any, x: Any) -> Any:
        """f(x) in a program."""
        return family.features(count_of_0, x)

    def log_ratio(self, log_p: Tensor, log_q: Tensor) -> Tensor:
        """What x itself adds to log w."""
        return log_p - log_q

    # -- the programs --------------------------------------------------------------------------------------------

    def model(self) -> None:
        ppl = self.ppl
        theta = None if self.order == "z of each prompt" else ppl.normal("theta")
        if theta is not None:
            with ppl.plate("preferences", len(PREFERENCES), self.num_preferences) as some:
                preferred = ppl.dist.Bernoulli(logits=theta * ppl.array(PREFERENCES)[some])
                ppl.sample("won", preferred, obs=ppl.array(np.ones(self.num_preferences)))
        with ppl.plate("prompts", self.num_prompts, self.subsample) as chosen:
            prior = ppl.completions(ppl.engine.prior(self.prior), PROMPTS, chosen, self.num_tokens)
            x = self.draw(prior)
            weight = ppl.normal("z") if theta is None else theta
            ppl.factor("taste", weight * self.features(prior, x) / ALPHA)

    def guide(self) -> None:
        ppl, order, theta = self.ppl, self.order, None
        params = {name: ppl.param(name, value) for name, value in self.params.items()}
        sd = ppl.exp(params["log_sd"])
        if order in ("independent", "theta, then x"):
            theta = ppl.normal("theta", params["loc"], sd)
        with ppl.plate("prompts", self.num_prompts, self.subsample) as chosen:
            family = self.family(params, theta, chosen)
            x = self.draw(family)
            if order == "z of each prompt":
                ppl.normal("z", params["loc"] + params["slope"] * self.features(family, x), sd)
        if order == "x, then theta":
            total = self.features(family, x).sum(-1)[..., None]
            ppl.normal("theta", params["loc"] + params["slope"] * total, sd)

    def sampled(self, loss: Any, num_runs: int) -> tuple[np.ndarray, np.ndarray]:
        """-ELBO and gradients of independent steps, (runs,) and (runs, numbers)."""
        return self.ppl.sampled(loss, self.model, self.guide, self.params, num_runs)

    # -- the truth -----------------------------------------------------------------------------------------------

    def exact(self, num_nodes: int = 40) -> tuple[float, np.ndarray]:
        """-ELBO and its gradient, by enumeration and Gauss-Hermite quadrature."""
        return value_and_gradient(partial(self.minus_elbo, num_nodes=num_nodes), self.params)

    def minus_elbo(self, params: dict[str, Tensor], num_nodes: int = 40) -> Tensor:
        prompts = list(range(self.num_prompts))
        groups = [[p] for p in prompts] if self.order == "z of each prompt" else [prompts]
        parts = [self._of_prompts(params, group, num_nodes) for group in groups]
        return torch.stack(parts).sum()

    def _of_prompts(self, params: dict[str, Tensor], prompts: list[int], num_nodes: int) -> Tensor:
        points, weights = np.polynomial.hermite_e.hermegauss(num_nodes)
        eps, mass = torch.as_tensor(points)[:, None], torch.as_tensor(weights / weights.sum())[:, None]  # (J, 1)
        f = torch.as_tensor(count_of_0(self.all_completions(1).tokens[0], None))  # (M,)
        chosen = torch.tensor(list(product(range(len(f)), repeat=len(prompts))))  # (C, P)
        each = torch.arange(len(prompts))
        f_sum = f[chosen].sum(1)  # (C,)
        slope = params.get("slope", torch.zeros((), dtype=torch.float64))
        theta = params["loc"] + slope * f_sum + params["log_sd"].exp() * eps  # (J, C)
        log_q = self.log_q(params, prompts, theta[:, 0])[:, each, chosen].sum(-1)
        log_p = self.log_prior(prompts)[each, chosen].sum(-1)
        log_p_theta = -0.5 * theta**2
        if self.order != "z of each prompt":
            log_p_theta = log_p_theta + logsigmoid(theta[..., None] * torch.as_tensor(PREFERENCES)).sum(-1)
        log_q_theta = -0.5 * eps**2 - params["log_sd"]
        log_w = self.log_ratio(log_p, log_q) + theta * f_sum / ALPHA + log_p_theta - log_q_theta
        return -(mass * log_q.exp() * log_w).sum()

    def all_completions(self, num_prompts: int) -> bk.Sequences:
        """Every completion once, for every prompt."""
        xs = completions(3, [2], self.num_tokens)
        one = bk.Sequences.from_lists(xs, max_new_tokens=self.num_tokens, pad_token=2)
        return bk.Sequences(np.repeat(one.tokens, num_prompts, axis=0), np.repeat(one.lengths, num_prompts, axis=0))

    def log_prior(self, prompts: list[int]) -> Tensor:
        """log p0(x) of all completions, (P, M)."""
        ids = [PROMPTS[p] for p in prompts]
        return torch.as_tensor(self.prior.token_log_probs(ids, self.all_completions(len(ids)))).sum(2)

    def scores(self, logits: Tensor, prompts: list[int]) -> Tensor:
        """log q(x) of all completions under tables of logits (..., 9, 3), (..., P, M)."""
        every = self.all_completions(len(prompts))
        before = self.start.prefill([PROMPTS[p] for p in prompts])[:, None]
        read = np.concatenate([np.broadcast_to(before, (*every.tokens.shape[:2], 2)), every.tokens], axis=2)
        context = 3 * read[..., :-2] + read[..., 1:-1]
        log_probs = logits.log_softmax(-1)[..., torch.as_tensor(context), torch.as_tensor(every.tokens)]
        return (log_probs * torch.as_tensor(every.mask)).sum(-1)


# --- programs around a posterior's own ------------------------------------------------------------------------


def coin_posterior(likelihood: bk.TokenReward | None = None) -> bk.Posterior:
    coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    longer = bk.TokenReward(lambda tokens, lengths: 1.0 * lengths, alpha=1.0)
    return bk.Posterior(coin, likelihood or longer, prompts=[[], [0]], max_new_tokens=3)


def with_sites(
    ppl: Ppl,
    model_first: Callable[[Ppl], Any] | None,
    guide_first: Callable[[Ppl], Any] | None,
    likelihood: bk.TokenReward | None = None,
) -> tuple[Program, Program]:
    """The coin's programs with something before them."""
    posterior = coin_posterior(likelihood)
    inner, inner_guide = ppl.programs(posterior, posterior.prior)

    def before(first: Callable[[Ppl], Any] | None, program: Program) -> Program:
        def both() -> None:
            if first is not None:
                first(ppl)
            program()

        return both

    return before(model_first, inner), before(guide_first, inner_guide)


def theta(ppl: Ppl) -> Any:
    """A latent to put before the coin's programs."""
    return ppl.normal("theta")


def observed_theta(ppl: Ppl) -> Any:
    """The same, observed."""
    return ppl.normal("theta", obs=ppl.array(0.0))
