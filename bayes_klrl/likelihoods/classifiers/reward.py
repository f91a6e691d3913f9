"""A sequence classifier or a scalar reward model as a likelihood: r(x) = log p(label | prompt, x), or its score."""

from __future__ import annotations

import copy
import os
import warnings
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from bayes_klrl.batch import Batch, Setting
from bayes_klrl.checks import check_count
from bayes_klrl.errors import CheckpointError, RewardError, TextRewardError
from bayes_klrl.likelihood import Factor, check_alpha_and_bounds
from bayes_klrl.likelihoods.classifiers.heads import Head, head_of
from bayes_klrl.models.twists.simple import PartialRewardTwist
from bayes_klrl.prompts.chat import is_messages
from bayes_klrl.typing import FloatArray, LanguageModel

if TYPE_CHECKING:
    from bayes_klrl.likelihoods.classifiers.network import Classifier

__all__ = ["ClassifierReward"]


@dataclass
class Scores:
    """The loaded classifier and its scores of texts, shared by all powers and parts of one reward."""

    size: int
    classifier: Classifier | None = None
    known: OrderedDict[tuple[str, bool], float] = field(default_factory=OrderedDict)
    said: bool = False

    def keep(self, found: dict[tuple[str, bool], float]) -> None:
        """Keep scores, and drop those that were not used for longest."""
        for key, value in found.items():
            self.known[key] = value
            self.known.move_to_end(key)
        while len(self.known) > self.size:
            self.known.popitem(last=False)


