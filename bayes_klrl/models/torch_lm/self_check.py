"""The self-check of a model: its numbers against its own plain forward, before anything is computed with them.

Decoding and scoring share a network, so they agree even where both are wrong. The self-check compares them with an independent
path: the model's own forward of one text at a time, without padding, cache or mask, prefix by prefix. What is compared, in
one small batch:

* scoring and decoding of completions, with rows permuted and repeated half-way, next to a prompt of another length;
* completions that hold the padding id, the EOS ids and BOS;
* completions that differ in their last tokens only: by causality, nothing before them may change, and the scored log-prob of
  two last tokens together is that of the first one plus that of the second one given the first;
* a text longer than the lengths that the configuration names (sliding windows, chunk sizes), as far as this is cheap.

The first network that passes is used. If none does, the model is not a language model that can be sampled and scored, and
`CheckpointError` says which path, which token and how many nats are wrong (theory.md 9.6).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from bayes_klrl.errors import CheckpointError
from bayes_klrl.models.torch_lm.general import general_networks
from bayes_klrl.models.torch_lm.network import (
    Network,
    accepted,
    adapter_configs,
    base_model,
    context_limit,
    decoder_start,
    model_device,
)
from bayes_klrl.models.torch_lm.probes import LONGEST, Probe, long_probe, named_lengths, short_probe
from bayes_klrl.models.torch_lm.tight import tight_network
from bayes_klrl.typing import TokenIds

__all__ = ["SelfCheck", "apart", "choose_network", "own_log_probs", "rebuilt", "tolerance"]

SMALL = 20_000_000
"""Number of parameters up to which every prefix of the check is read by the model's own forward."""

