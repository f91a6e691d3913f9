"""A posterior of conversations is the posterior of their rendered ids; reward functions see messages, people see words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from bayes_klrl.inference.svi.checkpoint import fingerprint
from tests.helpers.chat import EOS, TEMPLATE, WORDS, chat_lm, chat_tokenizer
from tests.helpers.tiny_models import tiny_t5

TURNS = [{"role": "system", "content": "c"}, {"role": "user", "content": "a b"}]
OTHER = [{"role": "user", "content": "b"}, {"role": "assistant", "content": "a"}]
BOTH = [TURNS, OTHER]


def contents(completions: Any) -> list[str]:
    """The texts of completions in TRL's conversational format."""
    assert all(list(completion[0]) == ["role", "content"] and len(completion) == 1 for completion in completions)
    return [completion[0]["content"] for completion in completions]


def many_a(completions: Any, prompts: Any, answer: Any, **_: Any) -> list[float]:
    """A reward function in the form of TRL's conversational ones; it changes what it was given, as it may."""
    values = [
        text.split().count("a") + text.split().count(a) for text, a in zip(contents(completions), answer, strict=True)
    ]
    assert all(isinstance(prompt, list) and prompt[-1]["content"] in ("a b", "a") for prompt in prompts)
    for message in (prompts[0][-1], completions[0][0]):
        message["content"] = "changed"
    completions.clear()
    return values


def plainly(completions: list[str], answer: list[str]) -> list[float]:
    """The same function of texts."""
    return [text.split().count("a") + text.split().count(a) for text, a in zip(completions, answer, strict=True)]


@pytest.fixture(scope="module")
def prior() -> Any:
    return chat_lm()


@pytest.fixture(scope="module")
def chat(prior: Any) -> bk.Posterior:
    return bk.Posterior(prior, bk.Reward(many_a, alpha=0.7), prompts=BOTH, max_new_tokens=3, answer=["b", "c"])


@pytest.fixture(scope="module")
def ids(prior: Any, chat: bk.Posterior) -> bk.Posterior:
    rendered = list(chat.prompt_ids)
    return bk.Posterior(prior, bk.Reward(plainly, alpha=0.7), prompts=rendered, max_new_tokens=3, answer=["b", "c"])


@pytest.fixture(scope="module")
def log_evidence(chat: bk.Posterior) -> Any:
    return bk.Exact().run(chat, seed=0).log_evidence


def test_the_evidence_is_that_of_the_rendered_ids(chat: bk.Posterior, ids: bk.Posterior, log_evidence: Any) -> None:
    np.testing.assert_allclose(log_evidence, bk.Exact().run(ids, seed=0).log_evidence, rtol=0, atol=1e-12)
    assert chat.prompts == (tuple(TURNS), tuple(OTHER))  # whatever the reward did to what it was given


@pytest.mark.parametrize("algorithm", [bk.ImportanceSampling(2000), bk.SMC(1000)], ids=["IS", "SMC"])
def test_samplers_estimate_it_and_draw_what_they_draw_for_ids(
    algorithm: Any, chat: bk.Posterior, ids: bk.Posterior, log_evidence: Any
) -> None:
    draws = algorithm.run(chat, seed=1)
    assert (np.abs(draws.log_evidence - log_evidence) < 4 * draws.log_evidence_se).all()
    np.testing.assert_array_equal(draws.tokens, algorithm.run(ids, seed=1).tokens)
    assert not any("<" in text for texts in draws.texts() for text in texts)  # special tokens have no text


def test_a_fitted_guide_is_certified(chat: bk.Posterior, log_evidence: Any) -> None:
    guide = bk.SVI(3, num_particles=8).fit(chat, seed=0).guide
    certificate = bk.certify(chat, guide, seed=0, num_draws=32, num_particles=16, num_runs=4)
    low, high = certificate.log_evidence_bounds.T
    assert ((low <= log_evidence + 1e-6) & (log_evidence <= high + 1e-6)).all()
    assert guide.eos_token_ids == chat.prior.eos_token_ids
    assert "a b" in str(certificate.table())


def test_frontier_compare_and_amortise_take_conversations(chat: bk.Posterior) -> None:
    assert bk.frontier(chat, num_draws=64, seed=0).log_evidence.size > 1
    result = bk.compare(chat, {"IS": bk.ImportanceSampling(64)}, seed=0)
    assert "role" not in str(result.table())
    held_out = bk.Posterior(chat.prior, chat._given, prompts=[TURNS[1:]], max_new_tokens=3, answer=["c"])
    assert "unseen" in str(bk.amortise(chat, held_out, bk.SVI(2, num_particles=4), seed=0, num_draws=32))


def test_rows_of_a_conversational_data_set(chat: bk.Posterior, prior: Any, log_evidence: Any) -> None:
    rows = [{"prompt": TURNS, "answer": "b"}, {"prompt": OTHER, "answer": "c"}]
    read = bk.Posterior.from_rows(prior, bk.Reward(many_a, alpha=0.7), rows, max_new_tokens=3)
    np.testing.assert_array_equal(bk.Exact().run(read, seed=0).log_evidence, log_evidence)


