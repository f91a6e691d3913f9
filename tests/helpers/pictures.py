"""For tests of pictures: the size of a PNG, two small posteriors, and draws of every odd kind."""

import struct
from dataclasses import replace
from pathlib import Path

import numpy as np

import bayes_klrl as bk

_TABLE = np.log([[0.5, 0.3, 0.2], [0.2, 0.5, 0.3], [0.4, 0.4, 0.2]])
_LM = bk.NgramLM(_TABLE, eos_token_id=2)
_LONG = bk.TokenReward(lambda tokens, lengths: lengths + 0.1 * tokens[:, 0], alpha=0.7)
_LEAST = float(np.nextafter(0, 1))

ONE = bk.Posterior(_LM, _LONG, prompts=[[0]], max_new_tokens=4)
TWO = bk.Posterior(_LM, _LONG, prompts=[[0], [1]], max_new_tokens=4)


def png_size(file: Path) -> tuple[int, int]:
    """Width and height in pixels, from the header."""
    head = file.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def odd_draws() -> dict[str, bk.Draws]:
    """Draws of two prompts that a picture must cope with: without weight, constant, impossible, single, hardly any ESS."""
    draws = bk.ImportanceSampling(20).run(TWO, seed=0)
    return {
        "dead": _dead(draws, 0, 1),
        "half": _dead(draws, 1),
        "constant": replace(draws, reward=np.ones(draws.shape), log_weights=np.zeros(draws.shape)),
        "hard": replace(draws, reward=np.full(draws.shape, -np.inf), elbo=np.full(2, -np.inf)),
        "single": bk.ImportanceSampling(1).run(TWO, seed=0),
        "tiny": replace(draws, ess=np.full(2, _LEAST)),
    }


def _dead(draws: bk.Draws, *prompts: int) -> bk.Draws:
    """The draws, of which some prompts have no positive weight."""
    arrays = {name: getattr(draws, name).copy() for name in ("log_weights", "log_evidence", "elbo", "ess")}
    for name, value in (("log_weights", -np.inf), ("log_evidence", -np.inf), ("elbo", -np.inf), ("ess", 0.0)):
        arrays[name][list(prompts)] = value
    return replace(draws, **arrays, log_evidence_se=np.full(draws.shape[0], np.inf))
