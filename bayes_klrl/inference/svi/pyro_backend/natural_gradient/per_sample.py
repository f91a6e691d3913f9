"""The scores of single draws, without ever holding them all: Gram matrices, directions, derivatives along a direction.

With s_n = grad log q(x_n) over all trainable parameters, and J the matrix whose rows they are, natural gradients in the space
of the samples (`natural`) need J J^T, J^T a and J d. A layer with inputs x and gradients g of its outputs at positions t has

    s_n = sum_t g_nt x_nt^T,     J J^T = sum over layers of <s_n, s_m> = sum_{t,u} (g_nt . g_mu)(x_nt . x_mu),

so one forward pass and one backward pass for the outputs' gradients are enough, of all draws together. Each layer adds to
the Gram matrix, by a block of its own s_n at a time or by the right-hand side, whichever needs fewer operations (the "ghost"
norms of Li et al. 2022, and Goodfellow 2015). A weight that several layers share has its terms summed before the product.

The network reads prompt and completion of each row in the model's own forward, so no two rows share anything. What the layers
are understood to do is compared with torch's gradient at the first call. Parameters for which it differs, and those of layers
of unknown kinds, are differentiated draw by draw, which is exact and slow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.inference.svi.pyro_backend.natural_gradient.score_products import (
    Outer,
    Terms,
    Whole,
    add_gram,
    weighted,
)
from bayes_klrl.models.torch_lm.general import (
    PlainEncoderDecoderNetwork,
    PlainNetwork,
    equal_lengths,
    last_positions,
)
from bayes_klrl.models.torch_lm.lm import TorchLM
from bayes_klrl.models.torch_lm.network import accepted, has_virtual_tokens
from bayes_klrl.models.torch_lm.scoring import positions_inside, tempered
from bayes_klrl.models.torch_lm.table import TableLM
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import IntArray, TokenIds

__all__ = ["PerSample", "SampleScores"]

_MOST_SLOW = 2**28


class PerSample:
    """The scores of single draws of a guide.

    Parameters
    ----------
    guide
        A `TorchLM`, with or without adapters, or a `TableLM`.

    Attributes
    ----------
    parameters
        The trainable parameters.
    slow
        The names of those that are differentiated draw by draw; known after the first call of `scores`.

    Raises
    ------
    BayesKLRLError
        If the guide is of another kind.
    """

    def __init__(self, guide: Any) -> None:
        if not isinstance(guide, TorchLM | TableLM):
            raise BayesKLRLError(
                f"Scores of single draws are known for bk.TorchLM and bk.NgramLM; got a {type(guide).__name__}. Use Adam."
            )
        self.guide = guide
        self.parameters = [parameter for parameter in guide.parameters() if parameter.requires_grad]
        self.slow: list[str] = []
        self._slow: set[int] = set()
        self._layers: list[tuple[nn.Module, str]] = []
        self._names: dict[int, str] = {}
        self._checked = isinstance(guide, TableLM)
        if isinstance(guide, TorchLM):
            self._find_layers(guide.module)

    def scores(self, prompts: Sequence[TokenIds], sequences: Sequences) -> SampleScores:
        """Return the scores of N completions of each of P prompts; equal completions of a prompt are computed once."""
        rows = DistinctRows.of(sequences)
        if isinstance(self.guide, TableLM):
            log_probs, terms = table_terms(self.guide, prompts, rows)
        else:
            log_probs, terms = self._network_terms(prompts, rows)
        return SampleScores(self.parameters, rows, log_probs, terms)

    def _find_layers(self, module: nn.Module) -> None:
        """Note the layers that hold trainable parameters, and the parameters of layers of unknown kinds."""
        for name, layer in module.named_modules():
            own = {key: value for key, value in layer._parameters.items() if value is not None and value.requires_grad}
            for key, parameter in own.items():
                self._names.setdefault(id(parameter), f"{name}.{key}")
                if key not in ("weight", "bias") or (not isinstance(layer, _KINDS) and not is_rms_norm(layer)):
                    self._mark_slow(parameter)
            if own:
                self._layers.append((layer, name))

    def _mark_slow(self, parameter: Tensor) -> None:
        if id(parameter) not in self._slow:
            self._slow.add(id(parameter))
            self.slow.append(self._names[id(parameter)])

    def _network_terms(self, prompts: Sequence[TokenIds], rows: DistinctRows) -> tuple[Tensor, Terms]:
        assert isinstance(self.guide, TorchLM)
        if any(part.training for part in self.guide.module.modules()):
            self.guide.module.eval()
        passes, log_probs = [], torch.zeros(len(rows.prompt), dtype=torch.float64, device=self.guide.device)
        lengths = [len(prompts[p]) for p in rows.prompt.tolist()]
        for length, chosen in equal_lengths(lengths, self.guide.device):
            with torch.enable_grad(), captured_calls(self._layers) as calls:
                log_q = row_log_probs(self.guide, prompts, rows, chosen, length)
            log_probs[chosen] = log_q.detach().double()
            passes.append((chosen, log_q, calls))
        terms = self._captured_terms(passes, keep_graph=not self._checked or bool(self._slow))
        if not self._checked:
            self._check(passes, terms)
            self._checked = True
        self._add_slow(passes, terms)
        return log_probs, terms

    def _captured_terms(self, passes: Passes, *, keep_graph: bool) -> Terms:
        """Return the terms of all parameters that are not slow."""
        terms: Terms = {id(parameter): [] for parameter in self.parameters}
        for chosen, log_q, calls in passes:
            edges = [call.edge for call in calls]
            gradients: Sequence[Tensor | None] = ()
            if edges:
                gradients = torch.autograd.grad(log_q.sum(), edges, retain_graph=keep_graph, allow_unused=True)
            for call, gradient in zip(calls, gradients, strict=True):
                if gradient is None:
                    continue
                for key, parameter in call.layer._parameters.items():
                    if parameter is None or not parameter.requires_grad or id(parameter) in self._slow:
                        continue
                    term = layer_term(call, key, gradient, chosen)
                    if term is None:
                        self._mark_slow(parameter)
                    else:
                        terms[id(parameter)].append(term)
        for marked in self._slow:
            terms[marked] = []
        return terms

    def _check(self, passes: Passes, terms: Terms) -> None:
        """Compare a random combination of the scores with torch's gradient; where it differs, a parameter is slow."""
        generator = torch.Generator().manual_seed(0)
        weights = torch.randn(sum(len(chosen) for chosen, _, _ in passes), generator=generator)
        total = sum((log_q * weights[chosen.cpu()].to(log_q)).sum() for chosen, log_q, _ in passes)
        assert isinstance(total, Tensor)
        expected = torch.autograd.grad(total, self.parameters, retain_graph=True, allow_unused=True)
        norm = sum(float(gradient.double().square().sum()) for gradient in expected if gradient is not None) ** 0.5
        for parameter, gradient in zip(self.parameters, expected, strict=True):
            if id(parameter) in self._slow:
                continue
            found = weighted(terms[id(parameter)], weights.to(parameter.device), parameter)
            right = torch.zeros_like(parameter) if gradient is None else gradient
            # many layers compute in float32 whatever the dtype
            tolerance = 20 * max(torch.finfo(right.dtype).eps, torch.finfo(torch.float32).eps) ** 0.75
            scale = float(right.double().norm()) + 1e-3 * norm
            if float((found - right).double().norm()) > tolerance * scale:
                self._mark_slow(parameter)
                terms[id(parameter)] = []

    def _add_slow(self, passes: Passes, terms: Terms) -> None:
        """Add the scores in the slow parameters, by one derivative per draw."""
        slow = [parameter for parameter in self.parameters if id(parameter) in self._slow]
        if not slow:
            return
        for parameter in slow:
            num_floats = parameter.numel() * sum(len(chosen) for chosen, _, _ in passes)
            if num_floats > _MOST_SLOW:
                name = self._names[id(parameter)]
                raise BayesKLRLError(
                    f"The layer of {name!r} is of a kind whose scores are not known, and {num_floats} numbers are too many to "
                    "differentiate draw by draw. Freeze it (requires_grad_(False)), use LoRA adapters, or use Adam."
                )
        for chosen, log_q, _ in passes:
            for parameter, values in zip(slow, draw_by_draw(log_q, slow), strict=True):
                terms[id(parameter)].append(Whole(chosen, values))


