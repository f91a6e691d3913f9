"""`dialogue`: the rewards, the split, and the whole example on the shipped model, with its prior in the adapter's place."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from tests.examples.gallery import is_short

pytest.importorskip("torch")
pytest.importorskip("vaderSentiment")

TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def example() -> Any:
    from bayes_klrl.gallery.language import dialogue as module

    return module


@pytest.fixture(scope="module")
def prior() -> bk.TorchLM:
    lm = bk.TorchLM.from_pretrained("austen")
    lm.tokenizer.chat_template = TEMPLATE
    return lm


def as_messages(*texts: str) -> list[list[dict[str, str]]]:
    return [[{"role": "assistant", "content": text}] for text in texts]


def test_the_constraint_reads_whole_words(example: Any) -> None:
    foul = as_messages("You idiots!", "SHUT UP.", "a damned shame", "That is a shitty idea", "what a clown")
    fine = as_messages("Hello, assistant", "We pass the shelly class", "a foolscap sheet", "I am sorry", "")
    assert example.clean(foul) == [False] * 5
    assert example.clean(fine) == [True] * 5


def test_the_relaxed_reward_differs_by_one_where_the_constraint_fails(example: Any) -> None:
    texts = as_messages("Thank you, that is wonderful!", "You are a stupid liar.", "It comes on Monday.")
    score, soft = np.array(example.sentiment(texts)), np.array(example.relaxed(texts))
    assert score[0] > 0.5 > 0 > score[1]
    assert score[2] == 0
    assert np.abs(soft - (score - [0, 1, 0])).max() < 1e-12
    assert 1 / example.ALPHA == 8  # the nats of the docstring


def test_no_conversation_is_in_both_parts_and_no_reply_of_the_shop_is_foul(example: Any) -> None:
    from bayes_klrl.gallery.data.conversations import TRAINING, UNSEEN, messages

    assert (len(TRAINING), len(UNSEEN)) == (16, 8)
    turns = [turn for conversation in (*TRAINING, *UNSEEN) for turn in conversation]
    assert len(set(turns)) == 72
    assert [message["role"] for message in messages(UNSEEN[0])] == ["system", "user", "assistant", "user"]
    assert all(example.clean([conversation[1] for conversation in (*TRAINING, *UNSEEN)]))


def test_both_posteriors_agree_on_clean_replies(example: Any, prior: bk.TorchLM) -> None:
    """log-likelihoods in nats, hard and relaxed, of a clean reply and a foul one."""
    hard, soft = (example.posterior_of(prior, example.UNSEEN[:1], hard=is_hard) for is_hard in (True, False))
    replies = [prior.encode([text])[0] + sorted(prior.eos_token_ids)[:1] for text in (" I am happy", " you fool")]
    first, second = hard.log_likelihood(replies)[0], soft.log_likelihood(replies)[0]
    assert abs(first[0] - second[0]) < 1e-9
    assert abs(first[0] - 8 * example.sentiment([" I am happy"])[0]) < 1e-9
    assert np.isneginf(first[1])
    assert np.isfinite(second[1])


def test_an_answer_is_weighted_only_where_it_says_so(example: Any, prior: bk.TorchLM) -> None:
    draws = bk.ImportanceSampling(16).run(example.posterior_of(prior, example.UNSEEN[:2]), seed=0)
    weighted, plain = (example.answer_of(draws, 2.0, weighted=is_weighted) for is_weighted in (True, False))
    scores = np.array([example.sentiment(row) for row in draws.texts()])
    assert np.abs(plain.sentiment - scores.mean(axis=1)).max() < 1e-12
    assert np.abs(weighted.sentiment - (draws.weights * scores).sum(axis=1)).max() < 1e-12
    assert (weighted.insulted == 0).all()
    assert (plain.effective, plain.seconds) == (32, 2 / 32)
    assert abs(weighted.effective - draws.ess.sum()) < 1e-9
    # of the prior itself, log Z - ELBO is log Z - E[r] / alpha
    assert (
        np.abs(
            example.distance(draws, np.zeros(2))
            + 8 * np.array([example.relaxed(r) for r in draws.texts()]).mean(axis=1)
        ).max()
        < 1e-9
    )


@pytest.mark.slow
def test_the_example_ends_in_a_report(example: Any, prior: bk.TorchLM, tmp_path: Path) -> None:
    found = example.main(
        tmp_path / "out", prior=prior, adapter=prior, num_draws=8, num_conversations=3, certified=1, num_runs=4
    )
    page = found.report.read_text(encoding="utf-8")
    assert page.count("<figure>") >= 3
    assert "adapter, then IS" in page
    assert is_short(found)
    assert abs(found.numbers["adapter, KL to the prior (nats)"]) < 1e-9  # it is the prior here
    assert found.numbers["SMC, insults"] == found.numbers["adapter, then IS, insults"] == 0
    assert f"SMC {found.numbers['SMC, CPU seconds per effective draw']:.1f}" in found.worse
    assert f"{found.numbers['adapter, sentiment']:.2f} ±" in found.better
    assert all(np.isfinite(value) for name, value in found.numbers.items() if "high" not in name)


def test_the_shipped_adapter_is_small_and_names_no_folder(example: Any) -> None:
    from safetensors import safe_open

    file = example.SHIPPED / "adapter_model.safetensors"
    assert file.stat().st_size < 1_000_000
    with safe_open(file, "pt") as weights:
        tensors = {name: weights.get_tensor(name) for name in weights.keys()}  # noqa: SIM118
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"torch.float16"}
    assert any(tensor.abs().max() > 0 for name, tensor in tensors.items() if "lora_B" in name)  # it was trained
    config = json.loads((example.SHIPPED / "adapter_config.json").read_text(encoding="utf-8"))
    assert config["base_model_name_or_path"] is None
    assert "Apache" in (example.SHIPPED / "README.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_the_shipped_adapter_changes_smollm2(example: Any) -> None:
    """Where SmolLM2 is installed: the adapter fits it, and its replies on unseen conversations are kinder."""
    try:
        smollm2 = bk.TorchLM.from_pretrained("smollm2")
    except bk.MissingPackageError as error:
        pytest.skip(str(error))
    posterior = example.posterior_of(smollm2, example.UNSEEN[:2], hard=False)
    draws = example.PolicyDraws(example.as_policy(example.SHIPPED, posterior), 8).run(posterior, seed=0)
    ratio = draws.log_proposal - draws.log_prior
    assert ratio.mean() > 0.2  # KL to the prior, nats
