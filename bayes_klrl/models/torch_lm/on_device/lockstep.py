"""Drawing the rest of independent completions on the device, instead of the step loop of `models/decoding.py`.

That loop brings every token to the host. A small kernel takes less time than such a round trip, so a card would mostly wait.
Here tokens, log-probs and the question which rows have ended stay on the device. The uniforms go there in one transfer before
the first token. The host looks at the ended rows every `LOOK_EVERY` tokens: it stops when all have ended, and goes on with the
others in a smaller batch when fewer than half are left. The tokens are those that the step loop would draw, up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayes_klrl.arrays import to_device, to_host
from bayes_klrl.models.token_ids import check_length
from bayes_klrl.models.torch_lm.on_device.drawing import drawn_and_scored
from bayes_klrl.models.torch_lm.on_device.static_step import StaticStep, chosen_step, stepper
from bayes_klrl.models.torch_lm.tight import TightNetwork
from bayes_klrl.typing import FloatArray, IntArray

__all__ = ["LOOK_EVERY", "Batch", "TorchLockstep", "lockstep_of"]

LOOK_EVERY = 16
"""Number of tokens after which the host asks which rows have ended. More would waste steps after the last end, of which there
are LOOK_EVERY / 2 on average."""

MAX_SHARING = 4
"""The step loop computes a prefix once for all rows that share it. This loop takes over if at most this number of rows, on
average, share a prefix."""

CHEAP_STEP = 2**33
"""Up to this number of rows x parameters a step of a card takes no longer than a round trip, and sharing saves nothing. This
is an estimate from the arithmetic of a card, 17 GFLOP, and not a measurement."""


@dataclass(eq=False)
class Batch:
    """The rows that are still drawn: M rows of the R completions.

    Parameters
    ----------
    caches
        The cache of each model's network, without the newest tokens.
    newest
        The newest token of each row, (M,).
    going
        True for rows that have not ended, (M,).
    index
        The completion that each row is, (M,); None: all of them, in order.
    """

    caches: list[Any]
    newest: Tensor
    going: Tensor
    index: Tensor | None = None

    def rows_of(self, whole: Tensor) -> Tensor:
        """Return what belongs to the rows, of an array over all completions (..., R)."""
        return whole if self.index is None else whole[..., self.index]


@dataclass(frozen=True, eq=False)
class TorchLockstep:
    """See `Lockstep`; for `TorchLM`s on one accelerator.

    Parameters
    ----------
    models
        The models; the first one draws.
    """

    models: Sequence[Any]

    bounds_tables = True
    """Tables (R, V) are made in passes here, so that the rows need not be drawn in parts."""

    def is_faster(self, num_rows: int, num_prefixes: int) -> bool:
        """See `Lockstep`."""
        num_parameters = sum(each.numel() for model in self.models for each in model.module.parameters())
        return num_rows <= MAX_SHARING * num_prefixes or num_rows * num_parameters <= CHEAP_STEP

    @torch.no_grad()
    def __call__(
        self, states: Sequence[Any], state_rows: IntArray, newest: IntArray, uniforms: FloatArray
    ) -> tuple[IntArray, FloatArray, int]:
        """See `Lockstep`."""
        num_tokens, num_rows = uniforms.shape
        for model, state in zip(self.models, states, strict=True):
            if not model.prompt_apart:
                check_length(int(state.num_tokens[state_rows].max()) + num_tokens, model.context_length)
            if model.module.training:
                model.module.eval()
        device = self.models[0].device
        networks = [state.network for state in states]
        eos = to_device(np.array(sorted(self.models[0].eos_token_ids), dtype=np.int64), device)
        columns = to_device(uniforms.astype(np.float32), device)
        owners = to_device(state_rows, device)
        caches = [with_room(state.network, state.cache, owners, num_tokens) for state in states]
        first = to_device(newest, device)
        how = chosen_step()
        if how not in (None, "loop") and all(isinstance(network, TightNetwork) for network in networks):
            step = StaticStep(self.models, networks, caches, first, columns, eos)
            return self._by_static_steps(step, stepper(step, str(how)))
        batch = Batch(caches, first, torch.ones(num_rows, dtype=torch.bool, device=device))
        tokens = torch.zeros((num_tokens, num_rows), dtype=torch.long, device=device)
        log_probs = torch.zeros((len(states), num_rows), dtype=torch.float64, device=device)
        model_tokens = 0
        for t in range(num_tokens):
            if t and t % LOOK_EVERY == 0:
                going = to_host(batch.going)  # the host waits
                if not going.any():
                    break
                if 2 * going.sum() < going.size:
                    batch = fewer(batch, networks, to_device(np.flatnonzero(going), device), num_tokens - t)
            features = self.advanced(networks, batch)
            drawn, scores = drawn_and_scored(networks, self.models, features, batch.rows_of(columns[t]))
            scores = scores.double().masked_fill(~batch.going, 0.0)
            if batch.index is None:
                tokens[t] = drawn
                log_probs += scores
            else:
                tokens[t, batch.index] = drawn
                log_probs[:, batch.index] += scores
            model_tokens += len(states) * len(drawn)
            batch.newest, batch.going = drawn, batch.going & ~torch.isin(drawn, eos)
        host_tokens: IntArray = to_host(tokens.T)
        return host_tokens, to_host(log_probs), model_tokens

    def _by_static_steps(self, step: StaticStep, one_more: Callable[[], None]) -> tuple[IntArray, FloatArray, int]:
        """Return the same by steps over caches of a fixed size; all rows go on until all have ended."""
        num_tokens, num_rows = step.tokens.shape
        taken = 0
        while taken < num_tokens and (not taken or taken % LOOK_EVERY or bool(step.going.any())):
            one_more()
            taken += 1
        host_tokens: IntArray = to_host(step.tokens.T)
        return host_tokens, to_host(step.log_probs), len(self.models) * num_rows * taken

    def advanced(self, networks: Sequence[Any], batch: Batch) -> list[Tensor]:
        """Feed the newest tokens, and return the features that predict the next ones under each model, (M, F)."""
        found = []
        for i, network in enumerate(networks):
            features, batch.caches[i] = network.step(batch.caches[i], batch.newest)
            found.append(features)
        return found


def fewer(batch: Batch, networks: Sequence[Any], kept: Tensor, num_tokens: int) -> Batch:
    """Return a batch of some of the rows, with room for so many more tokens."""
    caches = [with_room(*pair, kept, num_tokens) for pair in zip(networks, batch.caches, strict=True)]
    index = kept if batch.index is None else batch.index[kept]
    return Batch(caches, batch.newest[kept], batch.going[kept], index)


def with_room(network: Any, cache: Any, rows: Tensor, num_tokens: int) -> Any:
    """Return the cache of the given rows, with room for so many more tokens where the network can make it beforehand."""
    roomy = getattr(network, "select_with_room", None)
    return network.select(cache, rows) if roomy is None else roomy(cache, rows, num_tokens)


def lockstep_of(models: Sequence[Any], kind: type) -> TorchLockstep | None:
    """Return the lockstep of models of this kind that are on one accelerator with float64; None for others."""
    if not all(isinstance(model, kind) for model in models):
        return None
    devices = {model.device for model in models}
    elsewhere = () if chosen_step() is not None else ("cpu",)  # a test of what a card would do
    return (
        TorchLockstep(models) if len(devices) == 1 and devices.pop().type not in (*elsewhere, "mps", "meta") else None
    )
