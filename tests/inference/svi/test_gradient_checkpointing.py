"""Gradient checkpointing: the same gradient from fewer stored numbers, and no trace of it on the guide."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.models.torch_lm.general import blocks
from bayes_klrl.models.torch_lm.tight import TightNetwork
from tests.helpers.backends import prior_on
from tests.helpers.tiny_models import tiny_gpt2, tiny_llama, tiny_other, tiny_t5
from tests.models.torch_lm.architectures import tiny

COIN = bk.NgramLM(np.log([0.5, 0.3, 0.2]), eos_token_id=2)
PROMPTS = [[0, 1], [1, 2, 3]]  # of two lengths, so that there is padding


def guide_of(name: str) -> bk.TorchLM:
    """Every parameter is trained, or a LoRA adapter."""
    if name.startswith("lora on "):
        return guide_of(name.removeprefix("lora on ")).with_adapter()
    own: dict[str, Any] = {"gpt2": tiny_gpt2, "llama": tiny_llama, "t5": tiny_t5}
    if name in own:
        return bk.TorchLM(own[name](6)).copy()
    others = tiny(name) if name in ("mixtral", "switch_transformers") else tiny_other(name, 6)
    return bk.TorchLM(others, check=False).copy()


def completions(lm: Any, num_draws: int = 6, num_tokens: int = 5) -> bk.Sequences:
    tokens = np.random.default_rng(0).integers(0, lm.vocab_size, (len(PROMPTS), num_draws, num_tokens))
    lengths = np.random.default_rng(1).integers(1, num_tokens + 1, tokens.shape[:2])
    return bk.Sequences(tokens, lengths)


def gradient(lm: bk.TorchLM, *, recompute: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor], int]:
    """Scores, the gradient of a weighted sum of them, and the bytes that are stored for the backward pass."""
    stored = 0

    def kept(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal stored
        stored += tensor.numel() * tensor.element_size()
        return tensor

    lm.module.zero_grad(set_to_none=True)
    with torch.autograd.graph.saved_tensors_hooks(kept, lambda tensor: tensor):
        with lm.recomputing() if recompute else nullcontext():
            scores = lm.token_log_probs(PROMPTS, completions(lm))
        weights = torch.linspace(-1, 1, scores.numel()).view(scores.shape)
        loss = (weights * scores).sum()
    loss.backward()  # outside: the backward pass may come later
    found = {name: p.grad.clone() for name, p in lm.module.named_parameters() if p.grad is not None}
    return scores.detach(), found, stored


@pytest.mark.parametrize(
    "name", ["gpt2", "llama", "lora on gpt2", "lora on gpt_neox", "mamba", "mixtral", "t5", "switch_transformers"]
)
def test_the_gradient_is_the_same(name: str) -> None:
    """The tight forward, a general one, an adapter, a recurrent model, experts, encoders and decoders."""
    lm = guide_of(name)
    scores, plain, stored = gradient(lm, recompute=False)
    again, recomputed, less = gradient(lm, recompute=True)
    np.testing.assert_allclose(again, scores, atol=1e-6)
    assert plain
    assert plain.keys() == recomputed.keys()
    largest = max(float(each.abs().max()) for each in plain.values())
    for key, value in plain.items():
        np.testing.assert_allclose(recomputed[key], value, atol=1e-5 * largest, err_msg=key)
    # a decoder of "switch_transformers" gets a cache, so only its encoder is computed again
    assert less < (0.9 if name == "switch_transformers" else 0.6) * stored, (less, stored)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_chunks_of_rows_may_be_recomputed_too(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from bayes_klrl.models.torch_lm import scoring

    lm = guide_of(name)
    _, plain, _ = gradient(lm, recompute=False)
    monkeypatch.setattr(scoring, "BUDGET", 3 * 5 * max(lm._ready_network().width, 1))
    _, recomputed, _ = gradient(lm, recompute=True)
    largest = max(float(each.abs().max()) for each in plain.values())
    for key, value in plain.items():
        np.testing.assert_allclose(recomputed[key], value, atol=1e-5 * largest)


@pytest.mark.parametrize("name", ["gpt2", "opt"])
def test_what_needs_no_gradient_is_not_touched(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = guide_of(name)

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(blocks, "checkpoint", refuse)
    with lm.recomputing():
        state = lm.append(lm.prefill(PROMPTS), np.array([1, 2]))
        lm.next_log_probs(state)
        with torch.no_grad():
            lm.token_log_probs(PROMPTS, completions(lm))
        with pytest.raises(AssertionError, match="computed again"):
            lm.token_log_probs(PROMPTS, completions(lm))
    assert all("forward" not in vars(part) for part in lm.module.modules())
    lm.token_log_probs(PROMPTS, completions(lm))


def test_a_forward_of_ones_own_is_put_back() -> None:
    lm = guide_of("opt")
    (first, *_) = blocks.blocks_of(lm.module)
    calls: list[int] = []
    original = first.forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return original(*args, **kwargs)

    first.forward = counted
    lm._ready_network()
    calls.clear()
    gradient(lm, recompute=True)
    assert first.forward is counted
    assert len(calls) == 2  # forward, and once more


# --- trainings ------------------------------------------------------------------------------------------------------


def posterior(lm: Any) -> bk.Posterior:
    reward = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1) * 1.0, alpha=0.7)
    return bk.Posterior(lm, reward, prompts=[[0], [1]], max_new_tokens=4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"adapter": "lora"},
        {"estimator": "rao_blackwell"},
        {"particles_per_pass": 3},
        {"optimizer": "kl_sgd", "twist": bk.PartialRewardTwist()},
        {"objective": "js", "prompts_per_step": 1},
    ],
    ids=str,
)
def test_a_training_is_the_same(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    target, calls = posterior(bk.TorchLM(tiny_gpt2(6))), 0
    original = blocks.checkpoint

    def counted(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return original(*args, **kwargs)

    monkeypatch.setattr(blocks, "checkpoint", counted)
    plain = bk.SVI(3, 6, **options).fit(target, seed=0)
    assert calls == 0
    saving = bk.SVI(3, 6, gradient_checkpointing=True, **options).fit(target, seed=0)
    assert calls >= 3 * 2  # steps times layers, at least
    for name in ("elbo", "reward", "log_weight_sd", "gradient_norm"):
        np.testing.assert_allclose(saving.history[name], plain.history[name], rtol=1e-4, err_msg=name)


@pytest.mark.parametrize("name,network", [("gpt2", "TightNetwork"), ("gpt_neox", "CachedNetwork")])
def test_the_guide_carries_no_trace_of_it(name: str, network: str, tmp_path: Any) -> None:
    target = posterior(bk.TorchLM(guide_of(name).module))

    def look(record: bk.StepRecord, guide: Any) -> None:
        assert all("forward" not in vars(part) for part in guide.module.modules())

    guide: Any = bk.SVI(2, 6, gradient_checkpointing=True).fit(target, seed=0, callbacks=[look]).guide
    for module in (guide.module, copy.deepcopy(guide).module, pickle.loads(pickle.dumps(guide.module))):  # noqa: S301
        assert all("forward" not in vars(part) for part in module.modules())
    assert type(guide._ready_network()).__name__ == network
    if isinstance(guide._ready_network(), TightNetwork):
        assert not guide._scoring_network().recompute
    guide.save_pretrained(tmp_path)
    sequences = completions(guide)
    with torch.no_grad():
        own, loaded = (
            lm.token_log_probs(PROMPTS, sequences) for lm in (guide, bk.TorchLM.from_pretrained(tmp_path, check=False))
        )
    np.testing.assert_allclose(own, loaded, atol=1e-5)


def test_models_without_blocks_are_refused() -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"gradient_checkpointing .* NgramLM .* particles_per_pass"):
        bk.SVI(2, 4, gradient_checkpointing=True).fit(posterior(COIN), seed=0)
    lm = bk.TorchLM(tiny_other("opt", 6), check=False)
    for part in list(lm.module.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, torch.nn.ModuleList):
                setattr(part, name, torch.nn.Sequential(*child))  # no list any more
    with pytest.raises(bk.BayesKLRLError, match=r"gradient_checkpointing .* OPTForCausalLM"):
        bk.SVI(2, 4, gradient_checkpointing=True).fit(posterior(lm), seed=0)


def test_a_model_whose_blocks_all_get_a_cache_is_refused() -> None:
    lm = bk.TorchLM(tiny("granitemoehybrid"), check=False)
    with pytest.raises(bk.BayesKLRLError, match=r"without a cache; in a GraniteMoeHybridForCausalLM there are none"):
        bk.SVI(2, 4, gradient_checkpointing=True).fit(posterior(lm), seed=0)


def test_jax_and_the_natural_gradient_are_refused() -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"SVI\(gradient_checkpointing=.*on torch"):
        bk.SVI(2, 4, gradient_checkpointing=True).fit(posterior(prior_on("jax", COIN)), seed=0)
    with pytest.raises(bk.BayesKLRLError, match="gradient_checkpointing"):
        bk.SVI(2, 4, optimizer="natural", gradient_checkpointing=True)
    with pytest.raises(bk.BayesKLRLError, match="True or False; got 1"):
        bk.SVI(2, 4, gradient_checkpointing=1)  # type: ignore[arg-type]


# --- memory ---------------------------------------------------------------------------------------------------------

PEAK = """
    import contextlib, re
    from pathlib import Path
    import numpy as np, transformers as hf, bayes_klrl as bk
    sizes = dict(vocab_size=300, num_hidden_layers=12, num_attention_heads=4, hidden_size=128, intermediate_size=344)
    model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, bos_token_id=0, eos_token_id=0))
    lm = bk.TorchLM(model, check=False).copy()
    sequences = bk.Sequences(np.random.default_rng(0).integers(1, 300, (1, 12, 96)), np.full((1, 12), 96))
    few = bk.Sequences(sequences.tokens[:, :1], sequences.lengths[:, :1])
    lm.token_log_probs([[1, 2, 3]], few).sum().backward()
    def peak():  # of this process alone; ru_maxrss begins with that of the parent
        return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    before = peak()
    for recompute in (True, False):  # what should have the lower peak comes first, as a peak never falls
        with lm.recomputing() if recompute else contextlib.nullcontext():
            scores = lm.token_log_probs([[1, 2, 3]], sequences)
        scores.sum().backward()
        print(peak() - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_the_peak_of_memory_is_lower() -> None:
    """Twelve layers, in a process of their own."""
    run = subprocess.run([sys.executable, "-c", textwrap.dedent(PEAK)], capture_output=True, text=True, check=True)
    recomputed, plain = map(int, run.stdout.split()[-2:])
    assert recomputed < 0.6 * plain, (recomputed, plain)