@dataclass(frozen=True, eq=False, repr=False, init=False)
class ClassifierReward(Factor):
    """A Hugging Face sequence classifier, or a scalar reward model, as a factor of a `Posterior`'s likelihood.

        r(x, c) = log p(label | c, x), likelihood p(label | c, x)^(1 / alpha);    or r(x, c) = a logit, such as a score

    With alpha = 1 and the log-probability of a label, the posterior is Bayes' rule: the prior given that the label holds. This
    reward is at most 0, so that rejection sampling is exact and needs no bound.

    The classifier reads the text of prompt and completion with its own tokenizer, in evaluation mode, without gradient, in
    batches sorted by length. When it is loaded it is compared with its own plain forward pass, so that padding changes no
    value by more than rounding. A score is computed once for each text and kept; its last digits may depend on the batch in
    which it was computed, in half precision more of them. `Draws.cost` does not count its passes.

    A causal classifier scores a text and all its beginnings in one pass, which makes a critic of `SVI` and the pilot of a
    twist cheap. Unfinished completions are scored as if they were complete.

    Parameters
    ----------
    model
        The classifier: a folder or hub id for `AutoModelForSequenceClassification` (safetensors only), or such a model, which
        is not changed. It need not have the prior's vocabulary. Scores are kept by text: after you have changed a model in
        place, make a new `ClassifierReward`.
    label
        Whose probability is the reward: a name of the model's `id2label`, or an index. None: the only one, for a model with
        `num_labels = 1`.
    alpha
        Units of reward per nat; positive and finite. gamma = 1 / alpha is the power of the classifier.
    output
        "log_prob": the log-probability of the label, among all labels (softmax), or of the label alone if the model has the
        problem type "multi_label_classification" or one label (sigmoid). "logit": the raw number. None: "log_prob", but
        "logit" for a model with one label, and for regression.
    tokenizer
        The classifier's tokenizer; None: the one in the folder. A model that is given as an object needs it.
    batch_size
        The largest number of texts in one forward pass.
    device, dtype
        Where the classifier runs and in which precision ("bfloat16", `torch.float16`); None: the CPU and float32 for a
        folder, and for a model whatever it has.
    max_length
        Longer texts lose their beginning, so that the completion is kept, and the first time a warning says so. None: a text
        that is longer than the classifier reads is an error.
    add_special_tokens
        Whether plain texts get the special tokens of the tokenizer (BERT's [CLS] and [SEP], Llama's BOS). TRL's trainers leave
        them out. Texts that the chat template made have them already.
    cache_size
        The number of texts whose scores are kept.
    bounds
        The declared range (low, high) of the reward; None: none, but (-inf, 0) for a log-probability.
    name
        Name in tables and error messages; None: one with the label.

    Raises
    ------
    BayesKLRLError
        If an argument is wrong. A label that does not exist is answered with a list of those that do.
    CheckpointError
        If there is no sequence classifier: a model with another head, a language model in a folder, whose head would be
        random numbers, or a model that does not give K logits for a text. If its tokenizer does not fit.
    TextRewardError
        When a posterior is made: if the prior has no tokenizer.
    RewardError
        If a text is longer than the classifier reads, or a score is NaN or infinite, as happens in half precision.

    Examples
    --------
    >>> import bayes_klrl as bk, tokenizers, transformers
    >>> words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[PAD]": 0, "a": 1, "b": 2}, unk_token="[PAD]"))
    >>> words.pre_tokenizer = tokenizers.pre_tokenizers.Split("", "isolated")
    >>> config = transformers.BertConfig(vocab_size=3, hidden_size=4, num_hidden_layers=1, num_attention_heads=1,
    ...                                  intermediate_size=4, id2label={0: "NEGATIVE", 1: "POSITIVE"})
    >>> model = transformers.BertForSequenceClassification(config)
    >>> tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]")
    >>> positive = bk.ClassifierReward(model, label="POSITIVE", alpha=1.0, tokenizer=tokenizer)
    >>> prior = bk.NgramLM.fit(["ab", "ba"], order=2)
    >>> posterior = bk.Posterior(prior, positive, prompts="a", max_new_tokens=3)
    >>> positive, posterior.likelihood.bounds
    (ClassifierReward(log p(POSITIVE), alpha=1), (-inf, 0.0))
    >>> both = positive * bk.ClassifierReward(model, label="NEGATIVE", alpha=1.0, tokenizer=tokenizer)
    """

    model: Any
    target: str | int | None
    alpha: float
    output: str | None
    options: dict[str, Any]
    bounds: tuple[float, float] | None
    name: str | None
    head: Head
    scores: Scores

    def __init__(
        self,
        model: Any,
        *,
        label: str | int | None = None,
        alpha: float,
        output: str | None = None,
        tokenizer: Any = None,
        batch_size: int = 32,
        device: Any = None,
        dtype: Any = None,
        max_length: int | None = None,
        add_special_tokens: bool = True,
        cache_size: int = 65_536,
        bounds: tuple[float, float] | None = None,
        name: str | None = None,
    ) -> None:
        from bayes_klrl.likelihoods.classifiers.network import configuration

        check_count("batch_size", batch_size)
        check_count("cache_size", cache_size)
        if max_length is not None:
            check_count("max_length", max_length)
        if isinstance(model, str | os.PathLike):
            model = os.fspath(model)
        head = head_of(configuration(model), label, output)
        options = {
            "tokenizer": tokenizer,
            "device": device,
            "dtype": dtype,
            "batch_size": batch_size,
            "max_length": max_length,
            "add_special_tokens": add_special_tokens,
        }
        values = {"model": model, "target": label, "alpha": alpha, "output": output, "options": options, "name": name}
        known = (-np.inf, 0.0) if head.is_log_prob else None
        values |= {"head": head, "bounds": known if bounds is None else bounds, "scores": Scores(cache_size)}
        for key, value in values.items():
            object.__setattr__(self, key, value)
        check_alpha_and_bounds(self)

    def __repr__(self) -> str:
        return f"ClassifierReward({self.label}, alpha={self.alpha:.4g})"

    @property
    def label(self) -> str:
        """The name in tables and error messages: the given one, or one with the classifier's label (which is `target`)."""
        if self.name:
            return self.name
        if self.head.is_log_prob:
            return f"log p({self.head.label or 'label'})"
        return f"logit of {self.head.label}" if self.head.label else "reward model"

    def twist(self, *, gamma: float = 1.0, floor: float = 0.01, num_pilot: int = 64) -> PartialRewardTwist:
        """Return the recipe of the twist of the reward so far, for `SMC(twist=...)` and `SVI(twist=...)`.

        The classifier scores prefixes as if they were complete; see `PartialRewardTwist` for the arguments, and for the scale
        that it puts these scores on. In a product of likelihoods the other factors score the prefixes too.
        """
        return PartialRewardTwist(gamma, floor, num_pilot)

    def tempered(self, gamma: float) -> ClassifierReward:
        """Return the same reward at alpha / gamma, with the same model and scores."""
        other = copy.copy(self)
        object.__setattr__(other, "alpha", self.alpha / gamma)
        check_alpha_and_bounds(other)
        return other

    def check_arguments(self, prior: LanguageModel, columns: frozenset[str]) -> None:
        """See `Likelihood.check`: the prior must be able to decode its tokens."""
        if prior.tokenizer is None:
            raise TextRewardError(
                f"{self.label!r} reads text, but the prior has no tokenizer. Give the model a tokenizer."
            )

    def bind_with(self, setting: Setting, others: tuple[Factor, ...]) -> ClassifierReward:
        """Return the factor with its model loaded, and checked to have a chat template if the prompts are conversations."""
        tokenizer = self._classifier().tokenizer
        if any(map(is_messages, setting.prompts)) and not getattr(tokenizer, "chat_template", None):
            raise CheckpointError(
                f"The prompts are conversations, but the tokenizer of {self.label!r} has no chat template. Set the template "
                "that the model was trained with: tokenizer.chat_template = '...', and give tokenizer=tokenizer."
            )
        return self

    def values(self, batch: Batch) -> FloatArray:
        """See `Factor.values`."""
        keys = self._texts(batch)
        first: dict[tuple[str, bool], int] = {}
        for row, key in enumerate(keys):
            first.setdefault(key, row)
        known = {key: self.scores.known[key] for key in first if key in self.scores.known}
        new = [key for key in first if key not in known]
        if new:
            known |= zip(new, self._computed(new, [first[key] for key in new], batch), strict=True)
        self.scores.keep(known)
        return self.checked(np.array([known[key] for key in keys]), batch)

    def _computed(self, texts: list[tuple[str, bool]], rows: list[int], batch: Batch) -> list[float]:
        """Return the reward of texts that are not known yet; row r of the batch has text r."""
        classifier = self._classifier()
        sequences, is_cut = classifier.encoded(texts)
        for row, ids in zip(rows, sequences, strict=True):
            if classifier.limit is not None and len(ids) > classifier.limit:
                raise RewardError(
                    f"{self.label!r} reads {classifier.limit} tokens, but prompt and completion have {len(ids)}: "
                    f"{batch.describe(row)}. Give max_length={classifier.limit}, which drops the beginning of longer texts."
                )
        if any(is_cut) and not self.scores.said:
            self.scores.said = True
            warnings.warn(
                f"{self.label!r} reads only the last {self.options['max_length']} tokens (max_length) of longer texts, as for "
                f"{batch.describe(rows[is_cut.index(True)])}.",
                stacklevel=2,
            )
        logits = classifier.logits(sequences)
        finite = np.isfinite(logits).all(axis=1)
        if not finite.all():
            bad = int(finite.argmin())
            raise RewardError(
                f"{self.label!r} has the logits {logits[bad].tolist()} for {batch.describe(rows[bad])}. In float16 a model's "
                "numbers may pass 65,504: take dtype='bfloat16' or 'float32'. In float32 the model is broken."
            )
        values: list[float] = self.head.of_logits(logits).tolist()
        return values

    def _texts(self, batch: Batch) -> list[tuple[str, bool]]:
        """Return the text of prompt and completion for every row, and whether a chat template made it."""
        before = {int(p): batch.prompts[p] for p in np.unique(batch.prompt_index)}
        for p, prompt in before.items():
            if not isinstance(prompt, str) and not is_messages(prompt):
                before[p] = batch.prior.decode([prompt])[0]
        rows = zip(batch.prompt_index.tolist(), batch.completions, strict=True)
        return [self._joined(before[p], completion) for p, completion in rows]

    def _joined(self, prompt: Any, completion: str) -> tuple[str, bool]:
        """Return one text, and whether a chat template made it."""
        if isinstance(prompt, str):
            return prompt + completion, False
        messages = [dict(message) for message in prompt]
        if messages[-1]["role"] == "assistant":  # the completion continues what the assistant has begun
            messages[-1]["content"] += completion
        else:
            messages.append({"role": "assistant", "content": completion})
        return self._classifier().rendered(messages), True

    def _classifier(self) -> Classifier:
        """Return the classifier, loaded when it is first asked for."""
        if self.scores.classifier is None:
            from bayes_klrl.likelihoods.classifiers.network import Classifier, loaded

            given = dict(self.options)
            model = loaded(self.model, given.pop("tokenizer"), given.pop("device"), given.pop("dtype"))
            self.scores.classifier = Classifier(*model, **given)
        return self.scores.classifier
