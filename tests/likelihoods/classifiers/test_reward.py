"""Classifiers as likelihoods: the values of a pass alone, labels, enumerated posteriors, twists, and what is refused."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from transformers.modeling_outputs import SequenceClassifierOutput

import bayes_klrl as bk
from tests.helpers.truth import Truth
from tests.likelihoods.classifiers.common import CHARACTERS, MAKERS, PRIOR, alone, bert, characters, gpt2, llama

TEXTS = ["ab", "", "abaa", "b", "aba", "bbbb"]
NUM_TOKENS = 4


def completions(texts: list[str]) -> list[list[int]]:
    (eos,) = PRIOR.eos_token_ids
    return [[*PRIOR.encode([text])[0], *[eos] * (len(text) < NUM_TOKENS)] for text in texts]


def posterior(likelihood: bk.Likelihood, prompts: Any = "ab", **options: Any) -> bk.Posterior:
    return bk.Posterior(PRIOR, likelihood, **{"prompts": prompts, "max_new_tokens": NUM_TOKENS} | options)


def rewards(likelihood: bk.Likelihood, **options: Any) -> np.ndarray:
    values: np.ndarray = posterior(likelihood, **options).reward(completions(TEXTS))[0]
    return values


# ---- values


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_reward_is_that_of_each_text_alone(name: str, side: str, batch_size: int) -> None:
    model, tokenizer = MAKERS[name](), characters(side=side, cls_and_sep=name == "bert")
    reward = bk.ClassifierReward(model, label=0, alpha=1.0, output="logit", tokenizer=tokenizer, batch_size=batch_size)
    expected = alone(model, tokenizer, ["ab" + text for text in TEXTS])[:, 0]
    np.testing.assert_allclose(rewards(reward), expected, atol=1e-5)
    assert np.ptp(expected) > 0.1


def test_a_tokenizer_without_a_padding_token_is_no_obstacle() -> None:
    model, tokenizer = gpt2(), characters(pad=False)
    reward = bk.ClassifierReward(model, alpha=1.0, tokenizer=tokenizer)
    np.testing.assert_allclose(rewards(reward), alone(model, tokenizer, ["ab" + t for t in TEXTS])[:, 0], atol=1e-5)


def test_the_empty_text_is_read_as_one_special_token() -> None:
    model, tokenizer = gpt2(), characters()
    reward = bk.ClassifierReward(model, alpha=1.0, tokenizer=tokenizer)
    got = posterior(reward, prompts="").reward(completions([""]))[0, 0]
    np.testing.assert_allclose(got, alone(model, tokenizer, ["[SEP]"])[0, 0], atol=1e-5)


def test_prompts_of_ids_are_decoded_and_special_tokens_can_be_left_out() -> None:
    model, tokenizer = bert(), characters(cls_and_sep=True)
    reward = bk.ClassifierReward(
        model, label=1, alpha=1.0, output="logit", tokenizer=tokenizer, add_special_tokens=False
    )
    prompt = PRIOR.encode(["ab"])[0]
    expected = alone(model, tokenizer, ["ab" + text for text in TEXTS], add_special_tokens=False)[:, 1]
    np.testing.assert_allclose(rewards(reward, prompts=[prompt]), expected, atol=1e-5)


def test_conversations_are_rendered_by_the_classifiers_own_template() -> None:
    model, tokenizer = gpt2(n_positions=64), characters(cls_and_sep=True)
    prior = bk.NgramLM.fit(["ab", "ba"], order=2)
    user = [{"role": "user", "content": "ab"}]
    begun = [*user, {"role": "assistant", "content": "b"}]
    with pytest.raises(bk.CheckpointError, match="has no chat template"):
        bk.ClassifierReward(model, alpha=1.0, tokenizer=tokenizer).bind_with(_setting(prior, user), ())
    tokenizer.chat_template = "{% for m in messages %}<{{ m['role'][0] }}:{{ m['content'] }}>{% endfor %}"
    reward = bk.ClassifierReward(model, alpha=1.0, tokenizer=tokenizer)
    batch = _batch(prior, [user, begun], ["ba", "a"])
    expected = alone(model, tokenizer, ["<u:ab><a:ba>", "<u:ab><a:ba>"], add_special_tokens=False)[:, 0]
    np.testing.assert_allclose(reward.values(batch), expected, atol=1e-5)
    assert begun[-1]["content"] == "b"


def _setting(prior: Any, prompt: Any) -> Any:
    from bayes_klrl.batch import Setting

    return Setting(prior, (prompt,), ((0,),), {}, NUM_TOKENS, np.arange(1))


def _batch(prior: Any, prompts: list[Any], texts: list[str]) -> Any:
    from bayes_klrl.batch import Batch

    (eos,) = prior.eos_token_ids
    tokens = np.full((len(texts), NUM_TOKENS), eos)
    for row, text in enumerate(texts):
        encoded = prior.encode([text])[0]
        tokens[row, : len(encoded)] = encoded
    lengths = np.array([len(text) + 1 for text in texts])
    return Batch(tokens, lengths, np.arange(len(texts)), prompts, {}, prior)


def test_scores_are_computed_once_and_the_oldest_are_forgotten() -> None:
    reward = bk.ClassifierReward(gpt2(), alpha=1.0, tokenizer=characters(), cache_size=3)
    first = rewards(reward)
    classifier = reward.scores.classifier
    assert classifier is not None
    assert len(reward.scores.known) == 3
    passes = classifier.num_passes
    kept = [text for text, _ in reward.scores.known]
    again = posterior(reward**2.0).reward(completions([kept[0][2:]]))  # powers share the scores
    assert classifier.num_passes == passes
    assert again[0, 0] == first[TEXTS.index(kept[0][2:])]


def test_dropout_is_off_and_a_given_model_is_left_as_it_was() -> None:
    model = gpt2(resid_pdrop=0.5, embd_pdrop=0.5).train()
    expected = alone(gpt2(), characters(), ["ab" + text for text in TEXTS])[:, 0]
    np.testing.assert_allclose(
        rewards(bk.ClassifierReward(model, alpha=1.0, tokenizer=characters())), expected, atol=1e-5
    )
    half = bk.ClassifierReward(model, alpha=1.0, tokenizer=characters(), dtype="bfloat16")
    np.testing.assert_allclose(rewards(half), expected, atol=0.2)
    assert all(part.training for part in model.modules())
    assert model.score.weight.dtype == torch.float32
    assert model.config.pad_token_id is None


# ---- labels


def test_labels_are_log_probabilities_that_sum_to_one() -> None:
    model, tokenizer = llama(), characters()
    names = [bk.ClassifierReward(model, label=name, alpha=1.0, tokenizer=tokenizer) for name in ("NEGATIVE", "NEUTRAL")]
    last = bk.ClassifierReward(model, label=2, alpha=1.0, tokenizer=tokenizer)
    assert last.label == "log p(POSITIVE)"
    assert last.bounds == (-np.inf, 0.0)
    np.testing.assert_allclose(np.exp([rewards(each) for each in (*names, last)]).sum(axis=0), 1.0, atol=1e-6)
    logits = torch.tensor(alone(model, tokenizer, ["ab" + text for text in TEXTS]))
    np.testing.assert_allclose(rewards(last), logits.log_softmax(1)[:, 2], atol=1e-5)
    raw = bk.ClassifierReward(model, label=2, alpha=1.0, output="logit", tokenizer=tokenizer)
    np.testing.assert_allclose(rewards(raw), logits[:, 2], atol=1e-5)
    assert raw.bounds is None


def test_labels_that_may_hold_at_once_have_a_probability_each() -> None:
    model, tokenizer = llama(problem_type="multi_label_classification"), characters()
    logits = torch.tensor(alone(model, tokenizer, ["ab" + text for text in TEXTS]))
    reward = bk.ClassifierReward(model, label="NEUTRAL", alpha=1.0, tokenizer=tokenizer)
    np.testing.assert_allclose(rewards(reward), torch.nn.functional.logsigmoid(logits[:, 1]), atol=1e-5)
    one = bk.ClassifierReward(gpt2(), alpha=1.0, output="log_prob", tokenizer=tokenizer)
    logit = alone(gpt2(), tokenizer, ["ab" + text for text in TEXTS])[:, 0]
    np.testing.assert_allclose(rewards(one), -np.log1p(np.exp(-logit)), atol=1e-5)


def test_a_regression_has_numbers_and_no_probabilities() -> None:
    model, tokenizer = llama(problem_type="regression"), characters()
    logits = alone(model, tokenizer, ["ab" + text for text in TEXTS])
    reward = bk.ClassifierReward(model, label="NEUTRAL", alpha=1.0, tokenizer=tokenizer)
    np.testing.assert_allclose(rewards(reward), logits[:, 1], atol=1e-5)
    with pytest.raises(bk.BayesKLRLError, match="trained for regression"):
        bk.ClassifierReward(model, label=1, alpha=1.0, output="log_prob", tokenizer=tokenizer)


@pytest.mark.parametrize("label", ["positive", "3", 3, -1, True, 1.0, None])
def test_a_label_that_does_not_exist_is_answered_with_those_that_do(label: Any) -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"'NEGATIVE' \(0\), 'NEUTRAL' \(1\), 'POSITIVE' \(2\)"):
        bk.ClassifierReward(llama(), label=label, alpha=1.0, tokenizer=characters())


# ---- the posterior


@pytest.mark.parametrize("make", [bert, llama], ids=["bidirectional", "causal"])
def test_bayes_rule_and_the_evidence_by_enumeration(make: Any) -> None:
    """At alpha = 1 the posterior is Bayes' rule, and log Z the log-probability of the label under the prior."""
    model, tokenizer = make(), characters()
    reward = bk.ClassifierReward(model, label=1, alpha=1.0, tokenizer=tokenizer)
    target = posterior(reward)
    truth = Truth(target)
    texts = ["ab" + text for text in PRIOR.decode(truth.xs)]
    label = torch.tensor(alone(model, tokenizer, texts)).softmax(1)[:, 1].numpy()
    joint = np.exp(truth.log_prior[0]) * label
    np.testing.assert_allclose(truth.log_evidence, np.log(joint.sum()), atol=1e-6)
    np.testing.assert_allclose(truth.p[0], joint / joint.sum(), atol=1e-6)
    np.testing.assert_allclose(bk.Exact().run(target, seed=0).log_evidence, truth.log_evidence, atol=1e-9)
    bk.check_posterior(target).raise_if_broken()
    for sampler in (bk.ImportanceSampling(2000), bk.SMC(1000), bk.SMC(1000, twist=reward.twist())):
        draws = sampler.run(target, seed=0)  # type: ignore[attr-defined]
        z = (draws.log_evidence - truth.log_evidence) / np.maximum(draws.log_evidence_se, 1e-3)
        assert abs(z[0]) < 4.5
    rejection = bk.RejectionSampling(400).run(target, seed=0)  # needs no declared bound
    mean = (truth.p * truth.reward).sum()
    sd = np.sqrt((truth.p * (truth.reward - mean) ** 2).sum())
    assert abs(rejection.reward.mean() - mean) < 4.5 * sd / np.sqrt(400)