@dataclass(frozen=True, eq=False)
class DistinctRows:
    """The R distinct pairs of prompt and completion among N draws for each of P prompts."""

    prompt: IntArray  # (R,), ascending
    tokens: IntArray  # (R, T), 0 past the lengths
    lengths: IntArray  # (R,)
    index: IntArray  # (P, N), the row of each draw

    @classmethod
    def of(cls, sequences: Sequences) -> DistinctRows:
        """Return the distinct rows of some completions."""
        num_prompts, num_draws, num_tokens = sequences.tokens.shape
        marked = np.where(sequences.mask, sequences.tokens, -1).reshape(-1, num_tokens)
        keys = np.concatenate([np.repeat(np.arange(num_prompts), num_draws)[:, None], marked], axis=1)
        found, inverse = np.unique(keys, axis=0, return_inverse=True)
        tokens = found[:, 1:]
        longest = int(sequences.lengths.max(initial=1))
        lengths = (tokens >= 0).sum(axis=1)
        return cls(found[:, 0], np.maximum(tokens, 0)[:, :longest], lengths, inverse.reshape(num_prompts, num_draws))


class SampleScores:
    """The scores s_n of N draws for each of P prompts, as terms of each parameter.

    Attributes
    ----------
    parameters
        The parameters, in the order in which directions are given.
    log_probs
        log q(x_n | c_p), (N, P), float64, without a gradient.
    prompt, counts
        The prompt of each of the R distinct rows, and how many draws equal it, both (R,).
    index
        The row of each draw, (P, N).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], rows: DistinctRows, log_probs: Tensor, terms: Terms) -> None:
        self.parameters = list(parameters)
        self.index = torch.as_tensor(rows.index, device=log_probs.device)
        self.prompt = torch.as_tensor(rows.prompt, device=log_probs.device)
        self.counts = torch.bincount(self.index.flatten(), minlength=len(rows.prompt))
        self.log_probs = log_probs[self.index].T
        self._terms = terms
        self._gram: Tensor | None = None

    @property
    def gram_of_rows(self) -> Tensor:
        """<s_i, s_j> of the distinct rows, (R, R), float64."""
        if self._gram is None:
            size = len(self.prompt)
            gram = torch.zeros((size, size), dtype=torch.float64, device=self.prompt.device)
            for parameter in self.parameters:
                add_gram(gram, self._terms[id(parameter)], parameter)
            self._gram = (gram + gram.T) / 2
        return self._gram

    def gram(self) -> Tensor:
        """Return <s_n, s_m> of all draws, prompt by prompt, (P * N, P * N), float64."""
        index = self.index.flatten()
        return self.gram_of_rows[index[:, None], index]

    def gram_by_prompt(self) -> Tensor:
        """Return <s_n, s_m> of the draws of each prompt, (P, N, N), float64."""
        return self.gram_of_rows[self.index[:, :, None], self.index[:, None, :]]

    def write_direction(self, weights: Tensor) -> None:
        """Write sum_p 1/N sum_n a_np s_np into each parameter's `grad`, for weights a of shape (N, P)."""
        rows = torch.zeros(len(self.prompt), dtype=torch.float64, device=self.prompt.device)
        rows.index_add_(0, self.index.flatten(), weights.T.flatten().to(rows) / len(weights))
        self.write_rows(rows)

    @torch.no_grad()
    def write_rows(self, weights: Tensor) -> None:
        """Write sum_i a_i s_i over the distinct rows into each parameter's `grad`, for weights (R,)."""
        for parameter in self.parameters:
            parameter.grad = weighted(self._terms[id(parameter)], weights, parameter)

    def along(self, direction: Sequence[Tensor]) -> Tensor:
        """Return <s_n, d>, the derivative of log q(x_n) along a direction, (N, P), float64."""
        return self.along_rows(direction)[self.index].T

    @torch.no_grad()
    def along_rows(self, direction: Sequence[Tensor]) -> Tensor:
        """Return <s_i, d> of the distinct rows, (R,), float64."""
        total = torch.zeros(len(self.prompt), dtype=torch.float64, device=self.prompt.device)
        for parameter, part in zip(self.parameters, direction, strict=True):
            for term in self._terms[id(parameter)]:
                total.index_add_(0, term.rows, term.along(part).double())
        return total


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a layer: its input, and the place of its output in the graph."""

    layer: nn.Module
    read: Tensor
    version: int
    num_rows: int
    edge: Any


Passes = list[tuple[Tensor, Tensor, list[Call]]]
"""For each forward pass, its rows, their log q, and the calls of the layers."""

_KINDS = (nn.Linear, Conv1D, nn.Embedding, nn.LayerNorm)


@contextmanager
def captured_calls(layers: Sequence[tuple[nn.Module, str]]) -> Iterator[list[Call]]:
    """Note all calls of the layers inside the block."""
    calls: list[Call] = []

    def note(layer: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        if arguments and isinstance(arguments[0], Tensor) and isinstance(output, Tensor) and output.requires_grad:
            read = arguments[0].detach()
            edge = torch.autograd.graph.get_gradient_edge(output)
            calls.append(Call(layer, read, read._version, len(output), edge))

    handles = [layer.register_forward_hook(note) for layer, _ in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def layer_term(call: Call, key: str, gradient: Tensor, rows: Tensor) -> Outer | Whole | None:
    """Return the scores in one parameter of a layer from its call; None if they are not known."""
    layer, read = call.layer, call.read
    if gradient.dim() < 2 or len(gradient) != len(rows) or len(read) != len(rows) or read._version != call.version:
        return None
    gradient = gradient.reshape(len(rows), -1, gradient.shape[-1])
    if isinstance(layer, nn.Embedding):
        if read.is_floating_point() or int(read.min()) < 0 or int(read.max()) >= layer.num_embeddings:
            return None  # a layer of positions that computes its own indices
        scale = getattr(layer, "embed_scale", None)
        gradient = gradient if scale is None else gradient * scale
        if layer.padding_idx is not None:
            gradient = gradient.masked_fill((read == layer.padding_idx).view(len(rows), -1, 1), 0.0)
        return Outer(rows, read.reshape(len(rows), -1), gradient)
    if key == "bias":
        return Whole(rows, gradient.sum(dim=1))
    read = read.reshape(len(rows), -1, read.shape[-1])
    if isinstance(layer, nn.Linear):
        return Outer(rows, gradient, read)
    if isinstance(layer, Conv1D):
        return Outer(rows, read, gradient)
    if isinstance(layer, nn.LayerNorm):
        normalised = functional.layer_norm(read, layer.normalized_shape, eps=layer.eps)
    else:
        if read.shape[-1] != gradient.shape[-1]:
            return None
        eps = getattr(layer, "variance_epsilon", getattr(layer, "eps", None)) or torch.finfo(read.dtype).eps
        normalised = read * torch.rsqrt(read.square().mean(dim=-1, keepdim=True) + eps)
    return Whole(rows, (gradient * normalised).sum(dim=1))


def is_rms_norm(layer: nn.Module) -> bool:
    """Return whether a layer divides by the root mean square and multiplies by a vector; `PerSample` checks the numbers."""
    weight = layer._parameters.get("weight")
    return "Norm" in type(layer).__name__ and len(layer._parameters) == 1 and weight is not None and weight.dim() == 1


def row_log_probs(
    guide: TorchLM, prompts: Sequence[TokenIds], rows: DistinctRows, chosen: Tensor, length: int
) -> Tensor:
    """Return log q of some rows, whose prompts have one length, (B,), by the model's own forward."""
    picked = chosen.cpu().numpy()
    tokens = torch.as_tensor(rows.tokens[picked], device=guide.device)
    inside = positions_inside(torch.as_tensor(rows.lengths[picked], device=guide.device), tokens.shape[1])
    texts = [list(prompts[p]) for p in rows.prompt[picked].tolist()]
    if guide.prompt_apart:
        network = PlainEncoderDecoderNetwork(guide.module, guide.vocab_size)
        logits = network.features(texts, torch.arange(len(texts), device=guide.device), tokens)
    else:
        read = torch.tensor(texts, dtype=torch.long, device=guide.device).view(len(texts), length)
        logits = causal_logits(guide, torch.cat([read, tokens[:, :-1]], dim=1), tokens.shape[1])
    logits = tempered(logits.float() if logits.dtype.itemsize < 4 else logits, guide.temperature)
    drawn = logits.gather(2, tokens[..., None])[..., 0] - logits.logsumexp(2)
    return drawn.masked_fill(~inside, 0.0).sum(dim=1)


