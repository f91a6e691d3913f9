"""Guides, adapters, folders, texts and refusals of TorchLM."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from transformers.activations import NewGELUActivation

from bayes_klrl.errors import BayesKLRLError, CheckpointError, MissingPackageError
from bayes_klrl.models.torch_lm.lm import TorchLM
from bayes_klrl.models.torch_lm.tight import TightNetwork
from bayes_klrl.models.torch_lm.tight.activation import tanh_gelu
from bayes_klrl.sequences import Sequences
from tests.helpers.tiny_models import tiny_gpt2, tiny_other, tiny_t5, tiny_tokenizer
from tests.models.torch_lm.test_lm import (
    MODELS,
    PROMPTS,
    close,
    decoded,
    random_completions,
    reference_scores,
    scored,
)


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=MODELS)
def lm(request: pytest.FixtureRequest) -> TorchLM:
    return TorchLM(MODELS[request.param]())


@pytest.fixture(params=["gpt2, pad is eos", "llama, pad is not eos"])
def tight_lm(request: pytest.FixtureRequest) -> TorchLM:
    return TorchLM(MODELS[request.param]())


# Guides


def test_a_copy_is_independent_and_trainable() -> None:
    lm = TorchLM(tiny_gpt2(), temperature=1.3, eos_token_id=[1, 2])
    lm.module.requires_grad_(False)
    copy = lm.copy()
    sequences = random_completions(lm, len(PROMPTS), 3, 4)
    before = scored(lm, PROMPTS, sequences)
    assert torch.equal(scored(copy, PROMPTS, sequences), before)
    assert (copy.temperature, copy.eos_token_ids) == (1.3, {1, 2})
    with torch.no_grad():
        for parameter in copy.parameters():
            parameter.add_(0.1)
    assert torch.equal(scored(lm, PROMPTS, sequences), before)
    assert not close(scored(copy, PROMPTS, sequences), before, 0.01)
    assert not list(lm.parameters())


@pytest.mark.parametrize("name", ["gpt2, pad is eos", "llama, pad is eos", "opt", "t5"])
def test_a_fresh_adapter_is_bitwise_the_prior_and_shares_its_weights(name: str) -> None:
    pytest.importorskip("peft")
    lm = TorchLM(MODELS[name]())
    names = {id(module): type(module) for module in lm.module.modules()}
    guide = lm.with_adapter()
    sequences = random_completions(lm, len(PROMPTS), 4, 4)
    assert torch.equal(scored(guide, PROMPTS, sequences), scored(lm, PROMPTS, sequences))
    assert all(parameter.requires_grad for parameter in lm.module.parameters())
    assert {id(module): type(module) for module in lm.module.modules()} == names
    storages = {parameter.data_ptr() for parameter in lm.module.parameters()}
    frozen = [parameter for parameter in guide.module.parameters() if not parameter.requires_grad]
    assert {parameter.data_ptr() for parameter in frozen} == storages
    assert 0 < sum(p.numel() for p in guide.parameters())


@pytest.mark.parametrize("name", ["gpt2, pad is eos", "llama, pad is eos", "t5"])
def test_a_trained_adapter_with_dropout_decodes_as_it_scores(name: str) -> None:
    peft = pytest.importorskip("peft")
    lm = TorchLM(MODELS[name]())
    guide = lm.with_adapter(
        peft.LoraConfig(r=2, lora_dropout=0.5, target_modules="all-linear", fan_in_fan_out="gpt2" in name)
    )
    sequences = random_completions(lm, len(PROMPTS), 4, 4)
    prior = scored(lm, PROMPTS, sequences)
    optimizer = torch.optim.SGD(list(guide.parameters()), lr=0.05)
    for _ in range(3):
        optimizer.zero_grad()
        (-guide.token_log_probs(PROMPTS, sequences).sum()).backward()
        optimizer.step()
    guide.module.train()  # as a training loop would
    scores = scored(guide, PROMPTS, sequences)
    assert not close(scores, prior, 0.01)
    assert close(decoded(guide, PROMPTS, sequences), scores)
    assert torch.equal(scored(lm, PROMPTS, sequences), prior)
    if name != "t5":
        assert isinstance(guide.prefill([[1]]).network, TightNetwork)
        assert close(scores, reference_scores(guide.module, PROMPTS, sequences).detach())


def test_adapters_are_of_peft_or_refused() -> None:
    pytest.importorskip("peft")
    with pytest.raises(BayesKLRLError, match="LoraConfig"):
        TorchLM(tiny_gpt2()).with_adapter("ia5")
    with pytest.raises(BayesKLRLError, match=r"cannot put this adapter on a MambaForCausalLM.*target_modules"):
        TorchLM(tiny_other("mamba")).with_adapter()


def test_a_missing_peft_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(BayesKLRLError, match=r"bayes_klrl\[lora\]"):
        TorchLM(tiny_gpt2()).with_adapter()


# Folders


@pytest.mark.parametrize("name", ["gpt2, pad is not eos", "llama, pad is eos", "t5", "opt"])
def test_a_saved_model_is_the_same_model(name: str, tmp_path: Any) -> None:
    lm = TorchLM(MODELS[name](), tiny_tokenizer(), eos_token_id=[0, 3], temperature=0.8)
    lm.save_pretrained(tmp_path / "model")
    loaded = TorchLM.from_pretrained(tmp_path / "model", temperature=0.8)
    sequences = random_completions(lm, len(PROMPTS), 4, 4)
    assert torch.equal(scored(loaded, PROMPTS, sequences), scored(lm, PROMPTS, sequences))
    assert loaded.eos_token_ids == {0, 3}
    assert loaded.encode(["a b"]) == lm.encode(["a b"])


def test_a_saved_adapter_is_merged(tmp_path: Any) -> None:
    pytest.importorskip("peft")
    guide = TorchLM(tiny_gpt2()).with_adapter()
    with torch.no_grad():
        for index, parameter in enumerate(guide.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(index), std=0.1)
    guide.save_pretrained(tmp_path)
    loaded = TorchLM.from_pretrained(tmp_path)
    sequences = random_completions(guide, len(PROMPTS), 4, 4)
    assert not hasattr(loaded.module, "peft_config")
    assert loaded.tokenizer is None
    assert close(scored(loaded, PROMPTS, sequences), scored(guide, PROMPTS, sequences))


def test_an_adapter_folder_brings_its_base(tmp_path: Any) -> None:
    pytest.importorskip("peft")
    TorchLM(tiny_gpt2()).save_pretrained(tmp_path / "base")
    guide = TorchLM.from_pretrained(tmp_path / "base").with_adapter()
    with torch.no_grad():
        for index, parameter in enumerate(guide.parameters()):
            parameter.normal_(generator=torch.Generator().manual_seed(index), std=0.1)
    with pytest.warns(
        UserWarning, match="save_embedding_layers"
    ):  # peft writes the frozen embedding beside a head's adapter
        guide.module.save_pretrained(tmp_path / "adapter")
    loaded = TorchLM.from_pretrained(tmp_path / "adapter")
    sequences = random_completions(guide, len(PROMPTS), 4, 4)
    assert close(scored(loaded, PROMPTS, sequences), scored(guide, PROMPTS, sequences))


def test_precision_of_loaded_weights(tmp_path: Any) -> None:
    TorchLM(tiny_gpt2().to(torch.bfloat16)).save_pretrained(tmp_path)
    dtypes = {
        dtype: next(TorchLM.from_pretrained(tmp_path, dtype=dtype).parameters()).dtype
        for dtype in (None, "bfloat16", torch.float16)
    }
    assert dtypes == {None: torch.float32, "bfloat16": torch.bfloat16, torch.float16: torch.float16}


def test_folders_that_are_no_models(tmp_path: Any) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        TorchLM.from_pretrained(tmp_path)
    tiny_gpt2().config.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="no safetensors weights"):
        TorchLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        TorchLM.from_pretrained(tmp_path)
    from safetensors.torch import save_file

    weights = {name: tensor.clone() for name, tensor in tiny_gpt2().state_dict().items() if name != "lm_head.weight"}
    save_file({name: weights[name] for name in weights if "c_fc" not in name}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lacks 4 .*c_fc"):
        TorchLM.from_pretrained(tmp_path)


def test_names_that_lead_nowhere() -> None:
    with pytest.raises(CheckpointError, match="Shipped: "):
        TorchLM.from_pretrained("nobody")
    with pytest.raises(CheckpointError, match="no folder"):
        TorchLM.from_pretrained("/no/such/folder")


def test_smollm2_without_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    from bayes_klrl.models.torch_lm.sources import located

    monkeypatch.setattr(located.util, "find_spec", lambda name: None)
    with pytest.raises(MissingPackageError, match=r"bayes_klrl\[smollm2\]"):
        TorchLM.from_pretrained("smollm2")


# Text, and refusals


def test_text_and_ids() -> None:
    lm = TorchLM(tiny_gpt2(), tiny_tokenizer())
    assert lm.encode(["a b", "c", ""]) == [[1, 2], [3], []]
    assert lm.decode([[1, 2, 0], [3]]) == ["a b", "c"]


def test_a_final_eos_of_the_tokenizer_is_for_encoders_only() -> None:
    tokenizer = tiny_tokenizer(adds_eos=True)
    assert TorchLM(tiny_gpt2(), tokenizer).encode(["a b <eos>"]) == [[1, 2, 0]]  # the user's own stays
    assert TorchLM(tiny_t5(), tokenizer).encode(["a b"]) == [[1, 2, 0]]


@pytest.mark.parametrize("adds_eos", [False, True])
def test_an_unknown_word_that_is_the_eos_is_no_added_eos(adds_eos: bool) -> None:
    """GPT-2's tokenizer class has one id for both. A prompt lost its last token when "a" was such a word."""
    tokenizer = tiny_tokenizer(adds_eos=adds_eos)
    lm = TorchLM(tiny_gpt2(), tokenizer)
    assert lm.encode(["b c", "b z", "z", ""]) == [[2, 3], [2, 0], [0], []]
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<eos>": 0, "x": 1, "y": 2}, unk_token="<eos>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    no_letter_a = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    assert TorchLM(tiny_gpt2(), no_letter_a).encode(["x y"]) == [[1, 2]]


