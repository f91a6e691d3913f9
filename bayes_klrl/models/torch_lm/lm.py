"""Any Hugging Face language model as a `LanguageModel`, `TorchLM`; sampling and scoring use the same forward pass."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayes_klrl.arrays import to_device
from bayes_klrl.checks import check_positive
from bayes_klrl.errors import BayesKLRLError
from bayes_klrl.models.checkpoint_files import OWN_ENTRY, own_options
from bayes_klrl.models.memory import length_groups
from bayes_klrl.models.out_of_memory import attempted
from bayes_klrl.models.token_ids import check_ids, check_length
from bayes_klrl.models.torch_lm.general.blocks import RecomputingNetwork, blocks_of
from bayes_klrl.models.torch_lm.hugging_face import HuggingFaceModel, output_size
from bayes_klrl.models.torch_lm.network import Network, base_model
from bayes_klrl.models.torch_lm.on_device import TorchLockstep, lockstep_of
from bayes_klrl.models.torch_lm.scoring import full_features, full_log_probs, sequence_log_probs, tempered
from bayes_klrl.models.torch_lm.self_check import SelfCheck, choose_network, rebuilt
from bayes_klrl.models.torch_lm.tight import TightNetwork, tight_network
from bayes_klrl.sequences import Sequences
from bayes_klrl.typing import IntArray, TokenIds
from bayes_klrl.whole_files import named_path

__all__ = ["TorchLM", "output_size"]


@dataclass(frozen=True, eq=False)
class TorchState:
    """The state of R rows: the features that predict their next tokens, and the network's cache."""

    network: Network
    features: Tensor  # (R, F)
    cache: Any
    num_tokens: IntArray  # (R,) tokens read so far, prompt included