def causal_logits(guide: TorchLM, tokens: Tensor, num_last: int) -> Tensor:
    """Return the logits at the last positions of texts (B, S), with a position for each token of each row.

    By default models look up the positions once for all rows, and the gradient of that look-up is a sum over the rows.
    """
    network = PlainNetwork(guide.module, guide.vocab_size)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
    options = dict(network.options)
    if network.keeps_last:
        options["logits_to_keep"] = last_positions(tokens, num_last)
    if not has_virtual_tokens(guide.module):
        options |= accepted(guide.module, {"position_ids": positions})
    logits: Tensor = guide.module(input_ids=tokens, **options).logits
    return logits[:, -num_last:]


def draw_by_draw(log_q: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """Return the gradient of each draw's log q in each parameter, (B, *shape)."""
    one_hot = torch.eye(len(log_q), dtype=log_q.dtype, device=log_q.device)
    gradients: Sequence[Tensor | None]
    try:
        gradients = torch.autograd.grad(
            log_q, parameters, one_hot, retain_graph=True, allow_unused=True, is_grads_batched=True
        )
    except RuntimeError:  # an operation that has no batched gradient
        each = [torch.autograd.grad(log_q, parameters, row, retain_graph=True, allow_unused=True) for row in one_hot]
        gradients = [
            None if column[0] is None else torch.stack([value for value in column if value is not None])
            for column in zip(*each, strict=True)
        ]
    return [
        parameter.new_zeros((len(log_q), *parameter.shape)) if gradient is None else gradient
        for parameter, gradient in zip(parameters, gradients, strict=True)
    ]


@torch.no_grad()
def table_terms(guide: TableLM, prompts: Sequence[TokenIds], rows: DistinctRows) -> tuple[Tensor, Terms]:
    """Return log q of a table's rows, (R,), and their scores: one-hot of the drawn token minus q, in the context's row."""
    order, (num_rows, num_tokens) = guide._prior.order, rows.tokens.shape
    before = guide.prefill(prompts)[rows.prompt]
    read = np.concatenate([before, rows.tokens], axis=1)
    contexts = np.stack([read[:, t : t + order - 1] for t in range(num_tokens)], axis=1)
    device = guide.logits.device
    index = torch.as_tensor(contexts @ guide._place, device=device)
    tokens = torch.as_tensor(rows.tokens, device=device)
    inside = torch.as_tensor(np.arange(num_tokens) < rows.lengths[:, None], device=device)
    log_probs = guide.logits[index].log_softmax(-1)
    score = -log_probs.exp()
    score.scatter_add_(2, tokens[..., None], torch.ones_like(score[..., :1]))
    drawn = log_probs.gather(2, tokens[..., None])[..., 0].masked_fill(~inside, 0.0)
    term = Outer(torch.arange(num_rows, device=device), index, score.masked_fill(~inside[..., None], 0.0))
    return drawn.sum(dim=1).double(), {id(guide.logits): [term]}
