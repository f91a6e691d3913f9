"""Prompts in every form in which a tokenizer gives them, and what looks like prompts but is not."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import transformers as hf

import bayes_klrl as bk
from tests.helpers.tiny_models import tiny_tokenizer

COIN = bk.NgramLM(np.log(np.full(9, 1 / 9)), eos_token_id=0)
LONGER = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
MESSAGES = [{"role": "user", "content": "a b"}]


def prompts_of(prompts: Any) -> tuple[Any, ...]:
    posterior = bk.Posterior(COIN, LONGER, prompts=prompts, max_new_tokens=2)
    assert posterior.prompts == posterior.prompt_ids
    return posterior.prompts


def tokenizer(padding_side: str = "left") -> Any:
    made = tiny_tokenizer(9)
    made.pad_token, made.padding_side = "<eos>", padding_side
    made.chat_template = (
        "{% for m in messages %}{{ m['content'] }} {% endfor %}{% if add_generation_prompt %}c{% endif %}"
    )
    return made


# --- the output of a tokenizer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [None, "np", "pt"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_output_of_a_tokenizer_gives_its_ids_without_padding(side: str, kind: str | None) -> None:
    encode = tokenizer(side)
    assert prompts_of(encode(["a b c", "d"], padding=True, return_tensors=kind)) == ((1, 2, 3), (4,))
    assert prompts_of(encode(["a b", "c d"], return_tensors=kind)) == ((1, 2), (3, 4))


def test_one_text_is_one_prompt() -> None:
    assert prompts_of(tokenizer()("a b c")) == ((1, 2, 3),)
    assert prompts_of(tokenizer()("a b c", return_tensors="pt")) == ((1, 2, 3),)
    assert prompts_of([tokenizer()("a b c"), tokenizer()("d", return_tensors="np")]) == ((1, 2, 3), (4,))


def test_a_padded_batch_without_its_mask_is_unpadded_by_its_encodings() -> None:
    padded = tokenizer()(["a b c", "d"], padding=True, return_attention_mask=False)
    assert "attention_mask" not in padded
    assert prompts_of(padded) == ((1, 2, 3), (4,))


def test_a_chat_template_may_be_tokenized() -> None:
    encode = tokenizer()
    assert prompts_of(encode.apply_chat_template(MESSAGES, tokenize=True, add_generation_prompt=True)) == ((1, 2, 3),)
    both = encode.apply_chat_template(
        [MESSAGES, [*MESSAGES, *MESSAGES]], tokenize=True, padding=True, return_tensors="pt"
    )
    assert prompts_of(both) == ((1, 2), (1, 2, 1, 2))


def test_reward_models_read_prompts_in_the_same_way() -> None:
    pairs = bk.Preferences(tokenizer()(["a b c", "d"], padding=True), [[1], [2]], [[2], [1]])
    assert pairs.prompts == ((1, 2, 3), (4,))
    assert bk.Preferences(torch.tensor([1, 2]), [[1], [2]], [[2], [1]]).prompts == ((1, 2), (1, 2))
    with pytest.raises(bk.BayesKLRLError, match="a plain dict"):
        bk.Preferences({"input_ids": [1], "attention_mask": [1]}, ["a", "b"], ["b", "a"])


@pytest.mark.parametrize(
    "mask, message",
    [
        ([[1, 0, 1]], "neither left nor right padding"),
        ([[0, 1, 0]], "neither left nor right padding"),
        ([[1, 1]], "attention_mask"),
        ([[1, 2, 1]], "attention_mask"),
        ([[1, 1, 1], [1, 1, 1]], "attention_mask"),
    ],
)
def test_a_mask_is_padding_and_fits_the_ids(mask: Any, message: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=message):
        prompts_of(hf.BatchEncoding({"input_ids": [[1, 2, 3]], "attention_mask": mask}))


def test_a_lone_surrogate_is_refused_by_the_number_of_its_prompt() -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"Prompt 1 has the lone surrogate '\\ud800' at character 2"):
        prompts_of(["a", "b \ud800"])


# --- arrays -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "given, expected",
    [
        (torch.tensor([1, 2]), ((1, 2),)),
        (torch.tensor([[1, 2], [3, 4]]), ((1, 2), (3, 4))),
        ([torch.tensor([1, 2]), torch.tensor([3])], ((1, 2), (3,))),
        ([torch.tensor(1), torch.tensor(2)], ((1, 2),)),
        (np.array([[1, 2], [3, 4]], dtype=np.uint8), ((1, 2), (3, 4))),
        ([np.int32(1), 2], ((1, 2),)),
        (range(1, 3), ((1, 2),)),
        (deque([1, 2]), ((1, 2),)),
        (pd.Series([1, 2]), ((1, 2),)),
    ],
)
def test_ids_may_be_in_any_array(given: Any, expected: Any) -> None:
    found = prompts_of(given)
    assert found == expected
    assert all(type(token) is int for prompt in found for token in prompt)


def test_texts_may_be_in_an_array_or_series() -> None:
    lm = bk.NgramLM.fit(["ab", "ba"], order=2)
    for texts in (np.array(["a", "b"]), pd.Series(["a", "b"]), ("a", "b"), {"k": "a", "l": "b"}.values()):
        assert bk.Posterior(lm, LONGER, prompts=texts, max_new_tokens=2).prompts == ("a", "b")


# --- what is refused --------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "a dict": (lambda: {"input_ids": [[1, 2]], "attention_mask": [[1, 1]]}, r"a plain dict.*encoded\[\"input_ids\"\]"),
    "a dict of texts": (lambda: {"a": 1, "b": 2}, "a plain dict.*list"),
    "dicts in a list": (lambda: [{"prompt": "a"}], "prompt 0 is a plain dict"),
    "the features of a processor": (
        lambda: hf.BatchFeature({"input_ids": [[1]], "pixel_values": [[0]]}),
        "BatchFeature",
    ),
    "an encoding without ids": (lambda: hf.BatchEncoding({"pixel_values": [[0]]}), "BatchEncoding.*input_ids"),
    "a table": (lambda: pd.DataFrame({"prompt": ["a"], "answer": ["b"]}), r"a DataFrame.*df\['prompt'\]"),
    "a set": (lambda: {"a", "b"}, "a set, which has no order"),
    "a frozen set": (lambda: frozenset({1, 2}), "a frozenset, which has no order"),
    "keys": ({"a": 1}.keys, "a dict_keys, which has no order"),
    "bytes": (lambda: b"ab", "bytes.*decode"),
    "a bytearray": (lambda: bytearray(b"ab"), "bytearray.*decode"),
    "a memoryview": (lambda: memoryview(b"ab"), "memoryview.*decode"),
    "bytes in a list": (lambda: [b"ab", b"c"], "prompt 0 is bytes.*decode"),
    "one message": (lambda: MESSAGES[0], "prompts is one message.*a list of messages"),
    "a conversation among texts": (lambda: ["a", MESSAGES], "Prompt 0 is no conversation, but others are: 'a'"),
    "ids among conversations": (lambda: [MESSAGES, [1, 2]], r"Prompt 1 is no conversation, but others are: \[1, 2\]"),
    "an empty conversation": (lambda: [MESSAGES, []], "The conversation of prompt 1 is empty"),
    "a text among messages": (lambda: [*MESSAGES, "a"], "Message 1 of the conversation is 'a', which is no message"),
    "a generator in a list": (lambda: [(i for i in (1, 2))], r"prompt 0 is a generator.*list\("),
    "a set in a list": (lambda: [{1, 2}], "prompt 0 is a set, which has no order"),
    "three axes": (lambda: np.ones((1, 2, 3), dtype=int), r"3 axes"),
    "no axis": (lambda: torch.tensor(3), r"no axis|must be"),
    "fractions": (lambda: torch.tensor([1.5, 2.0]), "must be one text, list of token ids or conversation"),
    "yes and no": (lambda: torch.tensor([True, False]), "must be one text, list of token ids or conversation"),
    "a number": (lambda: 3, "must be"),
    "None": (lambda: None, "must be"),
    "None in a list": (lambda: ["a", None], "all of one kind"),
    "nothing": (list, "prompts is empty"),
    "an empty batch": (lambda: hf.BatchEncoding({"input_ids": []}), "prompts is empty"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_prompt_is_refused_by_name(case: str) -> None:
    make, message = REFUSED[case]
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.Posterior(
            bk.NgramLM.fit(["ab", "input_ids attention_mask"], order=2), LONGER, prompts=make(), max_new_tokens=2
        )
