"""The posterior as a Pyro program, and a language model as its guide.

    x ~ prior(. | prompt)                 sample site "x": tokens, one sequence per site, event_dim 1
    reward = r(x)                         deterministic site "reward"
    factor exp(reward / alpha)            factor site "likelihood"

The programs are genuine: `pyro.poutine.trace`, `condition`, `replay`, `pyro.infer.Predictive` and a user's own
`pyro.infer.SVI` work on them. `TraceGraph_ELBO` finds the costs of a site by the provenance that it attaches to tensors. A
reward computed from decoded text would lose it, and with it its gradient, without any warning (theory.md 9.7). So
provenance is removed before a reward is computed and added to the result again.

Programs with further latent variables, such as uncertain reward weights, are written with `SequenceDistribution`, or around
`posterior.pyro_model()`, which may be called inside another program; see `pyro_model`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import pyro
import torch
from numpy.typing import ArrayLike
from pyro.distributions import TorchDistribution, constraints
from pyro.ops.provenance import detach_provenance, get_provenance, track_provenance
from torch import Tensor

from bayes_klrl.arrays import to_device, to_host
from bayes_klrl.checks import check_prompts_per_step
from bayes_klrl.models.decoding import check_shares_vocabulary, decode_by
from bayes_klrl.models.programs.completion_features import host_features
from bayes_klrl.posterior import Posterior
from bayes_klrl.sequences import Sequences, completion_lengths
from bayes_klrl.typing import IntArray, LanguageModel, TokenIds

__all__ = [
    "SequenceDistribution",
    "distinct_completions",
    "on_model_device",
    "pyro_guide",
    "pyro_model",
    "to_sequences",
]


class SequenceDistribution(TorchDistribution):
    """A language model as a Pyro distribution over whole completions.

    Batch shape (..., P), event shape (T,): integer tokens, padded past EOS. `sample` decodes with a seed from torch's
    generator (which `pyro.set_rng_seed` sets), without a gradient. `log_prob` scores by teacher forcing, in float64,
    differentiable in the model's parameters. There is no reparametrisation: gradients are score-function gradients.

    Parameters
    ----------
    lm
        The language model that draws and scores.
    prompt_ids
        Token ids of the P prompts.
    max_new_tokens
        T, the largest length of a completion.
    frozen
        True: score without a gradient, for the prior, which is not trained.
    batch_shape
        The batch shape (..., P); None: (P,).
    drawn_by
        Another language model, from which `sample` draws what `log_prob` scores under `lm`; None: `lm` itself.

    Examples
    --------
    A joint model: reward weights theta, completions x, and theta . f(x) as the reward. Numbers that `features` computes from
    tokens on the host keep their provenance, so `TraceGraph_ELBO` is correct, as is our `LeaveOneOutELBO`.

    >>> import numpy as np, bayes_klrl as bk, pyro.distributions as dist
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> def model():
    ...     theta = pyro.sample("theta", dist.Normal(torch.zeros(2), 1.0).to_event(1))
    ...     with pyro.plate("prompts", 1, dim=-1):
    ...         p = SequenceDistribution(coin, [()], 3, frozen=True)
    ...         x = pyro.sample("x", p)
    ...         f = p.features(lambda tokens, lengths: np.stack([lengths, lengths == 3], axis=1), x)
    ...         pyro.factor("likelihood", (theta * f).sum(-1) / 0.5)
    >>> trace = pyro.poutine.trace(model).get_trace()
    >>> trace.nodes["x"]["value"].shape, trace.nodes["likelihood"]["fn"].log_factor.shape
    (torch.Size([1, 3]), torch.Size([1]))
    """

    arg_constraints: dict[str, constraints.Constraint] = {}  # noqa: RUF012  (the base class's own declaration)
    support = constraints.independent(constraints.nonnegative_integer, 1)
    has_rsample = False

    def __init__(
        self,
        lm: LanguageModel,
        prompt_ids: Sequence[TokenIds],
        max_new_tokens: int,
        *,
        frozen: bool = False,
        batch_shape: torch.Size | None = None,
        drawn_by: LanguageModel | None = None,
    ) -> None:
        self.lm = lm
        self.drawn_by = lm if drawn_by is None else drawn_by
        self.prompt_ids = prompt_ids
        self.frozen = frozen
        shape = torch.Size([len(prompt_ids)]) if batch_shape is None else batch_shape
        super().__init__(shape, torch.Size([max_new_tokens]), validate_args=False)

    def expand(self, batch_shape: Any, _instance: Any = None) -> SequenceDistribution:
        """Return the distribution with more leading batch dimensions."""
        return SequenceDistribution(
            self.lm,
            self.prompt_ids,
            self.event_shape[0],
            frozen=self.frozen,
            batch_shape=torch.Size(batch_shape),
            drawn_by=self.drawn_by,
        )

    def sample(self, sample_shape: Any = ()) -> Tensor:
        """Return independent completions, shape sample_shape + (..., P, T)."""
        shape = self._extended_shape(torch.Size(sample_shape))
        num_prompts = len(self.prompt_ids)
        num_draws = int(np.prod(shape[:-2], dtype=np.int64))
        seed = int(torch.randint(2**63 - 1, (), device="cpu"))
        uniforms = np.random.default_rng(seed).random((shape[-1], num_prompts * num_draws))
        if hasattr(self.drawn_by, "drawn_tokens"):  # a model that several processes share
            drawn = self.drawn_by.drawn_tokens(self.prompt_ids, uniforms)
        else:
            drawn = decode_by((self.drawn_by,), self.prompt_ids, uniforms).tokens
        by_prompt = drawn.reshape(num_prompts, num_draws, shape[-1])
        tokens: Tensor = to_device(by_prompt.swapaxes(0, 1).copy(), model_device(self.lm))
        return tokens.reshape(shape)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return log p(x | c) of completions (..., P, T), shape (..., P), float64; tokens past EOS are ignored."""
        tokens, provenance = detach_provenance(value), get_provenance(value)
        batch_shape = np.broadcast_shapes(self.batch_shape, tokens.shape[:-1])
        sequences = to_sequences(tokens.expand(*batch_shape, tokens.shape[-1]), self.lm)
        with torch.no_grad() if self.frozen else nullcontext():
            distinct, index = distinct_completions(sequences)
            log_probs = torch.as_tensor(
                self.lm.token_log_probs(self.prompt_ids, distinct), device=model_device(self.lm)
            )
            total = log_probs.sum(dim=2, dtype=torch.float64).gather(1, to_device(index, log_probs.device))
            total = total.T.reshape(batch_shape)
        return track_provenance(total, provenance)  # type: ignore[no-any-return]

    def features(self, fn: Callable[[IntArray, IntArray], ArrayLike], value: Tensor) -> Tensor:
        """Return f(x) of completions (..., P, T), shape (..., P) or (..., P, K), float64, computed on the host.

        `TraceGraph_ELBO` follows the tensors that are computed from x. `x.tolist()` and `x.numpy()` end this record, and the
        gradient of everything computed from them is lost without any warning. This method keeps the record.

        Parameters
        ----------
        fn
            A function `fn(tokens (M, T), lengths (M,))` of NumPy arrays that returns M numbers or M rows of K; positions past
            a length hold the EOS id (0 if there is none), as for `TokenReward`. The texts are
            `lm.decode([x[:n] for x, n in zip(tokens, lengths)])`.
        value
            The completions, shape (..., P, T).

        Raises
        ------
        RewardError
            If `fn` returns anything else, or NaN.
        """
        tokens, provenance = detach_provenance(value), get_provenance(value)
        found = host_features(fn, to_host(tokens).astype(np.int64).reshape(-1, tokens.shape[-1]), self.lm)
        on_device = torch.as_tensor(found, device=tokens.device).reshape(*tokens.shape[:-1], *found.shape[1:])
        return track_provenance(on_device, provenance)  # type: ignore[no-any-return]


