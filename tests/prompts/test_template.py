"""Conversations rendered by a chat template: once, with one BOS, and with an end of turn that is EOS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.prompts.template import end_of_turn
from tests.helpers.chat import BOS, END, EOS, TEMPLATE, chat_lm, chat_tokenizer

LONGER = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
USER = {"role": "user", "content": "a b"}
TURNS = [{"role": "system", "content": "c"}, USER]
CLOCK = TEMPLATE + "{{ strftime_now('%S.%f') }} "
"""Two renderings differ, as those with a date do on two days."""


def posterior(prompts: Any = (TURNS,), prior: Any = None, **options: Any) -> bk.Posterior:
    return bk.Posterior(prior or chat_lm(), LONGER, prompts=prompts, max_new_tokens=2, **options)


def text_of(made: bk.Posterior, p: int = 0) -> str:
    return made.prompts[p].rendering.text


def test_the_template_opens_the_turn_of_the_assistant() -> None:
    made = posterior(TURNS)
    assert text_of(made) == "<bos> system c <end> user a b <end> assistant "
    assert made.prompt_ids == ((BOS, 3, 8, END, 4, 6, 7, END, 5),)  # one BOS, though the tokenizer would add one


def test_a_message_of_the_assistant_at_the_end_is_continued() -> None:
    begun = posterior([*TURNS, {"role": "assistant", "content": "b a"}])
    assert text_of(begun).rstrip() == "<bos> system c <end> user a b <end> assistant b a"
    assert begun.prompt_ids[0][-3:] == (5, 7, 6)


def test_the_ids_are_those_of_transformers() -> None:
    tokenizer = chat_tokenizer()
    theirs = tokenizer.apply_chat_template(TURNS, add_generation_prompt=True, return_dict=True)["input_ids"]
    assert posterior(TURNS).prompt_ids == (tuple(theirs),)


def test_a_conversation_is_rendered_once(tmp_path: Path) -> None:
    prior = chat_lm(template=CLOCK)
    made = posterior([TURNS, [USER]], prior)
    texts = [text_of(made, p) for p in range(2)]
    assert text_of(posterior([TURNS], prior)) != texts[0]  # or this test would say nothing
    assert [text_of(made.at_alpha(2.0), p) for p in range(2)] == texts
    assert [text_of(made.select([1, 0]), p) for p in range(2)] == texts[::-1]
    assert {text_of(part) for part in made.split(0.5, seed=0)} == set(texts)
    assert text_of(posterior(made.prompts, prior)) == texts[0]
    draws = bk.ImportanceSampling(4).run(made, seed=0)
    read = bk.Draws.load(draws.save(tmp_path / "draws.nc"))
    assert read.prompts == made.prompts
    assert text_of(posterior(read.prompts, prior)) == texts[0]
    assert posterior(read.prompts, prior).prompt_ids == made.prompt_ids


def test_another_template_renders_anew() -> None:
    other = chat_lm(template=TEMPLATE.replace("' <end> '", "' <end> <end> '"))
    again = posterior(posterior(TURNS).prompts, other)
    assert text_of(again) == "<bos> system c <end> <end> user a b <end> <end> assistant "


def test_arguments_of_the_template_are_kept_with_the_text() -> None:
    thoughtful = posterior(TURNS, chat_template_kwargs={"thought": "c"})
    assert text_of(thoughtful) == text_of(posterior(TURNS)) + "c "
    assert text_of(thoughtful.select([0])) == text_of(thoughtful)
    assert text_of(posterior(thoughtful.prompts)) == text_of(thoughtful)
    assert text_of(posterior(thoughtful.prompts, chat_template_kwargs={})) == text_of(posterior(TURNS))
    rows = [{"prompt": TURNS, "answer": 1}]
    read = bk.Posterior.from_rows(chat_lm(), LONGER, rows, max_new_tokens=2, chat_template_kwargs={"thought": "c"})
    assert text_of(read) == text_of(thoughtful)
    assert read.columns == {"answer": (1,)}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"tokenize": True}, "chat_template_kwargs has 'tokenize'"),
        ({"tools": []}, "chat_template_kwargs has 'tools'"),
        ({"documents": ["x"]}, "a text, a number, a bool or None"),
        (["x"], "chat_template_kwargs is a dictionary"),
    ],
    ids=["tokenize", "tools", "a list", "no dictionary"],
)
def test_what_is_no_argument_of_a_template_is_refused(options: Any, message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        posterior(TURNS, chat_template_kwargs=options)


def test_arguments_of_a_template_need_conversations() -> None:
    with pytest.raises(bk.BayesKLRLError, match="for prompts that are conversations"):
        posterior("a b", chat_template_kwargs={"thought": "c"})


def test_the_end_of_a_turn_must_be_eos() -> None:
    with pytest.raises(
        bk.BayesKLRLError, match=r"ends a turn with '<end>' \(id 2\).*EOS ids \[0\].*eos_token_id=\[0, 2\]"
    ):
        posterior(TURNS, chat_lm(eos_token_id=EOS))
    posterior("a b", chat_lm(eos_token_id=EOS))  # a text says nothing of turns: its prior stays as it is
    posterior(TURNS, chat_lm(eos_token_id=END))


def test_the_end_of_a_turn_is_found_after_an_answer() -> None:
    (asked,) = posterior(TURNS).prompts
    (begun,) = posterior([*TURNS, {"role": "assistant", "content": "<eos> b"}]).prompts
    assert end_of_turn(chat_tokenizer(), asked) == end_of_turn(chat_tokenizer(), begun) == END
    plain = "{% for m in messages %}{{ m['role'] + ' ' + m['content'] + ' ' }}{% endfor %}"
    assert end_of_turn(chat_tokenizer(plain), asked) is None
    posterior(TURNS, chat_lm(eos_token_id=EOS, template=plain))  # such turns end at EOS, or are cut


def test_a_role_that_the_template_refuses_is_an_error_with_the_number_of_the_prompt() -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"refuses the conversation of prompt 1.*\['boss'\]: No role boss"):
        posterior([TURNS, [{"role": "boss", "content": "a"}]])


def test_a_template_that_drops_the_beginning_of_an_answer_is_refused() -> None:
    drops = chat_lm(template="{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}")
    with pytest.raises(bk.BayesKLRLError, match=r"refuses the conversation of prompt 0.*final message"):
        posterior([USER, {"role": "assistant", "content": "b"}], drops)


def test_a_template_that_leaves_out_the_question_is_refused() -> None:
    for template in ("{% if false %}{{ messages }}{% endif %}", "{{ 'b' + messages[0]['content'] }}"):
        with pytest.raises(bk.BayesKLRLError, match=r"leaves out the last message of prompt 0, \{'role': 'user'"):
            posterior(TURNS, chat_lm(template=template))


def test_a_template_that_reads_parts_gets_parts() -> None:
    """Those of models that see images drop a content that is a text, without a word."""
    parts = "{% for part in m['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{{ '<end> ' }}"
    of_texts = "{{ m['role'] + ' ' + m['content'] + ' <end> ' }}"
    assert of_texts in TEMPLATE
    reads = chat_lm(template=TEMPLATE.replace(of_texts, "{{ m['role'] + ' ' }}" + parts))
    assert posterior(TURNS, reads).prompt_ids == posterior(TURNS).prompt_ids
    begun = [*TURNS, {"role": "assistant", "content": "b"}]
    assert posterior(begun, reads).prompt_ids == posterior(begun).prompt_ids
    with pytest.raises(bk.BayesKLRLError, match="ends a turn with '<end>'"):
        posterior(TURNS, chat_lm(eos_token_id=EOS, template=reads.tokenizer.chat_template))


@pytest.mark.parametrize(
    "prior, message",
    [
        (lambda: bk.NgramLM(np.log(np.full(9, 1 / 9)), eos_token_id=0), "the prior has no tokenizer"),
        (lambda: bk.NgramLM.fit(["a b"], order=2), "tokenizer has no chat template.*chat_template = "),
        (lambda: chat_lm(template=None), "tokenizer has no chat template.*chat_template = "),
    ],
    ids=["no tokenizer", "characters", "no template"],
)
def test_a_prior_without_a_template_takes_no_conversations(prior: Any, message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        posterior(TURNS, prior())


def test_as_chat_makes_messages_of_texts() -> None:
    texts = bk.Posterior(chat_lm(), LONGER, prompts=["a b", "c"], max_new_tokens=2, answer=[1, 2])
    chat = texts.as_chat()
    assert chat.prompts == ((USER,), ({"role": "user", "content": "c"},))
    assert chat.columns == texts.columns
    assert chat.as_chat().prompt_ids == chat.prompt_ids == posterior([[USER], [{**USER, "content": "c"}]]).prompt_ids
    with pytest.raises(bk.BayesKLRLError, match="Prompt 0 is a list of token ids"):
        posterior([[1, 2]]).as_chat()