@pytest.mark.parametrize("proposal", [None, "twisted"])
def test_the_twist_leaves_the_evidence_unbiased(proposal: str | None) -> None:
    reward = bk.ClassifierReward(llama(), label=1, alpha=0.3, tokenizer=characters())
    one = posterior(reward)
    many = posterior(reward, prompts=["ab"] * 300)  # equal prompts have independent draws
    draws = bk.SMC(6, proposal=proposal, twist=reward.twist().fit(one, seed=0)).run(many, seed=0)
    ratios = np.exp(draws.log_evidence - Truth(one).log_evidence)
    assert abs(ratios.mean() - 1) < 4 * ratios.std(ddof=1) / np.sqrt(len(ratios))


def test_one_pass_scores_all_prefixes_where_the_head_allows() -> None:
    for model, most in ((gpt2(), 1), (bert(1), 2)):
        reward = bk.ClassifierReward(model, alpha=1.0, tokenizer=characters(), batch_size=3)
        target = posterior(reward)
        classifier = reward.scores.classifier
        assert classifier is not None
        before = classifier.num_passes
        tokens = np.array([PRIOR.encode(["abab"])[0]] * 4)
        lengths = np.arange(1, 5)
        got = target.reward_of_rows(tokens, lengths, np.zeros(4, dtype=int))
        assert classifier.num_passes - before == most
        texts = ["ab" + "abab"[:length] for length in lengths]
        np.testing.assert_allclose(got, alone(model, characters(), texts)[:, 0], atol=1e-5)


