"""TorchLM against enumeration, against Hugging Face's own forward, and against itself."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

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
    from bayes_klrl.models.torch_lm.tight import families as torch_families

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
