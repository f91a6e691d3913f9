"""Numbers on the card against numbers on the CPU, for TorchLM, SMC, SVI, certify and JaxLM.

Completions are drawn by uniforms of the host on both, so the draws are the same but for a uniform that falls between two sums
that differ in the last bit. What is compared is therefore the log-probs of the same completions, and where the draws are the
same, all that follows from them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import bayes_klrl as bk
from bayes_klrl.models.decoding import decode, scoring_gap
from bayes_klrl.models.torch_lm.on_device import static_steps
from benchmarks.gpu.shapes import checked_models

__all__ = ["CHECKS"]

TOLERANCE = 1e-4
"""Nats per completion in float32, and relative for gradients."""

SAME = 0.98
"""The least share of completions that must be the same on both."""

PROMPTS = [[1, 2, 3, 4, 5], [6], [7, 8]]


def pairs(device: str, tiny: bool) -> dict[str, tuple[bk.TorchLM, bk.TorchLM]]:
    """Return each checked model on the CPU and on the card, with the same weights."""
    models, again = checked_models(tiny=tiny), checked_models(tiny=tiny)
    check = not tiny
    return {
        name: (bk.TorchLM(models[name], check=check), bk.TorchLM(again[name], device=device, check=check))
        for name in models
    }


def posterior_of(prior: Any, tiny: bool) -> bk.Posterior:
    """Return a posterior whose reward is cheap."""
    num_tokens = sizes(tiny)[1]
    even = bk.TokenReward(
        lambda tokens, lengths: (tokens % 2 == 0).sum(axis=1) / num_tokens, alpha=0.25, bounds=(0, 1), name="even"
    )
    return bk.Posterior(prior, even, prompts=PROMPTS, max_new_tokens=num_tokens)


def sizes(tiny: bool) -> tuple[int, int]:
    """Return the completions per prompt and their length."""
    return (8, 6) if tiny else (64, 24)


def same(a: np.ndarray, b: np.ndarray) -> float:
    """Return the share of completions (..., T) that are the same."""
    return float((a == b).all(axis=-1).mean())


def furthest(a: Any, b: Any) -> float:
    """Return the largest difference of two arrays; -inf on both sides is none."""
    with np.errstate(invalid="ignore"):
        return float(np.nan_to_num(np.abs(np.asarray(a) - np.asarray(b))).max())


def log_probs(lm: bk.TorchLM, sequences: bk.Sequences) -> np.ndarray:
    """Return the teacher-forced log-probs of completions, (P, N), as float64 on the host."""
    with torch.no_grad():
        scores = lm.token_log_probs(PROMPTS, sequences)
    return scores.double().sum(dim=2).cpu().numpy()  # type: ignore[no-any-return]


def torch_float32(device: str, tiny: bool) -> dict[str, Any]:
    """Decoded and scored log-probs, in float32, and the draws."""
    num_draws, num_tokens = sizes(tiny)
    shares, decoded, scored = [], [], []
    for host, card in pairs(device, tiny).values():
        ours, theirs = (decode((lm,), PROMPTS, num_draws, num_tokens, np.random.default_rng(0)) for lm in (host, card))
        sequences = theirs.sequences()
        shares.append(same(ours.tokens, theirs.tokens))
        expected = log_probs(host, sequences)
        decoded.append(furthest(theirs.log_probs.reshape(expected.shape), expected))
        scored.append(furthest(log_probs(card, sequences), expected))
    passed = max(decoded + scored) < TOLERANCE and min(shares) >= SAME
    return {"passed": passed, "same_draws": min(shares), "decoded": max(decoded), "scored": max(scored)}


def torch_bfloat16(device: str, tiny: bool) -> dict[str, Any]:
    """In bfloat16: decoding against scoring within the gap that the package reports, and the card against the CPU.

    Both devices round, each in its own order, so the card is not to be further from float32 with the same weights than twice
    what the CPU is.
    """
    num_draws, num_tokens = sizes(tiny)
    found = dict.fromkeys(("reported_gap", "decoded_scored", "card_float32", "cpu_float32"), 0.0)
    passed = True
    for host, card in pairs(device, tiny).values():
        on_card, on_cpu = (bk.TorchLM(lm.module.to(torch.bfloat16), check=False) for lm in (card, host))
        drawn = decode((on_card,), PROMPTS, num_draws, num_tokens, np.random.default_rng(0))
        gap = scoring_gap(drawn, (on_card,), PROMPTS).max()
        scored, on_host = (log_probs(lm, drawn.sequences()) for lm in (on_card, on_cpu))
        exact = log_probs(bk.TorchLM(on_cpu.module.float(), check=False), drawn.sequences())
        decoded = furthest(drawn.log_probs.reshape(scored.shape), scored)
        errors = furthest(scored, exact), furthest(on_host, exact)
        passed = passed and decoded <= gap + 1e-9 and errors[0] <= 2 * errors[1] + TOLERANCE
        for name, value in zip(found, (gap, decoded, *errors), strict=True):
            found[name] = max(found[name], float(value))
    return {"passed": bool(passed), **found}


def static(device: str, tiny: bool) -> dict[str, Any]:
    """The static step, and on a card the recorded one, against the loop on the device."""
    num_draws, num_tokens = sizes(tiny)
    ways = ("static", "graph") if device == "cuda" else ("static",)
    shares, differences = [], []
    for _, card in pairs(device, tiny).values():
        with static_steps("loop"):
            loop = decode((card,), PROMPTS, num_draws, num_tokens, np.random.default_rng(0))
        for how in ways:
            with static_steps(how):
                found = decode((card,), PROMPTS, num_draws, num_tokens, np.random.default_rng(0))
            shares.append(same(found.tokens, loop.tokens))
            alike = (found.tokens == loop.tokens).all(axis=1)
            differences.append(furthest(found.log_probs[:, alike], loop.log_probs[:, alike]))
    passed = min(shares) >= SAME and max(differences) < TOLERANCE
    return {"passed": passed, "ways": "+".join(ways), "same_draws": min(shares), "log_probs": max(differences)}


def followed(
    device: str, tiny: bool, run: Callable[[bk.Posterior], tuple[np.ndarray, dict[str, np.ndarray]]], tolerance: float
) -> dict[str, Any]:
    """Compare what a run returns on both devices: its draws, and if these are the same, its numbers, relative to 1."""
    report: dict[str, Any] = {"passed": True, "same_draws": 1.0}
    for host, card in pairs(device, tiny).values():
        (tokens, expected), (others, found) = (run(posterior_of(lm, tiny)) for lm in (host, card))
        share = same(tokens, others)
        report["same_draws"] = min(report["same_draws"], share)
        report["passed"] = report["passed"] and share >= SAME
        for name, value in expected.items() if share == 1.0 else ():
            difference = furthest(found[name], value) / max(1.0, float(np.nanmax(np.abs(value))))
            report[name] = max(report.get(name, 0.0), difference)
            report["passed"] = report["passed"] and difference < tolerance
    return report


def smc(device: str, tiny: bool) -> dict[str, Any]:
    """Log evidence and weights of SMC."""

    def run(posterior: bk.Posterior) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        draws = bk.SMC(sizes(tiny)[0], ess_threshold=0.9).run(posterior, seed=0)
        return draws.tokens, {"log_evidence": draws.log_evidence, "log_weights": draws.log_weights}

    return followed(device, tiny, run, TOLERANCE)


def svi(device: str, tiny: bool) -> dict[str, Any]:
    """Two steps of SVI: ELBO, gradient and the guide's log-probs."""

    def run(posterior: bk.Posterior) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        fit = bk.SVI(2, sizes(tiny)[0], optimizer="adam", twist="none").fit(posterior, seed=0)
        drawn = decode((fit.guide,), PROMPTS, sizes(tiny)[0], posterior.max_new_tokens, np.random.default_rng(0))
        return drawn.tokens, {"elbo": fit.history["elbo"], "gradient": fit.history["gradient_norm"]}

    return followed(device, tiny, run, 10 * TOLERANCE)


