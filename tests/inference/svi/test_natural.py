"""Scores of single draws against torch's gradients draw by draw; natural-gradient steps against the dense Fisher matrix."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

import bayes_klrl as bk
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.pyro_backend.natural_gradient import per_sample as module_under_test
from bayes_klrl.inference.svi.pyro_backend.natural_gradient import score_products
from bayes_klrl.inference.svi.pyro_backend.natural_gradient.per_sample import PerSample
from bayes_klrl.inference.svi.pyro_backend.natural_gradient.regression import NaturalGradient, System, held_out_errors
from bayes_klrl.models.torch_lm.table import TableLM
from bayes_klrl.sequences import Sequences
from tests.helpers.tiny_models import seeded, tiny_gpt2, tiny_llama, tiny_other, tiny_t5
from tests.helpers.truth import Truth

PROMPTS = [[1, 2], [3, 1, 2], [2, 1]]
NUM_DRAWS, NUM_TOKENS, VOCAB = 6, 4, 5


def qwen2_with_lora() -> bk.TorchLM:
    """A Qwen2 under LoRA adapters that are not 0."""
    config = hf.Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    guide = bk.TorchLM(seeded(hf.Qwen2ForCausalLM, config, 0)).with_adapter("lora")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return guide


def table() -> TableLM:
    """A trainable trigram table."""
    logits = np.random.default_rng(1).normal(size=(VOCAB,) * 3)
    return TableLM(bk.NgramLM(logits - np.log(np.exp(logits).sum(-1, keepdims=True)), eos_token_id=0))


GUIDES = {
    "gpt2": lambda: bk.TorchLM(tiny_gpt2()),
    "gpt2-untied": lambda: bk.TorchLM(tiny_gpt2(tie_word_embeddings=False)),
    "llama": lambda: bk.TorchLM(tiny_llama()),
    "llama-tied": lambda: bk.TorchLM(tiny_llama(tie_word_embeddings=True), temperature=1.5),
    "qwen2-lora": qwen2_with_lora,
    "table": table,
    "t5": lambda: bk.TorchLM(tiny_t5()),
    "opt": lambda: bk.TorchLM(tiny_other("opt")),
    "gemma2": lambda: bk.TorchLM(tiny_other("gemma2")),
}
SLOW_PARTS = {"t5": "relative_attention_bias", "opt": "embed_positions"}


def completions(seed: int = 0) -> Sequences:
    """Completions of three prompts; two of each prompt are equal."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, VOCAB, (len(PROMPTS), NUM_DRAWS, NUM_TOKENS))
    lengths = rng.integers(1, NUM_TOKENS + 1, (len(PROMPTS), NUM_DRAWS))
    tokens[:, 1], lengths[:, 1] = tokens[:, 0], lengths[:, 0]
    return Sequences(tokens, lengths)


def in_double(guide: Any) -> Any:
    """The guide in float64, so that a difference is not rounding."""
    if isinstance(guide, bk.TorchLM):
        guide.module.double()
    return guide


def own_log_prob(guide: Any, prompt: list[int], ids: list[int]) -> Tensor:
    """log q of one completion by the model's own forward."""
    if isinstance(guide, TableLM):
        return guide.token_log_probs([prompt], Sequences(np.array([[ids]]), np.array([[len(ids)]]))).sum()
    if guide.prompt_apart:
        logits = guide.module(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *ids[:-1]]])
        ).logits[0]
    else:
        logits = guide.module(input_ids=torch.tensor([prompt + ids[:-1]])).logits[0, len(prompt) - 1 :]
    return (logits / guide.temperature).log_softmax(-1)[range(len(ids)), ids].sum()


def looped(guide: Any, sequences: Sequences) -> tuple[Tensor, Tensor]:
    """log q and the scores of all draws, one by one, prompt by prompt: (P * N,) and (P * N, number of parameters)."""
    parameters = [parameter for parameter in guide.parameters() if parameter.requires_grad]
    log_probs, rows = [], []
    for row, ids in enumerate(sequences.lists()):
        log_q = own_log_prob(guide, PROMPTS[row // NUM_DRAWS], ids)
        gradients = torch.autograd.grad(log_q, parameters, allow_unused=True)
        flat = [
            torch.zeros_like(parameter) if gradient is None else gradient
            for parameter, gradient in zip(parameters, gradients, strict=True)
        ]
        log_probs.append(log_q.detach())
        rows.append(torch.cat([part.flatten() for part in flat]).double())
    return torch.stack(log_probs), torch.stack(rows)


def flat_grad(parameters: list[nn.Parameter]) -> Tensor:
    """The gradients that were written, as one vector."""
    return torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]).double()


