"""Fitted n-gram models, texts, tokenizers and files."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import bayes_klrl as bk
from bayes_klrl.models.ngram_lm.lm import CharacterTokenizer
from bayes_klrl.problems import gold_table
from tests.models.ngram_lm.test_lm import as_sequences, by_decoding, models

TEXTS = ["abacadaba", "cab", "", "a bad cad", "dada"]


@pytest.fixture(params=models())
def lm(request: pytest.FixtureRequest) -> bk.NgramLM:
    return models()[request.param]


# --- fitting -----------------------------------------------------------------------------------------------


def witten_bell(texts: list[list[int]], context: tuple[int, ...], token: int, vocab_size: int) -> float:
    """The recursion of the docstring, by counting in Python; texts are of `padded`."""
    followers = [
        text[t][1]
        for text in texts
        for t in range(len(text))
        if text[t][0] and tuple(a for _, a in text[t - len(context) : t]) == context
    ]
    lower = witten_bell(texts, context[1:], token, vocab_size) if context else 1 / vocab_size
    types = len(set(followers))
    return (followers.count(token) + types * lower) / (len(followers) + types) if followers else lower


def padded(ids: list[int], order: int, pad: int) -> list[tuple[bool, int]]:
    """Pairs (is counted, token), padding first."""
    return [(False, pad)] * (order - 1) + [(True, a) for a in ids]


def test_witten_bell_by_hand() -> None:
    # "ab$" and "b$" with a, b, $ = 0, 1, 2: counts a 1, b 2, $ 2, three types, V = 3.
    lm = bk.NgramLM.fit(["ab", "b"], order=2)
    unigram = np.array([(1 + 1) / 8, (2 + 1) / 8, (2 + 1) / 8])
    after_a = (np.array([0, 1, 0]) + 1 * unigram) / 2  # b once: one type
    after_b = (np.array([0, 0, 2]) + 1 * unigram) / 3  # $ twice: one type
    at_start = (np.array([1, 1, 0]) + 2 * unigram) / 4  # a and b once each; the padding is $
    np.testing.assert_allclose(np.exp(lm.log_probs), [after_a, after_b, at_start], rtol=1e-14)
    alone = bk.NgramLM.fit(["ab", "b"], order=1)
    np.testing.assert_allclose(np.exp(alone.log_probs), unigram, rtol=1e-14)


@pytest.mark.parametrize("order", [1, 2, 3, 5])
def test_witten_bell_by_counting(order: int) -> None:
    lm = bk.NgramLM.fit(TEXTS, order=order)
    assert lm.vocab_size == 6  # space a b c d, EOS
    eos = 5
    counted = [padded([" abcd".index(c) for c in text] + [eos], order, eos) for text in TEXTS]
    contexts = [[eos] * 4, [1], [1, 2], [4, 1, 4], [3, 3, 3, 3], [1, 4, 1, 2], [2, 0, 5, 1]]
    rows = lm.next_log_probs(lm.prefill(contexts))
    for context, row in zip(contexts, rows, strict=True):
        window = tuple(([eos] * order + context)[len(context) + 1 :])
        expected = [witten_bell(counted, window, token, 6) for token in range(6)]
        np.testing.assert_allclose(np.exp(row), expected, rtol=1e-12)


@pytest.mark.slow
@given(
    ids=st.lists(st.lists(st.integers(0, 3), max_size=8), min_size=1, max_size=4).filter(any),
    order=st.integers(1, 4),
    contexts=st.lists(st.lists(st.integers(0, 4), max_size=5), min_size=1, max_size=3),
)
def test_any_fit_is_normalised_and_equals_its_dense_table(
    ids: list[list[int]], order: int, contexts: list[list[int]]
) -> None:
    sparse = bk.NgramLM.fit(ids, order=order, eos_token_id=3, vocab_size=5)
    dense = bk.NgramLM(sparse.log_probs, eos_token_id=3)
    assert dense.order == sparse.order == order
    assert sparse.full_support
    state = sparse.prefill(contexts)
    rows = sparse.next_log_probs(state)
    assert np.isfinite(rows).all()
    np.testing.assert_allclose(np.exp(rows).sum(axis=1), 1, rtol=0, atol=1e-12)
    np.testing.assert_allclose(rows, dense.next_log_probs(state), rtol=1e-13)
    x = bk.Sequences(np.array([[[0, 1, 2, 4]], [[2, 2, 3, 0]]]), np.array([[4], [3]]))
    prompts = [contexts[0], contexts[-1]]
    np.testing.assert_allclose(sparse.token_log_probs(prompts, x), dense.token_log_probs(prompts, x), rtol=1e-13)


def test_ids_are_taken_as_they_are() -> None:
    ended = bk.NgramLM.fit([[0, 1, 2]], order=1, eos_token_id=2)
    cut = bk.NgramLM.fit([[0, 1]], order=1, eos_token_id=2)
    np.testing.assert_allclose(np.exp(ended.log_probs), [2 / 6, 2 / 6, 2 / 6])
    np.testing.assert_allclose(np.exp(cut.log_probs), [5 / 12, 5 / 12, 2 / 12])
    as_text = bk.NgramLM.fit(["ab"], order=1)
    np.testing.assert_array_equal(as_text.log_probs, ended.log_probs)


def test_a_large_vocabulary_needs_no_square_of_it() -> None:
    rng, vocab_size = np.random.default_rng(0), 50_000
    ids = [[*np.minimum(rng.zipf(1.3, size=60) - 1, vocab_size - 2).tolist(), vocab_size - 1] for _ in range(50)]
    lm = bk.NgramLM.fit(ids, order=3, eos_token_id=vocab_size - 1)
    assert lm.vocab_size == vocab_size
    state = lm.prefill([ids[0][:10], ids[1][:1], [], [49_000, 48_000]])
    rows = lm.next_log_probs(state)
    np.testing.assert_allclose(np.exp(rows).sum(axis=1), 1, rtol=0, atol=1e-12)
    x = as_sequences([ids[0][10:20]], 10, pad=vocab_size - 1)
    scored = lm.token_log_probs([ids[0][:10]], x)[0, 0]
    np.testing.assert_allclose(scored, by_decoding(lm, ids[0][:10], ids[0][10:20]), rtol=1e-13)
    with pytest.raises(bk.BayesKLRLError, match="more than 10000000 entries"):
        _ = lm.log_probs


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"texts_or_ids": [], "order": 2}, "nothing to fit"),
        ({"texts_or_ids": [[], []], "order": 2}, "nothing to fit"),
        ({"texts_or_ids": ["ab"], "order": 0}, "order 1.*got 0"),
        ({"texts_or_ids": ["ab", [0, 1]], "order": 2}, "list of integers"),
        ({"texts_or_ids": [[0, 5]], "order": 2, "vocab_size": 4}, "id 5 is outside"),
        ({"texts_or_ids": [[0, 1]], "order": 2, "vocab_size": 4, "eos_token_id": 4}, "id 4 is outside"),
    ],
)
def test_what_cannot_be_fitted_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.NgramLM.fit(**arguments)


# --- text --------------------------------------------------------------------------------------------------


def test_characters_there_and_back() -> None:
    lm = bk.NgramLM.fit(TEXTS, order=3)
    assert lm.tokenizer == CharacterTokenizer(" abcd")
    assert lm.encode(["a cab", ""]) == [[1, 0, 3, 1, 2], []]
    assert lm.decode([[1, 0, 3, 1, 2, 5], [5], []]) == ["a cab", "", ""]
    with pytest.raises(bk.BayesKLRLError, match="character 'z' is not in the vocabulary ' abcd'"):
        lm.encode(["a", "cazé"])
    assert bk.NgramLM.fit("abba", order=2).encode(["ba"]) == [[1, 0]]  # one string is one text


def test_without_a_tokenizer_there_is_no_text() -> None:
    lm = bk.NgramLM(gold_table(0.0), eos_token_id=3)
    assert lm.tokenizer is None
    assert lm.encode(["", ""]) == [[], []]
    with pytest.raises(bk.BayesKLRLError, match="no tokenizer: give prompts as lists of token ids"):
        lm.encode(["", "a"])
    with pytest.raises(bk.BayesKLRLError, match="no tokenizer"):
        lm.decode([[0]])


def test_a_posterior_over_text() -> None:
    lm = bk.NgramLM.fit(TEXTS, order=3)
    reward = bk.Reward(lambda completions: [c.count("d") for c in completions], alpha=0.5)
    posterior = bk.Posterior(lm, reward, prompts=["ca", ""], max_new_tokens=3)
    assert posterior.prompt_ids == ((3, 1), ())
    x = bk.Sequences(np.array([[[4, 1, 4], [5, 5, 5]]] * 2), np.array([[3, 1]] * 2))
    np.testing.assert_array_equal(posterior.log_likelihood(x), [[4.0, 0.0]] * 2)
    expected = [[sum(by_decoding(lm, p, x)) for x in ([4, 1, 4], [5])] for p in ([3, 1], [])]
    np.testing.assert_allclose(posterior.log_prior(x), expected, rtol=1e-13)


class Words:
    """A tokenizer that marks both ends, as BERT's does."""

    words = ("<s>", "</s>", "the", "cat", "sat")
    bos_token_id, eos_token_id = 0, 1

    def __len__(self) -> int:
        return len(self.words)

    def encode(self, text: str) -> list[int]:
        return [0, *(self.words.index(word) for word in text.split()), 1]

    def decode(self, ids: list[int]) -> str:
        return " ".join(self.words[i] for i in ids)


