"""Problems P8 and P11: a mean to be met, and a text to be written under rules."""

from __future__ import annotations

import numpy as np

from bayes_klrl.checks import check_count, check_fraction
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.exact.messages import Messages, backward_messages
from bayes_klrl.inference.moments.constraints import MomentConstraint, moment_constraint
from bayes_klrl.likelihood import Likelihood
from bayes_klrl.models.automata.automaton import Automaton
from bayes_klrl.models.automata.reward import AutomatonConstraint, AutomatonReward
from bayes_klrl.models.ngram_lm.lm import CharacterTokenizer, NgramLM
from bayes_klrl.models.twists.twisted_lm import TwistedLM
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import FloatArray, IntArray

__all__ = ["SENTENCES", "constraint_text", "masked_policy", "rare_feature"]

SENTENCES = (
    "it is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a wife.",
    "however little known the feelings or views of such a man may be on his first entering a neighbourhood, this truth is so "
    "well fixed in the minds of the surrounding families, that he is considered as the rightful property of some one or "
    "other of their daughters.",
    "my dear mr. bennet, said his lady to him one day, have you heard that netherfield park is let at last?",
    "mr. bennet was so odd a mixture of quick parts, sarcastic humour, reserve, and caprice, that the experience of three and "
    "twenty years had been insufficient to make his wife understand his character.",
    "vanity and pride are different things, though the words are often used synonymously.",
    "i could easily forgive his pride, if he had not mortified mine.",
    "she had been forced into prudence in her youth, she learned romance as she grew older: the natural sequel of an "
    "unnatural beginning.",
    "there could have been no two hearts so open, no tastes so similar, no feelings so in unison, no countenances so beloved.",
)
"""Sentences of Jane Austen (Pride and Prejudice, 1813; Persuasion, 1818; public domain), in lower case."""


def rare_feature(target: float = 0.5, *, prior_mean: float = 0.07, max_new_tokens: int = 5) -> MomentConstraint:
    """Return problem P8: f(x) = "contains token 2", of prior mean 0.07, must hold with probability `target`.

        lambda = logit(target) - logit(prior_mean) = 2.587 at the default
        log Z = log(1 - prior_mean + prior_mean exp(lambda))

    Maximising E[f] would make it hold always; the moment constraint asks for half, and leaves all else as in the prior.

    Parameters
    ----------
    target, prior_mean
        Probabilities between 0 and 1.
    max_new_tokens
        T; 3**T completions.

    Examples
    --------
    >>> rare_feature().lambdas.round(3)
    array([2.587])
    """
    check_fraction("prior_mean", prior_mean)
    if not 0 < prior_mean < 1:
        raise BayesKLRLError(
            f"prior_mean must lie strictly between 0 and 1, or its logit is infinite; got {prior_mean!r}."
        )
    check_count("max_new_tokens", max_new_tokens)
    each = 1 - (1 - prior_mean) ** (1 / max_new_tokens)
    prior = NgramLM(np.log([(1 - each) * 0.6, (1 - each) * 0.4, each]), eos_token_id=None)
    contains = Automaton.contains([2], vocab_size=3)
    feature = AutomatonReward(
        contains, final_rewards=contains.state_values, alpha=1.0, bounds=(0.0, 1.0), name="contains 2"
    )
    return moment_constraint(prior, feature, target, max_new_tokens=max_new_tokens)


