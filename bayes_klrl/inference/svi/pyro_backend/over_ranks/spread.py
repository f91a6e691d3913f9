"""Models whose parameters are spread over the ranks (FSDP), for those that do not fit on one device.

`fully_shard` of torch cuts every parameter into W parts; a block of the model has all of its own while it is computed, and
one part of W at other times. So each call of the model is one that all ranks make together, and they must make as many:

* in scoring, every rank scores the same number of rows of the same largest length, some of them for nothing;
* in decoding, a rank whose completions have ended calls the model on one token until those of all have.

The model's own forward is called: the tight network reads weights that are not there. Gradients and optimizer states are
spread like the parameters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.pyro_backend.over_ranks.rows import SharedLM
from bayes_klrl.inference.svi.ranks.group import Ranks
from bayes_klrl.models.torch_lm.network import base_model
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import FloatArray, IntArray, LanguageModel, TokenIds

__all__ = ["SpreadLM", "spread_like", "whole_tensor", "write_whole_guide"]


class SpreadLM(SharedLM):
    """A copy of a `TorchLM` whose parameters are spread over the ranks.

    Parameters
    ----------
    lm
        The model; it stays whole.
    ranks
        The group.

    Raises
    ------
    BayesKLRLError
        If the model is no `TorchLM`, or has no list of blocks.
    """

    def __init__(self, lm: LanguageModel, ranks: Ranks) -> None:
        from bayes_klrl.models.torch_lm.adapters import duplicated  # with transformers, which tables do without
        from bayes_klrl.models.torch_lm.general.blocks import blocks_of
        from bayes_klrl.models.torch_lm.lm import TorchLM

        if not isinstance(lm, TorchLM):
            raise BayesKLRLError(
                f"FSDP spreads the parameters of a bk.TorchLM; a {type(lm).__name__} has none to spread. Start the ranks "
                "without FSDP: each then has a copy of the model."
            )
        module = duplicated(lm.module, {})
        for part in (*blocks_of(module), module):
            ranks.fully_shard(part)
        spread = lm._with_module(module, check=False)
        spread.free_bytes = _unknown  # type: ignore[method-assign]  # what is free differs from rank to rank
        super().__init__(spread, ranks)
        self._in_decoding = self._at_work = False
        module.register_forward_pre_hook(self._before_call, prepend=True)

    def drawn_tokens(self, prompt_ids: Sequence[TokenIds], uniforms: FloatArray) -> IntArray:
        """See `SharedLM.drawn_tokens`."""
        self._in_decoding = True
        return super().drawn_tokens(prompt_ids, uniforms)

    @contextmanager
    def working(self) -> Iterator[None]:
        """See `SharedLM.working`: in decoding, go on calling the model until all ranks are done."""
        if not self._in_decoding:
            yield
            return
        self._at_work = True
        try:
            yield
        finally:
            self._in_decoding = self._at_work = False
            while self.ranks.any(False):
                self._call_for_others()

    def evened(self, sequences: Sequences, rows: slice) -> Sequences:
        """See `SharedLM.evened`: as many rows on every rank, and one of each prompt's largest length."""
        most = -(-sequences.tokens.shape[1] // self.ranks.size)
        index = np.resize(np.arange(rows.start, rows.stop), most)
        prompts, longest = np.arange(len(sequences.lengths)), sequences.lengths.argmax(axis=1)
        tokens = np.concatenate([sequences.tokens[:, index], sequences.tokens[prompts, longest][:, None]], axis=1)
        lengths = np.concatenate([sequences.lengths[:, index], sequences.lengths[prompts, longest][:, None]], axis=1)
        return Sequences(tokens, lengths)

    def _before_call(self, *_: object) -> None:
        """Tell the others that this rank calls the model once more."""
        if self._at_work:
            self.ranks.any(True)

    @torch.no_grad()
    def _call_for_others(self) -> None:
        module: Any = self.whole.module  # type: ignore[attr-defined]
        token = torch.zeros((1, 1), dtype=torch.long, device=self.whole.device)  # type: ignore[attr-defined]
        inputs = {"input_ids": token}
        if base_model(module).config.is_encoder_decoder:
            inputs["decoder_input_ids"] = token
        module(**inputs)


def _unknown() -> None:
    """Return that it is not known how much memory is free."""


def whole_tensor(tensor: Any) -> Tensor:
    """Return a tensor of which every rank has a part, whole and on the host; one that is not spread as it is.

    All ranks call it together.
    """
    found: Tensor = tensor.full_tensor().cpu() if hasattr(tensor, "full_tensor") else tensor
    return found


@torch.no_grad()
def spread_like(tensor: Tensor, pattern: Any) -> Tensor:
    """Return this rank's view of a whole tensor, spread as `pattern` is; as it is where `pattern` is not spread."""
    if not hasattr(pattern, "full_tensor"):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    found: Tensor = distribute_tensor(tensor.to(pattern.device), pattern.device_mesh, pattern.placements)
    return found


@torch.no_grad()
def write_whole_guide(spread: Iterable[Tensor], whole: Iterable[Tensor]) -> None:
    """Write trained parameters that are spread into those of a whole model, on every rank."""
    for part, parameter in zip(spread, whole, strict=True):
        parameter.copy_(whole_tensor(part.detach()))
