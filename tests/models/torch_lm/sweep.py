"""What every architecture of transformers gives: numbers against its own forward, prefix by prefix, and whole runs.

The reference here shares no code with the package. `python -m tests.models.torch_lm.sweep` writes the table of
docs/architectures.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bayes_klrl as bk
from tests.models.torch_lm.architectures import CAUSAL, CAUSAL_SWITCH, NOT_BUILT, SEQ2SEQ, tiny

__all__ = ["CASES", "CERTIFIED", "NETWORKS", "TABLE", "case_names", "check_case", "table"]

TABLE = Path(__file__).parents[3] / "docs" / "architectures.md"
NETWORKS = {
    "TightNetwork": "own loop",
    "CachedNetwork": "its forward, with its cache",
    "EncoderDecoderNetwork": "its forward, with its cache",
    "PlainNetwork": "its forward, without a cache",
    "PlainEncoderDecoderNetwork": "its forward, without a cache",
}

CERTIFIED = {
    "llama": "TightNetwork",
    "gemma3_text": "CachedNetwork",
    "bamba": "PlainNetwork",
    "t5 (encoder-decoder)": "EncoderDecoderNetwork",
    "fsmt (encoder-decoder)": "PlainEncoderDecoderNetwork",
}
"""One architecture per kind of network, and the kind. A certificate draws and scores: both are compared for every one."""

FULL = ("big_bird", "bigbird_pegasus")
CASES: dict[str, dict[str, Any]] = {
    **{name: CAUSAL_SWITCH.get(name, {}) for name in CAUSAL},
    **{f"{name} (encoder-decoder)": {"seq2seq": True} for name in SEQ2SEQ},
    **{f"{name} (as configured by default)": {} for name in CAUSAL_SWITCH},
}
for _name in [case for case in CASES if case.startswith(FULL) and "default" not in case]:
    CASES[f"{_name.split(' (')[0]} (original_full{', encoder-decoder' if '(' in _name else ''})"] = {
        **CASES[_name],
        "attention_type": "original_full",
    }

PROMPTS = [[4, 11, 17, 9, 5], [30]]
NUM_TOKENS = 6
LOST_BY_TRANSFORMERS = {
    "emu3": "its text configuration has no AutoModelForCausalLM",
    "mllama": "its text configuration has no AutoModelForCausalLM",
    "youtu": "its embedding is drawn anew when a folder is loaded",
}
"""What transformers itself does not load as it was saved; saving says so."""


def case_names() -> list[str]:
    """Return the names of all cases."""
    return sorted(CASES)


def as_built(case: str) -> Any:
    """Return the tiny model of a case."""
    return tiny(case.split(" (")[0], **CASES[case])


@torch.no_grad()
def own_scores(module: Any, prompts: list[list[int]], completions: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Return the log-prob of each token that is asked for, of completions (P, N, T), by one forward of its prefix alone."""
    scores = np.zeros(completions.shape)
    for p, n, t in np.argwhere(asked):
        read = completions[p, n, :t].tolist()
        if module.config.is_encoder_decoder:
            ids = torch.tensor([[module.config.decoder_start_token_id, *read]])
            logits = module(input_ids=torch.tensor([prompts[p]]), decoder_input_ids=ids, use_cache=False).logits
        else:
            logits = module(torch.tensor([[*prompts[p], *read]]), use_cache=False).logits
        scores[p, n, t] = logits[0, -1].float().log_softmax(-1)[completions[p, n, t]]
    return scores


def row(case: str, found: bk.TorchLM | bk.CheckpointError) -> str:
    """Return a line of the table: the network that an architecture gets, or that it is refused and why."""
    if isinstance(found, bk.TorchLM):
        return f"| {case} | {NETWORKS[type(found.prefill([[4]]).network).__name__]} |"
    reasons = {"tokens that come later": "sees later tokens", "Block-sparse": "block-sparse attention"}
    return (
        f"| {case} | refused: {next((why for words, why in reasons.items() if words in str(found)), 'other numbers')} |"
    )


def tried(module: Any) -> bk.TorchLM | bk.CheckpointError:
    """Return the language model of a module, or its refusal."""
    try:
        return bk.TorchLM(module)
    except bk.CheckpointError as error:
        return error


def table() -> str:
    """Return the table, with the architectures that are not tried and why."""
    rows = "\n".join(row(case, tried(as_built(case))) for case in case_names())
    skipped = "\n".join(f"| {name} | not tried: {reason} |" for name, reason in sorted(NOT_BUILT.items()))
    return f"| architecture | log-probs by |\n|---|---|\n{rows}\n{skipped}\n"


def check_case(case: str, folder: Path) -> None:
    """Check all that the table promises of a case."""
    module = as_built(case)
    found = tried(module)
    line = row(case, found)
    assert line in TABLE.read_text().splitlines(), f"{line} is new: python -m tests.models.torch_lm.sweep"
    if isinstance(found, bk.TorchLM):
        check_numbers(module, found)
        check_runs(case, found, folder)
    else:
        assert "nats" in str(found) or "Block-sparse" in str(found)


def completions(lm: bk.TorchLM) -> np.ndarray:
    """Return tokens (P, N, T), some of them the padding id 0, up to the length that the model reads."""
    tokens = np.random.default_rng(0).integers(3, lm.vocab_size, (len(PROMPTS), 2, NUM_TOKENS))
    tokens[:, 0, 1] = 0
    return tokens