def distinct_completions(sequences: Sequences) -> tuple[Sequences, IntArray]:
    """Return each prompt's distinct completions (P, M, T), and the index of each draw among them (P, N).

    M is the largest number of distinct completions of a prompt. Draws of short completions, or from peaked policies, repeat
    often; each distinct one is scored once.
    """
    kept = np.where(sequences.mask, sequences.tokens, -1)
    per_prompt = [np.unique(rows, axis=0, return_index=True, return_inverse=True)[1:] for rows in kept]
    num_distinct = max(len(first) for first, _ in per_prompt)
    # prompts with fewer distinct completions repeat their first one
    first = np.stack([np.concatenate([f, np.repeat(f[:1], num_distinct - len(f))]) for f, _ in per_prompt])
    rows = np.arange(len(first))[:, None]
    chosen = Sequences(sequences.tokens[rows, first], sequences.lengths[rows, first])
    return chosen, np.stack([inverse.ravel() for _, inverse in per_prompt])


def to_sequences(tokens: Tensor, lm: LanguageModel) -> Sequences:
    """Return completions (..., P, T) as `Sequences` (P, N, T), cut at their first EOS."""
    host = to_host(tokens).astype(np.int64)
    by_prompt = host.reshape(-1, *host.shape[-2:]).swapaxes(0, 1)
    return Sequences(by_prompt, completion_lengths(by_prompt, lm.eos_token_ids))