def test_logits_wider_than_the_tokenizer_are_all_tokens() -> None:
    lm = TorchLM(tiny_gpt2(vocab_size=7), tiny_tokenizer(5))
    assert lm.vocab_size == 7
    assert lm.next_log_probs(lm.prefill([[6]])).shape == (1, 7)
    with pytest.raises(CheckpointError, match=r"7 ids .* 5"):
        TorchLM(tiny_gpt2(vocab_size=5), tiny_tokenizer(7))


@pytest.mark.parametrize(
    "prompts, message",
    [([], "At least one"), ([[1], []], "Prompt 1 has no tokens"), ([[5]], r"0\.\.4"), ([[1] * 33], "at most 32")],
)
def test_prompts_that_are_refused(tight_lm: TorchLM, prompts: list[list[int]], message: str) -> None:
    with pytest.raises(BayesKLRLError, match=message):
        tight_lm.prefill(prompts)


def test_other_refusals(tight_lm: TorchLM) -> None:
    full = tight_lm.prefill([[1] * 32])
    with pytest.raises(BayesKLRLError, match="at most 32"):
        tight_lm.append(full, np.array([1]))
    with pytest.raises(BayesKLRLError, match="at most 32"):
        tight_lm.token_log_probs([[1] * 30], Sequences(np.ones((1, 1, 3), dtype=int), np.array([[3]])))
    with pytest.raises(BayesKLRLError, match=r"0\.\.4"):
        tight_lm.append(tight_lm.prefill([[1]]), np.array([-1]))
    with pytest.raises(BayesKLRLError, match="no tokenizer"):
        tight_lm.encode(["a"])
    with pytest.raises(BayesKLRLError, match="temperature"):
        TorchLM(tight_lm.module, temperature=0.0)
    with pytest.raises(BayesKLRLError, match="outside the vocabulary"):
        TorchLM(tight_lm.module, eos_token_id=5)
    with pytest.raises(BayesKLRLError, match="2 prompts"):
        tight_lm.token_log_probs([[1], [2]], random_completions(tight_lm, 1, 2, 2))


