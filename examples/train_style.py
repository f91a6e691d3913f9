"""Train `style`, the classifier of the gallery's `generation`: speech against narration in Jane Austen's six novels.

The text comes from the Debian package r-cran-janeaustenr, as for `train_austen.py`:

    apt-get download r-cran-janeaustenr
    python examples/train_style.py r-cran-janeaustenr_*.deb bayes_klrl/gallery/shipped/style

A sentence is speech if all of it stands between quotation marks, which a paragraph opens and closes, and narration if none
of it does; others are left out. The marks are removed. The classifier learns from fragments of 6 to 20 words that begin
anywhere, as completions do. Chapters 10, 20, 30, ... of each novel are held out, as for the prior.
"""

import json
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from safetensors.numpy import save_file
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from train_austen import read_novels, split_chapters, split_sentences

from bayes_klrl.gallery.models.style import NUM_FEATURES, StyleClassifier, hashed

INVERSE_PENALTY, NUM_HELD_OUT = 10.0, 300


def labelled(paragraph: str) -> list[tuple[bool, str]]:
    """The sentences of a paragraph that are speech, or narration, from end to end; without quotation marks.

    >>> labelled('She sighed. "How odd!" he cried. "It is. I think so."')
    [(False, 'She sighed.'), (True, 'It is.'), (True, 'I think so.')]
    """
    is_open, found = False, []
    for sentence in split_sentences(paragraph):
        marks, body = sentence.count('"'), sentence.replace('"', "").strip()
        begins, ends = sentence.startswith('"'), sentence.endswith('"')
        if marks == 0:
            found.append((is_open, body))
        elif (
            ((marks, is_open) == (1, False) and begins)
            or ((marks, is_open) == (1, True) and ends)
            or ((marks, is_open) == (2, False) and begins and ends)
        ):
            found.append((True, body))
        is_open ^= marks % 2 == 1
    return found


def fragments(sentences: list[tuple[bool, str]], rng: np.random.Generator) -> tuple[list[str], np.ndarray]:
    """A fragment of each sentence, and whether it is speech."""
    texts = []
    for _, text in sentences:
        words = text.split()
        start = int(rng.integers(max(1, len(words) - 6))) if rng.random() < 0.7 else 0
        texts.append(" ".join(words[start : start + int(rng.integers(6, 21))]))
    return texts, np.array([is_speech for is_speech, _ in sentences])


def matrix(texts: list[str]) -> csr_matrix:
    """The features of texts, as scikit-learn reads them."""
    return csr_matrix(hashed(texts), shape=(len(texts), NUM_FEATURES))


def main(
    package: Annotated[Path, typer.Argument(help="The .deb file, or a folder into which it was unpacked.")],
    out: Annotated[Path, typer.Argument(help="The folder for the classifier.")],
    seed: int = 0,
) -> None:
    """Train, and print how often the classifier is right on the held-out chapters."""
    rng = np.random.default_rng(seed)
    parts: dict[bool, list[tuple[bool, str]]] = {True: [], False: []}
    for novel in read_novels(package):
        for number, paragraphs in enumerate(split_chapters(novel), start=1):
            parts[number % 10 == 0] += [pair for paragraph in paragraphs for pair in labelled(paragraph)]
    texts, is_speech = fragments(parts[False], rng)
    fitted = LogisticRegression(C=INVERSE_PENALTY, class_weight="balanced", max_iter=1000).fit(matrix(texts), is_speech)
    stored = {"weights": fitted.coef_[0].astype(np.float16), "bias": fitted.intercept_.astype(np.float32)}
    out.mkdir(parents=True, exist_ok=True)
    save_file(stored, out / "style.safetensors")
    unseen, truth = fragments(parts[True], rng)
    odds = StyleClassifier(stored["weights"].astype(np.float64), float(stored["bias"][0])).log_odds(unseen)
    each = [float(((odds > 0) == truth)[truth == kind].mean()) for kind in (True, False)]
    loss = float(np.logaddexp(0, np.where(truth, -odds, odds)).mean())
    print(f"{len(texts):,} sentences, {is_speech.mean():.3f} of them speech; held out {len(truth):,}")
    print(f"right on held-out fragments: speech {each[0]:.3f}, narration {each[1]:.3f}; log loss {loss:.3f} nats")
    chosen = sorted(rng.choice(len(truth), NUM_HELD_OUT, replace=False).tolist())
    content = [[bool(truth[i]), unseen[i]] for i in chosen]
    (out / "held_out.json").write_text(json.dumps(content, indent=0, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
