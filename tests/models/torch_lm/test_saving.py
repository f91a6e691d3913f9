"""What is saved is what was fitted, and an adapter is loaded whole or not at all."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf
from safetensors.torch import load_file, save_file

import bayes_klrl as bk
from bayes_klrl.models.torch_lm.adapters import quiet_peft
from tests.helpers.tiny_models import seeded, tiny_gpt2, tiny_llama
from tests.models.torch_lm.architectures import tiny

VOCAB = 20


@pytest.fixture(autouse=True)
def seed() -> Any:
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie|Model with", category=UserWarning)  # peft, of tied weights
        torch.manual_seed(0)
        yield


def tied_qwen2() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    ids = {"eos_token_id": 0, "bos_token_id": 0, "tie_word_embeddings": True}
    return seeded(hf.Qwen2ForCausalLM, hf.Qwen2Config(vocab_size=VOCAB, num_key_value_heads=2, **sizes, **ids), 0)


def posterior_of(prior: bk.TorchLM) -> bk.Posterior:
    odd = bk.TokenReward(lambda tokens, lengths: (tokens % 2).mean(axis=1), alpha=0.3)
    return bk.Posterior(prior, odd, prompts=[[1, 2]], max_new_tokens=2)


def moved(lm: bk.TorchLM, scale: float = 0.3) -> bk.TorchLM:
    """Return the guide with its trainable parameters moved."""
    with torch.no_grad():
        for parameter in lm.parameters():
            parameter.add_(scale * torch.randn_like(parameter))
    return lm


def scores(lm: bk.TorchLM) -> np.ndarray:
    tokens = np.random.default_rng(1).integers(1, VOCAB, (1, 8, 4))
    with torch.no_grad():
        return np.asarray(lm.token_log_probs([[1, 2]], bk.Sequences(tokens, np.full((1, 8), 4))))


# --- models -----------------------------------------------------------------------------------------------------

TIED = [
    ("gpt2", ["lm_head"]),
    ("gpt2", ["wte"]),
    ("qwen2", ["lm_head"]),
    ("qwen2", ["embed_tokens"]),
    ("qwen2", ["embed_tokens", "lm_head", "q_proj"]),
]


@pytest.mark.slow
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("family,targets", TIED)
def test_lora_on_a_tied_layer_is_saved_as_it_was_fitted(
    family: str, targets: list[str], together: bool, tmp_path: Path
) -> None:
    """Merged into the shared matrix it changed the other layer, too: 0.01 to 0.27 nats in a certified KL."""
    prior = bk.TorchLM(tiny_gpt2(VOCAB) if family == "gpt2" else tied_qwen2())
    before = scores(prior)
    guide = moved(prior.with_adapter(peft.LoraConfig(r=4, target_modules=targets, ensure_weight_tying=together)))
    guide.save_pretrained(tmp_path)
    np.testing.assert_allclose(scores(bk.TorchLM.from_pretrained(tmp_path)), scores(guide), atol=2e-5)
    np.testing.assert_array_equal(scores(prior), before)
    np.testing.assert_allclose(scores(bk.TorchLM(guide.copy().module)), scores(guide), atol=2e-5)
    posterior = posterior_of(prior)
    of_guide, of_folder = (bk.certify(posterior, policy, seed=0).reverse_kl for policy in (guide, tmp_path))
    np.testing.assert_allclose(of_folder, of_guide, atol=3e-4)


@pytest.mark.slow
def test_a_fit_with_lora_on_the_head_survives_saving(tmp_path: Path) -> None:
    posterior = posterior_of(bk.TorchLM(tiny_gpt2(VOCAB)))
    svi = bk.SVI(num_steps=20, num_particles=16, adapter=peft.LoraConfig(r=4, target_modules=["lm_head"]))
    fit = svi.fit(posterior, seed=0)
    fit.save(tmp_path)
    of_guide, of_folder = (bk.certify(posterior, policy, seed=0).reverse_kl for policy in (fit, tmp_path))
    np.testing.assert_allclose(of_folder, of_guide, atol=3e-4)


def test_rwkv_is_saved_as_it_was_loaded(tmp_path: Path) -> None:
    """In evaluation mode it divides its weights, and divided them again after loading: 0.6 nats."""
    config = hf.RwkvConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, rescale_every=1, context_length=32)
    lm = bk.TorchLM(seeded(hf.RwkvForCausalLM, config, 0))
    before = scores(lm)
    lm.save_pretrained(tmp_path)
    np.testing.assert_allclose(scores(lm), before, atol=1e-6)
    np.testing.assert_allclose(scores(bk.TorchLM.from_pretrained(tmp_path)), before, atol=1e-5)


def test_a_folder_that_holds_another_model_is_an_error_and_keeps_the_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if merging had gone wrong: what was written is another model."""
    from bayes_klrl.models.torch_lm import checkpoint

    monkeypatch.setattr(checkpoint, "merged", lambda module: tiny_llama(VOCAB, seed=5))
    base = tiny_llama(VOCAB)
    guide = moved(bk.TorchLM(base).with_adapter(peft.LoraConfig(r=4, target_modules=["q_proj"])))
    with pytest.raises(bk.CheckpointError, match=r"differ by up to .* nats.*adapter"):
        guide.save_pretrained(tmp_path)
    with quiet_peft():
        again = bk.TorchLM(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    np.testing.assert_allclose(scores(again), scores(guide), atol=1e-6)


# --- adapters that cannot be merged ------------------------------------------------------------------------------

VIRTUAL = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "P-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "adaption prompt": lambda: peft.AdaptionPromptConfig(adapter_layers=1, adapter_len=3, task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_are_saved_as_an_adapter(kind: str, tmp_path: Path) -> None:
    tiny_llama(VOCAB).save_pretrained(tmp_path / "base")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with quiet_peft():
        policy = moved(bk.TorchLM(peft.get_peft_model(base, VIRTUAL[kind]())))
    policy.save_pretrained(tmp_path / "policy")
    np.testing.assert_allclose(scores(bk.TorchLM.from_pretrained(tmp_path / "policy")), scores(policy), atol=1e-5)
    posterior = posterior_of(bk.TorchLM.from_pretrained(tmp_path / "base"))
    of_policy, of_folder = (bk.certify(posterior, given, seed=0).reverse_kl for given in (policy, tmp_path / "policy"))
    np.testing.assert_allclose(of_folder, of_policy, atol=3e-4)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_an_adapter_without_a_base_is_refused_on_saving(kind: str, tmp_path: Path) -> None:
    with quiet_peft():
        policy = bk.TorchLM(peft.get_peft_model(tiny_llama(VOCAB), VIRTUAL[kind]()))
    with pytest.raises(bk.CheckpointError, match=r"does not say which model it belongs to.*module\.save_pretrained"):
        policy.save_pretrained(tmp_path)


def test_an_adapter_on_virtual_tokens_is_refused() -> None:
    with quiet_peft():
        prior = bk.TorchLM(peft.get_peft_model(tiny_llama(VOCAB), VIRTUAL["prompt tuning"]()))
    with pytest.raises(bk.BayesKLRLError, match="PromptTuningConfig cannot be added to the model's weights"):
        prior.with_adapter()


# --- adapter files that do not fit --------------------------------------------------------------------------------


def adapter_folder(tmp_path: Path, **options: Any) -> Path:
    """Write a base with two layers, and an adapter of it that names it; return the adapter's folder."""
    tiny_llama(VOCAB).save_pretrained(tmp_path / "base")
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", **options)
    with quiet_peft():
        policy = moved(bk.TorchLM(peft.get_peft_model(base, config)))
        policy.module.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def rewritten(folder: Path, change: Any) -> None:
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


def half(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensors[name] for name in sorted(tensors)[::2]}


def renamed(tensors: dict[str, Any]) -> dict[str, Any]:
    return {
        name.replace("base_model.model.", "base_model.model.language_model."): part for name, part in tensors.items()
    }


def deeper(tensors: dict[str, Any]) -> dict[str, Any]:
    more = {
        name.replace("layers.1.", "layers.2."): part.clone() for name, part in tensors.items() if "layers.1." in name
    }
    return tensors | more


@pytest.mark.parametrize("options", [{}, {"modules_to_save": ["lm_head"]}])
def test_a_whole_adapter_is_loaded(options: dict[str, Any], tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path, **options)
    policy = bk.TorchLM.from_pretrained(folder)
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with quiet_peft():
        expected = scores(bk.TorchLM(peft.PeftModel.from_pretrained(base, folder)))
    np.testing.assert_array_equal(scores(policy), expected)
    assert np.abs(expected - scores(bk.TorchLM.from_pretrained(tmp_path / "base"))).max() > 0.1


@pytest.mark.parametrize(
    "change,message",
    [
        (half, r"the file lacks 4 tensor\(s\) \(.*lora_B.*, .*, .*\)"),
        (renamed, r"the file lacks 8 tensor\(s\) .*the model has no place for 8 tensor\(s\) \(.*language_model"),
        (deeper, r"the model has no place for 4 tensor\(s\) \(.*layers\.2\."),
    ],
)
@pytest.mark.parametrize("way", ["from_pretrained", "certify"])
@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_tensors_that_do_not_fit_are_named(change: Any, message: str, way: str, tmp_path: Path) -> None:
    """They used to load with a library's warning at most, and the certificate was 0.2 to 3.4 nats off."""
    folder = adapter_folder(tmp_path)
    rewritten(folder, change)
    posterior = posterior_of(bk.TorchLM.from_pretrained(tmp_path / "base"))
    use = {"from_pretrained": bk.TorchLM.from_pretrained, "certify": lambda given: bk.certify(posterior, given, seed=0)}
    with pytest.raises(bk.CheckpointError, match=message):
        use[way](folder)


@pytest.mark.filterwarnings("ignore:Found missing adapter keys")
def test_a_head_that_was_trained_must_be_in_the_file(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path, modules_to_save=["lm_head"])
    rewritten(folder, lambda tensors: {name: part for name, part in tensors.items() if "lm_head" not in name})
    with pytest.raises(bk.CheckpointError, match=r"the file lacks 1 tensor\(s\) \(.*lm_head"):
        bk.TorchLM.from_pretrained(folder)


def test_an_adapter_of_nan_is_refused(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path)
    rewritten(folder, lambda tensors: {name: part * np.nan for name, part in tensors.items()})
    with pytest.raises(bk.CheckpointError, match=r"lora_A.* holds NaN"):
        bk.TorchLM.from_pretrained(folder)


@pytest.mark.parametrize("other", ["adapter_model.bin", None])
def test_an_adapter_without_safetensors_is_refused(other: str | None, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    if other is not None:
        torch.save({}, folder / other)
    with pytest.raises(bk.CheckpointError, match=r"no adapter_model\.safetensors"):
        bk.TorchLM.from_pretrained(folder)


def test_the_revision_of_an_adapter_reaches_its_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from bayes_klrl.models.torch_lm import checkpoint

    folder = adapter_folder(tmp_path)
    config_file = folder / "adapter_config.json"
    named = json.loads(config_file.read_text()) | {"base_model_name_or_path": "somebody/base", "revision": "v2"}
    config_file.write_text(json.dumps(named))
    asked: list[Any] = []

    def load_model(source: str, dtype: torch.dtype, **options: Any) -> Any:
        asked.append((source, options))
        return tiny_llama(VOCAB), None

    monkeypatch.setattr(checkpoint, "load_model", load_model)
    bk.TorchLM.from_pretrained(folder)
    assert asked == [("somebody/base", {"revision": "v2"})]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name,targets",
    [
        ("t5", ["q", "v"]),
        ("t5", ["lm_head"]),
        ("bart", ["lm_head"]),
        ("bart", ["embed_tokens"]),
        ("m2m_100", ["q_proj", "lm_head"]),
        ("t5gemma", ["q_proj"]),
        ("t5gemma", ["embed_tokens"]),
    ],
)
def test_lora_on_an_encoder_decoder_is_saved_as_it_was_fitted(name: str, targets: list[str], tmp_path: Path) -> None:
    prior = bk.TorchLM(tiny(name, seq2seq=True))
    guide = moved(prior.with_adapter(peft.LoraConfig(r=4, target_modules=targets, task_type="SEQ_2_SEQ_LM")), 0.1)
    assert np.abs(scores(guide) - scores(prior)).max() > 0.01
    guide.save_pretrained(tmp_path)
    np.testing.assert_allclose(scores(bk.TorchLM.from_pretrained(tmp_path)), scores(guide), atol=2e-5)


# --- the prior stays as it is ------------------------------------------------------------------------------------

WRITING = {
    "biases": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], bias="all"),
    "biases of LoRA layers": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], bias="lora_only"),
    "OLoRA": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="olora"),
    "PiSSA": lambda: peft.LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights="pissa"),
    "AdaLoRA with biases": lambda: peft.AdaLoraConfig(target_modules=["q_proj"], total_step=10, bias="all"),
}


