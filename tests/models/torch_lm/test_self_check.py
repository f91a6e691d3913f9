"""What the self-check finds: models whose decoding and scoring agree and are both wrong (theory.md 9.6)."""

from __future__ import annotations

import functools
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers as hf

import bayes_klrl as bk
from bayes_klrl.models.torch_lm.adapters import quiet_peft
from bayes_klrl.models.torch_lm.general import CachedNetwork, PlainNetwork
from bayes_klrl.models.torch_lm.probes import long_probe, named_lengths, short_probe
from bayes_klrl.models.torch_lm.self_check import SelfCheck
from tests.helpers.tiny_models import seeded, tiny_gpt2, tiny_llama, tiny_other, tiny_t5, tiny_tokenizer
from tests.models.torch_lm.architectures import tiny

VOCAB = 20
VIRTUAL = {
    "prompt tuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "P-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
    "prefix tuning": lambda: peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
}


@pytest.fixture(autouse=True)
def seed() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def by_prefixes(module: Any, prompt: list[int], completion: list[int], start: int | None = None) -> np.ndarray:
    """Return the log-prob of each token by the module's own forward of its prefix alone."""
    scores = []
    for t, token in enumerate(completion):
        if start is None:
            logits = module(input_ids=torch.tensor([prompt + completion[:t]]), use_cache=False).logits
        else:
            decoder = torch.tensor([[start, *completion[:t]]])
            logits = module(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder, use_cache=False).logits
        scores.append(float(logits[0, -1].detach().float().log_softmax(-1)[token]))
    return np.array(scores)


def scored(lm: bk.TorchLM, prompt: list[int], completion: list[int]) -> np.ndarray:
    with torch.no_grad():
        one = bk.Sequences(np.array([[completion]]), np.array([[len(completion)]]))
        return np.asarray(lm.token_log_probs([prompt], one))[0, 0]


# --- something else is read than we think -----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_are_read_as_peft_reads_them(kind: str) -> None:
    """Decoding and scoring used to share an error of up to 3.7 nats, and a certificate of grade A was wrong by 1.6."""
    with quiet_peft():
        policy = bk.TorchLM(peft.get_peft_model(tiny_llama(VOCAB), VIRTUAL[kind]()))
    expected = by_prefixes(policy.module, [1, 2, 3], [4, 5, 6, 0, 7])
    np.testing.assert_allclose(scored(policy, [1, 2, 3], [4, 5, 6, 0, 7]), expected, atol=1e-5)
    assert np.abs(expected - by_prefixes(tiny_llama(VOCAB), [1, 2, 3], [4, 5, 6, 0, 7])).max() > 0.1

    prior = bk.TorchLM(tiny_llama(VOCAB))
    odd = bk.TokenReward(lambda tokens, lengths: (tokens % 2).mean(axis=1), alpha=0.5)
    posterior = bk.Posterior(prior, odd, prompts=[[1, 2]], max_new_tokens=2)
    certificate = bk.certify(posterior, policy, seed=0)
    exact = bk.Exact().run(posterior, seed=0)
    log_q = np.array(
        [by_prefixes(policy.module, [1, 2], ids).sum() for ids in bk.Sequences(exact.tokens, exact.lengths).lists()]
    )
    log_p = exact.log_weights[0] - np.logaddexp.reduce(exact.log_weights[0])
    low, high = certificate.reverse_kl[0]
    assert low <= float(np.exp(log_q) @ (log_q - log_p)) <= high < low + 1e-3


@pytest.mark.parametrize("kind", VIRTUAL)
def test_a_guide_of_virtual_tokens_does_not_start_as_the_prior(kind: str) -> None:
    with pytest.raises(bk.BayesKLRLError, match=r"changes log-probs by .* nats before it is trained.*LoraConfig"):
        bk.TorchLM(tiny_llama(VOCAB)).with_adapter(VIRTUAL[kind]())


def test_an_adapter_that_starts_at_zero_is_a_guide() -> None:
    zero = peft.AdaptionPromptConfig(adapter_layers=1, adapter_len=3, task_type="CAUSAL_LM")
    prior = bk.TorchLM(tiny_llama(VOCAB))
    guide = prior.with_adapter(zero)
    np.testing.assert_allclose(scored(guide, [1, 2], [3, 4]), scored(prior, [1, 2], [3, 4]), atol=1e-5)
    with pytest.raises(bk.BayesKLRLError, match="before it is trained"):
        prior.with_adapter(peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))


