"""From texts to ids and back, on tokenizers of every kind: one BOS, first spaces, ids without a text."""

from __future__ import annotations

import gc
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import transformers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

import bayes_klrl as bk
from bayes_klrl.models.token_ids import decoded_after, drops_first_space
from bayes_klrl.problems.infilling import infilling
from tests.helpers.backends import as_jax
from tests.helpers.tiny_models import tiny_llama, tiny_t5, tiny_tokenizer

WORDS = ["▁", "▁hello", "▁world", "world", "▁▁", "h", "e", "l", "o", "w", "r", "d", "!"]
SPECIAL = ["<unk>", "<s>", "</s>"]
BOS, EOS = 1, 2
WORLD, SPACED_WORLD, HELLO, SPACE, TWO_SPACES = 6, 5, 4, 3, 7

LLAMA = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
)
GEMMA = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def sentencepiece(decoder: Any = None, *, bpe: bool = False, marks: str = "") -> Any:
    """A SentencePiece-style tokenizer of `WORDS`; `marks` is the template of the special tokens that it adds."""
    vocabulary = [*SPECIAL, *WORDS]
    if bpe:
        pieces = {"h", "e", "l", "o", "w", "r", "d", "▁", "!", "wo", "wor", "worl", "▁h", "▁he", "▁hel", "▁hell"}
        vocabulary += sorted(pieces - set(vocabulary))
        merges = [("▁", "h"), ("▁h", "e"), ("▁he", "l"), ("▁hel", "l"), ("▁hell", "o")]
        merges += [("w", "o"), ("wo", "r"), ("wor", "l"), ("worl", "d"), ("▁", "world"), ("▁", "▁")]
        model: Any = models.BPE({word: i for i, word in enumerate(vocabulary)}, merges, unk_token="<unk>")
    else:
        model = models.Unigram([(word, -float(len(word) == 1)) for word in vocabulary], unk_id=0)
    backend = tokenizers.Tokenizer(model)
    if decoder is LLAMA or decoder is GEMMA:
        prepend = [normalizers.Prepend("▁")] if decoder is LLAMA else []
        backend.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoder or decoders.Metaspace()
    if marks:
        backend.post_processor = processors.TemplateProcessing(
            single=marks, special_tokens=[("<s>", BOS), ("</s>", EOS)]
        )
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def byte_level() -> Any:
    backend = tokenizers.Tokenizer(models.BPE({"<s>": 0, "a": 1, "Ġa": 2, "Ġ": 3, "Ã": 4, "©": 5}, [("Ġ", "a")]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<s>")


def word_piece() -> Any:
    words = {"[UNK]": 0, "a": 1, "##a": 2, "b": 3, ".": 4, "[SEP]": 5, "▁a": 6}
    backend = tokenizers.Tokenizer(models.WordPiece(words, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece()
    return hf.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]")


def language_models(tokenizer: Any) -> dict[str, bk.LanguageModel]:
    """One model of each backend with this tokenizer, some tokens wider than it."""
    width = len(tokenizer) + 3
    torch_lm = bk.TorchLM(tiny_llama(width, eos_token_id=EOS), tokenizer)
    jax_lm = as_jax(bk.TorchLM(tiny_llama(width, eos_token_id=EOS)))
    jax_lm = bk.JaxLM(jax_lm.parameters, jax_lm._config, tokenizer, eos_token_id=EOS)
    ngram = bk.NgramLM(np.log(np.full(width, 1 / width)), eos_token_id=EOS, tokenizer=tokenizer)
    hmm = bk.HmmLM([1.0], [[1.0]], np.full((1, width), 1 / width), eos_token_id=EOS, tokenizer=tokenizer)
    return {"ngram": ngram, "hmm": hmm, "torch": torch_lm, "jax": jax_lm}


@pytest.fixture(scope="module")
def spaced() -> dict[str, bk.LanguageModel]:
    return language_models(sentencepiece())


# --- one BOS ----------------------------------------------------------------------------------------------------

WITH_BOS = ["<s> $A", "<s> $A </s>"]


@pytest.mark.parametrize("marks", WITH_BOS)
@pytest.mark.parametrize("kind", ["torch", "jax"])
def test_a_text_that_begins_with_bos_gets_no_second_one(kind: str, marks: str) -> None:
    tokenizer = sentencepiece(marks=marks)
    lm = language_models(tokenizer)[kind]
    plain = lm.encode(["hello world"])
    assert plain[0][0] == BOS
    assert plain[0].count(BOS) == 1
    with pytest.warns(UserWarning, match=r"begins with '<s>'.*does not add a second one"):
        rendered = lm.encode(["<s>hello world"])
    assert rendered[0] == [BOS, *tokenizer.encode("<s>hello world", add_special_tokens=False)[1:]]
    assert rendered[0].count(BOS) == 1


def test_it_is_said_once_for_each_tokenizer() -> None:
    first, second = (bk.TorchLM(tiny_llama(40, eos_token_id=EOS), sentencepiece(marks="<s> $A")) for _ in range(2))
    with pytest.warns(UserWarning, match="begins with"):
        first.encode(["<s>hello"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert first.encode(["<s>hello", "<s>world"]) == bk.TorchLM(
            tiny_llama(40, eos_token_id=EOS), first.tokenizer
        ).encode(["<s>hello", "<s>world"])
        first.encode(["hello"])
    with pytest.warns(UserWarning, match="begins with"):
        second.encode(["<s>hello"])


def test_a_text_that_holds_two_bos_keeps_two_and_one_that_holds_none_gets_one() -> None:
    lm = bk.TorchLM(tiny_llama(40, eos_token_id=EOS), sentencepiece(marks="<s> $A"))
    with pytest.warns(UserWarning, match="begins with"):
        (two,) = lm.encode(["<s><s>hello"])
    assert two[:2] == [BOS, BOS]
    assert two.count(BOS) == 2
    assert lm.encode(["hello<s>"])[0].count(BOS) == 2
    assert lm.encode([""]) == [[BOS]]
    assert lm.encode(["<s>"]) == [[BOS]]


def test_a_tokenizer_that_adds_no_bos_changes_nothing() -> None:
    lm = bk.TorchLM(tiny_llama(40, eos_token_id=EOS), sentencepiece())
    assert lm.encode(["<s><s>hello"])[0][:2] == [BOS, BOS]
    assert lm.encode(["<s>hello"])[0].count(BOS) == 1


def test_an_unknown_word_whose_id_is_bos_is_no_bos() -> None:
    words = tiny_tokenizer(5)
    words.bos_token = "<eos>"
    words.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 0)]
    )
    assert bk.TorchLM(tiny_llama(5), words).encode(["unknown a"]) == [[0, 0, 1]]


def test_an_encoder_decoder_model_keeps_one_bos_and_the_eos() -> None:
    lm = bk.TorchLM(tiny_t5(40, eos_token_id=EOS), sentencepiece(marks="<s> $A </s>"))
    with pytest.warns(UserWarning, match="begins with"):
        (ids,) = lm.encode(["<s>hello"])
    assert (ids[0], ids.count(BOS), ids[-1]) == (BOS, 1, EOS)


def test_an_ngram_model_has_no_bos_at_all() -> None:
    assert BOS not in language_models(sentencepiece(marks="<s> $A"))["ngram"].encode(["<s>hello"])[0]


# --- first spaces -----------------------------------------------------------------------------------------------

LOSSY = {
    "Metaspace": sentencepiece,
    "Llama": lambda: sentencepiece(LLAMA),
    "Metaspace BPE": lambda: sentencepiece(bpe=True),
    "Llama BPE": lambda: sentencepiece(LLAMA, bpe=True),
}
FAITHFUL = {
    "Gemma": lambda: sentencepiece(GEMMA),
    "byte level": byte_level,
    "WordPiece": word_piece,
    "words": lambda: tiny_tokenizer(5),
    "ByT5": hf.ByT5Tokenizer,
}


@pytest.mark.parametrize("name", LOSSY)
def test_prompt_and_completion_together_are_what_the_model_wrote(name: str) -> None:
    tokenizer = LOSSY[name]()
    assert drops_first_space(tokenizer)
    rng = np.random.default_rng(0)
    for kind, lm in language_models(tokenizer).items():
        prompts = [rng.integers(3, 16, size=rng.integers(1, 4)).tolist() for _ in range(200)]
        ids = [rng.integers(3, 16, size=rng.integers(1, 5)).tolist() for _ in range(200)]
        texts = lm.decode_after(prompts, ids)  # type: ignore[attr-defined]
        for prompt, completion, text in zip(prompts, ids, texts, strict=True):
            (before,), (whole,) = lm.decode([prompt]), lm.decode([[*prompt, *completion]])
            if before:  # a prompt of spaces alone has lost one of them
                assert before + text == whole, (kind, prompt, completion)


def test_two_completions_of_two_texts_are_two_for_a_reward(spaced: dict[str, bk.LanguageModel]) -> None:
    seen: list[str] = []

    def reward(completions: list[str]) -> list[float]:
        seen[:] = completions
        return [float(text.startswith(" ")) for text in completions]

    for lm in spaced.values():
        assert lm.decode([[SPACED_WORLD, EOS], [WORLD, EOS]]) == ["world", "world"]
        posterior = bk.Posterior(lm, bk.Reward(reward, alpha=1.0), prompts=[[HELLO]], max_new_tokens=2)
        assert posterior.reward([[SPACED_WORLD, EOS], [WORLD, EOS]]).tolist() == [[1.0, 0.0]]
        assert seen == [" world", "world"]


@pytest.mark.slow
def test_draws_show_the_texts_that_rewards_saw_also_from_a_file(tmp_path: Path) -> None:
    lm = language_models(sentencepiece())["ngram"]
    seen: list[list[str]] = []
    reward = bk.Reward(lambda completions: (seen.append(completions), [len(c) for c in completions])[1], alpha=9.0)
    posterior = bk.Posterior(lm, reward, prompts=[[HELLO], [BOS], []], max_new_tokens=2)
    draws = bk.ImportanceSampling(200).run(posterior, seed=0)
    texts = draws.texts()
    posterior.reward(draws)
    flat = [text for each in texts for text in each]
    assert flat == seen[-1]
    assert any(text.startswith(" ") for text in texts[0])
    assert flat[200:] == lm.decode(draws.sequences.lists()[200:])
    assert bk.Draws.load(draws.save(tmp_path / "draws.nc")).texts() == texts
    assert draws.resample(5, seed=1).texts() == bk.Draws.load(tmp_path / "draws.nc").resample(5, seed=1).texts()
    assert draws.to_pandas()["text"].tolist() == flat


def test_after_an_empty_prompt_and_after_a_special_token_a_completion_stands_alone(
    spaced: dict[str, bk.LanguageModel],
) -> None:
    for lm in spaced.values():
        texts = lm.decode_after([[], [BOS], [HELLO, EOS], [HELLO]], [[SPACED_WORLD]] * 4)  # type: ignore[attr-defined]
        assert texts == ["world", "world", "world", " world"]


def test_the_completion_of_an_encoder_decoder_model_is_a_text_of_its_own() -> None:
    lm = bk.TorchLM(tiny_t5(40, eos_token_id=EOS), sentencepiece())
    assert lm.decode_after([[HELLO]], [[SPACED_WORLD]]) == ["world"]


@pytest.mark.parametrize("name", FAITHFUL)
def test_other_tokenizers_give_what_they_gave(name: str) -> None:
    tokenizer = FAITHFUL[name]()
    assert not drops_first_space(tokenizer)
    rng = np.random.default_rng(0)
    width = min(len(tokenizer), 300)
    for lm in language_models(tokenizer).values():
        prompts, ids = ([rng.integers(0, width, size=3).tolist() for _ in range(50)] for _ in range(2))
        assert lm.decode_after(prompts, ids) == lm.decode(ids)  # type: ignore[attr-defined]


def test_broken_characters_fall_back_to_the_completion_alone() -> None:
    class Broken:
        all_special_ids = (0,)

        def get_vocab(self) -> dict[str, int]:
            return {"▁a": 1, "b": 2}

        def decode(self, ids: list[int], **options: Any) -> str:
            return "?" if len(ids) > 1 and ids[:2] != [1, 1] else {1: "a"}.get(ids[0], "b") + " a" * (len(ids) - 1)

    broken = Broken()
    assert drops_first_space(broken)
    assert decoded_after(broken, lambda rows: [broken.decode(row) for row in rows], [[2]], [[1]]) == ["a"]


def test_a_tokenizer_is_probed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, count = sentencepiece(), [0]
    own = type(tokenizer).get_vocab

    def counted(self: Any) -> Any:
        count[0] += 1
        return own(self)

    monkeypatch.setattr(type(tokenizer), "get_vocab", counted)
    assert all(drops_first_space(tokenizer) for _ in range(5))
    assert count == [1]
    del tokenizer
    gc.collect()
    assert not drops_first_space(byte_level())


def test_models_that_wrap_others_pass_it_on(spaced: dict[str, bk.LanguageModel]) -> None:
    from bayes_klrl.inference.exact.message_lm import MessageLM
    from bayes_klrl.inference.exact.messages import backward_messages
    from bayes_klrl.models.torch_lm.table import TableLM

    lm = bk.NgramLM(np.log(np.full(16, 1 / 16)), eos_token_id=EOS, tokenizer=sentencepiece())
    even = bk.AutomatonReward(bk.Automaton.counts(0, modulo=2, vocab_size=16), final_rewards=[1.0, 0.0], alpha=1.0)
    posterior = bk.Posterior(lm, even, prompts=[[HELLO]], max_new_tokens=2)
    wrapped = {
        "mixture": bk.MixtureLM([lm, lm]),
        "twisted": bk.TwistedLM(posterior, lambda posterior, index, prefixes: np.zeros(len(index))),
        "messages": MessageLM(backward_messages(posterior)),
        "table": TableLM(lm),
    }
    for name, model in wrapped.items():
        assert model.decode_after([[HELLO]], [[SPACED_WORLD]]) == [" world"], name  # type: ignore[attr-defined]

    class Own:
        """A user's model, which has no `decode_after`."""

        def __getattr__(self, name: str) -> Any:
            if name == "decode_after":
                raise AttributeError(name)
            return getattr(lm, name)

    assert bk.MixtureLM([Own(), lm]).decode_after([[HELLO]], [[SPACED_WORLD]]) == ["world"]  # type: ignore[list-item]
    own = bk.Posterior(Own(), bk.Reward(lambda completions: [len(c) for c in completions], alpha=1.0),  # type: ignore[arg-type]
                       prompts=[[HELLO]], max_new_tokens=2)  # fmt: skip
    assert own.reward([[SPACED_WORLD, EOS]]).tolist() == [[5.0]]


def test_completions_given_as_ids_to_a_reward_model_follow_their_prompts(spaced: dict[str, bk.LanguageModel]) -> None:
    pairs = bk.Preferences([[HELLO], [BOS]], [[SPACED_WORLD], [SPACED_WORLD]], [[WORLD], [WORLD]])
    for lm in spaced.values():
        assert pairs.batch(lm).completions == [" world", "world", "world", "world"]
    texts = bk.Preferences("hello", [[SPACED_WORLD]], [[WORLD]])
    assert texts.batch(spaced["torch"]).completions == [" world", "world"]


def test_the_suffix_of_an_infilling_problem_follows_its_gap() -> None:
    lm = bk.NgramLM.fit(
        [[HELLO, SPACED_WORLD] * 4], order=2, tokenizer=sentencepiece(), vocab_size=16, eos_token_id=EOS
    )
    problem = infilling(2, 2, num_suffixes=20, prompt=[HELLO], prior=lm, seed=0)
    suffixes = problem.posterior.columns["suffix"]
    for gap, ids, suffix in zip(problem.exact.tokens[:, 0], problem.suffixes, suffixes, strict=True):
        before, whole = lm.decode([gap.tolist()])[0], lm.decode([[*gap.tolist(), *ids.tolist()]])[0]
        assert gap[-1] <= EOS or before + suffix == whole
    assert any(suffix.startswith(" ") for suffix in suffixes)


# --- ids without a text -----------------------------------------------------------------------------------------

BARE = {
    "ByT5": lambda: hf.ByT5Tokenizer(extra_ids=0),
    "ByT5 with extra ids": hf.ByT5Tokenizer,
    "Metaspace": sentencepiece,
    "byte level": byte_level,
    "words": lambda: tiny_tokenizer(5),
    "characters": lambda: bk.NgramLM.fit(["ab"], order=1).tokenizer,
}


@pytest.mark.parametrize("name", BARE)
def test_ids_that_the_tokenizer_does_not_have_stand_for_no_text(name: str) -> None:
    tokenizer = BARE[name]()
    own = list(range(len(tokenizer)))[-8:]
    for kind, lm in language_models(tokenizer).items():
        if name == "characters" and kind in ("torch", "jax"):
            continue  # which take tokenizers of Hugging Face's interface only
        wide = [own[0], len(tokenizer), own[1], lm.vocab_size - 1]
        assert lm.decode([wide, [len(tokenizer)]]) == [*lm.decode([own[:2]]), ""], kind


def test_ids_beyond_the_length_of_a_tokenizer_with_gaps_keep_their_text() -> None:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "z": 9}, unk_token="a"))
    tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=backend)
    assert len(tokenizer) == 2
    assert bk.TorchLM(tiny_llama(12, eos_token_id=0), tokenizer).decode([[9, 5, 9]]) == ["z z"]