@pytest.mark.parametrize("kind", WRITING)
def test_an_adapter_never_changes_the_prior(kind: str, tmp_path: Path) -> None:
    """Trained biases are the base's own: fits used to train the prior, and log Z moved from 0.73 to 1.62."""
    prior = bk.TorchLM(tied_qwen2())
    for name, parameter in prior.module.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    before = {name: parameter.clone() for name, parameter in prior.module.named_parameters()}

    def unchanged() -> bool:
        return all(torch.equal(parameter, before[name]) for name, parameter in prior.module.named_parameters())

    guide = moved(prior.with_adapter(WRITING[kind]()))
    assert unchanged()
    bk.SVI(3, 8, adapter=WRITING[kind]()).fit(posterior_of(prior), seed=0)
    assert unchanged()
    with quiet_peft():
        guide.module.save_pretrained(tmp_path)
    bk.certify(posterior_of(prior), tmp_path, seed=0)  # it names no base, and is put on the prior
    assert unchanged()


def test_a_model_and_an_adapter_in_one_folder_are_refused(tmp_path: Path) -> None:
    """transformers adds the adapter to weights in which it is merged already: 2.05 nats for 1.42."""
    folder = adapter_folder(tmp_path)
    policy = bk.TorchLM.from_pretrained(folder)
    with pytest.raises(bk.CheckpointError, match="holds an adapter, and would then hold a model beside it"):
        policy.save_pretrained(folder)
    policy.module.merge_and_unload().save_pretrained(folder)
    with pytest.raises(bk.CheckpointError, match="holds both the weights of a model and an adapter"):
        bk.TorchLM.from_pretrained(folder)


