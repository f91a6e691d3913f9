"""The names of prompts: words, short, on one line and unique; and texts with whitespace visible where it matters."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import bayes_klrl as bk
from bayes_klrl.export.datatree import StoredTexts
from bayes_klrl.prompts.words import prompt_labels, prompt_texts, prompt_words, shortened, visible

LETTERS = bk.NgramLM.fit(["a cat", "the rat"], order=2)


@pytest.mark.parametrize(
    "text, seen",
    [
        ("a fine day", "a fine day"),
        (" a  day ", "␣a  day␣"),
        ("  ", "␣␣"),
        ("", "(empty)"),
        ("two\nlines\r\n", "two↵lines↵"),
        ("a\tb", "a⇥b"),
        ("\x1b[2Jred", "\\x1b[2Jred"),
        ("\u202eabc", "\\u202eabc"),
        ("\udc80", "\\udc80"),
        ("日本語 👩\u200d🔬", "日本語 👩\u200d🔬"),
    ],
)
def test_whitespace_is_visible_where_it_matters(text: str, seen: str) -> None:
    assert visible(text) == seen


@pytest.mark.slow
@given(st.text())
def test_what_is_visible_is_one_line_that_commands_no_terminal(text: str) -> None:
    seen = visible(text)
    assert seen
    assert len(seen.splitlines()) == 1
    assert seen.strip() == seen or not seen.isascii()
    assert not any(ord(character) < 32 for character in seen)
    seen.encode("utf-8")


@given(st.text(), st.integers(2, 30))
def test_a_short_text_keeps_both_ends(text: str, most: int) -> None:
    short = shortened(text, most)
    assert len(short) <= most
    if len(text) <= most:
        assert short == text
    else:
        head, tail = short.split("…") if text.count("…") == 0 else ("", "")
        assert text.startswith(head)
        assert text.endswith(tail)


@pytest.mark.parametrize(
    "prompt, words",
    [
        ("It was", "It was"),
        ((0, 12, 3), "ids 0 12 3"),
        ((), "(empty)"),
        ([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi!\n"}], "Hi!↵"),
        (
            [
                {"role": "user", "content": "Why?"},
                {"role": "assistant", "content": "So."},
                {"role": "user", "content": "And?"},
                {"role": "assistant", "content": "It"},
            ],
            "And?",
        ),
        ([{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}], "What is it?"),
        ([{"role": "system", "content": "Be brief."}], "Be brief."),
        ([{"role": "user", "content": None}], "(empty)"),
    ],
)
def test_each_kind_of_prompt_has_words(prompt: Any, words: str) -> None:
    assert prompt_words(prompt) == words


def test_ids_are_decoded_where_there_is_a_tokenizer() -> None:
    ids = LETTERS.encode(["the c", "a "])
    assert prompt_labels(ids, LETTERS.decode) == ["the c", "a␣"]
    assert prompt_texts(ids, LETTERS.decode) == ["the c", "a "]
    eos = [next(iter(LETTERS.eos_token_ids))]
    assert prompt_words(eos, LETTERS.decode) == f"ids {eos[0]}"  # it decodes to nothing


def test_draws_read_from_a_file_fall_back_on_the_ids() -> None:
    reward = bk.Reward(lambda completions: [len(text) for text in completions], alpha=1.0)
    ids = LETTERS.encode(["the c"])
    draws = bk.ImportanceSampling(3).run(bk.Posterior(LETTERS, reward, prompts=ids, max_new_tokens=2), seed=0)
    assert draws.prompt_words() == ["the c"]
    loaded = replace(draws, decoder=StoredTexts({}))  # knows the texts of completions alone
    assert loaded.prompt_words() == ["ids " + " ".join(map(str, ids[0]))]


@given(st.lists(st.sampled_from(["a", "a (prompt 1)", " a", "b" * 50, "b" * 51]), min_size=1, max_size=6))
def test_names_are_unique(prompts: list[str]) -> None:
    for names in (prompt_labels(prompts), prompt_texts(prompts)):
        assert len(set(names)) == len(prompts)


def test_verdicts_and_tables_name_prompts_by_their_words() -> None:
    long = "the cat " * 12 + "at"
    reward = bk.Reward(lambda completions: [text.count("a") for text in completions], alpha=1.0)
    posterior = bk.Posterior(LETTERS, reward, prompts=[long, "a ", "a "], max_new_tokens=2)
    certificate = bk.certify(posterior, LETTERS, seed=0, num_draws=32)
    text = str(certificate)
    assert "    the cat the cat th…he cat the cat at  " in text  # both ends
    assert "a␣ (prompt 1)" in text
    assert list(certificate.table().index) == [long, "a  (prompt 1)", "a  (prompt 2)", "mean"]
