"""What every architecture of transformers gives: numbers against its own forward, prefix by prefix, and whole runs.

The reference here shares no code with the package. `python -m tests.models.torch_lm.sweep` writes the table of
docs/architectures.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

import bayes_klrl as bk
from tests.models.torch_lm.architectures import CAUSAL, CAUSAL_SWITCH, NOT_BUILT, SEQ2SEQ, tiny

__all__ = ["CASES", "NETWORKS", "TABLE", "as_built", "case_names", "own_scores", "row", "table", "tried"]

TABLE = Path(__file__).parents[3] / "docs" / "architectures.md"
NETWORKS = {
    "TightNetwork": "own loop",
    "CachedNetwork": "its forward, with its cache",
    "EncoderDecoderNetwork": "its forward, with its cache",
    "PlainNetwork": "its forward, without a cache",
    "PlainEncoderDecoderNetwork": "its forward, without a cache",
}

FULL = ("big_bird", "bigbird_pegasus")
CASES: dict[str, dict[str, Any]] = {
    **{name: CAUSAL_SWITCH.get(name, {}) for name in CAUSAL},
    **{f"{name} (encoder-decoder)": {"seq2seq": True} for name in SEQ2SEQ},
    **{f"{name} (as configured by default)": {} for name in CAUSAL_SWITCH},
}
for _name in [case for case in CASES if case.startswith(FULL) and "default" not in case]:
    CASES[f"{_name.split(' (')[0]} (original_full{', encoder-decoder' if '(' in _name else ''})"] = {
        **CASES[_name],
        "attention_type": "original_full",
    }


def case_names() -> list[str]:
    """Return the names of all cases."""
    return sorted(CASES)


def as_built(case: str) -> Any:
    """Return the tiny model of a case."""
    return tiny(case.split(" (")[0], **CASES[case])


@torch.no_grad()
def own_scores(module: Any, prompts: list[list[int]], completions: np.ndarray) -> np.ndarray:
    """Return the log-prob of each token of completions (P, N, T), each by one forward of its prefix alone."""
    scores = np.empty(completions.shape)
    for p, n, t in np.ndindex(*completions.shape):
        read = completions[p, n, :t].tolist()
        if module.config.is_encoder_decoder:
            ids = torch.tensor([[module.config.decoder_start_token_id, *read]])
            logits = module(input_ids=torch.tensor([prompts[p]]), decoder_input_ids=ids, use_cache=False).logits
        else:
            logits = module(torch.tensor([[*prompts[p], *read]]), use_cache=False).logits
        scores[p, n, t] = logits[0, -1].float().log_softmax(-1)[completions[p, n, t]]
    return scores


def row(case: str, found: bk.TorchLM | bk.CheckpointError) -> str:
    """Return a line of the table: the network that an architecture gets, or that it is refused and why."""
    if isinstance(found, bk.TorchLM):
        return f"| {case} | {NETWORKS[type(found.prefill([[4]]).network).__name__]} |"
    reasons = {"tokens that come later": "sees later tokens", "Block-sparse": "block-sparse attention"}
    return (
        f"| {case} | refused: {next((why for words, why in reasons.items() if words in str(found)), 'other numbers')} |"
    )


def tried(module: Any) -> bk.TorchLM | bk.CheckpointError:
    """Return the language model of a module, or its refusal."""
    try:
        return bk.TorchLM(module)
    except bk.CheckpointError as error:
        return error


def table() -> str:
    """Return the table, with the architectures that are not tried and why."""
    rows = "\n".join(row(case, tried(as_built(case))) for case in case_names())
    skipped = "\n".join(f"| {name} | not tried: {reason} |" for name, reason in sorted(NOT_BUILT.items()))
    return f"| architecture | log-probs by |\n|---|---|\n{rows}\n{skipped}\n"


def main() -> None:
    """Put the present table into the document."""
    torch.set_num_threads(1)
    text = TABLE.read_text() if TABLE.is_file() else "# Architectures\n\n| "
    head = text[: text.index("| ")]
    TABLE.write_text(head + table())


if __name__ == "__main__":
    main()
