"""Which novel of Jane Austen's a passage is from: a log-linear model of its tokens, as a language model of one label token.

    logits = W f + b,        f_v = log(1 + number of tokens v in the passage), divided by its Euclidean norm

The tokens are those of the language model `austen`. The weights come with the package (`gallery/shipped/passages`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bayes_klrl.gallery.data.novels import NOVELS, SHIPPED
from bayes_klrl.gallery.models.label_lm import LabelLM
from bayes_klrl.models.checkpoint_files import shipped_folder

__all__ = ["SYMBOLS", "counts_of", "passages_lm"]

SYMBOLS = "\n" + "".join(map(chr, range(32, 127))) + "—£éêèàç"
"""The characters of passages."""


@cache
def tokenizer() -> Any:
    """Return the tokenizer of `austen`."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(shipped_folder() / "austen", trust_remote_code=False)


def counts_of(passages: Sequence[str]) -> Tensor:
    """Return the features f of each passage, (P, 2048)."""
    ids = tokenizer()(list(passages), add_special_tokens=False)["input_ids"]
    counts = np.stack([np.bincount(row, minlength=len(tokenizer())) for row in ids])
    return nn.functional.normalize(torch.as_tensor(counts, dtype=torch.float32).log1p(), dim=1)


def passages_lm(folder: Path = SHIPPED) -> LabelLM:
    """Return the classifier, with the weights in `labels.safetensors` of a folder, by default those that are shipped.

    Examples
    --------
    >>> prior = passages_lm()
    >>> prior.label_probs(["The sea was rough, and the Captain and the Admiral walked on the beach."]).shape
    (1, 6)
    """
    from safetensors.torch import load_file

    weights = load_file(folder / "labels.safetensors")
    head = nn.Linear(weights["weight"].shape[1], len(NOVELS))
    head.load_state_dict({name: value.float() for name, value in weights.items()})
    return LabelLM(head, counts_of, symbols=SYMBOLS, labels=NOVELS)
