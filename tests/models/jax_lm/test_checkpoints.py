"""Folders and configurations of JaxLM: what is read, what is written, what is refused."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers as hf
from safetensors.numpy import load_file, save_file

import bayes_klrl as bk
from bayes_klrl.models.jax_lm.config import architecture_of
from bayes_klrl.models.jax_lm.forward import ACTIVATIONS
from bayes_klrl.models.jax_lm.lm import JaxLM
from bayes_klrl.sequences import Sequences
from tests.helpers.tiny_models import tiny_gpt2, tiny_llama, tiny_tokenizer
from tests.models.jax_lm.test_lm import (
    DEEP,
    MODELS,
    PROMPTS,
    cached_lm,
    close,
    decoded,
    jax_lm_of,
    relative,
    scored,
    small_pair,
    torch_model,
    with_biases,
)
from tests.models.torch_lm.test_lm import random_completions, reference_scores


@pytest.fixture(
    params=[pytest.param(name, marks=[pytest.mark.slow] * (name not in ("gpt2", "llama, untied"))) for name in MODELS]
)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def small() -> JaxLM:
    return small_pair()[0]


# Folders


@pytest.mark.slow
def test_a_saved_model_is_the_same_model_on_torch(name: str, tmp_path: Path) -> None:
    loaded = cached_lm(name)
    changed = jax.tree.map(lambda array: array * 0.75, loaded.parameters)
    lm = JaxLM(changed, loaded._config, tiny_tokenizer(30), eos_token_id=[3, 7], temperature=1.5)
    lm.save_pretrained(tmp_path)
    model, report = hf.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(model) is type(torch_model(name))
    for (key, ours), theirs in zip(sorted(model.named_parameters()), sorted_parameters(name), strict=True):
        assert torch.equal(ours, 0.75 * theirs), key
    sequences = random_completions(lm, len(PROMPTS), 4, 6)  # type: ignore[arg-type]
    theirs = bk.TorchLM.from_pretrained(tmp_path)
    again = JaxLM.from_pretrained(tmp_path)
    for other in (theirs, again):
        assert (other.eos_token_ids, other.temperature) == ({3, 7}, 1.5)
        assert other.encode(["a b"]) == [[1, 2]]
    with torch.no_grad():
        assert close(theirs.token_log_probs(PROMPTS, sequences), scored(lm, PROMPTS, sequences))
    assert np.array_equal(scored(again, PROMPTS, sequences), scored(lm, PROMPTS, sequences))
    assert JaxLM.from_pretrained(tmp_path, eos_token_id=(), temperature=2.0).eos_token_ids == frozenset()


def sorted_parameters(name: str) -> list[torch.Tensor]:
    return [parameter for _, parameter in sorted(torch_model(name).named_parameters())]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_become_float32_whatever_is_stored(dtype: torch.dtype, tmp_path: Path) -> None:
    tiny_llama().to(dtype).save_pretrained(tmp_path)
    lm, theirs = JaxLM.from_pretrained(tmp_path), bk.TorchLM.from_pretrained(tmp_path)
    assert {array.dtype for array in jax.tree.leaves(lm.parameters)} == {jnp.dtype("float32")}
    sequences = random_completions(lm, len(PROMPTS), 4, 5)  # type: ignore[arg-type]
    assert close(scored(lm, PROMPTS, sequences), reference_scores(theirs.module, PROMPTS, sequences).detach())


def test_shards_are_read_by_their_index(tmp_path: Path) -> None:
    model = tiny_llama(vocab_size=50)
    model.save_pretrained(tmp_path, max_shard_size="5KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    lm = JaxLM.from_pretrained(tmp_path)
    assert close(lm.parameters["outer"]["tokens"], model.model.embed_tokens.weight.detach(), 0)
    lm.save_pretrained(tmp_path)  # over the shards
    again = JaxLM.from_pretrained(tmp_path)
    assert jax.tree.all(jax.tree.map(np.array_equal, again.parameters, lm.parameters))


def test_a_shard_that_is_missing(tmp_path: Path) -> None:
    tiny_llama(vocab_size=50).save_pretrained(tmp_path, max_shard_size="5KB")
    sorted(tmp_path.glob("model-*.safetensors"))[1].unlink()
    with pytest.raises(bk.CheckpointError, match=r"lacks 1 of the \d+ shards .* model-00002"):
        JaxLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(bk.CheckpointError, match=r"index\.json.*must hold an object; got \[\]"):
        JaxLM.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "build, change, message",
    [
        (tiny_gpt2, {"model_type": "gpt_neox"}, r"model_type = 'gpt_neox'.*supported values: gpt2, llama"),
        (tiny_gpt2, {"activation_function": "swiglu"}, r"activation_function = 'swiglu'.*gelu_new"),
        (tiny_gpt2, {"scale_attn_by_inverse_layer_idx": True}, r"scale_attn_by_inverse_layer_idx = True.*False"),
        (tiny_gpt2, {"scale_attn_weights": False}, r"scale_attn_weights = False.*True"),
        (tiny_gpt2, {"reorder_and_upcast_attn": True}, r"reorder_and_upcast_attn = True"),
        (tiny_gpt2, {"add_cross_attention": True}, r"add_cross_attention = True"),
        (tiny_gpt2, {"new_option": 3}, r"new_option = 3.*supported keys: .*n_embd"),
        (tiny_llama, {"hidden_act": "tanh"}, r"hidden_act = 'tanh'.*silu"),
        (tiny_llama, {"hidden_act": ["silu"]}, r"hidden_act = \['silu'\]"),
        (tiny_llama, {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, r"rope_type = 'yarn'.*llama3"),
        (tiny_llama, {"rope_parameters": {"rope_type": "default", "mscale": 2}}, r"rope_parameters.mscale = 2"),
        (tiny_llama, {"rope_parameters": {"rope_type": "linear"}}, r"rope_parameters.factor = None"),
        (
            tiny_llama,
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
            r"rope_parameters.partial_rotary_factor = 0.5.*1.0",
        ),
        (tiny_llama, {"rope_parameters": None, "rope_scaling": {"type": "dynamic"}}, r"rope_scaling.*dynamic"),
        (tiny_llama, {"model_type": "mistral"}, r"attention_bias = False"),
        (tiny_llama, {"sliding_window": 4096}, r"sliding_window = 4096.*None"),
        (tiny_llama, {"layer_types": ["sliding_attention"] * 2}, r"layer_types"),
        (tiny_llama, {"use_sliding_window": True}, r"use_sliding_window = True.*False"),
        (tiny_llama, {"attention_bias": "some"}, r"attention_bias = 'some'.*False, True"),
        (tiny_llama, {"tie_word_embeddings": None}, r"tie_word_embeddings = None.*False, True"),
        (tiny_llama, {"quantization_config": {"bits": 4}}, r"quantization_config"),
        (tiny_llama, {"hidden_size": None}, r"hidden_size = None.*positive integer"),
        (tiny_llama, {"num_hidden_layers": True}, r"num_hidden_layers = True.*positive integer"),
        (tiny_llama, {"num_key_value_heads": 3}, r"num_key_value_heads = 3.*a divisor of 4"),
        (tiny_llama, {"head_dim": 3}, r"head_dim = 3.*even"),
        (tiny_llama, {"rms_norm_eps": None}, r"rms_norm_eps = None.*positive number"),
        (
            tiny_llama,
            {"rope_parameters": {"rope_theta": "big"}},
            r"rope_parameters.rope_theta = 'big'.*positive number",
        ),
        (tiny_llama, {"rope_parameters": None, "rope_theta": -1.0}, r"rope_theta = -1.0.*positive number"),
        (tiny_llama, {"rope_parameters": "default"}, r"rope_parameters = 'default'.*dictionary"),
        (tiny_llama, {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, r"rope_type = 'dynamic'"),
        (tiny_llama, {"rope_parameters": {"rope_type": "longrope"}}, r"rope_type = 'longrope'"),
        (tiny_llama, {"rope_parameters": {"rope_type": "linear", "factor": None}}, r"rope_parameters.factor = None"),
        (tiny_llama, {"layer_types": ["full_attention"]}, r"layer_types.*each of the 2 layers"),
        (tiny_llama, {"embedding_multiplier": 2.0}, r"embedding_multiplier = 2.0"),
        (tiny_llama, {"auto_map": {"AutoModel": "code.Model"}}, r"auto_map"),
        (lambda: relative("Qwen2"), {"use_sliding_window": True, "sliding_window": 0}, r"sliding_window = 0.*positive"),
        (
            lambda: relative("Qwen2"),
            {"layer_types": ["sliding_attention"] * 4},
            r"layer_types.*4 layers full_attention",
        ),
        (lambda: relative("Qwen3"), {"use_sliding_window": "yes"}, r"use_sliding_window = 'yes'.*False, True"),
        (tiny_gpt2, {"n_head": 3}, r"n_head = 3.*a divisor of 16"),
        (tiny_gpt2, {"n_inner": "wide"}, r"n_inner = 'wide'.*positive integer"),
        (tiny_gpt2, {"n_embd": None}, r"n_embd = None.*positive integer"),
        (tiny_gpt2, {"layer_norm_epsilon": "1e-5"}, r"layer_norm_epsilon = '1e-5'.*positive number"),
        (tiny_llama, {"logit_scale": 2.0}, r"logit_scale = 2.0"),
    ],
)
def test_configurations_that_are_refused(build: Any, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    build().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(bk.CheckpointError, match=message):
        JaxLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["GPT2", "Llama", "Mistral", "Qwen2", "Qwen3"])
def test_every_field_of_transformers_is_known(name: str) -> None:
    """A field that a new version adds must be looked at: is it obeyed, refused, or none of our business?"""
    config = getattr(hf, f"{name}Config")(num_hidden_layers=3).to_dict()
    architecture = architecture_of(config)
    assert architecture.num_layers == 3
    assert (architecture.window, architecture.slides) == ((4096, (True,) * 3) if name == "Mistral" else (None, ()))


@pytest.mark.parametrize("first, expected", [(0, (True,) * 4), (3, (False, False, False, True)), (4, ()), (None, ())])
def test_windows_without_layer_types_start_at_a_layer(first: int | None, expected: tuple[bool, ...]) -> None:
    """As transformers fills `layer_types` in; its default is layer 28."""
    options = {} if first is None else {"max_window_layers": first}
    config = dict(cached_lm("qwen2")._config) | {"use_sliding_window": True, "sliding_window": 4}
    config = {key: value for key, value in config.items() if key not in ("layer_types", "max_window_layers")} | options
    assert architecture_of(config).slides == expected
    theirs = hf.Qwen2Config.from_dict(dict(config)).layer_types
    assert tuple(kind == "sliding_attention" for kind in theirs) == (expected or (False,) * 4)


COMPUTED: dict[str, Callable[[], Any]] = {
    "gpt2, untied": lambda: with_biases(tiny_gpt2(tie_word_embeddings=False, **DEEP)),
    "gpt2, sizes": lambda: tiny_gpt2(n_inner=20, layer_norm_epsilon=0.1, **DEEP),
    "llama, sizes": lambda: tiny_llama(head_dim=10, rms_norm_eps=0.1, num_key_value_heads=1, **DEEP),
    "llama, all heads": lambda: tiny_llama(num_key_value_heads=None, **DEEP),
    "mistral, window": lambda: relative("Mistral", sliding_window=3),
    "mistral, wide window": lambda: relative("Mistral", sliding_window=128),
    "qwen2, window in one layer": lambda: relative(
        "Qwen2", use_sliding_window=True, sliding_window=4, max_window_layers=3
    ),
    "qwen2, window not used": lambda: relative("Qwen2", use_sliding_window=False, sliding_window=4),
    "qwen3, window by types": lambda: relative(
        "Qwen3",
        use_sliding_window=True,
        sliding_window=2,
        layer_types=["sliding_attention", "full_attention", "full_attention", "sliding_attention"],
    ),
    "qwen3, biases": lambda: relative("Qwen3", attention_bias=True),
    "llama, relu": lambda: tiny_llama(hidden_act="relu", **DEEP),
} | {
    f"gpt2, {activation}": functools.partial(tiny_gpt2, activation_function=activation, **DEEP)
    for activation in ACTIVATIONS
}


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=[pytest.mark.slow] * (case not in ("gpt2, untied", "llama, sizes")))
        for case in COMPUTED
    ],
)
def test_configurations_that_are_computed(case: str) -> None:
    """Scored, decoded step by step, and drawn in one scan: as torch does."""
    model = COMPUTED[case]()
    lm = jax_lm_of(model, eos_token_id=())
    prompts = [[1, 2, 3, 4, 5, 6], [4]]
    sequences = random_completions(lm, 2, 2, 8)  # type: ignore[arg-type]
    expected = reference_scores(model.double(), prompts, sequences).detach()  # in float32 torch errs as much as we do
    assert close(scored(lm, prompts, sequences), expected)
    if "window" in case:  # what is far back is in the cache
        assert close(decoded(lm, prompts, sequences), expected)
        changed = dict(lm._config) | {"sliding_window": None, "layer_types": None}
        wide = JaxLM(lm.parameters, changed, eos_token_id=())
        matters = case not in ("mistral, wide window", "qwen2, window not used")
        assert close(scored(wide, prompts, sequences), expected) != matters


def test_the_older_key_of_rotary_scaling_comes_first_as_in_transformers() -> None:
    config = dict(cached_lm("llama, tied")._config) | {"rope_scaling": {"type": "linear", "factor": 2.0}}
    rope = architecture_of(config).rope
    assert rope is not None
    theirs = hf.LlamaConfig.from_dict(dict(config)).rope_parameters
    assert (rope.kind, rope.factor, rope.theta) == (theirs["rope_type"], theirs["factor"], theirs["rope_theta"])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop("model.norm.weight"), r"1 of the model's weights are missing \(norm.weight"),
        (lambda t: t.update(extra=t["model.norm.weight"]), r"1 weights that a model .* does not have \(extra"),
        (lambda t: t.update({"model.norm.weight": np.ones(3, np.float32)}), r"norm.weight has shape \(3,\).*\(16,\)"),
        (lambda t: t.update({"lm_head.weight": np.ones((5, 16), np.float32)}), r"tie_word_embeddings = True.*differs"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(16, np.float32)}),
            r"does not have \(layers.0.self_attn.q_proj.bias",
        ),
    ],
)
def test_weights_that_do_not_fit(change: Any, message: str, tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(bk.CheckpointError, match=message):
        JaxLM.from_pretrained(tmp_path)


def test_a_second_copy_of_a_tied_embedding_is_accepted(tmp_path: Path) -> None:
    tiny_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].copy()}, tmp_path / "model.safetensors")
    assert "head.weight" not in JaxLM.from_pretrained(tmp_path).parameters["outer"]


def test_folders_and_names_that_are_no_models(tmp_path: Path) -> None:
    with pytest.raises(bk.CheckpointError, match=r"'owner/model'.*austen.*bk.TorchLM"):
        JaxLM.from_pretrained("owner/model")
    with pytest.raises(bk.CheckpointError, match=r"no config\.json"):
        JaxLM.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(bk.CheckpointError, match="no safetensors weights"):
        JaxLM.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(bk.CheckpointError, match="no JSON"):
        JaxLM.from_pretrained(tmp_path)
    tiny_gpt2().save_pretrained(tmp_path)
    (tmp_path / "vocab.json").write_text("{}")
    with pytest.raises(bk.CheckpointError, match=r"no tokenizer\.json"):
        JaxLM.from_pretrained(tmp_path)
    (tmp_path / "vocab.json").unlink()
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(bk.CheckpointError, match="cannot be read"):
        JaxLM.from_pretrained(tmp_path)


@pytest.mark.slow
def test_other_refusals(small: JaxLM) -> None:
    parameters, config = small.parameters, small._config
    with pytest.raises(bk.BayesKLRLError, match="temperature"):
        JaxLM(parameters, config, temperature=0.0)
    with pytest.raises(bk.BayesKLRLError, match=r"\[5\] is outside the vocabulary 0..4"):
        JaxLM(parameters, config, eos_token_id=5)
    with pytest.raises(bk.CheckpointError, match="belong together"):
        JaxLM(parameters, config, tiny_tokenizer(6))
    with pytest.raises(bk.CheckpointError, match=r"outer: tokens"):
        small.with_parameters(
            {"outer": parameters["outer"] | {"tokens": jnp.ones((4, 16))}, "layers": parameters["layers"]}
        )
    with pytest.raises(bk.BayesKLRLError, match=r"This JaxLM has no tokenizer to encode.*JaxLM\(model, tokenizer\)"):
        small.encode(["a"])
    with pytest.raises(bk.BayesKLRLError, match="Prompt 1 has no tokens"):
        small.prefill([[1], []])
    with pytest.raises(bk.BayesKLRLError, match=r"0..4.*from 7 to 7"):
        small.prefill([[7]])
    with pytest.raises(bk.BayesKLRLError, match="33 tokens; this model reads at most 32"):
        small.append(small.prefill([[1] * 32]), np.array([1]))
    with pytest.raises(bk.BayesKLRLError, match="have 36 tokens"):
        small.token_log_probs([[1] * 32], Sequences(np.ones((1, 1, 4), int), np.array([[4]])))
    with pytest.raises(bk.BayesKLRLError, match="One token for each of 2 rows"):
        small.append(small.prefill([[1], [2]]), np.array([1]))
    with pytest.raises(bk.BayesKLRLError, match="2 prompts but completions of 1"):
        small.token_log_probs([[1], [2]], Sequences(np.ones((1, 1, 4), int), np.array([[4]])))
    empty = Sequences(np.zeros((1, 0, 4), int), np.zeros((1, 0), int))
    assert small.token_log_probs([[1]], empty).shape == (1, 0, 4)