LONG = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "original_max_position_embeddings": 8,
    "short_factor": [1.0, 1.0],
    "long_factor": [4.0, 7.0],
    "factor": 8.0,
}


@pytest.mark.parametrize("family", ["Llama", "Phi3"])
def test_longrope_is_one_model_up_to_its_original_length(family: str) -> None:
    """Past it, drawn and scored log-probs differed by 2.3 nats, and a short completion changed beside a long one."""
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 64, "original_max_position_embeddings": 8}
    ids = {"eos_token_id": 0, "bos_token_id": 0, "pad_token_id": 0}
    config = getattr(hf, f"{family}Config")(vocab_size=VOCAB, rope_parameters=dict(LONG), **sizes, **more, **ids)
    lm = bk.TorchLM(seeded(getattr(hf, f"{family}ForCausalLM"), config, 0))
    assert lm.context_length == 8
    expected = by_prefixes(lm.module, [1, 2, 3], [4, 5, 6, 7, 8])
    np.testing.assert_allclose(scored(lm, [1, 2, 3], [4, 5, 6, 7, 8]), expected, atol=1e-5)
    reward = bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0)
    with pytest.raises(bk.BayesKLRLError, match=r"context of 8\s+tokens"):
        bk.Posterior(lm, reward, prompts=[[1, 2, 3, 4, 5, 6]], max_new_tokens=5)
    with pytest.raises(bk.BayesKLRLError, match="at most 8"):
        scored(lm, [1, 2, 3, 4, 5, 6], [4, 5, 6, 7, 8])


@pytest.mark.parametrize("rope", ["longrope", "default"])
def test_virtual_tokens_count_in_the_context(rope: str) -> None:
    parameters = dict(LONG) if rope == "longrope" else {"rope_type": "default", "rope_theta": 1e4}
    base = tiny_llama(VOCAB, max_position_embeddings=8, rope_parameters=parameters)
    with quiet_peft():
        policy = bk.TorchLM(peft.get_peft_model(base, VIRTUAL["prompt tuning"]()))
    assert policy.context_length == 5
    with pytest.raises(bk.BayesKLRLError, match="at most 5"):
        scored(policy, [1, 2, 3], [4, 5, 6])


def test_the_context_of_composite_and_two_sided_models() -> None:
    assert bk.TorchLM(tiny("llama4", max_position_embeddings=12)).context_length == 12
    assert bk.TorchLM(tiny("led", seq2seq=True, max_decoder_position_embeddings=9)).context_length == 9
    assert bk.TorchLM(tiny("encoder-decoder", seq2seq=True)).context_length == 64


@pytest.mark.parametrize("name", ["big_bird", "bigbird_pegasus"])
def test_block_sparse_attention_is_refused_and_the_model_left_as_it_was(name: str) -> None:
    """It becomes full attention for good at the first short text, such as that of the check."""
    given = {"is_decoder": True} if name == "big_bird" else {"seq2seq": True}
    model = tiny(name, attention_type="block_sparse", **given)
    with pytest.raises(bk.CheckpointError, match=r"set_attention_type\('original_full'\)"):
        bk.TorchLM(model)
    assert model.config.attention_type == "block_sparse"
    assert bk.TorchLM(tiny(name, attention_type="original_full", **given)).self_check is not None


def test_a_start_token_that_stands_in_the_generation_configuration_alone() -> None:
    model = tiny_t5(VOCAB)
    model.config.decoder_start_token_id = None
    model.generation_config.decoder_start_token_id = 5
    lm = bk.TorchLM(model)
    np.testing.assert_allclose(scored(lm, [1, 2], [3, 4]), by_prefixes(model, [1, 2], [3, 4], start=5), atol=1e-5)


