"""Drawing on a device: the tokens of the step loop, and how often the host waits.

The loop on the device runs on the CPU inside of `static_steps`; its transfers are counted on a card that is pretended.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import bayes_klrl as bk
from bayes_klrl.models import passes
from bayes_klrl.models.decoding import Decoding, decode, decode_by
from bayes_klrl.models.torch_lm.on_device import drawing, lockstep_of, static_steps
from bayes_klrl.models.torch_lm.on_device import lockstep as lockstep_module
from bayes_klrl.models.torch_lm.tight import forward as tight_forward
from tests.helpers.tiny_models import tiny_gpt2, tiny_llama, tiny_other

PROMPTS = [[1, 2, 3], [4], [2, 2]]
ROOT = Path(__file__).parents[3]

CASES: dict[str, dict[str, Any]] = {
    "none ends": {"eos": (), "num_draws": 5},
    "some end": {"eos": (0,), "num_draws": 40},
    "most end early": {"eos": tuple(range(15)), "num_draws": 60},
    "all end at once": {"eos": tuple(range(50)), "num_draws": 4},
    "one row": {"eos": (0,), "num_draws": 1, "prompts": [[3, 1]]},
    "one token": {"eos": (0,), "num_draws": 7, "num_tokens": 1},
    "tempered": {"eos": (0, 1), "num_draws": 20, "temperature": 1.7},
    "tables in passes": {"eos": (0,), "num_draws": 20, "floats": 300},
    "long": {"eos": (0,), "num_draws": 6, "num_tokens": 100},
}


def models_of(build: Any, eos: tuple[int, ...], temperature: float) -> tuple[bk.TorchLM, bk.TorchLM]:
    length = {"n_positions": 128} if build is tiny_gpt2 else {"max_position_embeddings": 128}
    found = [bk.TorchLM(build(50, seed=seed, **length), eos_token_id=eos, temperature=temperature) for seed in (0, 1)]
    return found[0], found[1]


def by_steps(models: Any, prompts: list[list[int]], uniforms: np.ndarray) -> Decoding:
    decoding = Decoding(models, prompts, uniforms.shape[1] // len(prompts), len(uniforms))
    while not decoding.done:
        decoding.step(uniforms[decoding.step_count])
    return decoding


@pytest.mark.slow
@pytest.mark.parametrize("how", ["loop", "static"])
@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama], ids=["gpt2", "llama"])
@pytest.mark.parametrize("case", CASES)
def test_the_device_draws_what_steps_draw(case: str, build: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"temperature": 1.0, "prompts": PROMPTS, "num_tokens": 40} | CASES[case]
    if "floats" in options:
        for name in ("MOST_FLOATS", "FLOATS_PER_PASS"):
            monkeypatch.setattr(passes, name, options["floats"])
        monkeypatch.setattr(drawing, "FLOATS_PER_PASS", options["floats"])
    models = models_of(build, options["eos"], options["temperature"])
    rng = np.random.default_rng(3)
    uniforms = rng.random((options["num_tokens"], len(options["prompts"]) * options["num_draws"]))
    steps = by_steps(models, options["prompts"], uniforms)
    with static_steps(how):
        found = decode_by(models, options["prompts"], uniforms)
    assert isinstance(found, Decoding)
    np.testing.assert_array_equal(found.tokens, steps.tokens)
    np.testing.assert_array_equal(found.lengths, steps.lengths)
    np.testing.assert_allclose(found.log_probs, steps.log_probs, rtol=0, atol=1e-4)
    assert found.done


@pytest.mark.parametrize("model", ["opt", "mamba"])
def test_a_general_network_is_drawn_from_in_the_loop(model: str) -> None:
    lm = bk.TorchLM(tiny_other(model, 50))
    uniforms = np.random.default_rng(0).random((20, 12))
    steps = by_steps((lm,), PROMPTS, uniforms)
    for how in ("loop", "static"):  # there is no static step for it
        with static_steps(how):
            found = decode_by((lm,), PROMPTS, uniforms)
        np.testing.assert_array_equal(found.tokens, steps.tokens)
        np.testing.assert_allclose(found.log_probs, steps.log_probs, rtol=0, atol=1e-4)


def test_rows_that_have_ended_are_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch shrinks where most rows have ended, and nothing is computed once all have."""
    monkeypatch.setattr(lockstep_module, "LOOK_EVERY", 4)
    models = models_of(tiny_llama, tuple(range(15)), 1.0)
    sizes: list[int] = []
    plain = tight_forward.TightNetwork.step
    monkeypatch.setattr(
        tight_forward.TightNetwork,
        "step",
        lambda self, cache, tokens: sizes.append(len(tokens)) or plain(self, cache, tokens),  # type: ignore[func-returns-value]
    )
    with static_steps("loop"):
        found = decode(models[:1], PROMPTS, 40, 60, np.random.default_rng(0))
    assert sizes[0] <= 120
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < sizes[0] / 2
    assert len(sizes) <= found.lengths.max() + 4 < 60


