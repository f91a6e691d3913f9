"""TorchLM against enumeration, against Hugging Face's own forward, and against itself."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from torch import Tensor
from transformers.activations import NewGELUActivation

from bayes_klrl.errors import BayesKLRLError, CheckpointError
from bayes_klrl.models.torch_lm import scoring as torch_scoring
from bayes_klrl.models.torch_lm.activation import tanh_gelu
from bayes_klrl.models.torch_lm.general import CachedNetwork, EncoderDecoderNetwork, PlainNetwork
from bayes_klrl.models.torch_lm.lm import TorchLM
from bayes_klrl.models.torch_lm.tight import TightNetwork
from bayes_klrl.sequences import Sequences, completion_lengths
from bayes_klrl.typing import LanguageModel
from tests.helpers.tiny_models import tiny_gpt2, tiny_llama, tiny_other, tiny_t5, tiny_tokenizer

PROMPTS = [[1, 2, 3, 4], [4], [2, 2]]
TIGHT = {
    "gpt2, pad is eos": lambda: tiny_gpt2(pad_token_id=0),
    "gpt2, pad is not eos": lambda: tiny_gpt2(eos_token_id=3, pad_token_id=0),
    "llama, pad is eos": lambda: tiny_llama(pad_token_id=0),
    "llama, pad is not eos": lambda: tiny_llama(eos_token_id=3, pad_token_id=0),
}
GENERAL = {
    "opt": CachedNetwork,
    "gpt_neox": CachedNetwork,
    "bloom": CachedNetwork,
    "gemma2": CachedNetwork,
    "mamba": PlainNetwork,
    "bart": EncoderDecoderNetwork,
}
MODELS = TIGHT | {name: (lambda name=name: tiny_other(name)) for name in GENERAL} | {"t5": tiny_t5}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(params=MODELS)
def lm(request: pytest.FixtureRequest) -> TorchLM:
    return TorchLM(MODELS[request.param]())


@pytest.fixture(params=["gpt2, pad is eos", "llama, pad is not eos"])
def tight_lm(request: pytest.FixtureRequest) -> TorchLM:
    return TorchLM(MODELS[request.param]())


def all_completions(lm: TorchLM, num_prompts: int, num_tokens: int) -> Sequences:
    """Return every completion of up to num_tokens tokens, for each prompt."""
    eos = lm.eos_token_ids
    lists = [
        ids
        for length in range(1, num_tokens + 1)
        for ids in itertools.product(range(lm.vocab_size), repeat=length)
        if not eos & set(ids[:-1]) and (length == num_tokens or ids[-1] in eos)
    ]
    one = Sequences.from_lists(lists, max_new_tokens=num_tokens, pad_token=min(eos))
    return Sequences(one.tokens.repeat(num_prompts, 0), one.lengths.repeat(num_prompts, 0))


def random_completions(lm: TorchLM, num_prompts: int, num_draws: int, num_tokens: int, seed: int = 0) -> Sequences:
    tokens = np.random.default_rng(seed).integers(0, lm.vocab_size, (num_prompts, num_draws, num_tokens))
    return Sequences(tokens, completion_lengths(tokens, lm.eos_token_ids))


def decoded(lm: TorchLM, prompts: list[list[int]], sequences: Sequences) -> Tensor:
    """Return the log-probs (P, N, T) that the decode path gives these tokens, all positions."""
    num_prompts, num_draws, num_tokens = sequences.tokens.shape
    state = lm.select(lm.prefill(prompts), np.arange(num_prompts).repeat(num_draws))
    flat, columns = sequences.tokens.reshape(-1, num_tokens), []
    for step in range(num_tokens):
        columns.append(lm.next_log_probs(state)[np.arange(len(flat)), flat[:, step]])
        state = lm.append(state, flat[:, step])
    scores = torch.stack(columns, dim=1).reshape(num_prompts, num_draws, num_tokens)
    return scores * torch.from_numpy(sequences.mask)


def reference(model: Any, prompt: list[int], completion: list[int]) -> Tensor:
    """Return the log-probs (T,) from one unpadded, uncached Hugging Face forward."""
    log_probs = model(torch.tensor([prompt + completion])).logits[0].float().log_softmax(-1)
    return log_probs[range(len(prompt) - 1, len(prompt) + len(completion) - 1), completion]


def reference_scores(model: Any, prompts: list[list[int]], sequences: Sequences) -> Tensor:
    """Return the same for P prompts and N completions each, shape (P, N, T)."""
    num_prompts, num_draws, num_tokens = sequences.tokens.shape
    owners = np.arange(num_prompts).repeat(num_draws)
    scores = [reference(model, prompts[owner], ids) for owner, ids in zip(owners, sequences.lists(), strict=True)]
    padded = [torch.nn.functional.pad(row, (0, num_tokens - len(row))) for row in scores]
    return torch.stack(padded).reshape(num_prompts, num_draws, num_tokens)


def scored(lm: TorchLM, prompts: list[list[int]], sequences: Sequences) -> Tensor:
    with torch.no_grad():
        return lm.token_log_probs(prompts, sequences)


def close(left: Tensor, right: Tensor, tolerance: float = 1e-5) -> bool:
    return left.shape == right.shape and bool((left - right).abs().max() <= tolerance)


# Truth: normalisation, and one distribution whichever way it is asked


def test_it_is_a_language_model(lm: TorchLM) -> None:
    assert isinstance(lm, LanguageModel)
    assert (lm.vocab_size, lm.full_support, lm.tokenizer) == (5, True, None)


def test_total_probability_is_one_for_prompts_of_any_length(lm: TorchLM) -> None:
    scores = scored(lm, PROMPTS, all_completions(lm, len(PROMPTS), 3))
    total = scores.double().sum(-1).exp().sum(-1)
    assert close(total, torch.ones(3, dtype=torch.float64))


def test_decoding_and_scoring_agree(lm: TorchLM) -> None:
    sequences = random_completions(lm, len(PROMPTS), 6, 5)
    scores = scored(lm, PROMPTS, sequences)
    assert scores.dtype == torch.float32
    assert close(decoded(lm, PROMPTS, sequences), scores)
    assert not scores[~torch.from_numpy(sequences.mask)].any()


def test_what_stands_past_the_length_does_not_matter(lm: TorchLM) -> None:
    sequences = random_completions(lm, len(PROMPTS), 6, 5)
    tokens = np.where(sequences.mask, sequences.tokens, -7)
    assert torch.equal(scored(lm, PROMPTS, Sequences(tokens, sequences.lengths)), scored(lm, PROMPTS, sequences))


def test_a_prompt_scores_the_same_alone_and_among_others(lm: TorchLM) -> None:
    sequences = random_completions(lm, len(PROMPTS), 4, 5)
    together = scored(lm, PROMPTS, sequences)
    for index, prompt in enumerate(PROMPTS):
        alone = Sequences(sequences.tokens[[index]], sequences.lengths[[index]])
        assert close(scored(lm, [prompt], alone), together[[index]])


def test_rows_can_be_permuted_repeated_and_dropped(lm: TorchLM) -> None:
    tokens = np.array([3, 1, 2])
    state = lm.append(lm.prefill(PROMPTS), tokens)
    rows = np.array([2, 0, 0])
    chosen = lm.append(lm.select(state, rows), np.array([4, 4, 1]))
    expected = [[*PROMPTS[row], tokens[row], last] for row, last in zip(rows, [4, 4, 1], strict=True)]
    if isinstance(state.network, EncoderDecoderNetwork):
        sequences = Sequences(np.array([[[3, 4, 2]], [[2, 4, 2]]]), np.array([[3], [3]]))
        full = lm.position_log_probs([PROMPTS[0], PROMPTS[2]], sequences).detach()[:, 0, 2]
        assert close(lm.next_log_probs(chosen)[1], full[0])
    else:
        assert close(lm.next_log_probs(chosen), lm.next_log_probs(lm.prefill(expected)))
    assert lm.next_log_probs(lm.select(chosen, np.array([], dtype=np.int64))).shape == (0, 5)


def test_states_are_values(lm: TorchLM) -> None:
    start = lm.prefill(PROMPTS)
    first = lm.append(start, np.array([1, 2, 3]))
    kept = lm.next_log_probs(first).clone()
    other = lm.append(start, np.array([4, 4, 4]))  # start was already appended to
    second = lm.append(first, np.array([2, 2, 2]))
    again = lm.append(first, np.array([2, 2, 2]))
    assert torch.equal(lm.next_log_probs(first), kept)
    assert not close(lm.next_log_probs(other), kept, 1e-3)
    assert close(lm.next_log_probs(second), lm.next_log_probs(again), 1e-6)


def test_stale_states_do_not_disturb_each_other_over_many_steps(tight_lm: TorchLM) -> None:
    """Two continuations of one state, interleaved: a shared buffer written in place would mix them."""
    sequences = random_completions(TorchLM(tight_lm.module, eos_token_id=()), 1, 2, 6)
    states = [tight_lm.prefill([[1, 2]])] * 2
    for step in range(6):
        for which in range(2):
            expected = tight_lm.position_log_probs([[1, 2]], sequences).detach()[0, which, step]
            assert close(tight_lm.next_log_probs(states[which])[0], expected)
            states[which] = tight_lm.append(states[which], sequences.tokens[0, [which], step])


def test_position_log_probs_hold_the_tokens_log_probs(lm: TorchLM) -> None:
    sequences = random_completions(lm, len(PROMPTS), 4, 5)
    table = lm.position_log_probs(PROMPTS, sequences)
    assert table.shape == (3, 4, 5, 5)
    assert table.requires_grad
    tokens = torch.from_numpy(sequences.tokens)[..., None]
    assert close(table.gather(-1, tokens)[..., 0].detach(), scored(lm, PROMPTS, sequences))
    inside = torch.from_numpy(sequences.mask)
    assert close(table.detach().exp().sum(-1)[inside], torch.ones(int(inside.sum())))


# The two networks


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_tight_network_equals_the_models_own_forward_and_gradient(build: Any) -> None:
    layers = {"n_layer": 4} if build is tiny_gpt2 else {"num_hidden_layers": 4}
    lm, model = TorchLM(build(vocab_size=40, **layers)), build(vocab_size=40, **layers)
    sequences = random_completions(lm, len(PROMPTS), 5, 12)
    scores, expected = lm.token_log_probs(PROMPTS, sequences), reference_scores(model, PROMPTS, sequences)
    assert isinstance(lm.prefill([[1]]).network, TightNetwork)
    assert close(scores.detach(), expected.detach())
    assert close(decoded(lm, PROMPTS, sequences), expected.detach())
    scores.sum().backward()
    expected.sum().backward()
    for (name, ours), theirs in zip(lm.module.named_parameters(), model.parameters(), strict=True):
        assert close(ours.grad, theirs.grad, 1e-4 * max(1.0, float(theirs.grad.abs().max()))), name


@pytest.mark.parametrize("start", [3, 90])
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_decoding_past_buffer_growth_and_the_change_of_kernel(build: Any, start: int) -> None:
    lengths = {"n_positions": 160} if build is tiny_gpt2 else {"max_position_embeddings": 160}
    lm = TorchLM(build(vocab_size=11, eos_token_id=None, **lengths))
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 11, size).tolist() for size in (start, start - 2)]
    sequences = random_completions(lm, 2, 2, 50)
    assert close(decoded(lm, prompts, sequences), scored(lm, prompts, sequences))


@pytest.mark.parametrize(
    "config, model", [("MistralConfig", "MistralForCausalLM"), ("Qwen3Config", "Qwen3ForCausalLM")]
)
def test_relatives_of_llama_are_tight_and_right(config: str, model: str) -> None:
    import transformers

    from tests.helpers.tiny_models import seeded

    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"vocab_size": 5, "num_key_value_heads": 2, "head_dim": 8, "sliding_window": None, "eos_token_id": 0}
    network = seeded(getattr(transformers, model), getattr(transformers, config)(**sizes, **more), 0)
    lm = TorchLM(network)
    sequences = random_completions(lm, len(PROMPTS), 5, 6)
    assert isinstance(lm.prefill([[1]]).network, TightNetwork)
    assert close(scored(lm, PROMPTS, sequences), reference_scores(network, PROMPTS, sequences).detach())


@pytest.mark.parametrize("name", GENERAL)
def test_other_architectures_get_a_general_network(name: str) -> None:
    model = tiny_other(name)
    lm = TorchLM(model)
    assert type(lm.prefill([[1]]).network) is GENERAL[name]
    if name != "bart":
        sequences = random_completions(lm, len(PROMPTS), 5, 6)
        assert close(scored(lm, PROMPTS, sequences), reference_scores(model, PROMPTS, sequences).detach())


def test_gradients_of_a_general_network_are_finite_and_right() -> None:
    lm, model = TorchLM(tiny_other("opt")), tiny_other("opt")
    sequences = random_completions(lm, len(PROMPTS), 4, 4)
    lm.token_log_probs(PROMPTS, sequences).sum().backward()
    reference_scores(model, PROMPTS, sequences).sum().backward()
    for ours, theirs in zip(lm.module.parameters(), model.parameters(), strict=True):
        assert theirs.grad is None or close(ours.grad, theirs.grad, 1e-3)


@pytest.mark.parametrize("options", [{"activation_function": "relu"}, {"scale_attn_by_inverse_layer_idx": True}])
def test_known_options_stay_tight(options: dict[str, Any]) -> None:
    lm = TorchLM(tiny_gpt2(**options))
    sequences = random_completions(lm, len(PROMPTS), 4, 5)
    assert isinstance(lm.prefill([[1]]).network, TightNetwork)
    assert close(scored(lm, PROMPTS, sequences), reference_scores(lm.module, PROMPTS, sequences).detach())


@pytest.mark.parametrize("when", ["before", "after first use"])
def test_a_hook_on_a_block_is_obeyed(when: str) -> None:
    model = tiny_gpt2()
    lm = TorchLM(model)
    sequences = random_completions(lm, len(PROMPTS), 4, 5)
    if when == "after first use":
        assert close(scored(lm, PROMPTS, sequences), reference_scores(model, PROMPTS, sequences).detach())
    model.transformer.h[0].attn.register_forward_hook(lambda module, inputs, output: (output[0] * 0.0, output[1]))
    expected = reference_scores(model, PROMPTS, sequences).detach()
    assert close(scored(lm, PROMPTS, sequences), expected)
    assert close(decoded(lm, PROMPTS, sequences), expected)


def test_a_layer_replaced_after_first_use_is_used() -> None:
    lm = TorchLM(tiny_gpt2())
    sequences = random_completions(lm, len(PROMPTS), 4, 5)
    before = scored(lm, PROMPTS, sequences)
    lm.module.transformer.h[1].mlp.c_fc = tiny_gpt2(seed=1).transformer.h[1].mlp.c_fc
    assert not close(scored(lm, PROMPTS, sequences), before, 0.01)
    assert close(scored(lm, PROMPTS, sequences), reference_scores(lm.module, PROMPTS, sequences).detach())


def test_the_self_check_catches_a_tight_network_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    from bayes_klrl.models.torch_lm import families as torch_families

    monkeypatch.setattr(torch_families, "rotate", lambda heads, cos, sin: heads)
    lm = TorchLM(tiny_llama())
    sequences = random_completions(lm, len(PROMPTS), 4, 5)
    assert isinstance(lm.prefill([[1]]).network, CachedNetwork)
    assert close(scored(lm, PROMPTS, sequences), reference_scores(lm.module, PROMPTS, sequences).detach())


# Nothing else shapes the distribution


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama, lambda **_: tiny_t5(dropout_rate=0.5)])
def test_dropout_is_off_even_when_somebody_calls_train(build: Any) -> None:
    names = ("resid_pdrop", "attn_pdrop", "embd_pdrop") if build is tiny_gpt2 else ("attention_dropout",)
    drops = dict.fromkeys(names, 0.5)
    lm = TorchLM(build(**drops))
    sequences = random_completions(lm, len(PROMPTS), 4, 4)
    before = scored(lm, PROMPTS, sequences)
    lm.module.train()
    assert torch.equal(scored(lm, PROMPTS, sequences), before)
    lm.module.train()
    assert close(decoded(lm, PROMPTS, sequences), before)


def test_temperature_divides_the_logits_everywhere(tight_lm: TorchLM) -> None:
    warm = TorchLM(tight_lm.module, temperature=1.7)
    sequences = all_completions(warm, len(PROMPTS), 2)
    expected = (tight_lm.next_log_probs(tight_lm.prefill(PROMPTS)) / 1.7).log_softmax(-1)
    assert close(warm.next_log_probs(warm.prefill(PROMPTS)), expected)
    assert close(decoded(warm, PROMPTS, sequences), scored(warm, PROMPTS, sequences))
    assert close(scored(warm, PROMPTS, sequences).double().sum(-1).exp().sum(-1), torch.ones(3).double())
    assert not close(scored(warm, PROMPTS, sequences), scored(tight_lm, PROMPTS, sequences), 0.01)


def test_two_eos_ids() -> None:
    lm = TorchLM(tiny_llama(eos_token_id=[0, 3]))
    assert lm.eos_token_ids == {0, 3}
    total = scored(lm, PROMPTS, all_completions(lm, 3, 3)).double().sum(-1).exp().sum(-1)
    assert close(total, torch.ones(3).double())


def test_where_the_eos_ids_come_from() -> None:
    silent = tiny_gpt2(eos_token_id=None)
    assert TorchLM(silent).eos_token_ids == frozenset()
    assert TorchLM(silent, tiny_tokenizer()).eos_token_ids == {0}
    assert TorchLM(silent, tiny_tokenizer(), eos_token_id={1, 2}).eos_token_ids == {1, 2}
    assert TorchLM(tiny_gpt2(eos_token_id=2), tiny_tokenizer()).eos_token_ids == {2}
    assert TorchLM(tiny_gpt2(), eos_token_id=()).eos_token_ids == frozenset()
    assert TorchLM(tiny_gpt2(eos_token_id=50256)).eos_token_ids == frozenset()


@pytest.mark.parametrize("name", ["gpt2, pad is eos", "llama, pad is eos", "opt", "t5"])
def test_half_precision_weights_give_normalised_float32(name: str) -> None:
    lm = TorchLM(MODELS[name]().to(torch.bfloat16))
    sequences = all_completions(lm, len(PROMPTS), 3)
    scores = scored(lm, PROMPTS, sequences)
    log_probs = lm.next_log_probs(lm.prefill(PROMPTS))
    assert scores.dtype == log_probs.dtype == torch.float32
    assert close(log_probs.exp().sum(-1), torch.ones(3))
    # the prefixes of different completions are summed in different orders: 8 bits a factor
    assert close(scores.double().sum(-1).exp().sum(-1), torch.ones(3).double(), 0.05)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_it_works_under_a_default_device_of_another_kind(build: Any) -> None:
    """As under a default device "cuda" with a CPU model: any tensor made without a device would fail to mix."""
    lm = TorchLM(build())
    sequences = random_completions(lm, len(PROMPTS), 4, 5)
    expected = scored(TorchLM(build()), PROMPTS, sequences)
    with torch.device("meta"):
        scores = scored(lm, PROMPTS, sequences)
        state = lm.append(lm.select(lm.prefill(PROMPTS), np.array([2, 0])), np.array([1, 2]))
        log_probs = lm.next_log_probs(state)
    assert close(scores, expected)
    assert log_probs.device.type == "cpu"


def test_no_graph_is_built_by_decoding_but_by_scoring(tight_lm: TorchLM) -> None:
    state = tight_lm.append(tight_lm.prefill(PROMPTS), np.array([1, 2, 3]))
    assert not tight_lm.next_log_probs(state).requires_grad
    assert tight_lm.token_log_probs(PROMPTS, random_completions(tight_lm, 3, 1, 2)).requires_grad


# Memory


@pytest.mark.parametrize("name", ["gpt2, pad is eos", "llama, pad is eos", "opt", "t5"])
def test_chunks_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = TorchLM(MODELS[name]())
    sequences = random_completions(lm, len(PROMPTS), 3, 5)

    def scores_and_gradient() -> tuple[Tensor, list[Tensor]]:
        scores = lm.token_log_probs(PROMPTS, sequences)
        parameters = list(lm.parameters())
        return scores.detach(), list(torch.autograd.grad(scores.sum(), parameters))

    scores, gradient = scores_and_gradient()
    monkeypatch.setattr(torch_scoring, "BUDGET", 60)
    calls = []
    checkpoint = torch_scoring.checkpoint
    monkeypatch.setattr(torch_scoring, "checkpoint", lambda *a, **k: calls.append(1) or checkpoint(*a, **k))
    chunked, chunked_gradient = scores_and_gradient()
    assert len(calls) > 1
    assert close(chunked, scores)
    assert all(close(a, b, 1e-3) for a, b in zip(chunked_gradient, gradient, strict=True))


def test_the_table_over_the_vocabulary_never_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scoring 64 x 8 tokens over 5,000 words in chunks of 2**17 floats keeps no more than a few chunks alive."""
    lm = TorchLM(tiny_gpt2(vocab_size=5000, eos_token_id=None))
    sequences = random_completions(lm, 1, 64, 8)
    monkeypatch.setattr(torch_scoring, "BUDGET", 2**17)
    sizes = []
    plain = lm.module.lm_head.forward
    lm.module.lm_head.forward = lambda inputs: sizes.append(inputs.shape[0]) or plain(inputs)
    scores = scored(lm, [[1, 2]], sequences)
    assert scores.shape == (1, 64, 8)
    assert sum(sizes[1:]) >= 64 * 8
    assert max(sizes) * 5000 <= 2**17


def test_only_distinct_prompts_are_read_and_only_once(tight_lm: TorchLM) -> None:
    """The cost that the embedding sees: P prompts and T - 1 tokens of each completion, no padding up to T."""
    tight_lm.prefill([[1]])
    seen: list[int] = []
    embedding = tight_lm.module.get_input_embeddings()
    plain = embedding.forward
    embedding.forward = lambda tokens: seen.append(tokens.numel()) or plain(tokens)
    tokens = np.ones((1, 10, 30), dtype=np.int64)
    scored(tight_lm, [[1, 2, 4]], Sequences(tokens, np.full((1, 10), 4)))
    assert seen == [3, 10 * 3]


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
    from bayes_klrl.models.torch_lm import checkpoint as torch_checkpoint

    monkeypatch.setattr(torch_checkpoint.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"bayes_klrl\[smollm2\]"):
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
