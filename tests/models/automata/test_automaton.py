"""Automata against the definitions in words, over all short texts; what they refuse; and as likelihoods."""

import re
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import bayes_klrl as bk
from bayes_klrl.models.automata.tables import minimal

ALPHABET = "abc"
EOS = 3
TEXTS = ["".join(x) for length in range(7) for x in product(ALPHABET, repeat=length)]
SHORT = [text for text in TEXTS if len(text) <= 5]


def rows(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """Texts as padded tokens that end with EOS."""
    width = max(map(len, texts)) + 1
    tokens = np.full((len(texts), width), EOS)
    for row, text in enumerate(texts):
        tokens[row, : len(text)] = [ALPHABET.index(c) for c in text]
    return tokens, np.array([len(text) + 1 for text in texts])


def accepted(automaton: bk.Automaton, texts: list[str]) -> list[bool]:
    final = automaton.final_states(*rows(texts))
    return np.isin(final, list(automaton.accepting)).tolist()


def distance(text: str, target: str) -> int:
    """Edit distance by the recursion."""
    row = list(range(len(target) + 1))
    for i, a in enumerate(text, start=1):
        last, row[0] = row[0], i
        for j, b in enumerate(target, start=1):
            last, row[j] = row[j], min(last + (a != b), row[j] + 1, row[j - 1] + 1)
    return row[-1]


@pytest.mark.parametrize("pattern", ["a", "ab", "aab", "abab", "aaa", "abacab"])
def test_contains_and_forbids(pattern: str) -> None:
    ids = [ALPHABET.index(c) for c in pattern]
    contains = bk.Automaton.contains(ids, vocab_size=4, eos_token_ids=EOS)
    assert accepted(contains, TEXTS) == [pattern in text for text in TEXTS]
    forbids = bk.Automaton.forbids(ids, vocab_size=4, eos_token_ids=EOS)
    assert accepted(forbids, TEXTS) == [pattern not in text for text in TEXTS]
    assert forbids.state_values.tolist() == [1.0] * len(pattern) + [0.0]


def test_contains_is_the_gold_automaton() -> None:
    contains = bk.Automaton.contains([0, 1], vocab_size=4, eos_token_ids=[3])
    assert contains.transitions.tolist() == [[1, 0, 0, 0], [1, 2, 0, 1], [2, 2, 2, 2]]
    reads_eos = bk.Automaton.contains([0, 1], vocab_size=4)
    assert reads_eos.transitions[1, 3] == 0


@pytest.mark.parametrize("modulo", [1, 2, 5])
def test_counts(modulo: int) -> None:
    counter = bk.Automaton.counts([0, 2], modulo=modulo, vocab_size=4, remainder=modulo - 1, eos_token_ids=EOS)
    expected = [(text.count("a") + text.count("c")) % modulo for text in TEXTS]
    assert counter.state_values[counter.final_states(*rows(TEXTS))].tolist() == expected
    assert accepted(counter, TEXTS) == [count == modulo - 1 for count in expected]


@pytest.mark.parametrize("target", ["", "a", "abca", "aab", "bbbb"])
@pytest.mark.parametrize("cap", [0, 1, 2, 9])
def test_levenshtein(target: str, cap: int) -> None:
    automaton = bk.Automaton.levenshtein(
        [ALPHABET.index(c) for c in target], max_distance=cap, vocab_size=4, eos_token_ids=EOS
    )
    expected = [distance(text, target) for text in SHORT]
    final = automaton.final_states(*rows(SHORT))
    assert automaton.state_values[final].tolist() == [min(d, cap + 1) for d in expected]
    assert accepted(automaton, SHORT) == [d <= cap for d in expected]


def test_levenshtein_agrees_with_rapidfuzz_on_longer_texts() -> None:
    rapidfuzz = pytest.importorskip("rapidfuzz")
    rng = np.random.default_rng(0)
    target = rng.integers(0, 3, size=12)
    automaton = bk.Automaton.levenshtein(target, max_distance=3, vocab_size=4, eos_token_ids=EOS)
    texts = []
    for _ in range(300):
        edited = target.tolist()
        for _ in range(rng.integers(0, 6)):
            place = rng.integers(0, len(edited))
            edited[place : place + rng.integers(0, 2)] = rng.integers(0, 3, size=rng.integers(0, 2)).tolist()
        texts.append("".join(ALPHABET[i] for i in edited))
    goal = "".join(ALPHABET[i] for i in target)
    expected = [min(4, rapidfuzz.distance.Levenshtein.distance(text, goal)) for text in texts]
    assert automaton.state_values[automaton.final_states(*rows(texts))].tolist() == expected
    assert set(expected) == {0, 1, 2, 3, 4}


# ---- regular expressions


@pytest.mark.parametrize(
    "pattern",
    [
        "",
        "a",
        "abc",
        "a|bc|",
        "(ab)*",
        "(a|b)*abb",
        "a?b+c*",
        ".*ab.*",
        "[ab]c[^a]",
        "[a-b]*",
        "[^c]{2,3}",
        "(ab|c){2}",
        "a{2,}",
        "a{0,2}b{1}",
        "(a*)*b",
        "((a|bc)+c?){1,2}",
        "a**",
        "(a{2}){2}",
        "(|a)b",
    ],
)
def test_regex_against_re(pattern: str) -> None:
    automaton = bk.Automaton.regex(pattern, vocab_size=4, alphabet=ALPHABET, eos_token_ids=EOS)
    reference = re.compile("a*" if pattern == "a**" else pattern)
    assert accepted(automaton, TEXTS) == [reference.fullmatch(text) is not None for text in TEXTS]


ATOMS = st.sampled_from(["a", "b", "c", ".", "[ab]", "[^b]"])
PATTERNS = st.recursive(
    ATOMS,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("".join),
        st.tuples(inner, inner).map(lambda pair: f"({pair[0]}|{pair[1]})"),
        st.tuples(inner, st.sampled_from(["*", "+", "?", "{2}", "{1,2}", "{2,}"])).map(lambda p: f"({p[0]}){p[1]}"),
    ),
    max_leaves=6,
)


