"""Folders as trainers leave them, made without the trainers: what is in them is the policy, to the last digit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.inference.policies import as_policy
from bayes_klrl.models.torch_lm.adapters import merged, quiet_peft
from bayes_klrl.posterior import completion_log_probs
from tests.helpers.tiny_models import tiny_gpt2, tiny_tokenizer

PRIOR = bk.TorchLM(tiny_gpt2(), tiny_tokenizer(), temperature=0.8)
POSTERIOR = bk.Posterior(
    PRIOR, bk.TokenReward(lambda tokens, lengths: 0.5 * lengths, alpha=0.5), prompts=["a b", "c"], max_new_tokens=3
)
OUTCOMES = bk.Exact().run(POSTERIOR, seed=0).sequences


def log_probs(lm: bk.LanguageModel) -> np.ndarray:
    return completion_log_probs(lm, POSTERIOR.prompt_ids, OUTCOMES)


def in_memory(module: torch.nn.Module) -> bk.TorchLM:
    """A model as its trainer had it, asked the question of the prior."""
    return bk.TorchLM(module, eos_token_id=PRIOR.eos_token_ids, temperature=PRIOR.temperature)


def leave_checkpoint(folder: Path, module: Any, tokenizer: Any, state: dict[str, Any] | None = None) -> None:
    """What `transformers.Trainer` writes into a checkpoint: configs changed for training, and files of its own."""
    module.config.use_cache = False
    module.config.pad_token_id = tokenizer.pad_token_id
    module.generation_config.update(pad_token_id=tokenizer.pad_token_id, eos_token_id=[0, 3], do_sample=True, top_k=2)
    module.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin"):
        (folder / name).write_bytes(b"a pickle that is never read")
    (folder / "trainer_state.json").write_text(json.dumps(state or {"global_step": 9}))


def padded_tokenizer() -> Any:
    """The prior's tokenizer with a padding token of its own, past the model's last logit."""
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "<pad>"})
    assert tokenizer.pad_token_id == PRIOR.vocab_size
    return tokenizer


def adapter_config() -> peft.LoraConfig:
    """A LoRA adapter that is not the identity."""
    return peft.LoraConfig(
        r=2, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False, fan_in_fan_out=True
    )


def tuned_adapter(base: torch.nn.Module, seed: int = 3) -> Any:
    with torch.random.fork_rng(), quiet_peft():
        torch.manual_seed(seed)
        return peft.get_peft_model(base, adapter_config()).eval()


def test_the_last_checkpoint_is_the_policy(tmp_path: Path) -> None:
    """Of 9 and 10, ten is the last, whatever sorts first; a model at the root comes before all of them."""
    trained = {number: tiny_gpt2(seed=number) for number in (8, 9, 10)}
    for number in (9, 10):
        leave_checkpoint(tmp_path / f"checkpoint-{number}", trained[number], padded_tokenizer())
    (tmp_path / "README.md").write_text("# Model card")
    (tmp_path / "checkpoint-best").mkdir()
    assert np.allclose(log_probs(as_policy(tmp_path, POSTERIOR)), log_probs(in_memory(trained[10])), atol=1e-6)
    leave_checkpoint(tmp_path, trained[8], padded_tokenizer())
    assert np.allclose(log_probs(as_policy(tmp_path, POSTERIOR)), log_probs(in_memory(trained[8])), atol=1e-6)


def test_a_checkpoint_that_is_not_complete_is_named(tmp_path: Path) -> None:
    """Not passed over for the one before it: that is another policy."""
    leave_checkpoint(tmp_path / "checkpoint-9", tiny_gpt2(seed=9), tiny_tokenizer())
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(bk.CheckpointError, match=r"checkpoint-10.*is no model"):
        as_policy(tmp_path, POSTERIOR)


@pytest.mark.parametrize("names_base", [True, False])
@pytest.mark.parametrize("with_config", [True, False])
def test_an_adapter_finds_its_base(names_base: bool, with_config: bool, tmp_path: Path) -> None:
    """By the path in it, or, where a model was trained from memory and there is none, the prior, which stays as it was."""
    before = log_probs(PRIOR)
    PRIOR.save_pretrained(tmp_path / "prior")
    trained = tuned_adapter(tiny_gpt2())
    trained.peft_config["default"].base_model_name_or_path = str(tmp_path / "prior") if names_base else None
    folder = tmp_path / "out" / "checkpoint-10"
    leave_checkpoint(folder, trained, padded_tokenizer())
    assert not (folder / "config.json").exists()
    if with_config:
        shutil.copy(tmp_path / "prior" / "config.json", folder)
    expected = log_probs(in_memory(trained))
    assert np.abs(expected - before).max() > 0.1
    assert np.allclose(log_probs(as_policy(tmp_path / "out", POSTERIOR)), expected, atol=1e-5)
    assert np.array_equal(log_probs(PRIOR), before)


def test_an_adapter_on_a_prior_that_has_one_of_its_own(tmp_path: Path) -> None:
    """The base is what the prior computes."""
    module = tuned_adapter(tiny_gpt2(), seed=1)
    prior = bk.TorchLM(module, PRIOR.tokenizer, eos_token_id=PRIOR.eos_token_ids, temperature=PRIOR.temperature)
    before = log_probs(prior)
    assert np.abs(before - log_probs(PRIOR)).max() > 0.1
    trained = tuned_adapter(merged(prior.module))
    trained.save_pretrained(tmp_path)
    posterior = bk.Posterior(prior, POSTERIOR.likelihood, prompts=["a b", "c"], max_new_tokens=3)
    assert np.allclose(log_probs(as_policy(tmp_path, posterior)), log_probs(in_memory(trained)), atol=1e-5)
    assert np.array_equal(log_probs(prior), before)


def test_an_adapter_whose_base_has_moved_says_so(tmp_path: Path) -> None:
    PRIOR.save_pretrained(tmp_path / "old")
    trained = tuned_adapter(tiny_gpt2())
    trained.peft_config["default"].base_model_name_or_path = str(tmp_path / "old")
    trained.save_pretrained(tmp_path / "adapter")
    (tmp_path / "old").rename(tmp_path / "new")
    with pytest.raises(bk.CheckpointError, match=r"belongs to the model '.*old'.*PeftModel\.from_pretrained"):
        as_policy(tmp_path / "adapter", POSTERIOR)


def test_a_padding_token_on_a_logit_that_was_spare_is_no_conflict(tmp_path: Path) -> None:
    """Models have more logits than their tokenizers have tokens; only the policy's tokenizer has a name for this one."""
    prior = bk.TorchLM(tiny_gpt2(vocab_size=7), tiny_tokenizer())
    posterior = bk.Posterior(prior, POSTERIOR.likelihood, prompts="a b", max_new_tokens=2)
    trained = tiny_gpt2(vocab_size=7, seed=4)
    leave_checkpoint(tmp_path, trained, padded_tokenizer())
    sequences = bk.Exact().run(posterior, seed=0).sequences
    found, expected = (
        completion_log_probs(lm, posterior.prompt_ids, sequences)
        for lm in (as_policy(tmp_path, posterior), bk.TorchLM(trained, eos_token_id=0))
    )
    assert np.allclose(found, expected, atol=1e-6)


