"""The posterior over completions: prior x likelihood / evidence.

    p*(x | c) = p0(x | c) exp(r(x, c) / alpha) / Z(c)

Completions follow the convention "absorb": x ends with EOS, which is part of it, or was cut at `max_new_tokens`, which is an
outcome like any other. So p0 sums to exactly 1 over completions, and sampling with `max_new_tokens` draws from it
(theory.md 1.2).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.batch import Batch, Setting
from bayes_klrl.checks import check_count, check_fraction, check_language_model, check_positive
from bayes_klrl.errors import BayesKLRLError, needs_jax
from bayes_klrl.likelihood import Likelihood
from bayes_klrl.prompts.chat import as_conversations
from bayes_klrl.prompts.context import check_context, encoded_prompts
from bayes_klrl.prompts.lists import chosen_prompts, prompt_list
from bayes_klrl.prompts.rows import checked_columns, prompts_and_columns
from bayes_klrl.prompts.template import check_end_of_turn, rendered_prompts
from bayes_klrl.randomness import generator
from bayes_klrl.reward_functions.signatures import check_reads_completions
from bayes_klrl.sequences import Sequences, check_outcomes, completion_log_probs, pad_token
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel

if TYPE_CHECKING:
    from bayes_klrl.draws import Draws
    from bayes_klrl.models.programs.numpyro_program import NumpyroGuide, NumpyroModel

__all__ = ["Posterior", "check_context", "check_language_model", "completion_log_probs", "encoded_prompts", "numbered"]


class Posterior:
    """The prior conditioned on a reward: the optimal policy of KL-regularised RL.

    Parameters
    ----------
    prior
        The pretrained language model p0 (RL: the reference model).
    likelihood
        The likelihood exp(r / alpha): a `Reward`, `TokenReward`, `Constraint`, or a product of them.
    prompts
        One prompt or P prompts: texts, lists or arrays of token ids, or conversations; several in a list, tuple, array, pandas
        Series or generator, which is read once. Of a tokenizer's output (a `transformers.BatchEncoding`) the `input_ids` are
        taken, without padding. A conversation is a list of messages, `[{"role": "user", "content": "Hello"}]`: the tokenizer's
        chat template renders it, once, and reward functions get completions as messages too.
    max_new_tokens
        T, the largest number of tokens that a completion may have, EOS included.
    chat_template_kwargs
        Arguments of the chat template, such as `{"enable_thinking": False}`; None: none, or those of an earlier rendering.
    **columns
        Further data about the prompts, which reward functions may ask for by name: each column holds P values of any type
        in a list, array, pandas Series or generator, which is read once.

    Attributes
    ----------
    prompts
        The P prompts as given; a conversation has its rendered text in `rendering.text`.
    prompt_ids
        The P prompts as token ids; an empty prompt has become the model's BOS.
    prompt_numbers
        What a reward that asks for `prompt_index` is told, shape (P,): 0, ..., P - 1, which `select` and `split` keep.

    Raises
    ------
    BayesKLRLError
        If an argument is wrong, before any model is run. `TextRewardError` for a reward that reads text and a prior that
        has no tokenizer.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3)
    >>> posterior.log_joint([[1], [0, 1]]).round(3)
    array([[0.307, 0.614]])
    """

    prompt_numbers: IntArray

    def __init__(
        self,
        prior: LanguageModel,
        likelihood: Likelihood,
        *,
        prompts: str | Iterable[Any] = "",
        max_new_tokens: int,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        **columns: Iterable[Any],
    ) -> None:
        check_language_model("The prior", prior)
        if not isinstance(likelihood, Likelihood):
            raise BayesKLRLError(
                f"likelihood must be a bk.Reward, bk.TokenReward or bk.Constraint; got {likelihood!r}. Wrap a function: "
                "bk.Reward(fn, alpha=...)."
            )
        check_count("max_new_tokens", max_new_tokens)
        self.prior = prior
        self.max_new_tokens = int(max_new_tokens)
        given = prompt_list(prompts)
        self.columns: dict[str, Any] = checked_columns(columns, len(given))
        likelihood.check(prior, self.columns)
        self.prompts = rendered_prompts(given, prior, chat_template_kwargs)
        check_end_of_turn(self.prompts, prior)
        self.prompt_ids = encoded_prompts(self.prompts, prior)
        check_context(self.prompt_ids, self.max_new_tokens, prior)
        if not hasattr(self, "prompt_numbers"):  # a part of the prompts of another posterior has theirs
            self.prompt_numbers = np.arange(len(given))
        self._given = likelihood
        self.likelihood = likelihood.bind(
            Setting(prior, self.prompts, self.prompt_ids, self.columns, self.max_new_tokens, self.prompt_numbers)
        )

    @classmethod
    def from_rows(
        cls,
        prior: LanguageModel,
        likelihood: Likelihood,
        rows: Iterable[Mapping[str, Any]],
        *,
        prompt: str = "prompt",
        max_new_tokens: int,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> Posterior:
        """Return the posterior of the prompts in a table, whose other columns go to the reward functions by name.

        A data set of prompts in TRL's format works as it is, standard or conversational, with two differences. A column
        "completion", which TRL drops, reaches the reward functions that ask for it, for instance as a reference answer.
        Columns with the names of what is sampled ("completions", "completion_ids", "finished") or with another reserved name
        are refused: rename or drop them.

        Parameters
        ----------
        prior, likelihood, max_new_tokens, chat_template_kwargs
            The same as for `Posterior`.
        rows
            The table: a list or other iterable of dictionaries with the same keys, a `datasets.Dataset`, or a pandas
            DataFrame. Values may be of any type and reach the reward functions unchanged.
        prompt
            The name of the column that holds the prompts.

        Raises
        ------
        BayesKLRLError
            If there are no rows, if rows have different keys, if there is no column of prompts, if the name of another
            column is reserved, or if a reward function's only parameter is called like a column: it would not see the
            completions.

        Examples
        --------
        >>> import bayes_klrl as bk
        >>> prior = bk.NgramLM.fit(["1+2=3.", "2+2=4."], order=2)
        >>> rows = [{"prompt": "1+2=", "answer": "3"}, {"prompt": "2+2=", "answer": "4"}]
        >>> right = bk.Reward(lambda completions, answer: [a in c for c, a in zip(completions, answer)], alpha=0.5)
        >>> posterior = bk.Posterior.from_rows(prior, right, rows, max_new_tokens=2)
        >>> posterior.prompts, posterior.columns
        (('1+2=', '2+2='), {'answer': ('3', '4')})
        """
        prompts, columns = prompts_and_columns(rows, prompt)
        posterior = cls(
            prior,
            likelihood,
            prompts=prompts,
            max_new_tokens=max_new_tokens,
            chat_template_kwargs=chat_template_kwargs,
            **columns,
        )
        for factor in likelihood.factors:
            check_reads_completions(getattr(factor, "fn", None), factor.label, columns)
        return posterior

    def __repr__(self) -> str:
        return (
            f"Posterior(prior={type(self.prior).__name__}, likelihood={self.likelihood.label!r}, alpha="
            f"{self.likelihood.alpha}, prompts={len(self.prompts)}, max_new_tokens={self.max_new_tokens})"
        )

    def _repr_html_(self) -> str:
        from bayes_klrl.export.notebook import posterior_html

        return posterior_html(self)

    @property
    def num_prompts(self) -> int:
        """P, the number of prompts."""
        return len(self.prompt_ids)

    @property
    def alpha(self) -> float:
        """Units of reward per nat; 1 for constraints alone, whose reward is 0 or -inf."""
        return self.likelihood.alpha or 1.0

    @property
    def pad_token(self) -> int:
        """The token id at positions past a completion's length: the EOS id, 0 if there is none."""
        return pad_token(self.prior.eos_token_ids)

    def at_alpha(self, alpha: float) -> Posterior:
        """Return the posterior of the same prior and reward at another alpha; constraints are untouched by it.

        Raises
        ------
        BayesKLRLError
            If alpha is not a positive number, if there is no alpha (constraints alone), if rewards have different ones, or if
            the reward itself depends on it.

        Examples
        --------
        >>> import numpy as np, bayes_klrl as bk
        >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
        >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
        >>> posterior = bk.Posterior(coin, longer, max_new_tokens=3).at_alpha(0.5)
        >>> posterior.alpha, posterior.log_likelihood([[0, 1]])
        (0.5, array([[4.]]))
        """
        check_positive("alpha", alpha)
        if self.likelihood.alpha is None:
            raise BayesKLRLError("A likelihood of constraints alone has no alpha. Multiply it by a bk.Reward.")
        if len({factor.alpha for factor in self.likelihood.factors if factor.alpha is not None}) > 1:
            raise BayesKLRLError(
                f"The rewards of {self.likelihood.label!r} have different alphas, so there is no alpha to change. Take a new "
                "bk.Posterior with likelihood ** gamma, or give them one alpha."
            )
        if self.likelihood.depends_on_alpha:
            raise BayesKLRLError(
                f"The reward {self.likelihood.label!r} itself changes with alpha. Make a new bk.Posterior with a new reward."
            )
        if alpha == self.alpha:
            return self
        other = copy.copy(self)
        gamma = self.alpha / alpha
        other._given, other.likelihood = self._given**gamma, self.likelihood**gamma
        return other

    def select(self, indices: Iterable[int] | slice) -> Posterior:
        """Return the posterior of some of the prompts, with their columns, in the order of the indices.

        A reward that asks for `prompt_index` is told the numbers that the prompts have here.

        Parameters
        ----------
        indices
            Which prompts: indices in a list or array (negative ones count from the end), a slice, or a mask of P bools.

        Raises
        ------
        BayesKLRLError
            If no prompt is chosen, if there is no prompt of an index, or if a mask does not have length P.

        Examples
        --------
        >>> import numpy as np, bayes_klrl as bk
        >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
        >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
        >>> posterior = bk.Posterior(coin, longer, prompts=[[0], [0, 0], [0, 0, 0]], max_new_tokens=3)
        >>> posterior.select([2, 0]).prompt_ids, posterior.select(slice(2)).prompt_ids
        (((0, 0, 0), (0,)), ((0,), (0, 0)))
        """
        chosen = chosen_prompts(indices, self.num_prompts)
        columns = {name: [values[index] for index in chosen] for name, values in self.columns.items()}
        return self._with_prompts([self.prompts[p] for p in chosen], columns, self.prompt_numbers[chosen])

    def as_chat(self) -> Posterior:
        """Return the posterior of the same prompts as conversations: every text as one message of the user.

        Reward functions then get completions as messages. Prompts that are conversations already stay as they are.

        Raises
        ------
        BayesKLRLError
            If prompts are token ids, or the prior's tokenizer has no chat template.
        """
        return self._with_prompts(as_conversations(self.prompts), self.columns, self.prompt_numbers)

    def _with_prompts(self, prompts: Sequence[Any], columns: Mapping[str, Any], numbers: IntArray) -> Posterior:
        """Return the posterior of other prompts, with their columns and numbers."""
        options = {**columns, "prompts": list(prompts), "max_new_tokens": self.max_new_tokens}
        return numbered(numbers, self.prior, self._given, options)

    def with_likelihood(self, likelihood: Likelihood) -> Posterior:
        """Return the posterior of another likelihood: the same prior and prompts, with their columns and numbers."""
        options = {**self.columns, "prompts": self.prompts, "max_new_tokens": self.max_new_tokens}
        return numbered(self.prompt_numbers, self.prior, likelihood, options)

    def split(self, fraction: float, seed: int) -> tuple[Posterior, Posterior]:
        """Return the posteriors of two parts of the prompts, drawn at random, for training and for held-out evaluation.

        The first part has round(fraction * P) prompts and the second has the others, both in the order of this posterior.
        Each prompt is in one part; equal prompts may be in different ones.

        Parameters
        ----------
        fraction
            The share of the prompts that the first part has.
        seed
            The seed of the choice: the same seed and P give the same parts.

        Raises
        ------
        BayesKLRLError
            If one of the parts would have no prompt.

        Examples
        --------
        >>> import numpy as np, bayes_klrl as bk
        >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
        >>> longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
        >>> posterior = bk.Posterior(coin, longer, prompts=[[0] * n for n in range(1, 11)], max_new_tokens=3)
        >>> training, held_out = posterior.split(0.8, seed=0)
        >>> training.num_prompts, held_out.num_prompts
        (8, 2)
        """
        check_fraction("fraction", fraction)
        first = round(float(fraction) * self.num_prompts)
        if not 0 < first < self.num_prompts:
            raise BayesKLRLError(
                f"fraction = {fraction} splits the posterior's prompts into {first} and {self.num_prompts - first}; each "
                "part needs at least one. Choose another fraction, or give more prompts."
            )
        order = generator(seed).permutation(self.num_prompts)
        return self.select(np.sort(order[:first])), self.select(np.sort(order[first:]))

    def sequences(self, x: Sequences | Draws | Sequence[Sequence[int]]) -> Sequences:
        """Return completions as `Sequences` of width T; completions that are not outcomes of this posterior are refused.

        Parameters
        ----------
        x
            The completions: `Sequences` or `Draws` for P prompts, or for one prompt a list of token-id lists.
        """
        if hasattr(x, "tokens") and hasattr(x, "lengths"):
            given = Sequences(x.tokens, x.lengths)
        else:
            if self.num_prompts != 1:
                raise BayesKLRLError(
                    f"Lists of token ids are for one prompt; this posterior has {self.num_prompts}. Give bk.Sequences."
                )
            given = Sequences.from_lists(x, max_new_tokens=self.max_new_tokens, pad_token=self.pad_token)
        if given.tokens.shape[0] != self.num_prompts:
            raise BayesKLRLError(
                f"The completions are of {given.tokens.shape[0]} prompts, the posterior has {self.num_prompts}."
            )
        padded = given.padded(self.max_new_tokens, self.pad_token)
        check_outcomes(padded, self.prior)
        return padded

    def log_prior(self, x: Sequences | Draws | Sequence[Sequence[int]]) -> FloatArray:
        """Return log p0(x | c) = sum_t log p0(x_t | c, x_<t), EOS included, shape (P, N), float64."""
        return completion_log_probs(self.prior, self.prompt_ids, self.sequences(x))

    def reward(self, x: Sequences | Draws | Sequence[Sequence[int]]) -> FloatArray:
        """Return r(x, c), shape (P, N), float64; -inf outside a constraint."""
        sequences = self.sequences(x)
        num_prompts, num_draws, num_tokens = sequences.tokens.shape
        prompt_index = np.repeat(np.arange(num_prompts), num_draws)
        rewards = self.reward_of_rows(sequences.tokens.reshape(-1, num_tokens), sequences.lengths.ravel(), prompt_index)
        return rewards.reshape(num_prompts, num_draws)

    def reward_of_rows(self, tokens: IntArray, lengths: IntArray, prompt_index: IntArray) -> FloatArray:
        """Return r(x, c) of M completions of any prompts, shape (M,), float64.

        Parameters
        ----------
        tokens, lengths
            The token ids, shape (M, T), with `pad_token` past each length, and the lengths, shape (M,).
        prompt_index
            Index of the prompt that each completion follows, shape (M,).
        """
        return self.likelihood.reward(self.batch(tokens, lengths, prompt_index))

    def batch(self, tokens: IntArray, lengths: IntArray, prompt_index: IntArray) -> Batch:
        """Return M completions of any prompts as reward functions see them; see `reward_of_rows`."""
        return Batch(
            tokens,
            lengths,
            prompt_index,
            self.prompts,
            self.columns,
            self.prior,
            self.prompt_ids,
            self.prompt_numbers,
        )

    def log_likelihood(self, x: Sequences | Draws | Sequence[Sequence[int]]) -> FloatArray:
        """Return r(x, c) / alpha in nats, shape (P, N), float64."""
        return self.likelihood.log_likelihood(self.reward(x))

    def log_joint(self, x: Sequences | Draws | Sequence[Sequence[int]]) -> FloatArray:
        """Return log p0(x | c) + r(x, c) / alpha, the log posterior up to log Z(c), shape (P, N), float64."""
        return self.log_prior(x) + self.log_likelihood(x)

    def pyro_model(self) -> Callable[[], Any]:
        """Return the posterior as a Pyro program; see `bayes_klrl.models.programs.pyro_program.pyro_model`."""
        from bayes_klrl.models.programs.pyro_program import pyro_model

        return pyro_model(self)

    def pyro_guide(self, lm: LanguageModel) -> Callable[[], Any]:
        """Return a language model as a Pyro guide; see `bayes_klrl.models.programs.pyro_program.pyro_guide`."""
        from bayes_klrl.models.programs.pyro_program import pyro_guide

        return pyro_guide(self, lm)

    def numpyro_model(self) -> NumpyroModel:
        """Return the posterior as a NumPyro program; see `bayes_klrl.models.programs.numpyro_program.numpyro_model`."""
        with needs_jax("posterior.numpyro_model()"):
            from bayes_klrl.models.programs.numpyro_program import numpyro_model

        return numpyro_model(self)

    def numpyro_guide(self, lm: LanguageModel) -> NumpyroGuide:
        """Return a language model as a NumPyro guide; see `bayes_klrl.models.programs.numpyro_program.numpyro_guide`."""
        with needs_jax("posterior.numpyro_guide(lm)"):
            from bayes_klrl.models.programs.numpyro_program import numpyro_guide

        return numpyro_guide(self, lm)


def numbered(
    prompt_numbers: IntArray, prior: LanguageModel, likelihood: Likelihood, options: Mapping[str, Any]
) -> Posterior:
    """Return a posterior whose rewards know its prompts by these numbers, (P,); `options` are the arguments by name."""
    posterior = Posterior.__new__(Posterior)
    posterior.prompt_numbers = prompt_numbers
    Posterior.__init__(posterior, prior, likelihood, **options)
    return posterior