def relative(found: Tensor, right: Tensor) -> float:
    return float((found - right).norm() / right.norm())


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fastest", "ghost", "blocks"])
@pytest.mark.parametrize("name", GUIDES)
def test_grams_and_directions_equal_those_of_a_loop_over_draws(
    name: str, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way != "fastest":
        cost = {"ghost": 0, "blocks": 2}[way]
        monkeypatch.setattr(score_products, "ghost_operations", lambda *_: cost)
        monkeypatch.setattr(score_products, "block_operations", lambda *_: 1)
        monkeypatch.setattr(score_products, "_BLOCK", 20_000)  # several blocks
    guide, sequences = in_double(GUIDES[name]()), completions()
    log_probs, scores = looped(guide, sequences)
    samples = PerSample(guide)
    for repeat in range(2):  # the first call compares with torch, later ones do not
        found = samples.scores(PROMPTS, sequences)
        torch.testing.assert_close(found.log_probs.T.flatten(), log_probs.double(), rtol=0, atol=1e-6)
        gram = scores @ scores.T
        assert relative(found.gram(), gram) < 1e-5, repeat
        blocks = [gram[p * NUM_DRAWS :][:NUM_DRAWS, p * NUM_DRAWS :][:, :NUM_DRAWS] for p in range(len(PROMPTS))]
        assert relative(found.gram_by_prompt(), torch.stack(blocks)) < 1e-5
        weights = torch.randn(NUM_DRAWS, len(PROMPTS), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        found.write_direction(weights)
        assert relative(flat_grad(samples.parameters), weights.T.flatten() @ scores / NUM_DRAWS) < 1e-5
        generator = torch.Generator().manual_seed(2)
        direction = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in samples.parameters]
        right = scores @ torch.cat([part.flatten() for part in direction]).double()
        assert relative(found.along(direction).T.flatten(), right) < 1e-5
    slow = SLOW_PARTS.get(name)
    assert all(slow in part for part in samples.slow if name == "t5") if slow else samples.slow == []
    assert slow is None or any(slow in part for part in samples.slow)


def test_float32_is_close_enough() -> None:
    guide, sequences = bk.TorchLM(tiny_gpt2()), completions()
    _, scores = looped(guide, sequences)
    assert relative(PerSample(guide).scores(PROMPTS, sequences).gram(), scores @ scores.T) < 1e-5


def test_a_layer_that_does_more_than_it_seems_is_differentiated_draw_by_draw() -> None:
    class Doubled(nn.Linear):
        def forward(self, read: Tensor) -> Tensor:
            return 2.0 * super().forward(read)

    guide, sequences = in_double(bk.TorchLM(tiny_llama())), completions()
    layer = guide.module.model.layers[0].mlp.up_proj
    layer.__class__ = Doubled
    _, scores = looped(guide, sequences)
    samples = PerSample(guide)
    assert relative(samples.scores(PROMPTS, sequences).gram(), scores @ scores.T) < 1e-5
    assert samples.slow == ["model.layers.0.mlp.up_proj.weight"]


def test_a_large_layer_of_an_unknown_kind_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module_under_test, "_KINDS", ())
    monkeypatch.setattr(module_under_test, "_MOST_SLOW", 10)
    with pytest.raises(BayesKLRLError, match=r"transformer\.wte\.weight"):
        PerSample(bk.TorchLM(tiny_gpt2())).scores(PROMPTS, completions())


def test_other_models_are_refused() -> None:
    with pytest.raises(BayesKLRLError, match="NgramLM"):
        PerSample(table().to_ngram())


def regression(momentum: float, damping: float, max_kl: float) -> tuple[Any, ...]:
    """A guide, its scores, log-weights, and what a dense computation says of two steps."""
    guide, sequences = in_double(bk.TorchLM(tiny_gpt2(n_embd=4, n_layer=1))), completions()
    samples = PerSample(guide)
    rng = np.random.default_rng(3)
    by_text = {tuple(ids): rng.normal() for ids in sequences.lists()}
    values = np.array([by_text[tuple(ids)] for ids in sequences.lists()]).reshape(len(PROMPTS), NUM_DRAWS).T
    log_weights = torch.as_tensor(values)
    natural = NaturalGradient(
        samples.parameters, momentum=momentum, damping=damping, max_kl=max_kl, warm_up=0, gain=1e9
    )
    return guide, samples, sequences, log_weights, natural


def centred(values: Tensor) -> Tensor:
    """Rows (P * N, ...) minus the mean of their prompt."""
    by_prompt = values.view(len(PROMPTS), NUM_DRAWS, -1)
    return (by_prompt - by_prompt.mean(dim=1, keepdim=True)).view(values.shape)


