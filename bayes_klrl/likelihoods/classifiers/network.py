"""A sequence classifier on torch: loading it, and its logits for texts of different lengths.

Padding is where rewards go wrong without a word. Classifiers on GPT-2 or Llama read the logits of the last token that is not
padding, and find it by `pad_token_id`: if that is not the token that was padded with, they read another one. Some models read
the last position whatever stands there. So each model is compared with its own plain forward pass, without padding, when it is
loaded, and is then run in the fastest of these ways that gives the same:

    per token        the head on the hidden state at each text's own last token; one pass serves a text and all its beginnings
    padded           the model's own forward, with an attention mask
    equal lengths    the model's own forward on texts of one length at a time
    one by one       that pass itself, for models that refuse batches
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification

from bayes_klrl.errors import BayesKLRLError, CheckpointError
from bayes_klrl.likelihoods.classifiers.prefixes import owners_of
from bayes_klrl.models.checkpoint_files import check_has_weights, not_finite_error
from bayes_klrl.models.torch_lm.network import base_model, context_limit, forward_parameters, model_device
from bayes_klrl.models.torch_lm.sources.located import load_tokenizer, quiet
from bayes_klrl.reward_functions.calls import evaluating
from bayes_klrl.typing import FloatArray

__all__ = ["Classifier", "configuration", "loaded"]

_PROBE_LENGTHS = (9, 5, 2)
_PRECISIONS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # relative to the largest logit; half precision: 0.05

_CURE = (
    "Load the classifier with transformers.AutoModelForSequenceClassification.from_pretrained(folder), or score the texts "
    "in a bk.Reward of your own."
)


def configuration(model: Any) -> Any:
    """Return the configuration of a model, or of the checkpoint in a folder or on the hub."""
    if isinstance(model, nn.Module):
        config = getattr(base_model(model), "config", None)
        if not hasattr(config, "num_labels") or not hasattr(base_model(model), "base_model_prefix"):
            raise CheckpointError(f"A classifier is a model of transformers; got a {type(model).__name__}.")
        _check_head(base_model(model))
        return config
    if not isinstance(model, str | os.PathLike):
        cure = " A function of texts is a bk.Reward(fn, alpha=...)." if callable(model) else ""
        raise BayesKLRLError(f"model is a classifier, a folder or a hub id; got {model!r}.{cure}")
    name = os.fspath(model)
    if (Path(name) / "adapter_config.json").is_file():
        raise CheckpointError(
            f"{name!r} holds an adapter. Merge it into its base: "
            "peft.AutoPeftModelForSequenceClassification.from_pretrained(folder).merge_and_unload(), and give that model."
        )
    if Path(name).is_dir():
        check_has_weights(Path(name))
    try:
        with quiet():
            return AutoConfig.from_pretrained(name, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, KeyError and others, for what is no checkpoint
        raise CheckpointError(f"{name!r} cannot be read as a model: {error}") from error


def _check_head(model: Any) -> None:
    """Refuse a model of transformers that was made for another task, whose logits could pass for those of labels."""
    name = type(model).__name__
    if type(model).__module__.startswith("transformers.models.") and "ForSequenceClassification" not in name:
        raise CheckpointError(f"{name} is no sequence classifier: it was made for another task. {_CURE}")


def loaded(model: Any, tokenizer: Any, device: Any, dtype: Any) -> tuple[Any, Any]:
    """Return model and tokenizer of what `ClassifierReward` is given; a model that is given is not changed."""
    precision = getattr(torch, dtype, dtype) if isinstance(dtype, str) else dtype
    if precision is not None and precision not in _PRECISIONS:
        raise BayesKLRLError(
            'dtype is a type of torch or its name, one of "float32", "float64", "bfloat16" and "float16"; '
            f"got {dtype!r}."
        )
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise BayesKLRLError("A classifier that is given as a model needs its tokenizer: tokenizer=...")
        options = {"device": device, "dtype": precision}
        moved = {key: value for key, value in options.items() if value is not None}
        here = model_device(model), next(model.parameters()).dtype
        if (device is not None and torch.device(device) != here[0]) or precision not in (None, here[1]):
            model = copy.deepcopy(model).to(**moved)
        return model, tokenizer
    name = os.fspath(model)
    with quiet():
        network = _from_pretrained(name, precision or torch.float32).to(device or "cpu")
        tokenizer = load_tokenizer(name) if tokenizer is None else tokenizer
    if tokenizer is None:
        raise CheckpointError(f"{name!r} has no tokenizer. Save one there, or give tokenizer=...")
    return network.eval(), tokenizer


def _from_pretrained(name: str, dtype: torch.dtype) -> Any:
    """Return a classifier from a folder or the hub; refuse one whose head would be made of random numbers."""
    options = {"local_files_only": True} if Path(name).is_dir() else {}
    try:
        model, report = AutoModelForSequenceClassification.from_pretrained(
            name, dtype=dtype, trust_remote_code=False, use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:  # OSError, SafetensorError, RuntimeError and others, caused by broken files
        raise CheckpointError(f"{name!r} cannot be loaded as a sequence classifier: {error}") from error
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"])[:3])
        raise CheckpointError(
            f"{name!r} is no sequence classifier: it lacks the weights {missing}. They would have been random numbers, and so "
            "would the reward. Give a checkpoint that was trained as a classifier or as a reward model."
        )
    for key, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise not_finite_error(key, name)
    return model


class Classifier:
    """A sequence classifier with its tokenizer.

    Parameters
    ----------
    model, tokenizer
        What `loaded` returns.
    batch_size
        The largest number of texts in one pass.
    max_length
        The number of tokens that a longer text is cut to, at its beginning; None: longer ones are not cut.
    add_special_tokens
        Whether plain texts get the tokenizer's special tokens.

    Attributes
    ----------
    limit
        The largest number of tokens that the model reads; None: it has no limit.
    way
        "per token", "padded", "equal lengths" or "one by one".
    num_passes, num_tokens
        Forward passes so far, and the tokens in them, padding included.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, batch_size: int, max_length: int | None, add_special_tokens: bool
    ) -> None:
        self.model, self._base = model, base_model(model)
        self.tokenizer = copy.deepcopy(tokenizer)
        self.tokenizer.truncation_side = "left"
        self._batch_size, self._max_length, self._special = batch_size, max_length, add_special_tokens
        self.limit = _limit(model, tokenizer)
        if max_length is not None and self.limit is not None and max_length > self.limit:
            raise BayesKLRLError(
                f"max_length = {max_length} is more than the {self.limit} tokens that the model reads."
            )
        text_config = self._base.config.get_text_config()
        self._skipped = getattr(text_config, "pad_token_id", None)  # the model takes such a token for padding
        known = (self._skipped, getattr(tokenizer, "pad_token_id", None), 0)
        self._num_ids = int(self._base.get_input_embeddings().weight.shape[0])
        self._pad = next(token for token in known if isinstance(token, int) and 0 <= token < self._num_ids)
        self._device = model_device(model)
        self._has_types = _has_types(tokenizer) and "token_type_ids" in forward_parameters(model)
        self.num_passes = self.num_tokens = 0
        self.way = self._fastest_way()

    # ---- from texts to token ids

    def encoded(self, texts: Sequence[tuple[str, bool]]) -> tuple[list[tuple[int, ...]], list[bool]]:
        """Return the ids of texts, and which of them were longer than `max_length`.

        Parameters
        ----------
        texts
            Each text, and whether a chat template made it, so that it has its special tokens already.
        """
        whole = self._ids(texts)
        is_cut = [self._max_length is not None and len(ids) > self._max_length for ids in whole]
        cut = iter(self._ids([text for text, long in zip(texts, is_cut, strict=True) if long], truncation=True))
        sequences = [next(cut) if long else ids for ids, long in zip(whole, is_cut, strict=True)]
        # the empty text has no logits: it is read as the token that texts begin or end with
        special = [getattr(self.tokenizer, f"{name}_token_id", None) for name in ("bos", "eos", "pad")]
        sequences = [ids or tuple(token for token in special if token is not None)[:1] for ids in sequences]
        for index, ids in enumerate(sequences):
            if not ids or max(ids) >= self._num_ids:
                raise CheckpointError(
                    f"The classifier's tokenizer gives the ids {list(ids)} for {texts[index][0]!r}, and the model has the ids "
                    f"below {self._num_ids}. Give the tokenizer that the model was trained with: tokenizer=..."
                )
        return sequences, is_cut

    def _ids(self, texts: Sequence[tuple[str, bool]], **options: Any) -> list[tuple[int, ...]]:
        """Return the ids of texts, cut at their beginning if `truncation` is asked for."""
        found: dict[int, tuple[int, ...]] = {}
        for rendered in (False, True):
            rows = [index for index, (_, is_rendered) in enumerate(texts) if is_rendered == rendered]
            if rows:
                ids = self.tokenizer(
                    [texts[row][0] for row in rows],
                    add_special_tokens=self._special and not rendered,
                    max_length=self._max_length if options else None,
                    **options,
                )["input_ids"]
                found |= zip(rows, map(tuple, ids), strict=True)
        return [found[index] for index in range(len(texts))]

    def rendered(self, messages: list[dict[str, Any]]) -> str:
        """Return a conversation as text, by the classifier's own chat template."""
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False))

    # ---- from token ids to logits

    def logits(self, sequences: Sequence[tuple[int, ...]]) -> FloatArray:
        """Return the K logits of M token sequences, shape (M, K), float64."""
        found = np.empty((len(sequences), int(self._base.config.num_labels)))
        owners = owners_of(sequences) if self.way == "per token" else list(range(len(sequences)))
        served: dict[int, list[int]] = {}
        for index, owner in enumerate(owners):
            served.setdefault(owner, []).append(index)
        by_length = sorted(served, key=lambda owner: len(sequences[owner]))
        with evaluating(self.model):
            for batch in self._batches(by_length, [len(sequences[owner]) for owner in by_length]):
                rows = [sequences[owner] for owner in batch]
                if self.way == "per token":
                    wanted = [(row, index) for row, owner in enumerate(batch) for index in served[owner]]
                    places = [(row, self._last(sequences[index])) for row, index in wanted]
                    found[[index for _, index in wanted]] = _host(self._per_token(rows, places))
                else:
                    found[batch] = _host(self._padded(rows))
        return found

    def _batches(self, indices: list[int], lengths: list[int]) -> list[list[int]]:
        """Return the indices, which are sorted by length, in batches; of one length each where the model needs that."""
        groups = [indices]
        if self.way in ("equal lengths", "one by one"):
            pairs = zip(lengths, indices, strict=True)
            groups = [[index for _, index in group] for _, group in groupby(pairs, key=lambda pair: pair[0])]
        size = 1 if self.way == "one by one" else self._batch_size
        return [group[start : start + size] for group in groups for start in range(0, len(group), size)]

    def _last(self, ids: tuple[int, ...]) -> int:
        """Return the position whose logits the model reads: the last token's that it does not take for padding."""
        return max((place for place, token in enumerate(ids) if token != self._skipped), default=0)

    def _per_token(self, rows: Sequence[tuple[int, ...]], places: Sequence[tuple[int, int]]) -> Tensor:
        """Return the logits at places (row, position), shape (number of places, K)."""
        states = self._states(rows)
        row, position = (torch.tensor(index, device=states.device) for index in zip(*places, strict=True))
        logits: Tensor = self._base.score(states[row, position])
        return logits

    def _states(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the last hidden states of right-padded rows, (B, L, H)."""
        states: Tensor = self._base.base_model(**self._inputs(rows)).last_hidden_state
        return states

    def _padded(self, rows: Sequence[tuple[int, ...]]) -> Tensor:
        """Return the logits of rows by the model's own forward, (B, K)."""
        logits: Tensor | None = getattr(self.model(**self._inputs(rows)), "logits", None)
        expected = (len(rows), int(self._base.config.num_labels))
        if logits is None or tuple(logits.shape) != expected:
            shape = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
            raise CheckpointError(
                f"{type(self._base).__name__} is no sequence classifier: for {len(rows)} texts it gives {shape}, where "
                f"{expected} is expected, (texts, num_labels). {_CURE}"
            )
        return logits

    def _inputs(self, rows: Sequence[tuple[int, ...]]) -> dict[str, Tensor]:
        """Return rows as arrays padded on the right, whatever side the tokenizer pads on."""
        width = max(map(len, rows))
        self.num_passes, self.num_tokens = self.num_passes + 1, self.num_tokens + width * len(rows)
        ids = torch.tensor([[*row, *[self._pad] * (width - len(row))] for row in rows], device=self._device)
        lengths = torch.tensor([len(row) for row in rows], device=self._device)
        mask = (torch.arange(width, device=self._device) < lengths[:, None]).long()
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._has_types:
            inputs["token_type_ids"] = torch.zeros_like(ids)
        return {name: value for name, value in inputs.items() if name in forward_parameters(self.model)}

    # ---- which way is right

    def _fastest_way(self) -> str:
        """Return the first way that gives what the model's own forward gives for texts alone, without padding."""
        special = {self._pad, self._skipped, *getattr(self.tokenizer, "all_special_ids", ())}
        ids = [token for token in range(self._num_ids) if token not in special]
        longest = min(_PROBE_LENGTHS[0], self.limit or _PROBE_LENGTHS[0])
        if len(ids) < 2 or longest < _PROBE_LENGTHS[1]:
            return "one by one"
        draws = np.random.default_rng(0).choice(ids, size=longest, replace=len(ids) < longest).tolist()
        rows = [tuple(draws[:length]) for length in (longest, *_PROBE_LENGTHS[1:])]
        checks = {
            "per token": self._reads_last_tokens,
            "padded": self._ignores_padding,
            "equal lengths": self._ignores_neighbours,
        }
        for way, check in checks.items():
            try:
                with evaluating(self.model):
                    if check(rows, torch.cat([self._padded([row]) for row in rows])):
                        return way
            except CheckpointError:
                raise
            except Exception:  # whatever a model raises that is not made for this
                continue
        return "one by one"

    def _reads_last_tokens(self, rows: list[tuple[int, ...]], alone: Tensor) -> bool:
        """Return whether the head on hidden states of one padded pass gives the same, and no state sees later tokens."""
        if not isinstance(getattr(self._base, "score", None), nn.Module):
            return False
        states = self._states([rows[0], _changed(rows[0])])[:, : _PROBE_LENGTHS[2]]
        is_causal = torch.allclose(states[0], states[1], atol=1e-6, rtol=1e-6)
        beginnings = self._per_token(rows[:1] + rows[1:2], [(0, len(row) - 1) for row in rows])
        own = self._per_token(rows, [(row, len(ids) - 1) for row, ids in enumerate(rows)])
        return is_causal and _close(beginnings, alone) and _close(own, alone)

    def _ignores_padding(self, rows: list[tuple[int, ...]], alone: Tensor) -> bool:
        """Return whether the model's own forward gives the same for padded rows."""
        return _close(self._padded(rows), alone)

    def _ignores_neighbours(self, rows: list[tuple[int, ...]], alone: Tensor) -> bool:
        """Return whether the model's own forward gives the same beside a text of the same length."""
        return _close(self._padded([_changed(rows[0]), rows[0]])[1:], alone[:1])


def _limit(model: Any, tokenizer: Any) -> int | None:
    """Return the largest number of tokens that a classifier reads; None if there is no limit."""
    network = base_model(model)
    embeddings = getattr(getattr(network.base_model, "embeddings", None), "position_embeddings", None)
    offset = getattr(embeddings, "padding_idx", None)
    by_model = context_limit(model)
    if by_model is not None and offset is not None:  # RoBERTa counts positions from the padding's id on
        by_model -= offset + 1
    by_tokenizer = getattr(tokenizer, "model_max_length", None)
    known = [limit for limit in (by_model, by_tokenizer) if limit is not None and limit < 1e9]
    return int(min(known)) if known else None


def _has_types(tokenizer: Any) -> bool:
    """Return whether the tokenizer gives token types, which for a single text are 0; refuse others."""
    types = tokenizer("a").get("token_type_ids")
    if types is not None and any(types):
        raise CheckpointError(
            f"The tokenizer gives the token types {types} for a single text. Only classifiers that read types of 0 are "
            "supported; score the texts in a bk.Reward of your own."
        )
    return types is not None


def _changed(ids: tuple[int, ...]) -> tuple[int, ...]:
    """Return ids of the same length that begin alike and then differ."""
    kept = _PROBE_LENGTHS[2]
    return (*ids[:kept], *(ids[0] if token != ids[0] else ids[1] for token in ids[kept:]))


def _close(ours: Tensor, theirs: Tensor) -> bool:
    """Return whether logits are equal but for rounding."""
    tolerance = _TOLERANCE.get(theirs.dtype, 0.05)
    scale = max(1.0, float(theirs.abs().max()))
    return bool(torch.allclose(ours.double() / scale, theirs.double() / scale, rtol=tolerance, atol=tolerance))


def _host(logits: Tensor) -> FloatArray:
    """Return logits as NumPy, float64."""
    values: FloatArray = logits.detach().double().cpu().numpy()
    return values