def test_it_multiplies_tempers_and_is_told_apart_by_name() -> None:
    reward = bk.ClassifierReward(gpt2(), alpha=0.5, tokenizer=characters(), name="score")
    plain = bk.Reward(lambda completions: [len(text) for text in completions], alpha=0.5)
    own, lengths = rewards(reward), np.array([len(text) for text in TEXTS])
    product = posterior((reward * plain) ** 3.0)
    np.testing.assert_allclose(product.log_likelihood(completions(TEXTS))[0], (own + lengths) * 6, atol=1e-9)
    assert product.likelihood.label == "score * <lambda>"
    np.testing.assert_array_equal(product.at_alpha(2.0).select([0]).reward(completions(TEXTS))[0], own + lengths)


def test_svi_takes_it_with_its_critic() -> None:
    reward = bk.ClassifierReward(llama(), label=0, alpha=0.5, tokenizer=characters())
    for twist in (None, reward.twist()):
        fit = bk.SVI(3, num_particles=8, twist=twist).fit(posterior(reward), seed=0)
        assert np.isfinite(fit.history["elbo"]).all()


# ---- lengths and broken numbers


def test_a_text_that_is_too_long_is_an_error_that_says_how_to_cut() -> None:
    reward = bk.ClassifierReward(gpt2(), alpha=1.0, tokenizer=characters())
    with pytest.raises(bk.RewardError, match=r"reads 24 tokens, but .* have 26: completion 2 'abaa'.*max_length=24"):
        rewards(reward, prompts="ab" * 11)