@pytest.mark.parametrize("max_kl", [1e6, 1e-3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_steps_equal_ridge_regression_on_all_draws(momentum: float, max_kl: float) -> None:
    guide, samples, sequences, log_weights, natural = regression(momentum, 0.3, max_kl)
    before: Tensor | float = 0.0
    for _ in range(2):
        _, scores = looped(guide, sequences)
        scores, target = centred(scores), centred(log_weights.T.flatten())
        num_draws, size = scores.shape
        fisher = scores.T @ scores / num_draws
        damped = fisher + 0.3 * fisher.trace() / num_draws * torch.eye(size, dtype=torch.float64)
        residual = target - momentum * (scores @ before if isinstance(before, Tensor) else 0.0)
        direction = momentum * before + torch.linalg.solve(damped, scores.T @ residual / num_draws)
        share = min(1.0, float((2 * max_kl / (direction @ fisher @ direction)).sqrt()))
        start = torch.cat([parameter.detach().flatten() for parameter in samples.parameters])
        info = natural.step(samples.scores(PROMPTS, sequences), log_weights)
        moved = torch.cat([parameter.detach().flatten() for parameter in samples.parameters]) - start
        assert relative(moved, share * direction) < 1e-5
        assert info.share == pytest.approx(share, rel=1e-5)
        assert info.kl == pytest.approx(share**2 * float(direction @ fisher @ direction) / 2, rel=1e-5)
        assert info.num_distinct < num_draws
        before = direction


def test_a_step_is_limited_in_nats() -> None:
    guide, samples, sequences, log_weights, natural = regression(0.0, 0.03, 1e-4)
    old = copy.deepcopy(guide.module)
    assert natural.step(samples.scores(PROMPTS, sequences), 100 * log_weights).kl == pytest.approx(1e-4)
    assert any(not torch.equal(a, b) for a, b in zip(old.parameters(), guide.module.parameters(), strict=True))


def test_repeating_all_draws_changes_the_damping_alone() -> None:
    """Equal draws are one row: K enters by lambda' alone, so twice the draws with twice the damping make the same step."""
    moved = []
    for repeats in (1, 2):
        guide, samples, sequences, log_weights, natural = regression(0.0, 0.03 * repeats, 1e6)
        twice = Sequences(*(np.concatenate([x] * repeats, axis=1) for x in (sequences.tokens, sequences.lengths)))
        natural.step(samples.scores(PROMPTS, twice), torch.cat([log_weights] * repeats))
        moved.append(torch.cat([parameter.detach().flatten() for parameter in guide.parameters()]))
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-9)


def test_held_out_error_prefers_much_damping_for_noise_and_little_for_signal() -> None:
    rng = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 20, generator=rng, dtype=torch.float64)
    ones, prompt = torch.ones(200, dtype=torch.float64), torch.zeros(200)
    signal = scores @ torch.randn(20, generator=rng, dtype=torch.float64)
    noise = torch.randn(200, generator=rng, dtype=torch.float64)
    chosen = []
    for target in (signal, noise):
        system = System.centred(scores @ scores.T, target, ones, prompt)
        errors = held_out_errors(system, system.target, (0.01, 1.0, 1000.0), rng)
        chosen.append(int(errors.argmin()))
        if target is signal:
            assert errors[0] < 1e-3
    assert chosen == [0, 2]


def test_natural_gradient_finds_the_posterior_of_a_table_in_ten_steps() -> None:
    prior = bk.NgramLM.random(vocab_size=3, order=3, seed=0) if hasattr(bk.NgramLM, "random") else table().to_ngram()
    reward = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1) * 1.0, alpha=1.0)
    posterior = bk.Posterior(prior, reward, prompts=[[1, 1]], max_new_tokens=3)
    exact = bk.Exact().run(posterior, seed=0)
    guide = TableLM(posterior.prior)  # type: ignore[arg-type]
    samples = PerSample(guide)
    natural = NaturalGradient(samples.parameters, max_kl=1.0)
    gaps: list[float] = []
    for seed in range(20):
        draws = bk.ImportanceSampling(256, proposal=guide.to_ngram()).run(posterior, seed=seed)
        scores = samples.scores(posterior.prompt_ids, draws.sequences)
        gaps.append(float(exact.log_evidence[0] - draws.log_weights.mean()))
        natural.step(scores, torch.as_tensor(draws.log_weights).T)
    assert gaps[0] > 0.05
    assert gaps[-1] < 0.03 * gaps[0]


@pytest.mark.parametrize(
    "options", [{"momentum": 1.0}, {"damping": 0.0}, {"damping": "best"}, {"max_kl": -1.0}], ids=str
)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(BayesKLRLError):
        NaturalGradient([], **options)


def test_infinite_log_weights_are_refused() -> None:
    _, samples, sequences, log_weights, natural = regression(0.0, 0.03, 1.0)
    log_weights[0, 0] = -torch.inf
    with pytest.raises(BayesKLRLError, match="finite"):
        natural.step(samples.scores(PROMPTS, sequences), log_weights)


@pytest.mark.slow
def test_svi_with_the_natural_gradient_needs_a_tenth_of_adams_steps() -> None:
    """On an enumerable task with a transformer."""
    from bayes_klrl import problems

    posterior = problems.random_gpt2_task(4, vocab_size=4, max_new_tokens=3, hidden=16, layers=1, target_kl=1.0)
    truth = Truth(posterior)
    natural = bk.SVI(12, 256, optimizer="natural").fit(posterior, seed=0)
    adam = bk.SVI(12, 256).fit(posterior, seed=0)
    assert truth.kl(natural.guide)[0] < 0.05
    assert truth.kl(natural.guide)[0] < 0.3 * truth.kl(adam.guide)[0]
