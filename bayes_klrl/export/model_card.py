"""The model card of a saved guide: README.md with the posterior that it approximates, its training and its certificate.

Its front matter is what the hub reads (base_model, library_name, tags). A README.md that others wrote is never replaced.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bayes_klrl.errors import warn_caller
from bayes_klrl.posterior import Posterior
from bayes_klrl.whole_files import write_whole

__all__ = ["CARD", "OTHER_CARD", "card_before", "is_ours", "model_card", "write_card"]

CARD = "README.md"
OTHER_CARD = "BAYES_KLRL.md"
"""The card's name where README.md is somebody else's."""

_MARK = "<!-- Written by bayes_klrl. -->"
_LINE = 120


def is_ours(text: str) -> bool:
    """Whether a model card was written by this package, so that it may be replaced."""
    return _MARK in text


def model_card(
    posterior: Posterior,
    *,
    training: Mapping[str, str],
    is_adapter: bool,
    how_to_load: str,
    certificate: Any | None = None,
) -> str:
    """Return the text of a model card.

    Parameters
    ----------
    posterior
        The posterior that the guide approximates.
    training
        What to say of the training, value by name.
    is_adapter
        Whether the folder holds an adapter and not a whole model.
    how_to_load
        The call of this package that reads the folder.
    certificate
        A `Certificate` of the guide; its text is quoted. None: the card says that there is none.

    Examples
    --------
    >>> import numpy as np, bayes_klrl as bk
    >>> coin = bk.NgramLM(np.log([0.5, 0.5]), eos_token_id=1)
    >>> posterior = bk.Posterior(coin, bk.TokenReward(lambda t, n: n, alpha=0.5, name="length"), max_new_tokens=3)
    >>> card = model_card(posterior, training={"steps": "30"}, is_adapter=False, how_to_load="NgramLM.from_pretrained(folder)")
    >>> [line for line in card.splitlines() if "alpha" in line][-1]
    '| alpha (the KL coefficient) | 0.5 |'
    """
    from huggingface_hub import ModelCardData

    base = base_model_name(posterior.prior)
    is_network = hasattr(posterior.prior, "module")
    library = ("peft" if is_adapter else "transformers") if is_network else "bayes_klrl"
    tags = ["bayes_klrl", "kl-regularised-rl", "variational-inference"]
    front = ModelCardData(base_model=base, library_name=library, tags=tags).to_yaml()
    alpha = posterior.likelihood.alpha
    problem = {
        "prior (the reference model)": base or f"a {type(posterior.prior).__name__} without a name",
        "likelihood (the reward)": posterior.likelihood.label,
        "alpha (the KL coefficient)": "none: hard constraints alone" if alpha is None else f"{alpha:.6g}",
        "prompts": f"{posterior.num_prompts}",
        "max_new_tokens": f"{posterior.max_new_tokens}",
    }
    if (temperature := getattr(posterior.prior, "temperature", 1.0)) != 1.0:
        problem["temperature of prior and guide"] = f"{temperature:.6g}"
    parts = [
        f"---\n{front.strip()}\n---\n{_MARK}",
        "# An approximate posterior",
        "This language model approximates, for each prompt c, the posterior that KL-regularised RL aims at:",
        "    p*(x | c) = p0(x | c) exp(r(x, c) / alpha) / Z(c)",
        table(problem),
        "## Training",
        table(training),
        "## Certificate",
        "None was made." if certificate is None else fenced(str(certificate)),
        "## Use",
        f"Load it with `bayes_klrl.{how_to_load}`{', or as any model of its library' if is_network else ''}. Draws follow the "
        "guide, not exactly the posterior: `bayes_klrl.ImportanceSampling(1000, proposal=guide)` corrects them.",
    ]
    return "\n\n".join(parts) + "\n"


def base_model_name(prior: Any) -> str | None:
    """Return the name of the prior as one may publish it: a hub id, or the last part of a folder's path; None without one."""
    name = str(getattr(getattr(prior, "module", None), "name_or_path", "") or "")
    if not name:
        return None
    is_path = Path(name).is_absolute() or Path(name).exists() or name.count("/") > 1 or name.startswith(".")
    return Path(name).resolve().name if is_path else name


def table(rows: Mapping[str, str]) -> str:
    """Return a table of two columns in Markdown."""
    lines = [f"| {name} | {cell(value)} |" for name, value in rows.items()]
    return "\n".join(["| | |", "|---|---|", *lines])


def cell(value: str) -> str:
    """Return a text that cannot end its cell, or begin mark-up."""
    line = " ".join(value.split()).replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")
    return line if len(line) <= _LINE else line[: _LINE - 3] + "..."


def fenced(text: str) -> str:
    """Return a text as it is, in a fence longer than any in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}text\n{text}\n{fence}"


def card_before(folder: Path) -> bytes | None:
    """Return the README.md of a folder that is about to be written into, None if there is none."""
    file = folder / CARD
    return file.read_bytes() if file.is_file() else None


def write_card(folder: Path, text: str, before: bytes | None) -> Path:
    """Write a model card into a folder that was just saved, and return its file.

    Parameters
    ----------
    folder
        The folder.
    text
        The card.
    before
        The README.md that was there before the saving (peft writes one too). One of somebody else's stays as it was; the card
        is then in BAYES_KLRL.md, and a warning says so.
    """
    if before is None or is_ours(before.decode("utf-8", errors="replace")):
        return write_whole(folder / CARD, text)
    if card_before(folder) != before:
        write_whole(folder / CARD, before)
    warn_caller(
        f"{str(folder / CARD)!r} was not written by bayes_klrl and stays as it was; the model card is in {OTHER_CARD}."
    )
    return write_whole(folder / OTHER_CARD, text)