@pytest.mark.slow
@settings(max_examples=60)
@given(PATTERNS)
def test_any_regex_against_re(pattern: str) -> None:
    automaton = bk.Automaton.regex(pattern, vocab_size=4, alphabet=ALPHABET, eos_token_ids=EOS)
    reference = re.compile(pattern)
    assert accepted(automaton, SHORT) == [reference.fullmatch(text) is not None for text in SHORT]


def test_regex_of_token_ids_and_of_characters_is_one() -> None:
    by_id = bk.Automaton.regex("(<0><1>)*[<2><0>]", vocab_size=4, eos_token_ids=EOS)
    by_character = bk.Automaton.regex("(ab)*[ca]", vocab_size=4, alphabet={"a": 0, "b": 1, "c": 2}, eos_token_ids=EOS)
    np.testing.assert_array_equal(by_id.transitions, by_character.transitions)
    assert by_id.accepting == by_character.accepting
    escaped = bk.Automaton.regex(r"\*\<<1>", vocab_size=3, alphabet={"*": 0, "<": 2})
    assert accepted(
        bk.Automaton.regex(r"[\a-b]", vocab_size=4, alphabet=ALPHABET, eos_token_ids=3), ["a", "b", "c"]
    ) == [
        True,
        True,
        False,
    ]
    assert [x for x in product(range(3), repeat=3) if run(escaped, x) in escaped.accepting] == [(0, 2, 1)]


def test_regex_is_minimal() -> None:
    assert bk.Automaton.regex("(a|b|c)*", vocab_size=4, alphabet=ALPHABET, eos_token_ids=EOS).num_states == 1
    # "the k-th token from the end is a" needs 2^k states, and no more
    assert bk.Automaton.regex("[abc]*a[abc]{2}", vocab_size=4, alphabet=ALPHABET, eos_token_ids=EOS).num_states == 8


@pytest.mark.parametrize(
    "pattern, complaint",
    [
        ("(a", "a bracket is not closed"),
        ("a)", "was not opened"),
        ("*a", "nothing to repeat"),
        ("[ab", "not closed"),
        ("a{3,1}", "at least 3 and at most 1"),
        ("a{x}", "a repetition is"),
        ("az", "'z' is not in the alphabet"),
        ("<9>", "outside the vocabulary"),
        ("<3>", "is EOS"),
        ("<a>", "a token is <id>"),
        ("[<1>-c]", "a range [a-f] is one of characters"),
        ("a\\", "'' is not in the alphabet"),
        ("[^abc]", "matches nothing"),
        ("((((a{99}){99}){99}){99})", "too large"),
    ],
)
def test_regex_that_cannot_be_read(pattern: str, complaint: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=re.escape(complaint)):
        bk.Automaton.regex(pattern, vocab_size=4, alphabet=ALPHABET, eos_token_ids=EOS)