class TorchLM(HuggingFaceModel):
    """A Hugging Face causal or encoder-decoder model as a distribution over completions.

        log p(x|c) = sum_t log softmax(logits(c, x_<t) / temperature)[x_t]

    Nothing else changes the distribution: the generation config is ignored (no top-k, no top-p, no forced tokens), and
    dropout is always off, even after `train()` was called on the model. See `LanguageModel` for the methods.

    Parameters
    ----------
    model
        A `transformers` model with a language modelling head, with or without a PEFT adapter. The encoder of an
        encoder-decoder model reads the prompt. The model is put into evaluation mode.
    tokenizer
        The model's tokenizer; None: the model works on token ids only.
    eos_token_id
        The id or ids that end a completion; an empty collection for none. None: those of the model's configuration and of its
        generation configuration together, else the tokenizer's. A configured id outside the vocabulary can never be drawn and
        is left out.
    temperature
        The number by which the logits are divided, in sampling and in scoring.
    device
        The device to move the model to; None: the model stays where it is.
    check
        True: the numbers are compared with the model's own forward before anything is computed with them (`SelfCheck`, some
        ten small forward passes). False: no model is refused for its numbers.
    particles_per_pass
        The most completions, over all prompts, that are decoded at once where draws are independent, and scored at once.
        None: as many as the free memory of the device allows, at most 512 in decoding.

    Attributes
    ----------
    self_check
        What the comparison found, a `SelfCheck`; None if there was none.

    Raises
    ------
    CheckpointError
        If the tokenizer has more ids than the model. If the model's numbers would be wrong: an encoder that sees later tokens,
        for instance; the message says which path, which token, and how many nats.
    BayesKLRLError
        If the temperature is not positive, or an EOS id is outside the vocabulary.

    Examples
    --------
    The model that is shipped with the package, as the prior of a posterior:

    >>> import bayes_klrl as bk
    >>> prior = bk.TorchLM.from_pretrained("austen")
    >>> excited = bk.Reward(lambda completions: [c.count("!") for c in completions], alpha=1.0)
    >>> posterior = bk.Posterior(prior, excited, prompts="It was a fine morning", max_new_tokens=4)
    >>> bk.ImportanceSampling(8).run(posterior, seed=0).tokens.shape
    (1, 8, 4)
    """

    _recomputes = False

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any | None = None,
        *,
        eos_token_id: int | Collection[int] | None = None,
        temperature: float = 1.0,
        device: str | torch.device | None = None,
        check: bool = True,
        particles_per_pass: int | None = None,
    ) -> None:
        check_positive("temperature", temperature)
        super().__init__(model, tokenizer, eos_token_id, device, particles_per_pass)
        self._network: Network | None = None
        self.self_check: SelfCheck | None = None
        self.temperature = float(temperature)
        if check and not self.unloaded:
            self.check_numbers()

    def __repr__(self) -> str:
        return f"TorchLM({type(base_model(self._module)).__name__}, V={self.vocab_size})"

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike[str],
        dtype: torch.dtype | str | None = None,
        device: str | torch.device | None = None,
        **options: Any,
    ) -> TorchLM:
        """Load a folder, a model shipped with the package, or (only with a `/` in the name) one from the hub.

        Parameters
        ----------
        name_or_folder
            An existing folder in Hugging Face's format (with safetensors, with a PEFT adapter, or with a GGUF file), or a
            GGUF file, else the name of a shipped model such as "austen", else a hub id. What a GGUF file holds is dequantised
            once and then kept in `~/.cache/bayes_klrl`, or in the folder that the environment variable BAYES_KLRL_CACHE names.
        dtype
            Precision of the weights; None: float32, whatever the precision of the file. Log-probs are always float32.
        device
            The device to move the model to; None: where transformers loads it, by default the CPU. "meta": only the
            configuration is read, and the model has shapes and no weights. `bk.plan` says what it would need.
        options
            `eos_token_id`, `temperature`, `check` and `particles_per_pass` of `TorchLM`; the first two by default as
            `save_pretrained` stored them.

        Raises
        ------
        CheckpointError
            If there is no such model, or weights are missing; the message says what to do.
        """
        from bayes_klrl.models.torch_lm.checkpoint import load
        from bayes_klrl.models.torch_lm.sources.unloaded import without_weights

        is_planned = device is not None and torch.device(device).type == "meta"
        model, tokenizer = (without_weights if is_planned else load)(name_or_folder, dtype)
        saved = own_options(getattr(base_model(model).config, OWN_ENTRY, None))
        return cls(model, tokenizer, device=device, **{**saved, **options})

    def prefill(self, prompts: Sequence[TokenIds]) -> TorchState:
        """See `LanguageModel`. No gradient flows through it."""
        self._check_prompts(prompts, num_new=0)
        network = self._ready_network()
        features, cache = network.prefill(prompts)
        return TorchState(network, features, cache, np.array([len(prompt) for prompt in prompts]))

    @torch.no_grad()
    def next_log_probs(self, state: TorchState) -> Tensor:
        """See `LanguageModel`. Shape (R, V), float32, without a gradient."""
        return tempered(state.network.logits(state.features), self.temperature).log_softmax(-1)

    def next_log_probs_of(self, state: TorchState, rows: IntArray) -> Tensor:
        """Return `next_log_probs` of some rows, (len(rows), V), without a copy of their caches."""
        features = state.features[to_device(rows, state.features.device)]
        return self.next_log_probs(replace(state, features=features, cache=None, num_tokens=state.num_tokens[rows]))

    def log_probs_from(self, features: Tensor) -> Tensor:
        """Return the next-token log-probs (..., V) that features (..., F) predict, float32."""
        return tempered(self._ready_network().logits(features), self.temperature).log_softmax(-1)

    def append(self, state: TorchState, tokens: IntArray) -> TorchState:
        """See `LanguageModel`. No gradient flows through it."""
        tokens = np.asarray(tokens)
        check_ids(tokens, self._vocab_size)
        num_tokens = state.num_tokens + 1
        if not self.prompt_apart:
            check_length(int(num_tokens.max(initial=0)), self.context_length)
        if self._module.training:
            self._module.eval()
        on_device = to_device(tokens, self.device, torch.long)
        features, cache = state.network.step(state.cache, on_device)
        return TorchState(state.network, features, cache, num_tokens)

    def select(self, state: TorchState, rows: IntArray) -> TorchState:
        """See `LanguageModel`. Selecting all rows in order copies nothing."""
        rows = np.asarray(rows)
        if np.array_equal(rows, np.arange(len(state.num_tokens))):
            return state
        on_device = to_device(rows, self.device, torch.long)
        cache = state.network.select(state.cache, on_device)
        return TorchState(state.network, state.features[on_device], cache, state.num_tokens[rows])

    def lockstep(self, models: Sequence[Any]) -> TorchLockstep | None:
        """See `LanguageModel`: for models on an accelerator, where the host would wait for every token."""
        return lockstep_of(models, TorchLM)

    def token_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> Tensor:
        """See `LanguageModel`. Shape (P, N, T), float32, differentiable in the parameters.

        If the memory of the device runs out, half as many completions are scored at once, with a warning.
        """

        def scored(most: int | None) -> Tensor:
            return self._scored(partial(sequence_log_probs, most=most), prompts, sequences)

        def most() -> int | None:
            return self.rows_per_chunk(prompts, sequences.tokens.shape[2], recompute=self._recomputes)

        while not (found := attempted(scored, most())):
            self.halve_scored(sequences.lengths.size, gradient=torch.is_grad_enabled())
        return found[0]

    def position_log_probs(self, prompts: Sequence[TokenIds], sequences: Sequences) -> Tensor:
        """Return log p(. | c, x_<t) at every position, shape (P, N, T, V), 0 past each completion's length.

        Differentiable. The whole table must fit into memory.
        """
        return self._scored(full_log_probs, prompts, sequences)

    def features(self, prompts: Sequence[TokenIds], sequences: Sequences) -> Tensor:
        """Return the features that predict every token, shape (P, N, T, F), 0 past each completion's length.

        They are the last hidden states where these give the model's logits by one known step, else the logits. A `TorchState`
        holds the same features in decoding.
        """
        return self._scored(full_features, prompts, sequences)

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Store little for the backward pass of scores that are computed inside: the input of each block of the model alone.

        The backward pass, which may come later, computes the activations of the blocks again. Its gradient is the same, and
        what is scored without a gradient, or sampled, is not affected.

        Raises
        ------
        BayesKLRLError
            If the model has no list of blocks.
        """
        blocks_of(self._module)
        before, self._recomputes = self._recomputes, True
        try:
            yield
        finally:
            self._recomputes = before

    def check_numbers(self) -> SelfCheck:
        """Compare decoding and scoring with the model's own plain forward, prefix by prefix, and return what was compared.

        This happens once when a `TorchLM` is made. Call it again for a model whose layers were replaced since.

        Raises
        ------
        CheckpointError
            If they differ by more than rounding; the message says which path, which token, and how many nats.
        """
        self.require_weights()
        self._switch_dropout_off()
        self._network, found = choose_network(self._module, self._vocab_size, self._special_ids())
        assert found is not None
        self.self_check = found
        return found

    def copy(self) -> TorchLM:
        """Return an independent copy with all parameters trainable."""
        from bayes_klrl.models.torch_lm.adapters import trainable_copy

        duplicate = self._with_module(trainable_copy(self._module), check=False)
        # the same numbers, so the check need not be repeated
        duplicate.self_check = self.self_check
        duplicate.rebuild(self._network)
        return duplicate

    def with_adapter(self, config: Any = "lora") -> TorchLM:
        """Return a guide that equals this model and trains only an adapter; the frozen weights are shared.

        Parameters
        ----------
        config
            A `peft` configuration of a kind in docs/adapters.md, or "lora": LoRA of rank 8 on all linear layers and the head.
        """
        from bayes_klrl.models.torch_lm.adapter_kinds.trial import check_guide
        from bayes_klrl.models.torch_lm.adapters import adapted

        self.require_weights("tuned")
        guide = self._with_module(adapted(self._module, config))
        check_guide(guide.module, self._module, config, self._vocab_size)
        return guide

    def save_pretrained(self, folder: str | os.PathLike[str], *, max_shard_size: int | str = "5GB") -> None:
        """Write a Hugging Face folder that `from_pretrained` reads: weights with adapters merged, tokenizer, EOS ids.

        Weights of more than `max_shard_size` (bytes, or words such as "5GB") are written as several files with an index.
        Temperature and EOS ids are written to config.json, from which `from_pretrained` reads them, and to the generation
        config, for Hugging Face's `generate`. An adapter that cannot be merged, such as prompt tuning, is written as an
        adapter. At the end the folder is loaded again, and eight completions are scored by what was written.

        Raises
        ------
        CheckpointError
            If the folder gives other log-probs than this model; the unmerged adapter is then in its subfolder "adapter".
        OutputError
            If it cannot be written. A new folder is then not there; one that held a model is as it was.
        """
        from bayes_klrl.models.torch_lm.checkpoint import check_written, save

        self.require_weights("saved")
        save(self._module, self._tokenizer, named_path(folder), self._eos_token_ids, self.temperature, max_shard_size)
        check_written(self, folder)

    def save_adapter(self, folder: str | os.PathLike[str]) -> None:
        """Write this model's adapter as `peft` does, without its base, and compare what was written as `save_pretrained` does.

        Raises
        ------
        CheckpointError
            If the model has no adapter, or the adapter does not say which folder or name its base has.
        """
        from bayes_klrl.models.torch_lm.checkpoint import check_written, save_adapter

        save_adapter(self._module, named_path(folder), self._tokenizer)
        check_written(self, folder)

    def _with_module(self, module: nn.Module, *, check: bool = True) -> TorchLM:
        return TorchLM(
            module,
            self._tokenizer,
            eos_token_id=self._eos_token_ids,
            temperature=self.temperature,
            check=check,
            particles_per_pass=self.particles_per_pass,
        )

    def _scored(self, score: Any, prompts: Sequence[TokenIds], sequences: Sequences) -> Tensor:
        """Return `score` of all P * N rows, reshaped to (P, N, T, ...); positions past the longest length are not computed."""
        num_prompts, num_draws, num_tokens = sequences.tokens.shape
        if num_prompts != len(prompts):
            raise BayesKLRLError(
                f"{len(prompts)} prompts but completions of {num_prompts}. Give N completions for each prompt."
            )
        longest = int(sequences.lengths.max(initial=0))
        if longest == 0:
            return torch.zeros((num_prompts, num_draws, num_tokens), device=self.device)
        if len(groups := length_groups([len(prompt) for prompt in prompts])) > 1:  # a long prompt would pad all others
            found = [
                self._scored(
                    score, [prompts[p] for p in group], Sequences(sequences.tokens[group], sequences.lengths[group])
                )
                for group in groups
            ]
            return torch.cat(found)[to_device(np.concatenate(groups).argsort(), self.device)]
        self._check_prompts(prompts, num_new=longest)
        check_ids(sequences.tokens[sequences.mask], self._vocab_size)
        network, device = self._scoring_network(), self.device
        owners = torch.arange(num_prompts, device=device).repeat_interleave(num_draws)
        tokens = to_device(sequences.tokens[..., :longest], device).flatten(0, 1)
        lengths = to_device(sequences.lengths, device).flatten()
        scores: Tensor = score(network, prompts, owners, tokens, lengths, self.temperature)
        padding = scores.new_zeros((len(owners), num_tokens - longest, *scores.shape[2:]))
        return torch.cat([scores, padding], dim=1).view(num_prompts, num_draws, num_tokens, *scores.shape[2:])

    def rebuild(self, network: Network | None) -> None:
        """Compute with a network of the same kind as another model's, which need not be chosen by a check; None: with any."""
        self._network = None if network is None else rebuilt(network, self._module, self._vocab_size)

    def _ready_network(self) -> Network:
        """Return the network: the chosen one, or if it is tight, the same of the present layers, which may be others."""
        if self._network is None:
            self.require_weights()
        self._switch_dropout_off()
        if self._network is None or isinstance(self._network, TightNetwork):
            self._network = (
                None if self._network is None else tight_network(self._module, self._vocab_size)
            ) or choose_network(self._module, self._vocab_size, self._special_ids(), refuse=False)[0]
        return self._network

    def _scoring_network(self) -> Network:
        """Return the network; inside of `recomputing` one that stores less for the backward pass."""
        network = self._ready_network()
        if not self._recomputes:
            return network
        if isinstance(network, TightNetwork):
            return TightNetwork(network.family, network.vocab_size, recompute=True)
        return RecomputingNetwork(network, self._module)