def test_no_draws_are_no_scores(tight_lm: TorchLM) -> None:
    empty = Sequences(np.zeros((2, 0, 3), dtype=int), np.zeros((2, 0), dtype=int))
    assert tight_lm.token_log_probs([[1], [2]], empty).shape == (2, 0, 3)


@pytest.mark.slow
def test_nothing_is_kept_alive_by_a_dropped_model() -> None:
    import weakref

    lm = TorchLM(tiny_gpt2())
    lm.prefill([[1]])
    alive = weakref.ref(lm.module)
    del lm
    gc.collect()
    assert alive() is None


def test_the_activation_of_gpt2_is_hugging_faces_own() -> None:
    """Value, gradient and second derivative; and the same bits with a graph and without, else a guide equal to its prior
    would not be at distance 0 from it."""
    inputs = torch.linspace(-12, 12, 97, dtype=torch.float64, requires_grad=True)
    expected = NewGELUActivation()(inputs)
    result = tanh_gelu(inputs)
    assert torch.equal(result, tanh_gelu(inputs.detach()))
    torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    weights = torch.linspace(1, 2, 97, dtype=torch.float64)
    slopes = [torch.autograd.grad((value * weights).sum(), inputs)[0] for value in (tanh_gelu(inputs), expected)]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradgradcheck(tanh_gelu, inputs)
