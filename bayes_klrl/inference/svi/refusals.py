"""Errors that SVI raises on every backend: an adapter on the wrong model, an unbounded loss, programs that do not match."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bayes_klrl.batch import completion_texts
from bayes_klrl.errors import BayesKLRLError, UnboundedLossError
from bayes_klrl.typing import LanguageModel, TokenIds

__all__ = ["check_same_latents", "completion_text", "no_adapter", "no_density", "no_other_alpha", "unbounded_loss"]


def no_adapter(prior: LanguageModel, adapter: object) -> None:
    """Refuse an adapter for a model that cannot have one."""
    if adapter is not None:
        raise BayesKLRLError(
            f"Adapters are for a bk.TorchLM; the prior is a {type(prior).__name__}. Leave the adapter out."
        )


def no_other_alpha() -> BayesKLRLError:
    """Return the error about an alpha that is to change on JAX."""
    return BayesKLRLError(
        "Alphas that change (AnnealedAlpha, AdaptiveAlpha) are for priors on torch: on JAX a step is compiled for one alpha. "
        "Use a bk.TorchLM, or choose alpha by bk.frontier before the training."
    )


def unbounded_loss(completion: str, what: str = "likelihood") -> UnboundedLossError:
    """Return the error about a completion that the guide drew, and whose likelihood (or other probability) is 0."""
    cure = "Relax the constraint: a reward of alpha * log(eps) instead of -inf (say eps = 1e-3), or use bk.SMC."
    if what == "prior probability":
        cure = "Start the guide as a copy of the prior, which never draws what the prior cannot."
    return UnboundedLossError(
        f"The guide drew the completion {completion}, whose {what} is 0, so its ELBO is -inf and has no gradient. {cure}"
    )


def no_density(name: str, log_prob: float, completion: str) -> BayesKLRLError:
    """Return the error about a log-prob of site `name` that is -inf, inf or NaN where the guide drew a completion."""
    if log_prob == float("-inf"):
        names = {"likelihood": "likelihood", "x": "prior probability"}
        return unbounded_loss(completion, names.get(name, f"probability at the site {name!r}"))
    return BayesKLRLError(
        f"The log-prob of site {name!r} is {log_prob} for the completion {completion}; a log-density is finite or -inf."
    )


def check_same_latents(model: Mapping[str, Any], guide: Mapping[str, Any]) -> None:
    """Refuse programs that do not draw the same latents; sites are given by name, as the traces of Pyro and NumPyro have them.

    Raises
    ------
    BayesKLRLError
        If a site, auxiliary ones apart, is drawn by the guide only, or not drawn by the guide; it is named.
    """
    for name, site in guide.items():
        latent = name in model and not model[name]["is_observed"]
        if not latent and not site["infer"].get("is_auxiliary"):
            raise BayesKLRLError(
                f"The guide draws {name!r}, which is no latent site of the model: its log-density would not be balanced. "
                "Add it to the model, or mark it with infer={'is_auxiliary': True}."
            )
    for name, site in model.items():
        if name not in guide and not site["is_observed"]:
            raise BayesKLRLError(
                f"The model has a latent site {name!r} that the guide does not draw, so there is no density to weigh it "
                "with. Draw it in the guide too."
            )


def completion_text(lm: LanguageModel, ids: Sequence[int], prompt: TokenIds = ()) -> str:
    """Return the words by which an error names a completion: its text after the prompt, if there is one, and its ids."""
    if lm.tokenizer is None:
        return f"with ids {ids}"
    return f"{completion_texts(lm, [prompt], [ids])[0]!r} (ids {ids})"