def prompts_for(lm: bk.TorchLM) -> list[list[int]]:
    """Return prompts of two lengths, as long as the model allows."""
    room = (lm.context_length or 64) - 2
    return [prompt[: max(1, min(len(prompt), room - 1))] for prompt in PROMPTS]


def check_numbers(module: Any, lm: bk.TorchLM) -> None:
    """Scoring, decoding with rows permuted at every step, and the mass of two last tokens, against prefixes one by one."""
    prompts, tokens = prompts_for(lm), completions(lm)
    tokens = tokens[..., : (lm.context_length or 64) - max(map(len, prompts))]
    asked = np.ones(tokens.shape, dtype=bool)
    asked[:, 1:, :-1] = False  # of second completions only the last token, which depends on those before it
    own = own_scores(module, prompts, tokens, asked)
    tolerance = 3e-5 * max(1.0, np.abs(own).max())
    lengths = np.full(tokens.shape[:2], tokens.shape[2])
    with torch.no_grad():
        scored = lm.token_log_probs(prompts, bk.Sequences(tokens, lengths)).numpy()
    by_steps = decoded(lm, prompts, tokens)
    assert np.abs(scored - own)[asked].max() < tolerance
    assert np.abs(by_steps - own)[asked].max() < tolerance
    assert np.abs(by_steps - scored).max() < 2 * tolerance
    assert two_last_tokens(lm, prompts[0][:2]) == pytest.approx(np.ones(2), abs=1e-4)


def decoded(lm: bk.TorchLM, prompts: list[list[int]], tokens: np.ndarray) -> np.ndarray:
    """Return the log-probs (P, N, T) that decoding gives, with the rows in another order at every step."""
    flat = tokens.reshape(-1, tokens.shape[2])
    state, order = lm.select(lm.prefill(prompts), np.array([0, 0, 1, 1])), np.arange(4)
    found = np.empty(flat.shape)
    for t in range(flat.shape[1]):
        found[order, t] = np.asarray(lm.next_log_probs(state))[np.arange(4), flat[order, t]]
        if t + 1 < flat.shape[1]:
            turn = np.array([2, 0, 3, 1])
            state = lm.append(lm.select(state, turn), flat[order[turn], t])
            order = order[turn]
    return found.reshape(tokens.shape)


def two_last_tokens(lm: bk.TorchLM, prompt: list[int]) -> np.ndarray:
    """Return p(a)^-1 sum_b p(a, b) by scored completions of two tokens, for two tokens a: 1 for a distribution."""
    first = np.arange(3, 5)
    pairs = np.stack([np.repeat(first, lm.vocab_size), np.tile(np.arange(lm.vocab_size), 2)], axis=1)[None]
    with torch.no_grad():
        scored = lm.token_log_probs([prompt], bk.Sequences(pairs, np.full(pairs.shape[:2], 2))).double().numpy()[0]
        alone = np.asarray(lm.next_log_probs(lm.prefill([prompt])).double())[0, first]
    mass: np.ndarray = np.exp(scored.sum(axis=1)).reshape(2, -1).sum(axis=1) / np.exp(alone)
    return mass


def check_runs(case: str, lm: bk.TorchLM, folder: Path) -> None:
    """SMC, SVI, a policy that is the same after saving, and a certificate of one architecture per kind of network."""
    odd = bk.TokenReward(lambda tokens, lengths: (tokens % 2).mean(axis=1), alpha=0.5, bounds=(0, 1))
    posterior = bk.Posterior(lm, odd, prompts=[prompts_for(lm)[0][:2]], max_new_tokens=2)
    draws = bk.SMC(4).run(posterior, seed=0)
    assert np.isfinite(draws.log_evidence).all()
    np.testing.assert_allclose(draws.log_prior, posterior.log_prior(draws), atol=1e-3)
    if case == "reformer":
        with pytest.raises(bk.BayesKLRLError, match="Reformer computes gradients in training mode only"):
            bk.SVI(num_steps=1, num_particles=2).fit(posterior, seed=0)
        return
    fit = bk.SVI(num_steps=1, num_particles=2).fit(posterior, seed=0)
    if case in CERTIFIED:
        assert type(lm.prefill([[4]]).network).__name__ == CERTIFIED[case]
        certificate = bk.certify(
            posterior,
            fit.guide,
            seed=0,
            num_draws=32,
            num_particles=2,
            num_runs=4,
            sampling_only=True,
            max_proposals=64,
        )
        assert (certificate.reverse_kl[:, 1] >= certificate.reverse_kl[:, 0]).all()
        assert "checked against its own plain forward" in str(certificate)
    if case in LOST_BY_TRANSFORMERS:
        with pytest.raises(bk.CheckpointError):
            fit.save(folder)
        return
    fit.save(folder)  # which loads what it wrote and compares eight completions


def main() -> None:
    """Put the present table into the document."""
    torch.set_num_threads(1)
    text = TABLE.read_text() if TABLE.is_file() else "# Architectures\n\n| "
    head = text[: text.index("| ")]
    TABLE.write_text(head + table())


if __name__ == "__main__":
    main()