@pytest.mark.parametrize("content", ["{", "[]"])
def test_broken_adapter_configurations_are_refused(content: str, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path)
    (folder / "adapter_config.json").write_text(content)
    with pytest.raises(bk.CheckpointError, match=r"adapter_config\.json"):
        bk.TorchLM.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["WHATEVER", None])
def test_a_kind_of_adapter_that_peft_does_not_know_is_named(kind: str | None, tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path)
    file = folder / "adapter_config.json"
    content = json.loads(file.read_text()) | {"peft_type": kind}
    file.write_text(json.dumps({name: value for name, value in content.items() if value is not None}))
    with pytest.raises(bk.CheckpointError, match=rf"has peft_type {kind!r}, which is no kind of adapter"):
        bk.TorchLM.from_pretrained(folder)


def test_an_adapter_that_is_its_own_base_is_refused(tmp_path: Path) -> None:
    folder = adapter_folder(tmp_path)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(folder)}))
    with pytest.raises(bk.CheckpointError, match="names its own folder"):
        bk.TorchLM.from_pretrained(folder)


def test_a_generation_configuration_that_transformers_finds_invalid_is_no_obstacle(tmp_path: Path) -> None:
    model = tiny_llama(VOCAB)
    model.generation_config.temperature, model.generation_config.do_sample = 0.3, False
    bk.TorchLM(model).save_pretrained(tmp_path)
    assert model.generation_config.temperature == 0.3
    assert bk.TorchLM.from_pretrained(tmp_path).temperature == 1.0


