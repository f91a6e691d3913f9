"""What the package does on a card that is only pretended (`tests/helpers/pretended_card.py`), as JSON on standard output.

Run by `test_on_device`, in a process of its own, since torch learns of the pretended device for good:

    python -m tests.models.torch_lm.on_card
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.models.decoding import decode
from bayes_klrl.models.torch_lm.on_device import drawing
from tests.helpers.pretended_card import OnCard, PretendedCard, register
from tests.helpers.tiny_models import tiny_gpt2, tiny_llama

PROMPTS = [[1, 2, 3], [4]]
BUILD = {
    "gpt2": lambda seed: tiny_gpt2(50, eos_token_id=None, seed=seed, n_positions=128),
    "llama": lambda seed: tiny_llama(50, eos_token_id=None, seed=seed, max_position_embeddings=128),
}


def posterior_of(prior: Any, num_tokens: int) -> bk.Posterior:
    even = bk.TokenReward(
        lambda tokens, lengths: (tokens % 2 == 0).sum(axis=1) / 4, alpha=1.0, bounds=(0, num_tokens / 4)
    )
    return bk.Posterior(prior, even, prompts=PROMPTS, max_new_tokens=num_tokens)


def sampled(prior: Any, guide: Any, num_tokens: int) -> list[np.ndarray]:
    drawn = decode((guide, prior), PROMPTS, 8, num_tokens, np.random.default_rng(0))
    return [drawn.tokens, drawn.log_probs]


def smc(prior: Any, guide: Any, num_tokens: int) -> list[np.ndarray]:
    draws = bk.SMC(8, ess_threshold=0.9).run(posterior_of(prior, num_tokens), seed=0)
    return [draws.tokens, draws.log_weights]


def smc_with_proposal(prior: Any, guide: Any, num_tokens: int) -> list[np.ndarray]:
    draws = bk.SMC(8, proposal=guide, ess_threshold=0.9).run(posterior_of(prior, num_tokens), seed=0)
    return [draws.tokens, draws.log_weights]


def scored(prior: Any, guide: Any, num_tokens: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    sequences = bk.Sequences(rng.integers(0, 50, (2, 6, num_tokens)), rng.integers(1, num_tokens + 1, (2, 6)))
    with torch.no_grad():
        found = guide.token_log_probs(PROMPTS, sequences)
    return [(found.inner if isinstance(found, OnCard) else found).numpy()]


def step_of_svi(prior: Any, guide: Any, num_tokens: int) -> list[np.ndarray]:
    fit = bk.SVI(1, 8, optimizer="adam", twist="none").fit(posterior_of(prior, num_tokens), seed=0)
    return [fit.history["elbo"], fit.history["gradient_norm"]]


def certificate(prior: Any, guide: Any, num_tokens: int) -> list[np.ndarray]:
    found = bk.certify(posterior_of(prior, num_tokens), guide, seed=0, num_draws=32, num_runs=2, num_particles=4)
    return [found.elbo, found.log_evidence_bounds]


RUNS: dict[str, tuple[Callable[..., list[np.ndarray]], tuple[int, ...]]] = {
    "sampling": (sampled, (12, 40)),
    "SMC": (smc, (12,)),
    "SMC with a proposal": (smc_with_proposal, (12,)),
    "scores": (scored, (12,)),
    "step of SVI": (step_of_svi, (8, 16)),
    "certificate": (certificate, (4,)),
}
"""The runs by name, and the numbers of tokens for which each is counted."""

ONCE = ("certificate", "SMC with a proposal")  # for one family alone, for they take long


def moved(model: Any) -> Any:
    """Return the model on the pretended card, with head and embedding one tensor where they were: a real move keeps that."""
    model.to("card").tie_weights()
    return model


@contextmanager
def somebody_adds_an_item() -> Iterator[None]:
    """A mistake in the loops that this must find: a number of a tensor is read for every token."""
    plain = drawing.first_beyond

    def reads(cumulative: torch.Tensor, uniforms: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = plain(cumulative, uniforms)
        assert found[0].item() >= 0
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawing, "first_beyond", reads)
        yield


def main() -> None:
    """Print for each run its waits and sends, where they came from, and the difference to the CPU's numbers."""
    register()  # before the first backward pass, which counts the devices
    report: dict[str, Any] = {}
    for family, build in BUILD.items():
        host = [bk.TorchLM(build(seed)) for seed in (0, 1)]
        counted = [
            (name, t) for name, (_, lengths) in RUNS.items() for t in lengths if family == "llama" or name not in ONCE
        ]
        expected = {(name, t): RUNS[name][0](*host, t) for name, t in counted}
        with PretendedCard() as card:
            lms = [bk.TorchLM(moved(build(seed))) for seed in (0, 1)]
            for (name, t), numbers in expected.items():
                card.reset()
                found = RUNS[name][0](*lms, t)
                report[f"{family}: {name} of {t}"] = {
                    "waits": card.waits.total(),
                    "sends": card.sends.total(),
                    "places": dict(card.places),
                    "difference": max(float(np.abs(a - b).max()) for a, b in zip(found, numbers, strict=True)),
                }
            card.reset()
            with somebody_adds_an_item():
                sampled(*lms, 40)
            report[f"{family}: an item in the loop"] = {"waits": card.waits.total()}
    print(json.dumps(report))


if __name__ == "__main__":
    main()
