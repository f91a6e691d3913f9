"""Deterministic finite automata over token ids, and builders for common ones.

If an automaton computes the reward, the posterior of an n-gram or hidden Markov prior has an exact solution at any length
(theory.md 5.2). This file holds the transitions; the rewards are in `bayes_klrl.models.automata.reward`.

Every builder takes `eos_token_ids`: tokens that are not part of the text and leave the state unchanged.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import ArrayLike

from bayes_klrl.checks import check_count
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.models.automata.regex import regex_machine
from bayes_klrl.models.automata.tables import levenshtein_machine, minimal, pattern_machine, product_machine, reachable
from bayes_klrl.typing import FloatArray, IntArray, TokenIds

__all__ = ["Automaton"]


@dataclass(frozen=True, eq=False)
class Automaton:
    """A deterministic finite automaton over token ids.

    Parameters
    ----------
    transitions
        The next state for each of D states and V tokens, integers of shape (D, V). EOS has a column like any other token.
        Positions past a completion's length are never read.
    start
        The state before the first token.
    accepting
        The states in which an `AutomatonConstraint` of this automaton is fulfilled; may be empty.
    values
        A number for each state, shape (D,), from which rewards can be made: 1 where a pattern was found, the count modulo m,
        or the distance to a target. None: 1 for accepting states and 0 for others.

    Raises
    ------
    BayesKLRLError
        If a transition leads to a state that does not exist, or an accepting state cannot be reached.

    Examples
    --------
    The automaton of texts that contain token 0 directly followed by token 1; token 3 is EOS:

    >>> contains = Automaton.contains([0, 1], vocab_size=4, eos_token_ids=3)
    >>> contains.transitions.tolist()
    [[1, 0, 0, 0], [1, 2, 0, 1], [2, 2, 2, 2]]
    >>> contains.final_states(np.array([[2, 0, 1, 3], [0, 0, 2, 1]]), np.array([4, 4])).tolist()
    [2, 0]
    """

    transitions: IntArray
    start: int = 0
    accepting: Collection[int] = ()
    values: ArrayLike | None = None

    def __post_init__(self) -> None:
        try:
            transitions = np.array(self.transitions)
        except ValueError:  # rows of different lengths
            raise BayesKLRLError(
                f"transitions is an integer array of shape (states, V), all rows of one length; got {self.transitions!r}."
            ) from None
        if transitions.ndim != 2 or not transitions.size or transitions.dtype.kind not in "iu":
            raise BayesKLRLError(
                "transitions is an integer array of shape (states, V), one row per state, one column per token; got shape "
                f"{transitions.shape} of dtype {transitions.dtype}."
            )
        num_states = len(transitions)
        outside = np.argwhere((transitions < 0) | (transitions >= num_states))
        if outside.size:
            state, token = outside[0]
            raise BayesKLRLError(
                f"State {state} goes to state {transitions[state, token]} on token {token}, but the states are "
                f"0..{num_states - 1}. Every state needs a next state in that range for every token."
            )
        accepting_states = list(self.accepting) if isinstance(self.accepting, Iterable) else [self.accepting]
        for what, state in [("The start", self.start), *(("The accepting", state) for state in accepting_states)]:
            if isinstance(state, bool) or not isinstance(state, int | np.integer) or not 0 <= state < num_states:
                raise BayesKLRLError(f"{what} state must be one of 0..{num_states - 1}; got {state!r}.")
        accepting = tuple(sorted({int(state) for state in accepting_states}))
        unreachable = sorted(set(accepting) - set(reachable(transitions, int(self.start)).tolist()))
        if unreachable:
            raise BayesKLRLError(
                f"The accepting state {unreachable[0]} cannot be reached from the start state {self.start} by any "
                "tokens. Leave it out, or correct the transitions."
            )
        values = np.isin(np.arange(num_states), accepting) if self.values is None else np.array(self.values)
        if values.shape != (num_states,) or values.dtype.kind not in "biuf" or np.isnan(values.astype(float)).any():
            raise BayesKLRLError(
                f"values needs one number per state, shape ({num_states},), no NaN; got {self.values!r}."
            )
        fields = {"transitions": transitions.astype(np.int64), "values": values.astype(np.float64)}
        for name, array in fields.items():
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        object.__setattr__(self, "start", int(self.start))
        object.__setattr__(self, "accepting", accepting)

    @property
    def num_states(self) -> int:
        """D, the number of states."""
        return len(self.transitions)

    @property
    def vocab_size(self) -> int:
        """V, the number of tokens."""
        return int(self.transitions.shape[1])

    @cached_property
    def state_values(self) -> FloatArray:
        """`values` as an array, shape (D,)."""
        return np.asarray(self.values, dtype=np.float64)

    def states(self, tokens: IntArray, lengths: IntArray) -> IntArray:
        """Return the state before each token and after the last one, shape (M, T + 1), constant past a completion's length.

        Parameters
        ----------
        tokens, lengths
            M completions: their tokens, shape (M, T), and their lengths, shape (M,).
        """
        num_rows, width = tokens.shape
        visited = np.empty((width + 1, num_rows), dtype=np.int64)
        visited[0] = self.start
        flat = self.transitions.ravel()
        longest = int(lengths.max(initial=0))
        for t in range(longest):
            going = t < lengths
            read = np.where(going, tokens[:, t], 0)  # positions past the length may hold no token id
            visited[t + 1] = np.where(going, flat[visited[t] * self.vocab_size + read], visited[t])
        visited[longest + 1 :] = visited[longest]
        return visited.T

    def final_states(self, tokens: IntArray, lengths: IntArray) -> IntArray:
        """Return the state after the last token, shape (M,)."""
        final: IntArray = self.states(tokens, lengths)[:, -1]
        return final

    def complement(self) -> Automaton:
        """Return the automaton that accepts what this one does not accept; its values are 1 for accepting states."""
        states = reachable(self.transitions, self.start).tolist()
        return Automaton(self.transitions, self.start, sorted(set(states) - set(self.accepting)))

    def product(self, other: Automaton) -> Automaton:
        """Return the automaton that runs both in parallel and accepts what both accept.

        Its states are the pairs of states that can be reached.

        Examples
        --------
        >>> even = Automaton.counts(0, modulo=2, remainder=0, vocab_size=3)
        >>> even.product(Automaton.forbids([1], vocab_size=3)).accepting
        (0,)
        """
        self._check_same_vocabulary(other)
        transitions, pairs = product_machine(self.transitions, other.transitions, (self.start, other.start))
        both = np.isin(pairs[:, 0], list(self.accepting)) & np.isin(pairs[:, 1], list(other.accepting))
        return Automaton(transitions, 0, np.flatnonzero(both).tolist())

    def _check_same_vocabulary(self, other: Automaton) -> None:
        if not isinstance(other, Automaton):
            raise BayesKLRLError(f"The product is with another Automaton; got {other!r}.")
        if other.vocab_size != self.vocab_size:
            raise BayesKLRLError(
                f"The automata read {self.vocab_size} and {other.vocab_size} tokens; they must share one vocabulary."
            )

    @classmethod
    def contains(cls, pattern: TokenIds, *, vocab_size: int, eos_token_ids: int | Collection[int] = ()) -> Automaton:
        """Return the automaton of texts that contain the tokens of `pattern` side by side (Knuth, Morris and Pratt 1977).

        In state k the last tokens were the first k tokens of the pattern. The last state, in which the pattern was found, is
        never left.

        Parameters
        ----------
        pattern
            Token ids.
        vocab_size
            V.
        eos_token_ids
            Tokens that leave the state unchanged.
        """
        ids = _text_ids("The pattern", pattern, vocab_size, eos_token_ids)
        transitions = pattern_machine(ids, vocab_size)
        return cls(_ignoring_eos(transitions, eos_token_ids), 0, [len(ids)])

    @classmethod
    def forbids(cls, pattern: TokenIds, *, vocab_size: int, eos_token_ids: int | Collection[int] = ()) -> Automaton:
        """Return the automaton of texts that do not contain the tokens of `pattern` side by side; see `contains`."""
        return cls.contains(pattern, vocab_size=vocab_size, eos_token_ids=eos_token_ids).complement()

    @classmethod
    def counts(
        cls,
        tokens: int | Collection[int],
        *,
        modulo: int,
        vocab_size: int,
        remainder: int | None = None,
        eos_token_ids: int | Collection[int] = (),
    ) -> Automaton:
        """Return the automaton whose state is the number of tokens read that are among `tokens`, modulo m.

        Parameters
        ----------
        tokens
            The id, or ids, of the counted tokens.
        modulo
            m, the number of states.
        vocab_size
            V.
        remainder
            The accepting state; None: no state accepts.
        eos_token_ids
            Tokens that leave the state unchanged.

        Examples
        --------
        >>> even = Automaton.counts([0, 2], modulo=2, remainder=0, vocab_size=3)
        >>> even.final_states(np.array([[0, 1, 2], [0, 1, 1]]), np.array([3, 3])).tolist()
        [0, 1]
        """
        check_count("modulo", modulo)
        counted = _text_ids("The counted tokens", _as_list(tokens), vocab_size, eos_token_ids)
        states = np.arange(modulo)
        transitions = np.tile(states[:, None], (1, vocab_size))
        transitions[:, counted] = ((states + 1) % modulo)[:, None]
        transitions = _ignoring_eos(transitions, eos_token_ids)
        return cls(transitions, 0, [] if remainder is None else [remainder], states)

    @classmethod
    def regex(
        cls,
        pattern: str,
        *,
        vocab_size: int,
        alphabet: str | Mapping[str, int] | None = None,
        eos_token_ids: int | Collection[int] = (),
    ) -> Automaton:
        r"""Return the smallest automaton that accepts the texts which a regular expression matches as a whole.

        Parameters
        ----------
        pattern
            The regular expression. `<17>` stands for the token of id 17, a character for its id in `alphabet`. `.` is any
            token but EOS, `[ab<3>]` one of several tokens, `[^ab]` any token but these and EOS, `[a-f]` a range of
            characters. `|`, `*`, `+`, `?`, `{2}`, `{2,}`, `{2,5}` and round brackets have their usual meaning; a backslash
            takes the next character literally.
        vocab_size
            V.
        alphabet
            The id of each character: a mapping, or a text whose i-th character has id i (the `characters` of a
            `CharacterTokenizer`). None: the pattern uses ids only.
        eos_token_ids
            Tokens that leave the state unchanged.

        Raises
        ------
        BayesKLRLError
            If the pattern cannot be read, or matches nothing.

        Examples
        --------
        >>> even = Automaton.regex("(<0><0>)*", vocab_size=2, eos_token_ids=1)
        >>> even.num_states, even.accepting
        (2, (0,))
        """
        eos = _checked_ids("EOS", _as_list(eos_token_ids), vocab_size)
        if alphabet is None:
            alphabet = {}
        elif isinstance(alphabet, str):
            alphabet = {character: i for i, character in enumerate(alphabet)}
        if not isinstance(pattern, str) or not isinstance(alphabet, Mapping):
            raise BayesKLRLError(
                "The pattern must be a str, and alphabet a str or a mapping from characters to ids; got "
                f"{pattern!r} and {alphabet!r}."
            )
        _checked_ids("The alphabet", list(alphabet.values()), vocab_size)
        transitions, accepting = regex_machine(pattern, alphabet, vocab_size, eos)
        if not accepting.any():
            raise BayesKLRLError(f"The regular expression {pattern!r} matches nothing at all.")
        return cls(transitions, 0, np.flatnonzero(accepting).tolist())

    @classmethod
    def levenshtein(
        cls,
        target: TokenIds,
        *,
        max_distance: int,
        vocab_size: int,
        eos_token_ids: int | Collection[int] = (),
    ) -> Automaton:
        """Return the automaton that computes the edit distance between the tokens read and a target, up to a maximum.

        Its `values` are the distances, `max_distance` + 1 for all larger ones. It accepts distances of at most
        `max_distance`. The number of states grows with len(target), and exponentially with `max_distance`.

        Parameters
        ----------
        target
            Token ids.
        max_distance
            The largest distance that is computed; larger ones all count as `max_distance` + 1.
        vocab_size
            V.
        eos_token_ids
            Tokens that leave the state unchanged.

        Examples
        --------
        >>> near = Automaton.levenshtein([0, 1], max_distance=1, vocab_size=3, eos_token_ids=2)
        >>> texts, lengths = np.array([[0, 1, 2], [0, 2, 2], [1, 0, 2]]), np.array([3, 2, 3])
        >>> near.state_values[near.final_states(texts, lengths)].tolist()
        [0.0, 1.0, 2.0]
        """
        check_count("max_distance", max_distance, least=0)
        ids = _text_ids("The target", target, vocab_size, eos_token_ids)
        transitions, distances = levenshtein_machine(ids, max_distance, vocab_size)
        transitions, distances = minimal(_ignoring_eos(transitions, eos_token_ids), distances)
        return cls(transitions, 0, np.flatnonzero(distances <= max_distance).tolist(), distances)


def _as_list(ids: int | Collection[int]) -> Collection[int]:
    """Return one id as a list of one; several ids as they are."""
    return [int(ids)] if isinstance(ids, int | np.integer) else ids


def _checked_ids(what: str, ids: Collection[int], vocab_size: int) -> list[int]:
    """Return token ids as a list; refuse anything else, and ids outside the vocabulary."""
    check_count("vocab_size", vocab_size)
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise BayesKLRLError(
            f"{what} must be token ids, such as [4, 7]; got {ids!r}. Encode a text first: lm.encode([text])[0]."
        )
    listed = list(ids)
    for i in listed:
        if isinstance(i, bool) or not isinstance(i, int | np.integer):
            raise BayesKLRLError(f"{what} must be token ids, which are integers; got {i!r} among them.")
        if not 0 <= i < vocab_size:
            raise BayesKLRLError(f"{what} has the token id {i}, outside the vocabulary 0..{vocab_size - 1}.")
    return [int(i) for i in listed]


def _text_ids(what: str, ids: Collection[int], vocab_size: int, eos_token_ids: int | Collection[int]) -> list[int]:
    """Return the ids of tokens that are searched for in the text; refuse EOS, which is not part of it."""
    listed = _checked_ids(what, ids, vocab_size)
    if ended := set(listed) & set(_checked_ids("EOS", _as_list(eos_token_ids), vocab_size)):
        raise BayesKLRLError(f"{what} has the EOS id {min(ended)}, which is not part of the text. Leave it out.")
    return listed


def _ignoring_eos(transitions: IntArray, eos_token_ids: int | Collection[int]) -> IntArray:
    """Write into the table that EOS ids leave every state unchanged, and return it."""
    eos = _checked_ids("EOS", _as_list(eos_token_ids), transitions.shape[1])
    transitions[:, eos] = np.arange(len(transitions))[:, None]
    return transitions
