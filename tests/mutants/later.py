"""Mutants of the self-check, of saving and of training: traps that were found from outside (theory.md 9.6, 9.35, 2.14)."""

from __future__ import annotations

from tests.mutants.table import Mutant

__all__ = ["LATER"]

_CHECK = "tests/models/torch_lm/test_self_check.py"
_SAVING = "tests/models/torch_lm/test_saving.py"
_STATE = "tests/inference/svi/test_training_state.py"

LATER: tuple[Mutant, ...] = (
    Mutant(
        "the self-check looks at one path only",
        "models/torch_lm/self_check.py",
        "return max(found, key=lambda one: one.nats)",
        "return found[1]",
        (f"{_CHECK}::test_what_sees_later_tokens_is_refused[roformer]",),
    ),
    Mutant(
        "virtual tokens do not count in the context",
        "models/torch_lm/network.py",
        "return max(1, min(limits) - num_virtual_tokens(module)) if limits else None",
        "return min(limits) if limits else None",
        (f"{_CHECK}::test_virtual_tokens_count_in_the_context[default]",),
    ),
    Mutant(
        "EOS ids of the configuration alone",
        "models/checkpoint_files.py",
        "for entry in known for token in entry)",
        "for entry in known[:1] for token in entry)",
        (f"{_CHECK}::test_eos_ids_of_both_configurations[TorchLM]",),
    ),
    Mutant(
        "adapters with biases share the prior's weights",
        "models/torch_lm/adapters.py",
        'getattr(config, "bias", "none") == "none"',
        "True",
        (f"{_SAVING}::test_an_adapter_never_changes_the_prior[biases]",),
    ),
    Mutant(
        "the advantage forgets the token's own log-ratio",
        "inference/svi/objectives/critics.py",
        "after) - values - log_ratio, 0.0)",
        "after) - values, 0.0)",
        (
            "tests/inference/svi/test_objectives.py::test_advantages_are_sums_of_temporal_differences",
            "tests/inference/svi/test_objectives.py::"
            "test_with_lambda_1_the_gradient_is_the_elbos_whatever_the_critic[any twist]",
        ),
    ),
    Mutant(
        "a checkpoint without the random state",
        "inference/svi/pyro_backend/training.py",
        'torch.set_rng_state(arrays["random"].cpu())',
        "pass",
        (f"{_STATE}::test_a_training_that_goes_on_ends_as_if_nothing_had_happened[adam-table]",),
    ),
    Mutant(
        "a checkpoint without the critic",
        "inference/svi/pyro_backend/training.py",
        'for owner, name in ((self.critic, "critic."), (self.elbo, "loss.")):',
        'for owner, name in ((self.elbo, "loss."),):',
        (f"{_STATE}::test_a_training_that_goes_on_ends_as_if_nothing_had_happened[kl_sgd and critic-table]",),
    ),
)
