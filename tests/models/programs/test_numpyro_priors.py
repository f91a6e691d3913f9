"""NumPyro programs of priors of every kind: a user's own model, a torch model, a JAX model; and no NumPyro at all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from numpyro.infer import SVI, Predictive
from numpyro.infer.util import log_density

import bayes_klrl as bk
from bayes_klrl.inference.svi.numpyro_backend.elbo import LeaveOneOutELBO
from tests.helpers.user_models import RecurrentLM
from tests.models.programs.engines import sequences_of

pytestmark = pytest.mark.slow


def test_a_users_own_model_and_a_torch_model_are_priors_too() -> None:
    from tests.helpers.tiny_models import tiny_gpt2, tiny_tokenizer

    torch_lm = bk.TorchLM(tiny_gpt2(), tiny_tokenizer())
    text = bk.Reward(lambda completions: [float(len(c)) for c in completions], alpha=1.0)
    tokens = bk.TokenReward(lambda tokens, lengths: (tokens == 1).sum(axis=1), alpha=1.0)
    for prior, likelihood in ((RecurrentLM(), tokens), (torch_lm, text)):
        posterior = bk.Posterior(prior, likelihood, prompts=[[1, 2], [2]], max_new_tokens=3)
        found = Predictive(posterior.numpyro_model(), num_samples=20, parallel=True)(jax.random.key(0))
        drawn = sequences_of(posterior, found["x"])
        np.testing.assert_allclose(np.asarray(found["reward"]).T, posterior.reward(drawn), atol=1e-6)
        joint = jax.jit(lambda x, model: log_density(model, (), {}, {"x": x})[0], static_argnums=1)
        for n in range(3):
            one = bk.Sequences(drawn.tokens[:, n : n + 1], drawn.lengths[:, n : n + 1])
            expected = posterior.log_joint(one).sum()
            assert float(joint(found["x"][n], posterior.numpyro_model())) == pytest.approx(expected, abs=1e-4)


def test_a_jax_model_with_a_tokenizer_prompts_of_any_length_and_a_text_reward() -> None:
    from tests.helpers.tiny_models import tiny_gpt2, tiny_tokenizer
    from tests.models.jax_lm.test_lm import jax_lm_of
    from tests.models.torch_lm.test_lm import all_completions

    plain = jax_lm_of(tiny_gpt2())
    lm = bk.JaxLM(plain.parameters, plain._config, tiny_tokenizer(), temperature=1.3)
    reward = bk.Reward(
        lambda completions, prompts: [c.count("a") - len(p) for c, p in zip(completions, prompts, strict=True)],
        alpha=0.7,
    )
    posterior = bk.Posterior(lm, reward, prompts=["a b c", "d", "b b"], max_new_tokens=4)
    model = posterior.numpyro_model()
    found = Predictive(model, num_samples=30, parallel=True)(jax.random.key(0))
    drawn = sequences_of(posterior, found["x"])
    np.testing.assert_allclose(np.asarray(found["reward"]).T, posterior.reward(drawn), atol=1e-6)
    joint = jax.jit(jax.vmap(lambda x: log_density(model, (), {}, {"x": x})[0]))(found["x"])
    np.testing.assert_allclose(joint, posterior.log_joint(drawn).sum(axis=0), atol=1e-4)
    guide = posterior.numpyro_guide(lm.copy())
    svi = SVI(model, guide, optax.adam(1e-2), LeaveOneOutELBO(16))
    result = svi.run(jax.random.key(0), 60, progress_bar=False)
    assert np.mean(result.losses[-10:]) < np.mean(result.losses[:5]) - 0.3
    trained = guide.language_model(result.params)
    assert trained.tokenizer is lm.tokenizer
    assert trained.temperature == 1.3
    everything = all_completions(lm, 3, 4)  # type: ignore[arg-type]
    log_joint = posterior.log_joint(everything)
    log_qs = [np.asarray(q.token_log_probs(posterior.prompt_ids, everything)).sum(axis=2) for q in (lm, trained)]
    elbos = [(np.exp(log_q) * (log_joint - log_q)).sum(axis=1).mean() for log_q in log_qs]
    assert elbos[1] > elbos[0] + 0.1


def test_a_missing_numpyro_is_named_with_its_cure() -> None:
    code = """
import sys, numpy as np, bayes_klrl as bk
sys.modules["numpyro"] = None
prior = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
posterior = bk.Posterior(prior, bk.TokenReward(lambda tokens, lengths: lengths, alpha=1.0), max_new_tokens=3)
for build in (posterior.numpyro_model, lambda: posterior.numpyro_guide(prior)):
    try:
        build()
    except ImportError as error:
        print(error)
"""
    root = Path(__file__).parents[3]
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    assert run.stdout.count("needs the package numpyro: pip install 'bayes_klrl[jax]'") == 2
