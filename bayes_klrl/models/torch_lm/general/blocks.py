"""Gradient checkpointing: the activations inside each block of a model are computed again in the backward pass.

What is stored for the backward pass is then the input of each block, instead of everything inside it; the price is one more
forward pass (Chen et al. 2016, arXiv:1604.06174). The switch of transformers works in training mode alone, in which dropout is
on, so the blocks are wrapped here, in evaluation mode. They are wrapped only while scores with a gradient are computed, so a
model that is saved, copied or sampled from has no wrappers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import Cache

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.models.torch_lm.network import Network, base_model
from bayes_klrl.typing import TokenIds

__all__ = ["RecomputingNetwork", "blocks_of", "cannot_recompute", "recomputed"]


class RecomputingNetwork:
    """See `Network`. Another network, whose blocks are computed again in the backward pass of `features`."""

    def __init__(self, network: Network, module: nn.Module) -> None:
        self.network, self.model, self.blocks = network, base_model(module), blocks_of(module)
        self.vocab_size, self.width = network.vocab_size, network.width
        self.prefill, self.step, self.select, self.logits = (
            network.prefill,
            network.step,
            network.select,
            network.logits,
        )

    def features(self, prompts: Sequence[TokenIds], owners: Tensor, tokens: Tensor) -> Tensor:
        """See `Network.features`."""
        if not torch.is_grad_enabled():
            return self.network.features(prompts, owners, tokens)
        with wrapped(self.blocks) as called:
            features = self.network.features(prompts, owners, tokens)
        if not called:
            raise cannot_recompute(self.model)
        return features


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model: the members of its lists of modules that are not inside another list.

    Raises
    ------
    BayesKLRLError
        If it has no such list.
    """
    model = base_model(module)
    found = {id(block): block for blocks in outermost_lists(model) for block in blocks}
    if not found:
        raise cannot_recompute(model)
    return list(found.values())


def outermost_lists(module: nn.Module) -> Iterator[nn.ModuleList]:
    """Yield the lists of modules inside a module that are not inside another list."""
    for child in module.children():
        if isinstance(child, nn.ModuleList):
            yield child
        else:
            yield from outermost_lists(child)


@contextmanager
def wrapped(blocks: Sequence[nn.Module]) -> Iterator[list[nn.Module]]:
    """Let blocks be computed again in the backward pass of what is computed inside; yield those that will be.

    A few models give their blocks a cache even where none is asked for. Such a block is computed once, since its second run
    would find in the cache what the first has written.
    """
    called: list[nn.Module] = []

    def run(block: nn.Module, forward: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
        if any(isinstance(value, Cache) for value in (*inputs, *options.values())):
            return forward(*inputs, **options)
        called.append(block)
        return recomputed(forward, *inputs, **options)

    before = [vars(block).get("forward") for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(run, block, block.forward)
        yield called
    finally:
        for block, own in zip(blocks, before, strict=True):
            if own is not None:
                block.forward = own
            elif "forward" in vars(block):
                del block.forward


def recomputed(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Return function(*inputs, **options), of which the backward pass computes the activations again; there is no dropout."""
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False, **options)


def cannot_recompute(what: object) -> BayesKLRLError:
    """Return the error about a model whose activations cannot be computed again block by block."""
    kind = type(what).__name__
    return BayesKLRLError(
        "gradient_checkpointing is for a bk.TorchLM whose forward calls blocks in a list (torch.nn.ModuleList) without a "
        f"cache; in a {kind} there are none. Leave gradient_checkpointing out: particles_per_pass bounds memory too."
    )