def test_max_length_keeps_the_end_and_says_so_once() -> None:
    model, tokenizer = bert(), characters(cls_and_sep=True)
    reward = bk.ClassifierReward(model, label=0, alpha=1.0, output="logit", tokenizer=tokenizer, max_length=6)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        got = rewards(reward, prompts="ab" * 3)
        rewards(reward, prompts="ba" * 3)
    assert [str(one.message).split(",")[0] for one in said] == [
        "'logit of LABEL_0' reads only the last 6 tokens (max_length) of longer texts"
    ]
    texts = [("ababab" + text)[-4:] for text in TEXTS]  # with [CLS] and [SEP], six
    np.testing.assert_allclose(got, alone(model, tokenizer, texts)[:, 0], atol=1e-5)
    with pytest.raises(bk.BayesKLRLError, match="max_length = 25 is more than the 24 tokens"):
        posterior(bk.ClassifierReward(model, label=0, alpha=1.0, tokenizer=tokenizer, max_length=25))


def test_numbers_that_half_precision_cannot_hold_are_an_error() -> None:
    model = gpt2()
    with torch.no_grad():
        model.score.weight.mul_(1e5)
    reward = bk.ClassifierReward(model, alpha=1e4, tokenizer=characters(), dtype="float16")
    with pytest.raises(
        bk.RewardError, match=r"logits \[(-?inf|nan)\] for completion \d .*dtype='bfloat16' or 'float32'"
    ):
        rewards(reward)


# ---- folders


def test_a_folder_gives_the_same(tmp_path: Path) -> None:
    model, tokenizer = llama(), characters()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    for given in (tmp_path, str(tmp_path)):
        reward = bk.ClassifierReward(given, label="POSITIVE", alpha=1.0)
        object_reward = bk.ClassifierReward(model, label="POSITIVE", alpha=1.0, tokenizer=tokenizer)
        np.testing.assert_allclose(rewards(reward), rewards(object_reward), atol=1e-6)
    with pytest.raises(bk.BayesKLRLError, match="'POSITIVE'"):
        bk.ClassifierReward(tmp_path, label="good", alpha=1.0)


def test_the_head_of_a_language_model_would_be_random_numbers(tmp_path: Path) -> None:
    from tests.helpers.tiny_models import tiny_gpt2

    tiny_gpt2(len(CHARACTERS)).save_pretrained(tmp_path)
    characters().save_pretrained(tmp_path)
    with pytest.raises(bk.CheckpointError, match=r"no sequence classifier: it lacks the weights score\.weight"):
        posterior(bk.ClassifierReward(tmp_path, label=0, alpha=1.0))