def test_the_marks_that_a_tokenizer_sets_are_not_doubled() -> None:
    lm = bk.NgramLM.fit(["the cat sat", "the cat"], order=2, tokenizer=Words())
    assert lm.eos_token_ids == {1}
    assert lm.encode(["the cat", ""]) == [[2, 3], []]
    assert lm.decode([[2, 3, 1], [1]]) == ["the cat", ""]
    as_ids = bk.NgramLM.fit([[2, 3, 4, 1], [2, 3, 1]], order=2, eos_token_id=1, vocab_size=5)
    np.testing.assert_array_equal(lm.log_probs, as_ids.log_probs)
    of_ids = bk.NgramLM.fit([[2, 3, 4, 1], [2, 3, 1]], order=2, tokenizer=Words())
    np.testing.assert_array_equal(of_ids.log_probs, as_ids.log_probs)


def hugging_face_tokenizer() -> Any:
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {"<eos>": 0, "<unk>": 1, "the": 2, "cat": 3, "sat": 4}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>", unk_token="<unk>")


def test_a_hugging_face_tokenizer_is_used_and_saved(tmp_path: Path) -> None:
    lm = bk.NgramLM.fit(["the cat sat", "the cat"], order=3, tokenizer=hugging_face_tokenizer())
    assert lm.vocab_size == 5
    assert lm.decode([[2, 3, 0]]) == ["the cat"]
    lm.save_pretrained(tmp_path)
    again = bk.NgramLM.from_pretrained(tmp_path)
    assert again.encode(["sat the"]) == [[4, 2]]
    np.testing.assert_array_equal(again.log_probs, lm.log_probs)
    bk.NgramLM(lm.log_probs, eos_token_id=0).save_pretrained(tmp_path)  # the old tokenizer's folder is still there
    assert bk.NgramLM.from_pretrained(tmp_path).tokenizer is None


