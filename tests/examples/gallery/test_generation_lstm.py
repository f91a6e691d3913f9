"""`generation_lstm`: the LSTM is one distribution however it is run, and the n-gram's answer beside it is exact."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import bayes_klrl as bk
from tests.examples.gallery import is_short

NOTHING = bk.TokenReward(lambda tokens, lengths: 0.0 * lengths, alpha=1.0)


@pytest.fixture(scope="module")
def lstm() -> Any:
    """An LSTM of two layers over the characters a, b, c with random weights; the end is token 3."""
    import torch

    from bayes_klrl.gallery.models.lstm_lm import LSTMConfig, LSTMForCausalLM
    from bayes_klrl.models.ngram_lm.lm import CharacterTokenizer

    torch.manual_seed(0)
    config = LSTMConfig(vocab_size=4, embedding_size=6, hidden_size=12, num_hidden_layers=2, eos_token_id=3)
    model = LSTMForCausalLM(config)
    with torch.no_grad():
        model.lm_head.weight.mul_(3.0)  # far from uniform, so that a wrong state would show
    return bk.TorchLM(model, CharacterTokenizer("abc"), eos_token_id=3)


def everything(max_new_tokens: int) -> list[list[int]]:
    """All completions: those that end, and those that are cut."""
    ended = [[*ids, 3] for length in range(max_new_tokens) for ids in product(range(3), repeat=length)]
    return [*ended, *map(list, product(range(3), repeat=max_new_tokens))]


def test_probabilities_sum_to_one_and_every_path_agrees(lstm: Any) -> None:
    """Total mass, scores of a padded batch, decoding by cached states, and the network's own forward, prefix by prefix."""
    import torch

    from bayes_klrl.models.torch_lm.general import CachedNetwork

    assert lstm.self_check.gap < 1e-5
    completions = everything(4)
    sequences = bk.Sequences.from_lists(completions, max_new_tokens=4)
    prompts = [[0], [1, 2, 0, 0, 2]]
    both = bk.Sequences(sequences.tokens.repeat(2, axis=0), sequences.lengths.repeat(2, axis=0))
    scored = lstm.token_log_probs(prompts, both).detach().numpy().astype(float)
    assert np.allclose(np.exp(scored.sum(axis=2)).sum(axis=1), 1.0, atol=1e-5)
    assert abs(scored[0] - scored[1]).max() > 0.1  # the prompts matter

    rows = np.random.default_rng(0).permutation(len(completions))[:40]
    for p, prompt in enumerate(prompts):
        state = lstm.select(lstm.prefill([[2, 1], prompt]), np.ones(len(rows), dtype=int))  # prefilled beside another
        assert type(state.network) is CachedNetwork
        assert {tuple(layer.keys.shape) for layer in state.cache.cache.layers} == {(len(rows), 1, 1, 12)}
        for t in range(4):
            log_probs, inside = lstm.next_log_probs(state), t < both.lengths[p, rows]
            decoded = log_probs[np.arange(len(rows)), both.tokens[p, rows, t]].numpy()
            assert np.allclose(decoded[inside], scored[p, rows, t][inside], atol=1e-5)
            state = lstm.append(state, both.tokens[p, rows, t])
        for row in rows[:8]:
            ids = completions[row]
            with torch.no_grad():
                logits = lstm.module(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1]
            plain = logits.log_softmax(-1)[range(len(ids)), ids].numpy()
            assert np.allclose(plain, scored[p, row, : len(ids)], atol=1e-5)


def test_the_cell_is_that_of_torch(lstm: Any) -> None:
    """The hidden states against torch.nn.LSTM with the same weights."""
    import torch

    body = lstm.module.model
    theirs = torch.nn.LSTM(6, 12, num_layers=2, batch_first=True)
    with torch.no_grad():
        for number, layer in enumerate(body.layers):
            getattr(theirs, f"weight_ih_l{number}").copy_(layer.read.weight)
            getattr(theirs, f"weight_hh_l{number}").copy_(layer.recall.weight)
            getattr(theirs, f"bias_ih_l{number}").copy_(layer.read.bias)
            getattr(theirs, f"bias_hh_l{number}").zero_()
        ids = torch.tensor([[0, 2, 1, 1, 3, 0, 2], [1, 1, 0, 2, 2, 2, 0]])
        assert torch.allclose(body(ids).last_hidden_state, theirs(body.embedding(ids))[0], atol=1e-6)


