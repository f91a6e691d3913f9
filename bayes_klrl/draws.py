"""The result of every algorithm: completions, their log-densities and weights, and the estimate of the evidence."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike

from bayes_klrl.checks import check_count
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.prompts.decoder import PromptDecoder
from bayes_klrl.prompts.words import prompt_labels, prompt_texts
from bayes_klrl.randomness import generator
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel
from bayes_klrl.weights import effective_sample_size, log_evidence_se, logmeanexp, normalised, psis
from bayes_klrl.whole_files import named_path

if TYPE_CHECKING:
    import pandas as pd

    from bayes_klrl.posterior import Posterior

__all__ = ["Cost", "Draws"]


@dataclass(frozen=True)
class Cost:
    """The cost of draws in seconds and tokens.

    Parameters
    ----------
    seconds
        Wall time to draw and score.
    model_tokens
        Tokens that went through a language model to draw and score (prefill, decoding, scoring), each model counted.
    training_tokens, training_seconds
        Tokens and wall time that it took to fit a guide or twist; not part of the numbers above.
    """

    seconds: float = 0.0
    model_tokens: int = 0
    training_tokens: int = 0
    training_seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        """Return the sum of two costs."""
        return Cost(
            self.seconds + other.seconds,
            self.model_tokens + other.model_tokens,
            self.training_tokens + other.training_tokens,
            self.training_seconds + other.training_seconds,
        )


@dataclass(frozen=True, eq=False)
class Draws:
    """N draws for each of P prompts, with their log-densities, weights and estimates of the evidence.

    Parameters
    ----------
    tokens, lengths
        The completions (P, N, T) and their lengths (P, N); positions past a length hold the EOS id (0 if there is none).
    reward, log_prior, log_likelihood, log_proposal, log_weights
        One value per draw, (P, N), float64; all but the reward are in nats. `log_proposal` is NaN where no proposal density
        exists. For weighted methods logmeanexp over N of `log_weights` is `log_evidence`; other draws weigh equally and
        have log-weight 0.
    log_evidence, log_evidence_se, elbo, ess, pareto_k
        One value per prompt, (P,), NaN where undefined: the estimate of log Z and its standard error, the evidence lower
        bound (all three in nats), the effective sample size, and the Pareto tail shape k of the weights.
    prompts
        The P prompts as given to the posterior.
    method
        The name of the algorithm.
    alpha
        Units of reward per nat.
    cost
        Seconds and model tokens.
    guide
        The fitted policy, for SVI.
    info
        Further results by name, as each algorithm's docstring lists them: for SMC `ancestors` (P, T, N) and `step_ess`
        (P, T), for Markov chains the `chain` (N,) of each draw; for models in half precision `scoring_gap` (P,), the largest
        difference between decoded and teacher-forced log-probs, in nats.
    decoder
        Function that turns lists of token ids into texts; None if the prior has no tokenizer. If it has a method
        `after(prompt_index, ids)`, `texts` uses that: it decodes completions as they follow their prompts.
    eos_token_ids
        The ids that end a completion, which say which draws are `finished`.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> prior = bk.NgramLM.fit(["ha!", "ha ha!", "hm."], order=2)
    >>> cheerful = bk.Reward(lambda completions: [c.count("!") for c in completions], alpha=0.5)
    >>> posterior = bk.Posterior(prior, cheerful, max_new_tokens=8)
    >>> draws = bk.ImportanceSampling(500).run(posterior, seed=0)
    >>> draws.shape, draws.log_evidence.shape, len(draws.texts()[0])
    ((1, 500), (1,), 500)
    >>> prior_mean, posterior_mean = draws.reward.mean(), draws.mean(draws.reward)[0]
    >>> bool(posterior_mean > prior_mean)
    True
    """

    tokens: IntArray
    lengths: IntArray
    reward: FloatArray
    log_prior: FloatArray
    log_likelihood: FloatArray
    log_proposal: FloatArray
    log_weights: FloatArray
    log_evidence: FloatArray
    log_evidence_se: FloatArray
    elbo: FloatArray
    ess: FloatArray
    pareto_k: FloatArray
    prompts: tuple[Any, ...]
    method: str
    alpha: float
    cost: Cost = Cost()
    guide: LanguageModel | None = field(default=None, repr=False)
    info: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    decoder: Callable[[Sequence[Sequence[int]]], Sequence[str]] | None = field(default=None, repr=False)
    eos_token_ids: frozenset[int] = frozenset()

    @classmethod
    def weighted(
        cls,
        posterior: Posterior,
        sequences: Sequences,
        *,
        method: str,
        reward: FloatArray,
        log_prior: FloatArray,
        log_proposal: FloatArray,
        cost: Cost,
    ) -> Draws:
        """Return importance-weighted draws: log w = log_prior + log_likelihood - log_proposal.

        `log_evidence` is logmeanexp(log w), an estimate whose exponential is unbiased; `elbo` is mean(log w), the
        evidence lower bound of the proposal.
        """
        log_likelihood = posterior.likelihood.log_likelihood(reward)
        # log_prior - log_proposal first: exactly 0 for the prior as its own proposal, so weights are exactly r / alpha
        log_weights = np.where(np.isneginf(log_prior), -np.inf, log_prior - log_proposal) + log_likelihood
        ess = effective_sample_size(log_weights)
        draws = cls._common(posterior, sequences, method, reward, log_prior, log_proposal, cost)
        return replace(
            draws,
            log_weights=log_weights,
            log_evidence=logmeanexp(log_weights),
            log_evidence_se=log_evidence_se(ess, log_weights.shape[1]),
            elbo=log_weights.mean(axis=1),
            ess=ess,
            pareto_k=psis(log_weights)[1],
        )

    @classmethod
    def equally_weighted(
        cls,
        posterior: Posterior,
        sequences: Sequences,
        *,
        method: str,
        reward: FloatArray,
        log_prior: FloatArray,
        log_proposal: FloatArray | None,
        cost: Cost,
    ) -> Draws:
        """Return draws that weigh equally (of SVI, best-of-n, ...): log-weights 0, log evidence NaN."""
        proposal = np.full(reward.shape, np.nan) if log_proposal is None else log_proposal
        return cls._common(posterior, sequences, method, reward, log_prior, proposal, cost)

    @classmethod
    def _common(
        cls,
        posterior: Posterior,
        sequences: Sequences,
        method: str,
        reward: FloatArray,
        log_prior: FloatArray,
        log_proposal: FloatArray,
        cost: Cost,
    ) -> Draws:
        """Return draws with log-weights 0 and every summary undefined."""
        undefined = np.full(reward.shape[0], np.nan)
        return cls(
            tokens=sequences.tokens,
            lengths=sequences.lengths,
            reward=reward,
            log_prior=log_prior,
            log_likelihood=posterior.likelihood.log_likelihood(reward),
            log_proposal=log_proposal,
            log_weights=np.zeros(reward.shape),
            log_evidence=undefined,
            log_evidence_se=undefined,
            elbo=undefined,
            ess=undefined,
            pareto_k=undefined,
            prompts=posterior.prompts,
            method=method,
            alpha=posterior.alpha,
            cost=cost,
            decoder=PromptDecoder.of(posterior.prior, posterior.prompt_ids),
            eos_token_ids=frozenset(posterior.prior.eos_token_ids),
        )

    def __repr__(self) -> str:
        num_prompts, num_draws = self.shape
        evidence = ", ".join(f"{value:.3f}" for value in self.log_evidence[:3])
        return f"Draws({self.method}: {num_draws} draws x {num_prompts} prompts, log evidence [{evidence}])"

    def _repr_html_(self) -> str:
        from bayes_klrl.export.notebook import draws_html

        return draws_html(self)

    @property
    def shape(self) -> tuple[int, int]:
        """The number of prompts and of draws per prompt, (P, N)."""
        num_prompts, num_draws = self.lengths.shape
        return num_prompts, num_draws

    @property
    def seconds(self) -> float:
        """Wall time to draw and score; training is not counted."""
        return self.cost.seconds

    @property
    def model_tokens(self) -> int:
        """Tokens that went through a language model to draw and score; training is not counted."""
        return self.cost.model_tokens

    @property
    def training_tokens(self) -> int:
        """Tokens that went through a language model to fit a guide."""
        return self.cost.training_tokens

    @property
    def training_seconds(self) -> float:
        """Wall time to fit a guide."""
        return self.cost.training_seconds

    @property
    def sequences(self) -> Sequences:
        """The completions."""
        return Sequences(self.tokens, self.lengths)

    @property
    def weights(self) -> FloatArray:
        """The normalised weights W, (P, N), which sum to 1 over the draws of a prompt; 0 if all its log-weights are -inf."""
        alive = np.isfinite(self.log_weights).any(axis=1)
        weights = np.zeros(self.shape)
        if alive.any():
            weights[alive] = normalised(self.log_weights[alive])
        return weights

    @property
    def finished(self) -> np.ndarray:
        """Which completions end with EOS, (P, N); the others were cut at T tokens."""
        return self.sequences.finished(self.eos_token_ids)

    def prompt_words(self, most: int = 40) -> list[str]:
        """Return the name of each prompt: its words on one line, at most `most` characters, equal ones told apart."""
        return prompt_labels(self.prompts, self.decoder, most=most)

    def texts(self) -> list[list[str]]:
        """Return the completions as text: P lists of N texts.

        Raises
        ------
        BayesKLRLError
            If the prior has no tokenizer.
        """
        if self.decoder is None:
            raise BayesKLRLError("These draws have no text: the prior has no tokenizer. Use `tokens` and `lengths`.")
        num_prompts, num_draws = self.shape
        ids, after = self.sequences.lists(), getattr(self.decoder, "after", None)
        flat = list(self.decoder(ids) if after is None else after(np.repeat(np.arange(num_prompts), num_draws), ids))
        return [flat[p * num_draws : (p + 1) * num_draws] for p in range(num_prompts)]

    def mean(self, values: ArrayLike | Callable[[list[str]], Sequence[float]]) -> FloatArray:
        """Return the self-normalised posterior expectation sum_n W_n f(x_n) for each prompt, shape (P, ...).

        Parameters
        ----------
        values
            The value f(x) of each draw, shape (P, N, ...), or (N,) for one prompt; or a function that maps a list of texts to
            a list of numbers.
        """
        if callable(values):
            values = [values(texts) for texts in self.texts()]
        f = np.asarray(values, dtype=np.float64)
        if f.ndim == 1 and self.shape[0] == 1:
            f = f[None]
        if f.shape[:2] != self.shape:
            raise BayesKLRLError(f"values must have the shape (P, N, ...) = {self.shape}; got {f.shape}.")
        weights = normalised(self.log_weights).reshape(*self.shape, *[1] * (f.ndim - 2))
        with np.errstate(invalid="ignore"):
            result: FloatArray = np.where(weights > 0, weights * f, 0.0).sum(axis=1)
        return result

    def resample(self, num: int, seed: int) -> Draws:
        """Return `num` equally weighted draws per prompt, drawn with replacement with probabilities W.

        They are resampled from these draws, not drawn anew: there are at most N distinct texts, and a frequency test is valid
        only while `num` is small compared with the effective sample size.
        """
        check_count("num", num)
        rng = generator(seed)
        weights = normalised(self.log_weights)
        chosen = np.stack([rng.choice(self.shape[1], size=num, p=row) for row in weights])
        return self._taken(chosen)

    def _taken(self, chosen: IntArray) -> Draws:
        """Return the draws with indices `chosen` (P, M) of each prompt, equally weighted and without summaries."""
        rows = np.arange(self.shape[0])[:, None]
        undefined = np.full(self.shape[0], np.nan)
        return replace(
            self,
            **{
                name: getattr(self, name)[rows, chosen]
                for name in ("tokens", "lengths", "reward", "log_prior", "log_likelihood", "log_proposal")
            },
            log_weights=np.zeros(chosen.shape),
            log_evidence=undefined,
            log_evidence_se=undefined,
            elbo=undefined,
            ess=undefined,
            pareto_k=undefined,
            info={},
        )

    def to_arviz(self) -> Any:
        """Return what the installed ArviZ summarises (InferenceData in 0.x, xarray DataTree in 1.x)."""
        from bayes_klrl.export.datatree import draws_to_arviz

        return draws_to_arviz(self)

    def to_pandas(self) -> pd.DataFrame:
        """Return a pandas DataFrame with one row per draw, prompt by prompt.

        The columns: `prompt`, the words of the prompt (equal prompts told apart by their numbers); `draw`, from 0 to N - 1;
        `text`, if there is a tokenizer; `reward`; `log_prior`, `log_likelihood`, `log_proposal` and `log_weight`, in nats;
        `weight`, the normalised weight W, which sums to 1 over the draws of a prompt (0 where all weights are); `length`,
        in tokens, EOS included; `finished`, whether it ended with EOS or was cut.

        Examples
        --------
        >>> import numpy as np, bayes_klrl as bk
        >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
        >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
        >>> table = bk.Exact().run(bk.Posterior(coin, longer, max_new_tokens=2), seed=0).to_pandas()
        >>> print(table.sort_values("weight")[["reward", "weight", "finished"]].round(2).to_string(index=False))
         reward  weight  finished
            1.0    0.27      True
            2.0    0.37     False
            2.0    0.37      True
        """
        import pandas as pd

        num_prompts, num_draws = self.shape
        columns: dict[str, Any] = {
            "prompt": np.repeat(np.array(prompt_texts(self.prompts, self.decoder), dtype=object), num_draws),
            "draw": np.tile(np.arange(num_draws), num_prompts),
        }
        if self.decoder is not None:
            columns["text"] = [text for texts in self.texts() for text in texts]
        for name in ("reward", "log_prior", "log_likelihood", "log_proposal"):
            columns[name] = getattr(self, name).ravel()
        columns["log_weight"] = self.log_weights.ravel()
        columns["weight"] = self.weights.ravel()
        columns["length"], columns["finished"] = self.lengths.ravel(), self.finished.ravel()
        return pd.DataFrame(columns)

    def save(self, file: str | Path) -> Path:
        """Write everything but the guide to a netCDF file, texts included, and return its path.

        It is written whole or not at all, and ends with a checksum.

        Raises
        ------
        OutputError
            If it cannot be written, as on a full disk, or if `file` cannot be a path.
        """
        from bayes_klrl.export.datatree import save_draws

        return save_draws(self, named_path(file))

    @classmethod
    def load(cls, file: str | Path) -> Draws:
        """Read what `save` wrote; texts are available without the model.

        Raises
        ------
        CheckpointError
            If there is no such file, it is not one of ours, or it is damaged: its checksum is looked at first.
        """
        from bayes_klrl.export.datatree import load_draws

        return load_draws(file)
