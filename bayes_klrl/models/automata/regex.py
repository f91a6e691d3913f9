"""Regular expressions over tokens as automata: parse, Thompson's construction, subset construction, minimisation.

    expression = branch ("|" branch)*       branch = (atom repeat*)*       repeat = * + ? {m} {m,} {m,n}
    atom = "(" expression ")" | "[" "^"? items "]" | "." | "<" id ">" | character

Hopcroft, Motwani and Ullman (2006), chapters 2 and 3.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.models.automata.tables import explored, minimal
from bayes_klrl.typing import IntArray

__all__ = ["regex_machine"]

_MAX_STATES = 100_000


def regex_machine(
    pattern: str, alphabet: Mapping[str, int], vocab_size: int, eos_token_ids: Collection[int]
) -> tuple[IntArray, NDArray[np.bool_]]:
    """Return the smallest automaton of a regular expression: transitions (D, V), and which states accept, (D,).

    EOS ids leave every state unchanged and match nothing.
    """
    text = frozenset(range(vocab_size)) - frozenset(eos_token_ids)
    machine = _Machine()
    start, end = _Parser(pattern, alphabet, text, machine).parse()
    symbols = sorted({token for edges in machine.edges for tokens, _ in edges for token in tokens})
    kinds: dict[tuple[int, ...], list[int]] = {}  # classes of tokens that all edges treat alike
    sets = list({tokens for edges in machine.edges for tokens, _ in edges})
    for token in symbols:
        kinds.setdefault(tuple(i for i, tokens in enumerate(sets) if token in tokens), []).append(token)
    examples = [tokens[0] for tokens in kinds.values()]

    def successors(states: frozenset[int]) -> list[frozenset[int]]:
        return [machine.after(states, token) for token in examples] + [frozenset()]

    by_kind, subsets = explored(machine.closure({start}), successors)
    kind_of = np.full(vocab_size, len(examples), dtype=np.int64)
    for kind, tokens in enumerate(kinds.values()):
        kind_of[tokens] = kind
    accepting = np.array([end in states for states in subsets], dtype=np.int64)
    transitions = by_kind[:, kind_of]
    transitions[:, sorted(eos_token_ids)] = np.arange(len(transitions))[:, None]
    transitions, accepting = minimal(transitions, accepting)
    return transitions, accepting.astype(bool)


@dataclass
class _Machine:
    """A nondeterministic automaton: `edges` read one of a set of tokens, `jumps` read none."""

    edges: list[list[tuple[frozenset[int], int]]] = field(default_factory=list)
    jumps: list[list[int]] = field(default_factory=list)

    def state(self) -> int:
        """Add a state and return its number."""
        if len(self.edges) >= _MAX_STATES:
            raise BayesKLRLError(
                "The regular expression is too large, since its nested repetitions multiply. Write a smaller one."
            )
        self.edges.append([])
        self.jumps.append([])
        return len(self.edges) - 1

    def closure(self, states: Collection[int]) -> frozenset[int]:
        """Return the given states and all states that jumps lead to from them."""
        seen, stack = set(states), list(states)
        while stack:
            for state in self.jumps[stack.pop()]:
                if state not in seen:
                    seen.add(state)
                    stack.append(state)
        return frozenset(seen)

    def after(self, states: Collection[int], token: int) -> frozenset[int]:
        """Return the states after one more token."""
        return self.closure({goal for s in states for tokens, goal in self.edges[s] if token in tokens})


class _Parser:
    """A recursive descent parser. Every method adds a fragment to the machine and returns its (start, end) states."""

    def __init__(self, pattern: str, alphabet: Mapping[str, int], text: frozenset[int], machine: _Machine) -> None:
        self._pattern, self._alphabet, self._text, self._machine = pattern, alphabet, text, machine
        self._position = 0

    def parse(self) -> tuple[int, int]:
        """Return the fragment of the whole pattern."""
        fragment = self._expression()
        if self._position < len(self._pattern):
            raise self._error(f"{self._peek()!r} was not opened")
        return fragment

    def _peek(self) -> str:
        return self._pattern[self._position : self._position + 1]

    def _take(self, symbol: str) -> bool:
        """Step over `symbol` if it comes next, and return whether it did."""
        found = self._peek() == symbol
        self._position += found
        return found

    def _error(self, what: str) -> BayesKLRLError:
        return BayesKLRLError(f"The regular expression {self._pattern!r} cannot be read at {self._position}: {what}.")

    def _expression(self) -> tuple[int, int]:
        start, end = self._machine.state(), self._machine.state()
        while True:
            first, last = self._branch()
            self._machine.jumps[start].append(first)
            self._machine.jumps[last].append(end)
            if not self._take("|"):
                return start, end

    def _branch(self) -> tuple[int, int]:
        start = end = self._machine.state()
        while self._peek() not in ("", "|", ")"):
            first, last = self._repeated()
            self._machine.jumps[end].append(first)
            end = last
        return start, end

    def _repeated(self) -> tuple[int, int]:
        """Read an atom and its repetitions; a counted one reads the atom's text again for each copy."""
        begin = self._position
        fragment = self._atom()
        while True:
            end = self._position
            bounds = self._bounds()
            if bounds is None:
                return fragment
            after = self._position
            fragment = self._copies(begin, end, *bounds)
            self._position = after

    def _bounds(self) -> tuple[int, int | None] | None:
        """Return (least, most) of a repetition that comes next, most None for any number."""
        for symbol, bounds in {"*": (0, None), "+": (1, None), "?": (0, 1)}.items():
            if self._take(symbol):
                return bounds
        if self._peek() != "{":
            return None
        found = re.compile(r"\{(\d+)(,?)(\d*)\}").match(self._pattern, self._position)
        if not found or (found[3] and not found[2]):
            raise self._error("a repetition is {m}, {m,} or {m,n}; write \\{ for the character")
        self._position = found.end()
        least = int(found[1])
        most = least if not found[2] else int(found[3]) if found[3] else None
        if most is not None and most < least:
            raise self._error(f"{found[0]} asks for at least {least} and at most {most}")
        return least, most

    def _copies(self, begin: int, end: int, least: int, most: int | None) -> tuple[int, int]:
        """Return `least` copies of pattern[begin:end], then any number or up to `most` - `least` more."""
        jumps = self._machine.jumps
        start = state = self._machine.state()
        for _ in range(least):
            first, last = self._again(begin, end)
            jumps[state].append(first)
            state = last
        goal = self._machine.state()
        jumps[state].append(goal)
        if most is None:
            first, last = self._again(begin, end)
            jumps[goal].append(first)
            jumps[last].append(goal)
            return start, goal
        for _ in range(most - least):
            first, last = self._again(begin, end)
            jumps[state].append(first)
            jumps[last].append(goal)
            state = last
        return start, goal

    def _again(self, begin: int, end: int) -> tuple[int, int]:
        """Read pattern[begin:end], an atom with its inner repetitions, once more."""
        part = _Parser(self._pattern[:end], self._alphabet, self._text, self._machine)
        part._position = begin
        return part._repeated()

    def _atom(self) -> tuple[int, int]:
        if self._take("("):
            fragment = self._expression()
            if not self._take(")"):
                raise self._error("a bracket is not closed")
            return fragment
        if self._take("."):
            return self._reading(self._text)
        if self._take("["):
            return self._reading(self._set())
        if self._peek() in ("*", "+", "?", "{"):
            raise self._error(f"{self._peek()!r} has nothing to repeat")
        return self._reading(frozenset({self._symbol()}))

    def _reading(self, tokens: frozenset[int]) -> tuple[int, int]:
        """Return a fragment that reads one of `tokens`."""
        start, end = self._machine.state(), self._machine.state()
        self._machine.edges[start].append((tokens, end))
        return start, end

    def _set(self) -> frozenset[int]:
        """Read a set of tokens up to its closing bracket."""
        negated = self._take("^")
        tokens: set[int] = set()
        while not self._take("]"):
            if not self._peek():
                raise self._error("a set [...] is not closed")
            by_id = self._peek() == "<"
            tokens.add(self._symbol())
            if self._peek() == "-" and self._pattern[self._position + 1 : self._position + 2] not in ("", "]"):
                low = self._pattern[self._position - 1]
                self._position += 1
                if by_id or self._peek() == "<":
                    raise self._error("a range [a-f] is one of characters, not of ids")
                self._symbol()
                high = self._pattern[self._position - 1]
                tokens |= {i for c, i in self._alphabet.items() if low <= c <= high}
        return self._text - tokens if negated else frozenset(tokens)

    def _symbol(self) -> int:
        """Read one token: `<id>`, or a character of the alphabet."""
        if self._peek() == "<":
            found = re.compile(r"<(\d+)>").match(self._pattern, self._position)
            if not found:
                raise self._error("a token is <id>; write \\< for the character")
            token = int(found[1])
            if token not in self._text:
                raise self._error(f"token {token} is EOS, which is not part of the text, or outside the vocabulary")
            self._position = found.end()
            return token
        self._take("\\")
        character = self._peek()
        if character not in self._alphabet:
            raise self._error(f"the character {character!r} is not in the alphabet; give `alphabet`, or write <id>")
        self._position += 1
        return self._alphabet[character]