# --- files -------------------------------------------------------------------------------------------------


def test_saved_models_are_the_same_models(lm: bk.NgramLM, tmp_path: Path) -> None:
    lm.save_pretrained(tmp_path / "new" / "folder")
    again = bk.NgramLM.from_pretrained(tmp_path / "new" / "folder")
    assert (again.order, again.vocab_size, again.eos_token_ids) == (lm.order, lm.vocab_size, lm.eos_token_ids)
    assert again.tokenizer == lm.tokenizer
    contexts = [[], [0], [1, 2, 0], [2, 2, 2, 2]]
    np.testing.assert_array_equal(
        again.next_log_probs(again.prefill(contexts)), lm.next_log_probs(lm.prefill(contexts))
    )
    assert type(again._table) is type(lm._table)


def test_folders_that_hold_no_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(bk.CheckpointError, match="nowhere"):
        bk.NgramLM.from_pretrained(tmp_path / "nowhere")
    bk.NgramLM.fit(["ab"], order=2).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())

    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(bk.CheckpointError, match="format"):
        bk.NgramLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config | {"order": 3}))
    with pytest.raises(bk.CheckpointError, match="context_keys_2"):
        bk.NgramLM.from_pretrained(tmp_path)

    (tmp_path / "config.json").write_text(json.dumps(config))
    with np.load(tmp_path / "ngram.npz") as arrays:
        sound = dict(arrays)
    np.savez(tmp_path / "ngram.npz", **(sound | {"arc_keys_1": sound["arc_keys_1"][::-1]}))
    with pytest.raises(bk.CheckpointError, match="do not fit together"):
        bk.NgramLM.from_pretrained(tmp_path)
    np.savez(tmp_path / "ngram.npz", **(sound | {"unigram": np.array([{"a": 1}], dtype=object)}))
    with pytest.raises(bk.CheckpointError, match="allow_pickle"):
        bk.NgramLM.from_pretrained(tmp_path)
    (tmp_path / "ngram.npz").write_bytes(b"not a zip file")
    with pytest.raises(bk.CheckpointError, match="readable"):
        bk.NgramLM.from_pretrained(tmp_path)

    class Mute(Words):
        pass

    with pytest.raises(bk.CheckpointError, match="Mute has no save_pretrained"):
        bk.NgramLM.fit(["the"], order=1, tokenizer=Mute()).save_pretrained(tmp_path / "mute")


def test_it_is_a_language_model_that_needs_no_torch() -> None:
    assert isinstance(bk.NgramLM(gold_table(0.0), eos_token_id=3), bk.LanguageModel)
    code = (
        "import sys, bayes_klrl as bk; lm = bk.NgramLM.fit(['ab'], order=2); lm.next_log_probs(lm.prefill([[]]));"
        "sys.exit(any(name in sys.modules for name in ('torch', 'transformers', 'jax', 'scipy', 'arviz')))"
    )
    root = str(Path(bk.__file__).parents[1])
    assert subprocess.run([sys.executable, "-c", code], cwd=root, check=False).returncode == 0