def test_a_model_with_a_row_for_its_padding_token_is_another_distribution(tmp_path: Path) -> None:
    """It can draw what the prior cannot: refused, with the cure, rather than infinitely far."""
    resized = tiny_gpt2(vocab_size=PRIOR.vocab_size + 1)
    leave_checkpoint(tmp_path, resized, padded_tokenizer())
    with pytest.raises(bk.CheckpointError, match="If tokens were added for the tuning"):
        as_policy(tmp_path, POSTERIOR)


def test_a_tokenizer_in_another_order_is_refused(tmp_path: Path) -> None:
    leave_checkpoint(tmp_path, tiny_gpt2(), tiny_tokenizer())
    file = tmp_path / "tokenizer.json"
    file.write_text(file.read_text().replace('"a"', '"swap"').replace('"b"', '"a"').replace('"swap"', '"b"'))
    with pytest.raises(bk.CheckpointError, match="id 1 stands for 'b' in the one and 'a' in the other"):
        as_policy(tmp_path, POSTERIOR)


def test_what_a_folder_says_about_sampling_is_not_what_it_is_asked(tmp_path: Path) -> None:
    """Temperature and EOS ids are the prior's: `generation_config.json` has others. Certified, it is what enumeration says."""
    trained = tiny_gpt2(seed=10)
    leave_checkpoint(tmp_path / "checkpoint-10", trained, padded_tokenizer())
    policy = as_policy(str(tmp_path), POSTERIOR)
    assert policy.eos_token_ids == PRIOR.eos_token_ids
    log_q, log_joint = log_probs(policy), POSTERIOR.log_joint(OUTCOMES)
    assert np.allclose(np.exp(log_q).sum(axis=1), 1, atol=1e-5)
    log_posterior = log_joint - np.log(np.exp(log_joint).sum(axis=1, keepdims=True))
    truth = (np.exp(log_q) * (log_q - log_posterior)).sum(axis=1)
    for options in ({}, {"sampling_only": True}):
        interval = bk.certify(POSTERIOR, tmp_path, seed=0, **options).reverse_kl  # type: ignore[arg-type]
        assert ((interval[:, 0] <= truth) & (truth <= interval[:, 1])).all()
