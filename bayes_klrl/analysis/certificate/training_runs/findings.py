"""What a policy's KL to the prior, its adapter and its trainer's log say together: three errors that no bound shows.

A certificate holds for the prior that was given. Whether that is the model which the policy was tuned from is another
question, and the commonest error: a policy tuned from an adapter of supervised fine-tuning is certified against the base
model, and most of its KL is that adapter's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bayes_klrl.analysis.certificate.training_runs.trainer_log import TrainerLog
from bayes_klrl.draws import Draws
from bayes_klrl.posterior import Posterior
from bayes_klrl.typing import LanguageModel

__all__ = ["findings"]

_SAME = 1e-5  # nats per completion, the rounding of float32
_OTHER_MODEL = 0.05  # nats per token that half precision does not explain
_FACTOR, _LEAST = 3.0, 0.05  # how far the KLs must be apart: three times, and 0.05 nats per token
_QUANTILE = 4.0
_REFERENCE = "reference"
_NOT_THE_PRIOR = "this is not the prior it was tuned from"


def findings(
    posterior: Posterior, policy: LanguageModel, draws: Draws, folder: Path | None, log: TrainerLog | None
) -> tuple[str, ...]:
    """Return what is wrong with the prior or the training, in words; nothing is said unless it is sure.

    Parameters
    ----------
    posterior
        The posterior of the certificate.
    policy, draws
        The policy, and its own equally weighted draws, (P, N).
    folder
        The folder that the policy was loaded from, for this certificate alone; None: it was not.
    log
        What its trainer logged; None: nothing.
    """
    if policy is posterior.prior:
        return ()
    found = []
    if unchanged(draws):
        found.append("nothing was learned: every draw of the policy has the prior's own probability")
    other = None if folder is None else other_reference(posterior, policy, draws, folder)
    other = other or (None if log is None else contradiction(draws, log))
    if other is not None:
        found.append(f"{_NOT_THE_PRIOR}: {other}")
    if log is not None and log.without_kl:
        found.append("it was trained with beta = 0 (rewards were logged, and no KL), for which no posterior exists")
    return tuple(found)


def unchanged(draws: Draws) -> bool:
    """Whether policy and prior give all draws the same probability, so that the KL between them is exactly 0."""
    with np.errstate(invalid="ignore"):  # a prior of -inf is not the policy's
        return bool((np.abs(draws.log_proposal - draws.log_prior) <= _SAME).all())


def other_reference(posterior: Posterior, policy: LanguageModel, draws: Draws, folder: Path) -> str | None:
    """Return which model an adapter was tuned from, if it is another than the prior; None if not, or if it is unknown.

    TRL keeps the adapter that a training went on from beside the policy, in "ref", and takes it as reference. Without one, the
    reference is the base under the adapter.
    """
    if not hasattr(policy, "module") or not hasattr(posterior.prior, "module"):
        return None
    module: Any = policy.module
    if not hasattr(module, "peft_config"):
        return None
    from bayes_klrl.models.torch_lm.adapters import quiet_peft

    reference = folder / "ref"
    if (reference / "adapter_config.json").is_file():
        with quiet_peft():  # beside the policy's own adapter, which is done with, and not on a second copy of the base
            module.load_adapter(str(reference), adapter_name=_REFERENCE)
        module.set_adapter(_REFERENCE)
        if differ(module, posterior, draws):
            return f"its trainer's reference is the adapter in {str(reference)!r}: load that as the prior"
        return None
    config = module.peft_config["default"]
    if getattr(config, "bias", "none") != "none" or getattr(config, "is_prompt_learning", False):
        return None  # then the base under it cannot be had by switching the adapter off
    with module.disable_adapter():
        if differ(module, posterior, draws):
            return f"its adapter was trained on {config.base_model_name_or_path!r}, whose log-probs are others"
    return None


def differ(module: Any, posterior: Posterior, draws: Draws) -> bool:
    """Whether a network gives the first draw of one of the first four prompts other log-probs than the prior's."""
    from bayes_klrl.models.torch_lm.self_check import apart, own_forward

    prior: Any = posterior.prior
    for p, prompt in enumerate(posterior.prompt_ids[:4]):
        if not prompt:  # no forward pass without a token
            continue
        read = draws.tokens[p, 0, : draws.lengths[p, 0] - 1].tolist()
        ours, theirs = (own_forward(each, list(prompt), read) for each in (module, prior.module))
        if float(apart(ours.cpu(), theirs.cpu()).max()) > _OTHER_MODEL:
            return True
    return False


def contradiction(draws: Draws, log: TrainerLog) -> str | None:
    """Return how the KL to the prior contradicts the logged KL; None if it does not, or if that cannot be known.

    Compared per token, as TRL logs it ("kl"), or per completion ("objective/kl"). Both ends are generous: prompts, lengths and
    a policy that is one update older explain some of a difference, but not three times.
    """
    log_ratio = draws.log_proposal - draws.log_prior
    if log.kl_name is None or not np.isfinite(log_ratio).all():
        return None
    logged = log.around(log.kl_name, log.step)
    if logged.size < 2:
        return None
    lengths = draws.lengths.astype(float) if log.kl_name == "kl" else np.ones(draws.shape)
    kl = log_ratio.mean() / lengths.mean()
    error = _QUANTILE * (log_ratio - kl * lengths).std() / np.sqrt(log_ratio.size) / lengths.mean()
    low, high = float(logged.min()), float(logged.max())
    if kl - error <= _FACTOR * max(high, 0.0) + _LEAST and kl + error >= low / _FACTOR - _LEAST:
        return None
    unit = "token" if log.kl_name == "kl" else "completion"
    return (
        f"the KL to it is {kl:.2g} nats per {unit}, and {low:.2g} to {high:.2g} were logged (or prompts or temperature are "
        "not those of the training)"
    )