def pyro_model(posterior: Posterior, prompts_per_step: int | None = None) -> Callable[..., Tensor]:
    """Return the posterior as a Pyro program that returns the completions (..., P, T).

    It needs no argument. Its one optional argument is the indices of the prompts to use, an integer tensor; model and guide of
    a step get the same.

    It may be part of a larger program: call it in your own model, `x = posterior.pyro_model()()`, beside other latent
    variables, and add factors of both by `pyro.factor`, with `SequenceDistribution.features` of x. The guide calls the program
    of `pyro_guide` in the same way.

    Parameters
    ----------
    posterior
        The posterior to write as a program.
    prompts_per_step
        Number of the P prompts that every execution without indices draws at random; None: all of them.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> model = bk.Posterior(coin, longer, max_new_tokens=3).pyro_model()
    >>> conditioned = pyro.poutine.condition(model, data={"x": torch.tensor([[0, 1, 1]])})
    >>> trace = pyro.poutine.trace(conditioned).get_trace()
    >>> bool(np.isclose(float(trace.log_prob_sum()), 2 + 2 * np.log(0.5)))
    True
    """
    check_prompts_per_step(prompts_per_step, posterior.num_prompts)

    def model(prompts: Tensor | None = None) -> Tensor:
        with on_model_device(posterior.prior), _prompts(posterior, prompts_per_step, prompts) as chosen:
            x: Tensor = pyro.sample("x", _distribution(posterior, posterior.prior, chosen, frozen=True))
            reward = _reward(posterior, x, chosen)
            pyro.deterministic("reward", reward)
            pyro.factor("likelihood", reward / posterior.alpha)
        return x

    return model


def pyro_guide(
    posterior: Posterior,
    lm: LanguageModel,
    prompts_per_step: int | None = None,
    drawn_by: LanguageModel | None = None,
) -> Callable[..., Tensor]:
    """Return a trainable language model as a Pyro guide of `pyro_model`'s site "x".

    With `drawn_by` another model draws the completions that the guide scores, for losses of other draws than the guide's.
    Its parameters are registered under a unique name, so that a second guide in one parameter store is trained too. The
    prior itself as a guide is frozen, since training it would change the target (train `prior.copy()` or
    `prior.with_adapter()`).
    """
    check_shares_vocabulary("The guide", lm, posterior.prior)
    check_prompts_per_step(prompts_per_step, posterior.num_prompts)
    module = getattr(lm, "module", lm)
    is_prior = lm is posterior.prior
    name = _registered_name(module) if isinstance(module, torch.nn.Module) and not is_prior else None

    def guide(prompts: Tensor | None = None) -> Tensor:
        if name is not None:
            pyro.module(name, module)
        with on_model_device(lm), _prompts(posterior, prompts_per_step, prompts) as chosen:
            x: Tensor = pyro.sample("x", _distribution(posterior, lm, chosen, frozen=is_prior, drawn_by=drawn_by))
        return x

    return guide


def model_device(lm: LanguageModel) -> torch.device:
    """Return the device of a model's arrays."""
    device: torch.device = getattr(lm, "device", torch.device("cpu"))
    return device


def on_model_device(lm: LanguageModel) -> AbstractContextManager[Any]:
    """Return a context in which Pyro creates its own small tensors on the model's device.

    A device context slows every operation by a tenth, so it does nothing if the default device is the model's.
    """
    device = model_device(lm)
    return nullcontext() if torch.get_default_device() == device else device


def _prompts(posterior: Posterior, prompts_per_step: int | None, prompts: Tensor | None) -> Any:
    """Return the plate of the prompts: of these indices, or of a random subsample where there are none."""
    size = prompts_per_step if prompts is None else len(prompts)
    return pyro.plate("prompts", posterior.num_prompts, subsample_size=size, subsample=prompts, dim=-1)


def _distribution(
    posterior: Posterior, lm: LanguageModel, chosen: Tensor, frozen: bool, drawn_by: LanguageModel | None = None
) -> SequenceDistribution:
    """Return a model's distribution over completions of the chosen prompts."""
    prompt_ids = [posterior.prompt_ids[p] for p in chosen.tolist()]
    return SequenceDistribution(lm, prompt_ids, posterior.max_new_tokens, frozen=frozen, drawn_by=drawn_by)


def _reward(posterior: Posterior, x: Tensor, chosen: Tensor) -> Tensor:
    """Return r(x) of completions (..., P, T), shape (..., P), float64, with the provenance of x."""
    tokens, provenance = detach_provenance(x), get_provenance(x)
    lengths = completion_lengths(to_host(tokens).astype(np.int64), posterior.prior.eos_token_ids)
    inside = np.arange(tokens.shape[-1]) < lengths[..., None]
    padded = np.where(inside, to_host(tokens), posterior.pad_token).reshape(-1, tokens.shape[-1])
    prompt_index = np.broadcast_to(to_host(chosen), tokens.shape[:-1]).ravel()
    reward = posterior.reward_of_rows(padded, lengths.ravel(), prompt_index)
    on_device = to_device(reward, tokens.device, torch.float64).reshape(tokens.shape[:-1])
    return track_provenance(on_device, provenance)  # type: ignore[no-any-return]


_names: WeakKeyDictionary[torch.nn.Module, str] = WeakKeyDictionary()
_name_count = itertools.count()


def _registered_name(module: torch.nn.Module) -> str:
    """Return the module's name in the parameter store, which no other module had before."""
    if module not in _names:
        _names[module] = f"guide_{next(_name_count)}"
    return _names[module]