@pytest.mark.parametrize("backend", ["TorchLM", "JaxLM"])
def test_eos_ids_of_both_configurations(backend: str, tmp_path: Path) -> None:
    """As instruction-tuned checkpoints have them: <|endoftext|> here, [<|endoftext|>, <|im_end|>] there."""
    model = tiny_llama(VOCAB, eos_token_id=2)
    model.generation_config.update(eos_token_id=[2, 7], do_sample=True, top_k=3, temperature=0.1)
    model.save_pretrained(tmp_path)
    lm = getattr(bk, backend).from_pretrained(tmp_path)
    assert lm.eos_token_ids == {2, 7}
    assert lm.temperature == 1.0
    assert getattr(bk, backend).from_pretrained(tmp_path, eos_token_id=3).eos_token_ids == {3}


# --- models that are not causal, or see the pad -----------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "roberta", "xlm-roberta", "roformer", "xlm", "cpmant", "prophetnet"])
def test_what_sees_later_tokens_is_refused(name: str) -> None:
    with pytest.raises(
        bk.CheckpointError, match=r"nats; the model's own forward .* gives .*come later.*check=False"
    ) as error:
        bk.TorchLM(tiny(name))
    assert "is_decoder=True" in str(error.value)


def test_check_false_skips_the_check() -> None:
    lm = bk.TorchLM(tiny("bert"), check=False)
    assert lm.self_check is None
    assert np.isfinite(scored(lm, [4, 5], [6, 7])).all()


def test_a_folder_is_checked_as_well(tmp_path: Path) -> None:
    tiny("bert").save_pretrained(tmp_path)
    with pytest.raises(bk.CheckpointError, match="come later"):
        bk.TorchLM.from_pretrained(tmp_path)
    assert bk.TorchLM.from_pretrained(tmp_path, check=False).self_check is None
    prior = bk.TorchLM(tiny_gpt2(64))
    posterior = bk.Posterior(
        prior, bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0), prompts=[[4]], max_new_tokens=2
    )
    with pytest.raises(bk.CheckpointError, match="come later"):
        bk.certify(posterior, tmp_path, seed=0)


@pytest.mark.parametrize("name", ["m2m_100", "fsmt", "switch_transformers", "nllb-moe"])
def test_decoders_whose_positions_or_masks_depend_on_tokens_are_run_plainly(name: str) -> None:
    """M2M-100 counts tokens that are not padding: 1.1 nats off, once the padding id is drawn."""
    model = tiny(name, seq2seq=True)
    lm = bk.TorchLM(model)
    ids = [5, 0, 6, 0, 7]
    expected = by_prefixes(model, [9, 3, 4], ids, start=model.config.decoder_start_token_id)
    np.testing.assert_allclose(scored(lm, [9, 3, 4], ids), expected, atol=1e-4)


def test_a_forward_that_is_random_is_refused_as_such() -> None:
    model = tiny_gpt2(VOCAB)
    model.transformer.h[0].register_forward_hook(
        lambda module, inputs, output: output + torch.randn_like(output) if torch.is_tensor(output) else output
    )
    with pytest.raises(bk.CheckpointError, match="Its forward is random: two calls with the same text differ by"):
        bk.TorchLM(model)


def test_a_model_that_needs_more_than_ids_is_refused() -> None:
    model = tiny_gpt2(VOCAB)
    plain = model.forward
    model.forward = lambda input_ids, pixel_values, **rest: plain(input_ids, **rest)
    with pytest.raises(bk.CheckpointError, match="cannot be run on token ids alone"):
        bk.TorchLM(model)


def test_weights_that_give_nan_are_refused() -> None:
    model = tiny_gpt2(VOCAB)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(np.nan)
    with pytest.raises(bk.CheckpointError, match=r"NaN.*float32"):
        bk.TorchLM(model)