def test_draws_keep_their_conversations(chat: bk.Posterior, tmp_path: Path) -> None:
    draws = bk.ImportanceSampling(8).run(chat, seed=0)
    read = bk.Draws.load(draws.save(tmp_path / "draws.nc"))
    assert read.prompts == draws.prompts
    assert [each.rendering for each in read.prompts] == [each.rendering for each in draws.prompts]
    assert read.texts() == draws.texts()
    assert set(read.to_pandas()["prompt"]) == {"a b", "b"}
    draws.to_arviz()


def test_errors_show_words(chat: bk.Posterior) -> None:
    odd = bk.Reward(lambda completions: [np.nan for _ in completions], alpha=1.0, name="odd")
    with pytest.raises(
        bk.RewardError, match=r"completion 0 'a' \(ids \[6, 0\], prompt <conversation of 2 messages: 'a b'>\)"
    ):
        bk.Posterior(chat.prior, odd, prompts=TURNS, max_new_tokens=2).reward([[6, EOS]])


def test_a_checkpoint_belongs_to_its_conversations(chat: bk.Posterior, ids: bk.Posterior) -> None:
    mine, of_ids, other = (fingerprint(each, None, 0, "torch", "1") for each in (chat, ids, chat.select([1, 0])))
    assert mine["prompts"] == of_ids["prompts"] != other["prompts"]


def test_training_goes_on_from_its_checkpoint(chat: bk.Posterior, tmp_path: Path) -> None:
    svi = bk.SVI(4, num_particles=4)
    whole = svi.fit(chat, seed=0, checkpoint=tmp_path)
    again = svi.fit(chat.select([0, 1]), seed=0, resume=tmp_path)
    np.testing.assert_array_equal(again.history["elbo"], whole.history["elbo"])


@pytest.mark.slow
def test_jax_gives_the_draws_of_torch(chat: bk.Posterior, tmp_path: Path) -> None:
    pytest.importorskip("jax")
    chat.prior.save_pretrained(tmp_path)
    jax_lm = bk.JaxLM.from_pretrained(tmp_path)
    same = bk.Posterior(jax_lm, chat._given, prompts=chat.prompts, max_new_tokens=3, answer=["b", "c"])
    assert same.prompts[0] is chat.prompts[0]  # the template is the same, and so is the text
    assert same.prompt_ids == chat.prompt_ids
    by_jax, by_torch = (bk.ImportanceSampling(64).run(each, seed=0) for each in (same, chat))
    np.testing.assert_array_equal(by_jax.tokens, by_torch.tokens)
    np.testing.assert_allclose(by_jax.log_weights, by_torch.log_weights, atol=1e-4)


def test_an_encoder_reads_the_rendered_conversation() -> None:
    lm = bk.TorchLM(tiny_t5(len(WORDS)), chat_tokenizer(), eos_token_id=[0, 2], check=False)
    chat = bk.Posterior(lm, bk.Reward(many_a, alpha=0.7), prompts=BOTH, max_new_tokens=2, answer=["b", "c"])
    same = bk.Posterior(
        lm, bk.Reward(plainly, alpha=0.7), prompts=list(chat.prompt_ids), max_new_tokens=2, answer=["b", "c"]
    )
    np.testing.assert_allclose(*(bk.Exact().run(each, seed=0).log_evidence for each in (chat, same)), atol=1e-12)


def test_the_shipped_model_with_a_template() -> None:
    lm = bk.TorchLM.from_pretrained("austen", check=False)
    lm.tokenizer.chat_template = TEMPLATE.replace("<end>", "<|endoftext|>").replace("{{ bos_token }} ", "")
    polite = bk.Reward(lambda completions: [text.count(",") for text in contents(completions)], alpha=1.0)
    chat = bk.Posterior(lm, polite, prompts=[{"role": "user", "content": "Do you dance?"}], max_new_tokens=4)
    assert lm.decode(chat.prompt_ids)[0].startswith("user Do you dance?")
    assert bk.SMC(8).run(chat, seed=0).shape == (1, 8)


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def test_preferences_between_messages(prior: Any) -> None:
    rows = [
        {
            "prompt": TURNS,
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        },
        {
            "prompt": OTHER,
            "chosen": [{"role": "assistant", "content": "b"}],
            "rejected": [{"role": "assistant", "content": "c"}],
        },
    ]
    pairs = bk.Preferences.from_rows(rows)
    assert pairs.prompts == (tuple(TURNS), tuple(OTHER))
    assert (pairs.chosen, pairs.rejected) == (("a", "b"), ("b", "c"))
    seen = pairs.batch(prior)
    assert contents(seen.named("completions")) == ["a", "b", "b", "c"]
    assert seen.named("prompts") == [TURNS, OTHER, TURNS, OTHER]
    of_ids = bk.Preferences(TURNS, [[6], [7]], [[7], [6]]).batch(prior)
    assert of_ids.completions == ["a", "b", "b", "a"]
    with pytest.raises(
        bk.BayesKLRLError, match=r"chosen\[0\] must be one message of the assistant.*\['system', 'user'\]"
    ):
        bk.Preferences(TURNS, [TURNS], ["a"])
    with pytest.raises(bk.BayesKLRLError, match="of one kind with the others"):
        bk.Preferences([TURNS, "a"], ["a", "b"], ["b", "a"])