def test_on_the_cpu_steps_are_taken() -> None:
    models = models_of(tiny_gpt2, (), 1.0)
    assert lockstep_of(models, bk.TorchLM) is None
    with static_steps("loop"):
        assert lockstep_of(models, bk.TorchLM) is not None
        assert lockstep_of([*models, bk.NgramLM(np.zeros(50) - np.log(50), eos_token_id=0)], bk.TorchLM) is None
        with pytest.raises(bk.BayesKLRLError, match=r"graph.*got 'quickly'"), static_steps("quickly"):
            pass
    with static_steps("graph"), pytest.raises(bk.BayesKLRLError, match="needs a model on a CUDA card"):
        decode(models, PROMPTS, 4, 4, np.random.default_rng(0))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")
def test_the_static_step_can_be_translated(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one graph, without a break; that the compiler of this machine takes it is tried by `benchmarks/gpu.sh`."""
    whole = partial(torch.compile, backend="aot_eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", whole)
    models = models_of(tiny_llama, (0,), 1.0)
    uniforms = np.random.default_rng(3).random((12, 9))
    steps = by_steps(models[:1], PROMPTS, uniforms)
    with static_steps("compile"):
        found = decode_by(models[:1], PROMPTS, uniforms)
    torch.compiler.reset()
    np.testing.assert_array_equal(found.tokens, steps.tokens)
    np.testing.assert_allclose(found.log_probs, steps.log_probs, rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def card() -> dict[str, Any]:
    """What `on_card` counted."""
    command = [sys.executable, "-W", "error", "-m", "tests.models.torch_lm.on_card"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found: dict[str, Any] = json.loads(run.stdout)
    return found


@pytest.mark.slow
def test_on_a_card_everything_is_where_it_must_be_and_the_numbers_are_those_of_the_cpu(card: dict[str, Any]) -> None:
    """A tensor on the wrong device is an error there, as on a real card."""
    for name, counted in card.items():
        assert counted.get("difference", 0.0) < 1e-4, name


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_the_host_waits_for_no_token_in_sampling(family: str, card: dict[str, Any]) -> None:
    """Once for the first token, once for what was drawn, once for its log-probs, and every 16 tokens for what has ended."""
    assert card[f"{family}: sampling of 12"]["waits"] == 3
    assert card[f"{family}: sampling of 40"]["waits"] == 3 + 39 // 16
    assert card[f"{family}: sampling of 40"]["sends"] == card[f"{family}: sampling of 12"]["sends"] <= 14
    assert card[f"{family}: an item in the loop"]["waits"] == 3 + 39 // 16 + 39  # the count can fail


@pytest.mark.slow
def test_the_host_waits_once_for_each_token_of_smc(card: dict[str, Any]) -> None:
    """The log-probs of all models come with the token, because weights are NumPy's."""
    assert card["gpt2: SMC of 12"]["waits"] == card["llama: SMC of 12"]["waits"] == 12
    assert card["llama: SMC with a proposal of 12"]["waits"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_step_of_svi_waits_as_often_whatever_the_length(family: str, card: dict[str, Any]) -> None:
    """Three for the draws, one for each of three passes of scores, and the numbers that a step reports."""
    assert card[f"{family}: scores of 12"]["waits"] == 1
    assert card[f"{family}: step of SVI of 8"]["waits"] == card[f"{family}: step of SVI of 16"]["waits"] <= 26