def constraint_text(
    max_new_tokens: int = 40,
    *,
    order: int = 3,
    max_word_length: int | None = 5,
    word: str | None = "man",
    forbidden: str = "w",
    texts: tuple[str, ...] = SENTENCES,
) -> Posterior:
    """Return problem P11: text by characters, with short words, a word that must occur, and letters that must not.

    The prior is a character n-gram model of `texts`; the rules are automata, so that log Z and the posterior are exact at any
    length (`backward_messages`). After Lew et al. (2023), who put such rules to larger models.

    Parameters
    ----------
    max_new_tokens
        T, in characters.
    order
        The order of the prior, an n-gram model.
    max_word_length
        The largest number of successive letters; None: no such rule.
    word
        A word that must occur, between spaces; None: no such rule.
    forbidden
        Characters that must not occur.
    texts
        The texts that the prior is fitted to.
    """
    prior = NgramLM.fit(list(texts), order=order)
    tokenizer: CharacterTokenizer = prior.tokenizer  # type: ignore[assignment]
    rules = _rules(tokenizer, max_word_length, word, forbidden)
    if not rules:
        raise BayesKLRLError("A constraint text needs a rule: give max_word_length, word or forbidden.")
    likelihood = rules[0]
    for rule in rules[1:]:
        likelihood = likelihood * rule
    return Posterior(prior, likelihood, max_new_tokens=max_new_tokens)


def _rules(
    tokenizer: CharacterTokenizer, max_word_length: int | None, word: str | None, forbidden: str
) -> list[Likelihood]:
    """Return one constraint per rule."""
    vocabulary = {"vocab_size": len(tokenizer), "eos_token_ids": tokenizer.eos_token_id}
    rules: list[Likelihood] = []
    if max_word_length is not None:
        check_count("max_word_length", max_word_length)
        letters = [i for i, c in enumerate(tokenizer.characters) if c.isalpha()]
        rules.append(AutomatonConstraint(_short_runs(letters, max_word_length, tokenizer), name="short words"))
    if word is not None:
        ids = tokenizer.encode(f" {word} ")
        rules.append(AutomatonConstraint(Automaton.contains(ids, **vocabulary), name=f"contains {word!r}"))
    for character in forbidden:
        ids = tokenizer.encode(character)
        rules.append(AutomatonConstraint(Automaton.forbids(ids, **vocabulary), name=f"no {character!r}"))
    return rules


def _short_runs(letters: list[int], longest: int, tokenizer: CharacterTokenizer) -> Automaton:
    """Return the automaton that counts successive letters; after more than `longest` it never accepts."""
    too_long = longest + 1
    transitions = np.zeros((too_long + 1, len(tokenizer)), dtype=np.int64)
    states = np.arange(too_long + 1)
    transitions[:, letters] = np.minimum(states + 1, too_long)[:, None]
    transitions[:, tokenizer.eos_token_id] = states
    transitions[too_long] = too_long
    return Automaton(transitions, accepting=range(too_long))


def masked_policy(posterior: Posterior | Messages) -> TwistedLM:
    """Return local masking, as constrained decoding does it: the prior without tokens after which the rules cannot be met.

        q(a | x_<t) prop. to p0(a | x_<t) 1[some continuation of x_<t a has positive likelihood]

    It never breaks a rule, and its distribution is not the posterior: a token after which few continuations are left is as
    likely as before. Its KL to the posterior says how wrong it is.

    Parameters
    ----------
    posterior
        A posterior that backward messages can solve, or its messages.
    """
    messages = posterior if isinstance(posterior, Messages) else backward_messages(posterior)
    return TwistedLM(messages.posterior, _Feasible(messages))


class _Feasible:
    """The twist that is 1 where the rules can still be met and 0 where not."""

    def __init__(self, messages: Messages) -> None:
        self._optimal = messages.twist()

    def __call__(self, posterior: Posterior, prompt_index: IntArray, prefixes: IntArray) -> FloatArray:
        """See `Twist.__call__`."""
        return _log_of(np.isfinite(self._optimal(posterior, prompt_index, prefixes)))

    def next_log_psi(
        self, posterior: Posterior, prompt_index: IntArray, prefixes: IntArray, prior_rows: object = None
    ) -> FloatArray:
        """See `bayes_klrl.models.twists.simple.next_log_psi`."""
        return _log_of(np.isfinite(self._optimal.next_log_psi(posterior, prompt_index, prefixes)))


def _log_of(holds: np.ndarray) -> FloatArray:
    """Return 0 where something holds, -inf where not."""
    return np.where(holds, 0.0, -np.inf)