# ---- machines


def run(automaton: bk.Automaton, tokens: Any) -> int:
    state = automaton.start
    for token in tokens:
        state = int(automaton.transitions[state, token])
    return state


@pytest.mark.parametrize("seed", range(5))
def test_product_complement_and_minimal_on_random_machines(seed: int) -> None:
    rng = np.random.default_rng(seed)
    first, second = (
        bk.Automaton.regex(p, vocab_size=4, alphabet=ALPHABET, eos_token_ids=EOS)
        for p in rng.choice([".*ab.*", "(a|b)*", "a.*", ".*c", ".{2,4}", "(..)*"], size=2, replace=False)
    )
    both = first.product(second)
    expected = np.array([accepted(first, SHORT), accepted(second, SHORT)])
    assert accepted(both, SHORT) == expected.all(axis=0).tolist()
    assert accepted(first.complement(), SHORT) == (~expected[0]).tolist()
    machine = rng.integers(0, 9, size=(9, 3))
    machine = bk.Automaton(machine).product(bk.Automaton([[0] * 3])).transitions  # what can be reached
    labels = rng.integers(0, 2, size=len(machine))
    small, small_labels = minimal(machine, labels)
    assert len(small) <= len(machine)
    for x in product(range(3), repeat=6):
        assert labels[run(bk.Automaton(machine), x)] == small_labels[run(bk.Automaton(small), x)]


def test_states_along_a_completion() -> None:
    contains = bk.Automaton.contains([0, 1], vocab_size=4, eos_token_ids=EOS)
    tokens, lengths = np.array([[0, 1, 2, 3], [2, 0, 3, 0]]), np.array([4, 3])
    assert contains.states(tokens, lengths).tolist() == [[0, 1, 2, 2, 2], [0, 0, 1, 1, 1]]
    past_the_end = np.array([[0, 1, -5, 99]])
    assert contains.final_states(past_the_end, np.array([2])).tolist() == [2]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        (([[0, 1], [2, 0]],), r"State 1 goes to state 2 on token 0, but the states are 0\.\.1"),
        (([[0, -1]],), r"State 0 goes to state -1 on token 1"),
        (([0, 1],), r"shape \(states, V\).*got shape \(2,\)"),
        ((np.zeros((0, 3), int),), "one row per state"),
        (([[0.0, 0.0]],), "dtype float64"),
        (([[0, 0]], 1), r"The start state must be one of 0\.\.0; got 1"),
        (([[0, 0], [1, 1]], 0, [1]), "accepting state 1 cannot be reached from the start state 0"),
        (([[0, 0]], 0, [4]), "The accepting state must be one of"),
        (([[0, 0]], 0, [0], [1.0, 2.0]), r"values needs one number per state, shape \(1,\)"),
    ],
)
def test_what_is_no_automaton(arguments: tuple[Any, ...], complaint: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=complaint):
        bk.Automaton(*arguments)


def test_ids_outside_the_vocabulary_and_other_refusals() -> None:
    with pytest.raises(bk.BayesKLRLError, match="The pattern has the token id 4"):
        bk.Automaton.contains([0, 4], vocab_size=4)
    with pytest.raises(bk.BayesKLRLError, match="EOS has the token id 7"):
        bk.Automaton.contains([0], vocab_size=4, eos_token_ids=7)
    with pytest.raises(bk.BayesKLRLError, match="modulo must be an integer"):
        bk.Automaton.counts(0, modulo=0, vocab_size=4)
    with pytest.raises(bk.BayesKLRLError, match="4 and 3 tokens"):
        bk.Automaton.counts(0, modulo=2, vocab_size=4).product(bk.Automaton.counts(0, modulo=2, vocab_size=3))
    with pytest.raises(bk.BayesKLRLError, match="more than 20,000 states"):
        bk.Automaton.levenshtein([0, 1] * 20, max_distance=9, vocab_size=4)


def test_an_automaton_cannot_be_changed() -> None:
    table = np.zeros((1, 2), dtype=np.int64)
    automaton = bk.Automaton(table)
    table[0, 0] = 7
    assert automaton.transitions[0, 0] == 0
    with pytest.raises(ValueError, match="read-only"):
        automaton.transitions[0, 0] = 1