def test_half_precision_that_diverges_stops_the_training() -> None:
    posterior = posterior_of(bk.TorchLM(tiny_llama(VOCAB).half()))
    with pytest.raises(bk.BayesKLRLError, match=r"no longer finite.*float32"):
        bk.SVI(12, 16, learning_rate=10.0, max_step_kl=np.inf).fit(posterior, seed=0)


@pytest.mark.slow
def test_an_adapter_of_a_tied_head_says_what_merging_would_do(tmp_path: Path) -> None:
    """It is read here and merged by us as it was trained; the embedding is not in its files."""
    tiny_gpt2(VOCAB).save_pretrained(tmp_path / "base")
    prior = bk.TorchLM.from_pretrained(tmp_path / "base")
    fit = bk.SVI(10, 16, adapter="lora").fit(posterior_of(prior), seed=0)
    for save in (
        lambda: fit.save(tmp_path / "adapter", merged=False),
        lambda: fit.guide.save_adapter(tmp_path / "again"),
    ):
        with pytest.warns(UserWarning, match="head and embedding are one matrix") as warned:
            save()
        assert [each.filename for each in warned] == [__file__]  # the user's own line, and none of ours
    names = list(load_file(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert any("lm_head" in name for name in names)
    assert all("lora" in name for name in names)
    fit.save(tmp_path / "merged")
    assert np.abs(scores(fit.guide) - scores(prior)).max() > 1e-3
    for folder in ("adapter", "merged"):
        np.testing.assert_allclose(scores(bk.TorchLM.from_pretrained(tmp_path / folder)), scores(fit.guide), atol=1e-5)


@pytest.mark.slow
def test_an_adapter_may_stay_an_adapter(tmp_path: Path) -> None:
    """The folder loads in peft and here, and is a few files."""
    tiny_llama(VOCAB).save_pretrained(tmp_path / "base")
    posterior = posterior_of(bk.TorchLM.from_pretrained(tmp_path / "base"))
    fit = bk.SVI(10, 16, adapter="lora").fit(posterior, seed=0)
    fit.save(tmp_path / "adapter", merged=False)
    assert not (tmp_path / "adapter" / "config.json").exists()
    np.testing.assert_allclose(scores(bk.TorchLM.from_pretrained(tmp_path / "adapter")), scores(fit.guide), atol=1e-5)
    base = hf.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    with quiet_peft():
        again = bk.TorchLM(peft.PeftModel.from_pretrained(base, tmp_path / "adapter"))
    np.testing.assert_allclose(scores(again), scores(fit.guide), atol=1e-5)
    with pytest.raises(bk.CheckpointError, match="holds a whole model"):
        fit.save(tmp_path / "base", merged=False)
    assert not (tmp_path / "base" / "adapter_config.json").exists()
    with pytest.raises(bk.CheckpointError, match="no adapter"):
        bk.SVI(1, 4).fit(posterior, seed=0).save(tmp_path / "other", merged=False)
    unnamed = bk.SVI(1, 4, adapter="lora").fit(posterior_of(bk.TorchLM(tiny_llama(VOCAB))), seed=0)
    with pytest.raises(bk.CheckpointError, match="does not say which model"):
        unnamed.save(tmp_path / "third", merged=False)
