"""Every kind of adapter that peft has: read as peft reads it, saved as it was fitted, or refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.posterior import completion_log_probs
from tests.helpers.tiny_models import tiny_llama
from tests.models.torch_lm.test_self_check import by_prefixes, scored

VOCAB = 20
PROMPT, COMPLETION = [1, 2, 3], [4, 5, 6, 0, 7]
BOTH: dict[str, Any] = {"target_modules": ["q_proj", "v_proj"]}
ONE: dict[str, Any] = {"target_modules": ["q_proj"]}
KINDS = {
    "LoRA": lambda: peft.LoraConfig(r=4, **BOTH),
    "DoRA": lambda: peft.LoraConfig(r=4, use_dora=True, **BOTH),
    "LoRA with biases": lambda: peft.LoraConfig(r=4, bias="all", **BOTH),
    "PiSSA": lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", **BOTH),
    "OLoRA": lambda: peft.LoraConfig(r=4, init_lora_weights="olora", **BOTH),
    "LoRA and the head": lambda: peft.LoraConfig(r=4, modules_to_save=["lm_head"], **BOTH),
    "LoRA and the embedding": lambda: peft.LoraConfig(r=4, modules_to_save=["embed_tokens"], **BOTH),
    "LoRA and new tokens": lambda: peft.LoraConfig(r=4, trainable_token_indices=[3, 4], **BOTH),
    "LoRA on a parameter": lambda: peft.LoraConfig(r=4, target_modules=[], target_parameters=["q_proj.weight"]),
    "AdaLoRA": lambda: peft.AdaLoraConfig(total_step=10, **BOTH),
    "IA3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "LoHa": lambda: peft.LoHaConfig(r=4, **BOTH),
    "LoKr": lambda: peft.LoKrConfig(r=4, **BOTH),
    "OFT": lambda: peft.OFTConfig(r=0, oft_block_size=4, **BOTH),
    "BOFT": lambda: peft.BOFTConfig(boft_block_size=4, **BOTH),
    "VeRA": lambda: peft.VeraConfig(r=4, **ONE),
    "HRA": lambda: peft.HRAConfig(r=4, **BOTH),
    "layer norms": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"]),
    "trainable tokens": lambda: peft.TrainableTokensConfig(token_indices=[3, 4], target_modules=["embed_tokens"]),
    "RoAd": lambda: peft.RoadConfig(group_size=8, **BOTH),
    "RandLoRA": lambda: peft.RandLoraConfig(r=2, **ONE),
    "MiSS": lambda: peft.MissConfig(r=4, **BOTH),
    "SHiRA": lambda: peft.ShiraConfig(r=2, **BOTH),
}
REFUSED = {
    "repeated layers": (
        lambda: peft.LoraConfig(r=4, layer_replication=[(0, 2), (0, 2)], **BOTH),
        "before it is trained",
    ),
    "FourierFT": (lambda: peft.FourierFTConfig(n_frequency=8, **BOTH), "before it is trained"),
    "VB-LoRA": (lambda: peft.VBLoRAConfig(r=2, num_vectors=8, vector_length=4, topk=2, **ONE), "before it is trained"),
    "C3A": (lambda: peft.C3AConfig(block_size=4, **BOTH), "before it is trained"),
    "activated LoRA": (
        lambda: peft.LoraConfig(r=4, alora_invocation_tokens=[3], task_type="CAUSAL_LM", **BOTH),
        "alora_invocation_tokens",
    ),
    "X-LoRA": (lambda: peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=16, adapters={}), "peft cannot put"),
    "a mixture of tasks": (
        lambda: peft.PolyConfig(task_type="CAUSAL_LM", r=4, n_tasks=1, n_skills=1, n_splits=1, **BOTH),
        "token ids alone",
    ),
}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and transformers on tied weights and names that change
        torch.manual_seed(0)
        yield


@pytest.mark.parametrize("tied", [pytest.param(False, marks=pytest.mark.slow), True], ids=["untied", "tied"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_adapter_is_read_and_saved_as_peft_has_it(kind: str, tied: bool, tmp_path: Path) -> None:
    prior = bk.TorchLM(tiny_llama(VOCAB, tie_word_embeddings=tied))
    before = scored(prior, PROMPT, COMPLETION)
    guide = prior.with_adapter(KINDS[kind]())
    np.testing.assert_allclose(scored(guide, PROMPT, COMPLETION), before, atol=2e-5)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    own = by_prefixes(guide.module, PROMPT, COMPLETION)
    assert np.abs(own - before).max() > 3e-3
    np.testing.assert_allclose(scored(guide, PROMPT, COMPLETION), own, atol=2e-5)
    longer = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    posterior = bk.Posterior(prior, longer, prompts=[PROMPT], max_new_tokens=3)
    draws = bk.ImportanceSampling(16, proposal=guide).run(posterior, seed=0)
    again = completion_log_probs(guide, posterior.prompt_ids, posterior.sequences(draws))
    np.testing.assert_allclose(draws.log_proposal, again, atol=5e-5)
    guide.save_pretrained(tmp_path)
    np.testing.assert_allclose(scored(bk.TorchLM.from_pretrained(tmp_path), PROMPT, COMPLETION), own, atol=5e-5)
    np.testing.assert_array_equal(scored(prior, PROMPT, COMPLETION), before)


@pytest.mark.parametrize("kind", REFUSED)
def test_an_adapter_that_cannot_be_a_guide_is_refused(kind: str) -> None:
    config, message = REFUSED[kind]
    with pytest.raises(bk.BayesKLRLError, match=message):
        bk.TorchLM(tiny_llama(VOCAB)).with_adapter(config())


def test_a_policy_with_two_adapters_is_what_is_active() -> None:
    """The sum of both where both are active, one where one is."""
    wrapped = peft.get_peft_model(
        tiny_llama(VOCAB), peft.LoraConfig(r=2, init_lora_weights=False, **BOTH), adapter_name="a"
    )
    wrapped.add_adapter("b", peft.LoraConfig(r=2, init_lora_weights=False, **ONE))
    found = {}
    for active in ("a", "b", ["a", "b"]):
        wrapped.base_model.set_adapter(active)
        found[str(active)] = scored(bk.TorchLM(wrapped), PROMPT, COMPLETION)
        np.testing.assert_allclose(found[str(active)], by_prefixes(wrapped, PROMPT, COMPLETION), atol=2e-5)
    assert len({tuple(each.round(3)) for each in found.values()}) == 3