@pytest.mark.slow
def test_it_is_saved_and_tuned_like_any_other(lstm: Any, tmp_path: Path) -> None:
    posterior = bk.Posterior(
        lstm,
        bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1), alpha=0.5),
        prompts="ab",
        max_new_tokens=4,
    )
    exact = bk.Exact().run(posterior, seed=0).log_evidence[0]
    for adapter in (None, "lora"):
        fit = bk.SVI(30, 64, optimizer="natural", adapter=adapter).fit(posterior, seed=0)
        assert bk.certify(posterior, fit.guide, seed=0).reverse_kl[0, 1] < 0.1
    smc = bk.SMC(2000).run(posterior, seed=0)
    assert abs(smc.log_evidence[0] - exact) < 4 * smc.log_evidence_se[0] < 0.5
    plain = bk.TorchLM(fit.guide.module, eos_token_id=3)  # a tokenizer of characters has no file format
    plain.save_pretrained(tmp_path / "guide")
    again = bk.TorchLM.from_pretrained(tmp_path / "guide")
    sequences = bk.Sequences.from_lists(everything(2), max_new_tokens=4)
    log_probs = [np.asarray(lm.token_log_probs([[0, 1]], sequences).detach()) for lm in (plain, again)]
    assert np.allclose(*log_probs, atol=1e-5)


def test_the_reward_is_the_edit_distance(lstm: Any) -> None:
    from bayes_klrl.gallery.language.generation_lstm import disagreement, edit_reward

    reward = edit_reward(lstm, "abca", 1.0)
    posterior = bk.Posterior(lstm, reward, prompts="a", max_new_tokens=5)
    completions = everything(5)
    texts = ["".join("abc"[i] for i in ids if i < 3) for ids in completions]
    rewards = posterior.reward(completions)[0]
    assert disagreement(texts, rewards, "abca") == 0
    assert set(rewards) == {0.0, -1.0, -2.0, -3.0, -4.0}
    assert disagreement(texts, rewards, "abcb") > 0


def test_the_distillation_is_solved_exactly_and_proposes_without_bias(lstm: Any) -> None:
    """Its log evidence against enumeration; constant weights on itself; on the LSTM the LSTM's own evidence."""
    from bayes_klrl.gallery.language.generation_lstm import distilled, edit_reward

    posterior = bk.Posterior(lstm, edit_reward(lstm, "cab", 0.5), prompts="ab", max_new_tokens=4)
    exact = distilled(posterior, order=3, num_draws=500, seed=0)
    small = exact.posterior
    completions = everything(4)
    assert np.isclose(np.exp(small.log_joint(completions)[0]).sum(), np.exp(exact.log_evidence))
    on_itself = bk.ImportanceSampling(50, proposal=exact.solved.policy()).run(small, seed=0)
    assert np.ptp(on_itself.log_weights) < 1e-9
    truth = np.log(np.exp(posterior.log_joint(completions)[0]).sum())
    drawn = bk.ImportanceSampling(2000, proposal=exact.solved.policy()).run(posterior, seed=0)
    assert abs(drawn.log_evidence[0] - truth) < 4 * drawn.log_evidence_se[0] < 0.2
    # the distance of its posterior to the LSTM's, as the example reads it off
    log_small = small.log_joint(completions)[0] - exact.log_evidence
    divergence = (np.exp(log_small) * (log_small - posterior.log_joint(completions)[0] + truth)).sum()
    spread = drawn.log_weights[0].std() / np.sqrt(2000)
    assert abs(truth - drawn.elbo[0] - divergence) < 4 * spread


def test_the_histogram_weighs() -> None:
    from bayes_klrl.gallery.language.generation_lstm import histogram

    shares = histogram(np.array([0.0, 2.0, 2.0]), np.array([1.0, 1.0, 2.0]))
    assert np.allclose(shares, [0.25, 0.0, 0.75])


@pytest.mark.slow
def test_the_shipped_model_reads_and_the_example_ends_in_a_report(tmp_path: Path) -> None:
    from bayes_klrl.gallery.language.generation_lstm import main
    from bayes_klrl.gallery.models.lstm_lm import shipped_lstm

    prior = shipped_lstm()
    text = "it was a truth universally"
    assert prior.decode(prior.encode([text])) == [text]
    sequences = bk.Sequences.from_lists([prior.encode([text[2:]])[0]], max_new_tokens=32)
    bits = -float(prior.token_log_probs(prior.encode([text[:2]]), sequences).detach().sum()) / np.log(2) / len(text[2:])
    assert bits < 2.2  # of log2(36) = 5.2 for a model that knows nothing
    finding = main(tmp_path, target="glad.", num_draws=200, num_particles=50, num_steps=3, num_texts=300, num_runs=2)
    assert finding.numbers["largest difference from rapidfuzz"] == 0
    assert is_short(finding)
    page = finding.report.read_text(encoding="utf-8")
    assert "SMC, n-gram twist" in page
    assert "n-gram&#x27;s posterior" in page