def certify(device: str, tiny: bool) -> dict[str, Any]:
    """The bounds of a certificate, which join sampling, scoring and SMC."""
    sizes_ = (
        {"num_draws": 32, "num_runs": 4, "num_particles": 8}
        if tiny
        else {"num_draws": 64, "num_runs": 6, "num_particles": 16}
    )

    def run(posterior: bk.Posterior) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        policy = posterior.prior.copy()  # type: ignore[attr-defined]
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.mul_(0.9)
        found = bk.certify(posterior, policy, seed=0, **sizes_)
        finite = np.nan_to_num(found.log_evidence_bounds, posinf=0.0, neginf=0.0)
        return np.zeros((1, 1)), {"elbo": found.elbo, "log_evidence_bounds": finite}

    return followed(device, tiny, run, 10 * TOLERANCE)


def jax_lm(device: str, tiny: bool) -> dict[str, Any]:
    """JaxLM on the card against TorchLM on the CPU."""
    try:
        import jax
    except ImportError:
        return {"skipped": "jax is not installed"}
    platform = jax.devices()[0].platform
    if device == "cuda" and platform not in ("gpu", "cuda"):
        return {"skipped": f"jax sees no card, only {platform}"}
    num_draws, num_tokens = sizes(tiny)
    differences = []
    models = checked_models(tiny=tiny)
    for name in ("Llama",) if tiny else tuple(models):  # translating takes long
        host = bk.TorchLM(models[name])
        with tempfile.TemporaryDirectory() as folder:
            host.save_pretrained(Path(folder) / "model")
            with jax.default_matmul_precision("highest"):
                lm = bk.JaxLM.from_pretrained(Path(folder) / "model")
                drawn = decode((lm,), PROMPTS, num_draws, num_tokens, np.random.default_rng(0))
                sequences = drawn.sequences()
                scored = np.asarray(lm.token_log_probs(PROMPTS, sequences), dtype=np.float64).sum(axis=2)
        expected = log_probs(host, sequences)
        differences += [furthest(scored, expected), furthest(drawn.log_probs.reshape(expected.shape), expected)]
    return {"passed": max(differences) < TOLERANCE, "platform": platform, "log_probs": max(differences)}


CHECKS: dict[str, Callable[[str, bool], dict[str, Any]]] = {
    "TorchLM, float32": torch_float32,
    "TorchLM, bfloat16": torch_bfloat16,
    "static step": static,
    "SMC": smc,
    "SVI": svi,
    "certify": certify,
    "JaxLM": jax_lm,
}
