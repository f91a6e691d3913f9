"""Policies at an offset from a prior's parameters; a Bayesian policy is a distribution over such offsets.

    p_phi = the language model with parameters start + phi,     p_0 = the prior

phi is one flat vector over adapters, biases or all parameters. Its gradient flows through `torch.func.functional_call`, which
replaces the module's own parameters by start + phi during one call.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from bayes_klrl.errors import BayesKLRLError, CheckpointError
from bayes_klrl.models.ngram_lm.lm import NgramLM
from bayes_klrl.models.torch_lm.table import TableLM
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import Array, IntArray, LanguageModel, State, TokenIds

__all__ = ["OffsetFamily", "OffsetLM", "offset_family", "restored_family"]

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class OffsetFamily:
    """The family of all policies p_phi.

    Parameters
    ----------
    lm
        A frozen copy of the prior, with adapters added. It is p_0.
    start
        The parameters that phi is added to, by their names in `lm`'s module.
    adapters
        The names of those parameters that the prior does not have.
    """

    lm: Any
    start: Mapping[str, Tensor]
    adapters: frozenset[str] = frozenset()

    @property
    def module(self) -> nn.Module:
        """The torch module behind `lm`."""
        module: nn.Module = getattr(self.lm, "module", self.lm)
        return module

    @property
    def size(self) -> int:
        """D, the length of phi."""
        return sum(value.numel() for value in self.start.values())

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self.start.values())).device

    @property
    def prior_digest(self) -> str:
        """SHA-256 of the prior's own parameters: all parameters of `lm` at phi = 0, except those of adapters."""
        digest = hashlib.sha256()
        named = {name: self.start.get(name, value) for name, value in self.module.named_parameters()}
        for name in sorted(named.keys() - self.adapters):
            value = named[name].detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
            digest.update(value.flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def values(self, phi: Tensor) -> dict[str, Tensor]:
        """Return start + phi by name, in the parameters' own shapes and precision; differentiable."""
        parts = torch.split(phi, [value.numel() for value in self.start.values()])
        return {
            name: value + part.view(value.shape).to(value)
            for (name, value), part in zip(self.start.items(), parts, strict=True)
        }

    def at(self, phi: Tensor) -> OffsetLM:
        """Return p_phi, scoring differentiably in phi."""
        return OffsetLM(self, phi)

    @torch.no_grad()
    def policy(self, phi: Tensor) -> LanguageModel:
        """Return p_phi as a separate, frozen model: a `TorchLM` that shares the other weights, or an `NgramLM`."""
        from bayes_klrl.models.torch_lm.lm import TorchLM

        if isinstance(self.lm, TorchLM):
            policy: Any = shared(self.lm)
            module = policy.module
        else:
            policy = copy.deepcopy(self.lm)
            module = getattr(policy, "module", policy)
        own = dict(module.named_parameters())
        for name, value in self.values(phi).items():
            own[name].data = value.clone()
        return policy.to_ngram() if type(policy) is TableLM else policy


class OffsetLM:
    """p_phi as a `LanguageModel`, differentiable in phi; see there for the methods."""

    def __init__(self, family: OffsetFamily, phi: Tensor) -> None:
        self._family, self._lm = family, family.lm
        self._values = {f"inner.{name}": value for name, value in family.values(phi).items()}
        self._swapped = _Swapped(family.module)

    def __getattr__(self, name: str) -> Any:
        """Return the prior's attribute: vocabulary size, EOS ids, tokenizer and others."""
        return getattr(self.__dict__["_lm"], name)

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return self._family.device

    def prefill(self, prompts: Sequence[TokenIds]) -> State:
        """See `LanguageModel`."""
        return self._call(self._lm.prefill, prompts)

    def next_log_probs(self, state: State) -> Array:
        """See `LanguageModel`."""
        return self._call(self._lm.next_log_probs, state)

    def append(self, state: State, tokens: IntArray) -> State:
        """See `LanguageModel`."""
        return self._call(self._lm.append, state, tokens)

    def token_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> Tensor:
        """See `LanguageModel`; differentiable in phi."""
        return self._call(self._lm.token_log_probs, prompts, sequences)  # type: ignore[no-any-return]

    def _call(self, fn: Callable[..., Result], *arguments: Any) -> Result:
        """Return fn(*arguments), evaluated with the offset parameters in the module."""
        return torch.func.functional_call(self._swapped, self._values, (fn, *arguments))  # type: ignore[no-any-return]


class _Swapped(nn.Module):
    """A module whose forward calls any function, so that `functional_call` can replace the parameters during the call."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self.training = inner.training

    def forward(self, fn: Callable[..., Result], *arguments: Any) -> Result:
        return fn(*arguments)


def offset_family(prior: LanguageModel, parameters: Any) -> OffsetFamily:
    """Return the policies around a prior.

    Parameters
    ----------
    prior
        A `TorchLM`, an `NgramLM` (whose logits become a torch table), or a language model that is a torch module or has one as
        its attribute `module`.
    parameters
        The parameters that phi moves. "lora" or a `peft` configuration: adapters; "bias": all biases; "all": all parameters.

    Raises
    ------
    BayesKLRLError
        If the prior has no such parameters; the message names some that it has.
    """
    lm = _own_copy(prior, parameters)
    module = getattr(lm, "module", lm)
    named = dict(module.named_parameters())
    if parameters == "bias":
        chosen = [name for name in named if name.split(".")[-1] == "bias"]
    elif parameters == "all":
        chosen = list(named)
    else:
        chosen = [name for name, value in named.items() if value.requires_grad]
    if not chosen:
        raise BayesKLRLError(
            f"A {type(module).__name__} has no parameters for parameters={parameters!r} (it has {', '.join(list(named)[:3])}, "
            f"...). Use {_alternatives(prior)}."
        )
    module.requires_grad_(False)
    adapters = frozenset() if _known(parameters) else frozenset(chosen)
    return OffsetFamily(lm, {name: named[name].detach().clone() for name in chosen}, adapters)


def restored_family(
    prior: LanguageModel, parameters: Any, start: Mapping[str, Tensor], prior_digest: str
) -> OffsetFamily:
    """Return the family with saved start values, which include the random initial values of adapters."""
    family = offset_family(prior, parameters)
    found = {name: tuple(value.shape) for name, value in family.start.items()}
    given = {name: tuple(value.shape) for name, value in start.items()}
    if found != given:
        differing = sorted(set(found.items()) ^ set(given.items()))[0]
        raise CheckpointError(
            f"The saved policies are not of this prior: only one of the two has {differing[0]} of shape {differing[1]}. Load "
            "them with the posterior that they were fitted to."
        )
    if family.prior_digest != prior_digest:
        raise CheckpointError(
            "The saved policies are not of this prior: its weights are others, and the same offset gives another policy. "
            "Load them with the posterior that they were fitted to."
        )
    return replace(family, start={name: start[name].to(value) for name, value in family.start.items()})


def shared(lm: Any) -> Any:
    """Return a `TorchLM` with a copy of the module that shares the weights."""
    from bayes_klrl.models.torch_lm.adapters import shared_copy
    from bayes_klrl.models.torch_lm.lm import TorchLM

    module = shared_copy(lm.module).eval()
    return TorchLM(module, lm.tokenizer, eos_token_id=lm.eos_token_ids, temperature=lm.temperature)


def _own_copy(prior: Any, parameters: Any) -> Any:
    """Return the prior as a model whose parameters may be replaced."""
    from bayes_klrl.models.torch_lm.lm import TorchLM

    known = _known(parameters)
    if isinstance(prior, TorchLM):
        return shared(prior) if known else prior.with_adapter(parameters)
    if not known:
        raise BayesKLRLError(
            f"Adapters (parameters={parameters!r}) are for a bk.TorchLM; the prior is a {type(prior).__name__}. Use "
            f"{_alternatives(prior)}."
        )
    if isinstance(prior, NgramLM):
        return TableLM(prior)
    if not isinstance(getattr(prior, "module", prior), nn.Module):
        raise BayesKLRLError(
            f"A Bayesian policy needs a prior with torch parameters (a bk.TorchLM, a bk.NgramLM, or a language model that is "
            f"a torch module); got a {type(prior).__name__}."
        )
    return copy.deepcopy(prior)


def _known(parameters: Any) -> bool:
    """Return whether these are parameters that the prior itself has."""
    return isinstance(parameters, str) and parameters in ("bias", "all")


def _alternatives(prior: Any) -> str:
    """Return the possible values of `parameters` for an error message."""
    from bayes_klrl.models.torch_lm.lm import TorchLM

    return 'parameters="lora" or "all"' if isinstance(prior, TorchLM) else 'parameters="all"'