_ERRORS = (
    AssertionError,
    AttributeError,
    IndexError,
    KeyError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


@dataclass(frozen=True)
class SelfCheck:
    """What a self-check has compared.

    Attributes
    ----------
    num_compared
        Number of next-token distributions that were compared with the model's own forward.
    gap
        Largest difference between log-probs of one token, in nats.
    num_forwards
        Number of forward passes that the check took.
    seconds
        Time that the check took.
    not_reached
        Lengths that the configuration names and that were too long to be checked, as {name: length}.
    """

    num_compared: int
    gap: float
    num_forwards: int
    seconds: float
    not_reached: Mapping[str, int]

    def __str__(self) -> str:
        lengths = ", ".join(f"{name} = {length}" for name, length in self.not_reached.items())
        beyond = f", not beyond {lengths} tokens" if lengths else ""
        return f"checked against its own plain forward: at most {self.gap:.1e} nats apart{beyond}"


@dataclass(frozen=True)
class Difference:
    """The largest difference of a path from the model's own forward, or from scoring; positions count from 0."""

    path: str
    nats: float
    found: float
    expected: float
    row: int
    position: int
    token: int


def choose_network(
    module: nn.Module, vocab_size: int, special_ids: Sequence[int], *, refuse: bool = True
) -> tuple[Network, SelfCheck | None]:
    """Return the fastest network whose numbers are those of the model's own forward, and what was compared.

    Parameters
    ----------
    module, vocab_size
        The model, in evaluation mode, and the width of its logits.
    special_ids
        The padding id, EOS ids and BOS, which the check puts into its completions.
    refuse
        False: where no network gives these numbers, the plainest one is returned, with None.

    Raises
    ------
    CheckpointError
        If no network gives these numbers, or the model cannot be run on token ids alone.
    """
    started = time.perf_counter()
    if getattr(base_model(module).config, "attention_type", None) == "block_sparse":
        raise CheckpointError(
            "Block-sparse attention (BigBird) looks at random blocks, and becomes full attention for good at the first short "
            "text. Call model.set_attention_type('original_full') first, or load with attention_type='original_full'."
        )
    if refuse and reads_for_invocation(module):
        raise CheckpointError(
            "An activated LoRA (alora_invocation_tokens) changes a text from its last invocation on, so a later token changes "
            "earlier log-probs, and no completion has a log-prob. Use a LoRA without invocation tokens."
        )
    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    lengths, not_reached = named_lengths(module, num_parameters)
    limit = context_limit(module) or LONGEST
    probes = [short_probe(vocab_size, special_ids, limit, thorough=num_parameters <= SMALL)]
    if lengths:
        probes.append(long_probe(vocab_size, max(lengths), bool(base_model(module).config.is_encoder_decoder)))
    expected = [own_rows(module, probe) for probe in probes]
    num_forwards = sum(len(probe.places) for probe in probes)
    failure: Difference | Exception | None = None
    for network in networks(module, vocab_size):
        differences = []
        num_forwards += sum(1 + len(probe.tokens[0]) for probe in probes)
        try:
            for probe, own in zip(probes, expected, strict=True):
                differences.append(largest_difference(network, probe, own))
                if differences[-1].nats > tolerance(module, own):
                    break
            else:
                num_compared = 2 * sum(len(probe.places) for probe in probes)
                gap = max(difference.nats for difference in differences)
                seconds = time.perf_counter() - started
                return network, SelfCheck(num_compared, gap, num_forwards, seconds, not_reached)
            failure = differences[-1]
        except _ERRORS as error:  # no padded batch, or no cache of this kind
            failure = error
    if not refuse:
        return network, None
    failed = probes[len(differences) - 1]
    raise refusal(module, failed, failure) from (failure if isinstance(failure, Exception) else None)


def networks(module: nn.Module, vocab_size: int) -> Iterator[Network]:
    """Yield the networks of a model, the fastest first."""
    tight = tight_network(module, vocab_size)
    if tight is not None:
        yield tight
    yield from general_networks(module, vocab_size)


def rebuilt(like: Network, module: nn.Module, vocab_size: int) -> Network | None:
    """Return a network of the kind of one that was chosen earlier, of another module; None if it cannot be built."""
    has_head = getattr(like, "head", None) is not None
    for network in networks(module, vocab_size):
        if type(network) is type(like) and (getattr(network, "head", None) is not None) == has_head:
            return network
    return None


# --- the paths --------------------------------------------------------------------------------------------------


def own_log_probs(module: nn.Module, prompt: TokenIds, read: TokenIds) -> Tensor:
    """Return log p(. | prompt, read), shape (V,), by the model's own forward of this one text."""
    return own_forward(module, prompt, read)[-1]


@torch.no_grad()
def own_forward(module: nn.Module, prompt: TokenIds, read: TokenIds) -> Tensor:
    """Return the log-probs after the prompt and after each token read, shape (1 + len(read), V): no mask, no cache."""
    if base_model(module).config.is_encoder_decoder:
        ids = {"input_ids": list(prompt), "decoder_input_ids": [decoder_start(module), *read]}
    else:
        ids = {"input_ids": [*prompt, *read]}
    inputs = {name: torch.tensor([tokens], device=model_device(module)) for name, tokens in ids.items()}
    logits: Tensor = module(**inputs, **accepted(module, {"use_cache": False, "return_dict": True})).logits
    return logits[0, -1 - len(read) :].float().log_softmax(-1)


def own_rows(module: nn.Module, probe: Probe) -> Tensor:
    """Return the log-probs of the model's own forward at the places of a probe, shape (places, V)."""
    try:
        rows = torch.stack([own_log_probs(module, *prefix(probe, row, t)) for row, t in probe.places])
    except _ERRORS as error:
        raise CheckpointError(
            f"A {name_of(module)} cannot be run on token ids alone: {error}. Only models that read text are language models "
            "here."
        ) from error
    if rows.isnan().any():
        raise CheckpointError(
            f"The log-probs of this {name_of(module)} are NaN. Its weights or its precision are broken: load it in float32, "
            "or use another checkpoint."
        )
    return rows


@torch.no_grad()
def largest_difference(network: Network, probe: Probe, own: Tensor) -> Difference:
    """Return the largest difference of scored and decoded log-probs from the model's own, at the places of a probe."""
    device = own.device
    tokens = torch.tensor(probe.tokens, dtype=torch.long, device=device)
    owners = torch.tensor(probe.owners, dtype=torch.long, device=device)
    paths = {
        "scoring": network.logits(network.features(probe.prompts, owners, tokens)).log_softmax(-1),
        "decoding": decoded_rows(network, probe.prompts, owners, tokens),
    }
    found = [difference(path, table, own, probe) for path, table in paths.items()]
    found.append(between(paths["decoding"], paths["scoring"]))
    return max(found, key=lambda one: one.nats)


def decoded_rows(network: Network, prompts: Sequence[TokenIds], owners: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probs (R, T, V) that decoding gives, with the rows in another order from the second token on."""
    features, cache = network.prefill(prompts)
    order = torch.arange(len(owners), device=owners.device)
    cache, features = network.select(cache, owners), features[owners]
    columns = [network.logits(features).log_softmax(-1)]
    for t in range(tokens.shape[1] - 1):
        if t in (1, tokens.shape[1] - 2):
            turn = torch.arange(len(order) - 1, -1, -1, device=owners.device)
            order, cache = order[turn], network.select(cache, turn)
        features, cache = network.step(cache, tokens[order, t])
        columns.append(network.logits(features).log_softmax(-1)[order.argsort()])
    return torch.stack(columns, dim=1)


def difference(path: str, table: Tensor, own: Tensor, probe: Probe) -> Difference:
    """Return the largest difference of a path's log-probs (R, T, V) from the model's own (places, V)."""
    rows, positions = (torch.tensor(part, device=own.device) for part in zip(*probe.places, strict=True))
    found = table[rows, positions]
    gap = apart(found, own)
    place, token = divmod(int(gap.argmax()), own.shape[1])
    row, position = probe.places[place]
    values = float(gap[place, token]), float(found[place, token]), float(own[place, token])
    return Difference(path, *values, row, position, token)


def between(decoded: Tensor, scored: Tensor) -> Difference:
    """Return the largest difference between decoded and scored log-probs (R, T, V), at all places."""
    gap = apart(decoded, scored)
    index = int(gap.argmax())
    row, rest = divmod(index, gap.shape[1] * gap.shape[2])
    position, token = divmod(rest, gap.shape[2])
    at = (row, position, token)
    return Difference("decoding", float(gap[at]), float(decoded[at]), float(scored[at]), *at)


def apart(first: Tensor, second: Tensor) -> Tensor:
    """Return |first - second|: 0 for equal infinities, infinite where one of them is NaN."""
    gap = (first - second).abs().masked_fill(first == second, 0.0)
    return gap.nan_to_num(nan=float("inf"), posinf=float("inf"))


def tolerance(module: nn.Module, log_probs: Tensor) -> float:
    """Return the largest difference by rounding between two correct computations of these log-probs, in nats."""
    finite = log_probs[log_probs.isfinite()]
    precision = max((torch.finfo(p.dtype).eps for p in module.parameters() if p.dtype.is_floating_point), default=0.0)
    return max(1e-4, 2.5 * precision) * max(1.0, float(finite.abs().max()))


# --- the refusal ------------------------------------------------------------------------------------------------


def refusal(module: nn.Module, probe: Probe, failure: Difference | Exception | None) -> CheckpointError:
    """Return the error that says what is wrong with a model that no network can run."""
    name = name_of(module)
    skip = "TorchLM(..., check=False) skips this check; its results are then wrong by as much."
    if not isinstance(failure, Difference):
        return CheckpointError(
            f"A {name} cannot be sampled and scored token by token: {type(failure).__name__}: {failure}"
        )
    own = float(own_log_probs(module, *prefix(probe, failure.row, failure.position))[failure.token])
    scoring_is_worse = abs(failure.expected - own) > abs(failure.found - own)
    if failure.path == "decoding" and scoring_is_worse:  # decoding was compared with scoring
        failure = replace(failure, path="scoring", found=failure.expected)
    seen = (
        f"{failure.path} gives token {failure.token} at position {failure.position} of the completion "
        f"{probe.tokens[failure.row]} after the prompt {shortened(probe.prompts[probe.owners[failure.row]])} a log-prob of "
        f"{failure.found:.3f} nats; the model's own forward of the text up to there gives {own:.3f}"
    )
    return CheckpointError(f"The numbers of this {name} would be wrong: {seen}. {cause(module, probe, failure)} {skip}")


def cause(module: nn.Module, probe: Probe, failure: Difference) -> str:
    """Return the reason for a difference, as far as the model's own forward shows it."""
    prompt, read = prefix(probe, failure.row, failure.position)
    own, again = own_log_probs(module, prompt, read), own_log_probs(module, prompt, read)
    if (moved := float(apart(own, again).max())) > tolerance(module, own):
        return f"Its forward is random: two calls with the same text differ by {moved:.2g} nats."
    if any("quantized.dynamic" in type(part).__module__ for part in module.modules()):
        return (
            "Its layers are quantised dynamically: they round all tokens of a batch to one scale, so no token has a log-prob "
            "of its own. Load it unquantised, or in bfloat16."
        )
    if sees_later_tokens(module, probe):
        return (
            "Its log-probs change with tokens that come later, as in an encoder. If it was trained as a decoder, say so in "
            "its configuration (is_decoder=True for BERT and its relatives); otherwise it is no language model."
        )
    return "Its log-probs depend on the other texts of a batch, or on how a text is cut into steps."


def sees_later_tokens(module: nn.Module, probe: Probe) -> bool:
    """Return whether the model's own forward of a whole text gives other log-probs than that of its prefixes."""
    prompt, read = probe.prompts[probe.owners[0]], probe.tokens[0]
    whole = own_forward(module, prompt, read)
    prefixes = torch.stack([own_log_probs(module, prompt, read[:t]) for t in range(len(read) + 1)])
    return whole.shape != prefixes.shape or float(apart(whole, prefixes).max()) > tolerance(module, prefixes)


def prefix(probe: Probe, row: int, position: int) -> tuple[list[int], list[int]]:
    """Return the prompt, and the completion's tokens before a position."""
    return probe.prompts[probe.owners[row]], probe.tokens[row][:position]


def reads_for_invocation(module: nn.Module) -> bool:
    """Return whether a PEFT adapter is switched on by tokens of the text."""
    return any(getattr(config, "alora_invocation_tokens", None) for config in adapter_configs(module))


def shortened(ids: list[int]) -> str:
    """Return ids as text, those of long prompts by their first and last ones."""
    return str(ids) if len(ids) <= 8 else f"[{ids[0]}, {ids[1]}, ..., {ids[-1]}] of {len(ids)} tokens"


def name_of(module: nn.Module) -> str:
    """Return the class name of the Hugging Face model."""
    return type(base_model(module)).__name__