def test_what_is_no_classifier(tmp_path: Path) -> None:
    with pytest.raises(bk.CheckpointError, match=r"no config\.json"):
        bk.ClassifierReward(tmp_path, alpha=1.0)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(bk.CheckpointError, match="merge_and_unload"):
        bk.ClassifierReward(tmp_path, alpha=1.0)
    with pytest.raises(bk.CheckpointError, match="got a Linear"):
        bk.ClassifierReward(torch.nn.Linear(1, 1), alpha=1.0)
    with pytest.raises(bk.BayesKLRLError, match="got 3"):
        bk.ClassifierReward(3, alpha=1.0)
    with pytest.raises(bk.BayesKLRLError, match=r"built-in function len.*bk\.Reward"):
        bk.ClassifierReward(len, alpha=1.0)
    with pytest.raises(bk.BayesKLRLError, match="needs its tokenizer"):
        posterior(bk.ClassifierReward(gpt2(), alpha=1.0))
    with pytest.raises(bk.BayesKLRLError, match="alpha must be a positive"):
        bk.ClassifierReward(gpt2(), alpha=0.0, tokenizer=characters())
    for dtype in ("auto", "int8", torch.int8):
        with pytest.raises(bk.BayesKLRLError, match="dtype is a type of torch"):
            posterior(bk.ClassifierReward(gpt2(), alpha=1.0, tokenizer=characters(), dtype=dtype))
    with pytest.raises(bk.BayesKLRLError, match="output is"):
        bk.ClassifierReward(gpt2(), alpha=1.0, output="probability", tokenizer=characters())


@pytest.mark.parametrize(
    "kind", ["", "ForTokenClassification", "ForMultipleChoice", "ForQuestionAnswering", "ForNextSentencePrediction"]
)
def test_a_model_with_another_head_is_refused(kind: str) -> None:
    name = f"Bert{kind or 'Model'}"
    model = getattr(hf, name)(bert().config)
    with pytest.raises(
        bk.CheckpointError, match=f"{name} is no sequence classifier.*AutoModelForSequenceClassification"
    ):
        bk.ClassifierReward(model, label=0, alpha=1.0, tokenizer=characters())


def test_a_model_of_ones_own_is_known_by_its_logits() -> None:
    class PerToken(hf.BertPreTrainedModel):  # type: ignore[misc]
        def __init__(self, config: Any, reads: slice | int) -> None:
            super().__init__(config)
            self.bert, self.head, self.reads = hf.BertModel(config), torch.nn.Linear(8, 2), reads
            self.post_init()

        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            states = self.bert(input_ids, attention_mask).last_hidden_state
            return SequenceClassifierOutput(logits=self.head(states)[:, self.reads])

    config, tokenizer = bert().config, characters()
    with pytest.raises(bk.CheckpointError, match=r"PerToken is no sequence classifier: .* shape \(1, 9, 2\)"):
        posterior(bk.ClassifierReward(PerToken(config, slice(None)), label=0, alpha=1.0, tokenizer=tokenizer))
    assert np.isfinite(rewards(bk.ClassifierReward(PerToken(config, 0), label=0, alpha=1.0, tokenizer=tokenizer))).all()


def test_a_tokenizer_of_another_model_and_a_prior_without_one() -> None:
    small = gpt2()
    small.resize_token_embeddings(5)
    with pytest.raises(bk.CheckpointError, match=r"the model has the ids below 5"):
        rewards(bk.ClassifierReward(small, alpha=1.0, tokenizer=characters()))
    coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    with pytest.raises(bk.TextRewardError, match="no tokenizer"):
        bk.Posterior(coin, bk.ClassifierReward(gpt2(), alpha=1.0, tokenizer=characters()), max_new_tokens=2)


def test_another_vocabulary_than_the_priors() -> None:
    """The shipped prior has 2,048 byte pairs, the classifier single characters."""
    prior = bk.TorchLM.from_pretrained("austen")
    model, tokenizer = gpt2(n_positions=128), characters()
    target = bk.Posterior(
        prior, bk.ClassifierReward(model, alpha=1.0, tokenizer=tokenizer), prompts="She had", max_new_tokens=6
    )
    draws = bk.ImportanceSampling(6).run(target, seed=0)
    texts = ["She had" + text for text in draws.texts()[0]]
    np.testing.assert_allclose(draws.reward[0], alone(model, tokenizer, texts)[:, 0], atol=1e-5)
