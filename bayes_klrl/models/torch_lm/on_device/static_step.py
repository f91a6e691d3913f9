"""One token for all rows over caches of a fixed size: a step that a CUDA graph can record, or `torch.compile` can translate.

The step loop of `lockstep` slices its caches, so that shapes change with every token and each kernel is launched by the
host. Here nothing that the host must know changes from one token to the next: the number of filled slots is a tensor,
attention reads all slots under a mask, and tokens, log-probs and the place in the uniforms are written where they were. For
small models on a fast card launching takes longer than computing, and a recorded step is launched at once. It is not the
default: its arithmetic is tested on the CPU (`tests/models/torch_lm/on_device`), its speed on a card is measured by
`benchmarks/gpu.sh`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.models.torch_lm.on_device.drawing import drawn_and_scored
from bayes_klrl.models.torch_lm.tight.attention import attend
from bayes_klrl.models.torch_lm.tight.forward import by_head

__all__ = ["HOW", "StaticStep", "chosen_step", "static_steps", "stepper"]

HOW = ("loop", "static", "compile", "graph")
"""The ways of drawing on a device; see `static_steps`."""

_WARM_UP = 3  # steps before a recording, which PyTorch asks for

_chosen: ContextVar[str | None] = ContextVar("static_steps", default=None)


@contextmanager
def static_steps(how: str) -> Iterator[None]:
    """Draw independent completions in another way inside of the block; for models of the tight families.

    Parameters
    ----------
    how
        "loop": the loop of `lockstep`, which is what a model on a card does anyway; "static": the static step, run as it is;
        "compile": translated by `torch.compile`; "graph": recorded as a CUDA graph, on a CUDA card alone. In the block the
        first three work for a model on the CPU, too, which is how they are tested.

    Examples
    --------
    >>> import bayes_klrl as bk
    >>> from bayes_klrl.models.torch_lm.on_device import static_steps
    >>> prior = bk.TorchLM.from_pretrained("austen")
    >>> reward = bk.Reward(lambda completions: [c.count("!") for c in completions], alpha=1.0)
    >>> posterior = bk.Posterior(prior, reward, prompts="It was a fine morning", max_new_tokens=4)
    >>> with static_steps("static"):
    ...     there = bk.ImportanceSampling(8).run(posterior, seed=0)
    >>> bool((there.tokens == bk.ImportanceSampling(8).run(posterior, seed=0).tokens).all())
    True
    """
    if how not in HOW:
        raise BayesKLRLError(f"The ways of drawing on a device are {', '.join(map(repr, HOW))}; got {how!r}.")
    token = _chosen.set(how)
    try:
        yield
    finally:
        _chosen.reset(token)


def chosen_step() -> str | None:
    """Return the way that was chosen by `static_steps`; None outside of it."""
    return _chosen.get()


class StaticStep:
    """The state of M rows as tensors that stay where they are, and the function that adds one token to each.

    Parameters
    ----------
    models, networks
        The `TorchLM`s and their tight networks; the first one draws.
    caches
        The cache of each network, M rows, without the newest tokens.
    newest
        The newest token of each row, (M,).
    uniforms
        Uniform random numbers, (T, M), on the device.
    eos
        The ids that end a completion, on the device.
    """

    def __init__(
        self,
        models: Sequence[Any],
        networks: Sequence[Any],
        caches: Sequence[Any],
        newest: Tensor,
        uniforms: Tensor,
        eos: Tensor,
    ) -> None:
        self.models, self.networks, self.eos = models, networks, eos
        num_tokens, num_rows = uniforms.shape
        device, length = newest.device, caches[0].length
        capacity = length + num_tokens
        self.buffers = [[filled(stored, length, capacity) for stored in cache.whole()] for cache in caches]
        self.padding = caches[0].padding  # of the prompts, and the same for all models
        self.slots = torch.arange(capacity, device=device)
        self.uniforms = uniforms
        self.newest = newest.clone()
        self.position = torch.full((1,), length, dtype=torch.long, device=device)
        self.count = torch.zeros(1, dtype=torch.long, device=device)
        self.going = torch.ones(num_rows, dtype=torch.bool, device=device)
        self.tokens = torch.zeros((num_tokens, num_rows), dtype=torch.long, device=device)
        self.log_probs = torch.zeros((len(models), num_rows), dtype=torch.float64, device=device)

    def __call__(self) -> None:
        """Add one token to each row. No shape depends on a number in a tensor, and the host waits for nothing."""
        inside = self.slots <= self.position
        positions = self.position[None]
        if self.padding is not None:
            inside = inside & (self.slots >= self.padding[:, None])
            positions = (self.position - self.padding[:, None]).clamp(min=0)
        mask = inside.view(-1, 1, 1, len(self.slots))
        pairs = zip(self.networks, self.buffers, strict=True)
        features = [self._features(network.family, layers, positions, mask) for network, layers in pairs]
        uniforms = self.uniforms.index_select(0, self.count)[0]
        drawn, scores = drawn_and_scored(self.networks, self.models, features, uniforms)
        self.log_probs += scores.double().masked_fill(~self.going, 0.0)
        self.tokens.index_copy_(0, self.count, drawn[None])
        self.newest.copy_(drawn)
        self.going &= ~(drawn[:, None] == self.eos).any(dim=1)
        self.position += 1
        self.count += 1

    def _features(self, family: Any, buffers: Sequence[Tensor], positions: Tensor, mask: Tensor) -> Tensor:
        """Return the features (M, F) after the newest tokens, whose keys and values are written into the buffers."""
        num_rows = len(self.newest)
        hidden, rotation = family.embed(self.newest[:, None], positions)
        hidden = hidden.flatten(0, 1)
        for layer, stored in zip(family.layers, buffers, strict=True):
            queries, keys, values = (by_head(part, num_rows, 1) for part in layer.heads(hidden, rotation))
            stored[0].index_copy_(2, self.position, keys)
            stored[1].index_copy_(2, self.position, values)
            hidden = layer.finish(hidden, attend(queries, stored[0], stored[1], mask, layer.scale))
        features: Tensor = family.final_norm(hidden)
        return features

    def state(self) -> list[Tensor]:
        """Return copies of what a step changes, apart from the slots that the next step writes again."""
        return [each.clone() for each in self._changing()]

    def restore(self, state: Sequence[Tensor]) -> None:
        """Go back to a state."""
        for each, before in zip(self._changing(), state, strict=True):
            each.copy_(before)

    def _changing(self) -> tuple[Tensor, ...]:
        return self.newest, self.position, self.count, self.going, self.tokens, self.log_probs


def filled(stored: Tensor, length: int, capacity: int) -> Tensor:
    """Return keys and values (2, M, heads, capacity, size) with the first `length` slots of `stored`, and 0 in the others."""
    made = stored.new_zeros((*stored.shape[:3], capacity, stored.shape[4]))  # not empty: what is masked must not be NaN
    made[..., :length, :] = stored[..., :length, :]
    return made


def stepper(step: StaticStep, how: str) -> Callable[[], None]:
    """Return a function that adds one token as the step does: the step itself, translated, or recorded."""
    if how == "compile":
        translated: Callable[[], None] = torch.compile(step, dynamic=False)
        return translated
    if how != "graph":
        return step
    if step.newest.device.type != "cuda":
        raise BayesKLRLError(f"A CUDA graph needs a model on a CUDA card; this one is on {step.newest.device}.")
    before = step.state()
    beside = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    beside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(beside):
        for _ in range(min(_WARM_UP, len(step.uniforms))):
            step()
    torch.cuda.current_stream().wait_stream(beside)
    step.restore(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    step.restore(before)
    return graph.replay