def test_a_dynamically_quantised_model_is_refused_by_name() -> None:
    """It rounds all tokens of a batch to one scale: 0.4 nats between a text alone and beside another one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch announces that it will drop this
        quantised = torch.ao.quantization.quantize_dynamic(tiny_llama(VOCAB), {torch.nn.Linear}, dtype=torch.qint8)
    with pytest.raises(bk.CheckpointError, match="quantised dynamically"):
        bk.TorchLM(quantised)
    assert bk.TorchLM(quantised, check=False).vocab_size == VOCAB


# --- the check itself -------------------------------------------------------------------------------------------


def test_what_it_compares_is_kept_and_said() -> None:
    lm = bk.TorchLM(tiny_llama(VOCAB))
    check = lm.self_check
    assert isinstance(check, SelfCheck)
    assert check.num_compared >= 20
    assert 0 <= check.gap < 1e-4
    assert check.seconds > 0
    assert not check.not_reached
    assert lm.copy().self_check is check
    posterior = bk.Posterior(
        lm, bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0), prompts=[[4]], max_new_tokens=2
    )
    certificate = bk.certify(posterior, lm.copy(), seed=0)
    assert "numbers of the policy     checked against its own plain forward: at most" in str(certificate)
    report = bk.check_posterior(posterior)
    assert report
    assert "own forward, prefix by prefix: checked against" in str(report)


def test_a_large_model_is_asked_fewer_than_ten_times(monkeypatch: pytest.MonkeyPatch) -> None:
    from bayes_klrl.models.torch_lm import self_check

    monkeypatch.setattr(self_check, "SMALL", 0)
    calls: list[int] = []
    model = tiny_other("opt", vocab_size=VOCAB)
    plain = model.forward
    model.forward = functools.wraps(plain)(lambda *given, **named: calls.append(1) or plain(*given, **named))
    lm = bk.TorchLM(model)
    assert lm.self_check is not None
    assert len(calls) == lm.self_check.num_forwards < 10
    with pytest.raises(bk.CheckpointError, match="come later"):
        bk.TorchLM(tiny("bert"))


def test_a_network_that_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each of the cached network's steps is made wrong in turn: by a position, by a stale row, by a padding that is seen."""
    plain = CachedNetwork._logits

    def shifted(self: Any, tokens: Any, padding: Any, start: int, num_last: int, **cache: Any) -> Any:
        return plain(self, tokens, padding, start + (start > 0), num_last, **cache)

    def seen(self: Any, tokens: Any, padding: Any, start: int, num_last: int, **cache: Any) -> Any:
        return plain(self, tokens, padding * 0, start, num_last, **cache)

    for name, broken in {"_logits": shifted, "select": lambda self, cache, rows: cache}.items():
        with monkeypatch.context() as patch:
            patch.setattr(CachedNetwork, name, broken)
            assert isinstance(bk.TorchLM(tiny_other("opt"))._network, PlainNetwork)
    monkeypatch.setattr(CachedNetwork, "_logits", seen)
    assert isinstance(bk.TorchLM(tiny_other("opt"))._network, PlainNetwork)


def test_windows_are_crossed_where_that_is_cheap() -> None:
    model = tiny_other("gemma2")
    assert named_lengths(model, 10_000)[0] == [4]
    model.config.sliding_window = 5000
    assert named_lengths(model, 10_000) == ([], {"sliding_window": 5000})
    lm = bk.TorchLM(model)
    assert lm.self_check is not None
    assert "not beyond sliding_window = 5000 tokens" in str(lm.self_check)


def test_probes_hold_the_special_ids_and_fit_into_short_contexts() -> None:
    probe = short_probe(50, [0, 3, 1], 64, thorough=True)
    assert {0, 1, 3} < set(probe.tokens[0])
    assert len({tuple(tokens[:-2]) for tokens in probe.tokens[:3]}) == 1
    for limit in (3, 4, 6):
        short = short_probe(50, [0, 3, 1], limit, thorough=True)
        assert max(map(len, short.prompts)) + len(short.tokens[0]) <= limit
    crossing = long_probe(50, 20, False)
    assert len(crossing.prompts[0]) < 20 < len(crossing.prompts[0]) + len(crossing.tokens[0])


def test_half_precision_passes_and_an_encoder_in_it_does_not() -> None:
    assert bk.TorchLM(tiny_llama(VOCAB).to(torch.bfloat16)).self_check is not None
    with pytest.raises(bk.CheckpointError, match="come later"):
        bk.TorchLM(tiny("bert").to(torch.bfloat16))


def test_the_tokenizers_padding_id_is_among_the_special_ids() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(3)
    lm = bk.TorchLM(tiny_gpt2(8, eos_token_id=0), tokenizer)
    assert set(lm._special_ids()) == {0, 3}
