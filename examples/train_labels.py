"""Make the passages of the gallery's example `classification`, and train the classifier that is its prior.

The text comes from the Debian package r-cran-janeaustenr; R itself is not needed:

    apt-get download r-cran-janeaustenr
    python examples/train_labels.py r-cran-janeaustenr_*.deb bayes_klrl/gallery/shipped/passages

A passage is a run of whole sentences of one chapter. Names of people and places would give the novel away, so each becomes
a dash, as in "Mr. —— of ——shire"; titles such as Captain stay. The chapters that `train_austen.py` kept for validation (20,
40, 60 of each novel) give the part "labelled", those of its test (10, 30, 50) the part "unseen", and all others train the
classifier. Its penalty is chosen on the chapters 5, 25 and 45 before it is trained on all of them.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from safetensors.torch import save_file
from torch import nn
from train_austen import read_novels, split_chapters, split_sentences

from bayes_klrl.gallery.data.novels import MASK, NOVELS
from bayes_klrl.gallery.models.passages_lm import SYMBOLS, counts_of

PARTS = {0: "labelled", 10: "unseen"}  # by the number of the chapter modulo 20
PENALTY_CHAPTERS = 5  # modulo 20
LEAST_WORDS, MOST_CHARACTERS, PER_NOVEL = 50, 700, 40
PENALTIES = (1e-6, 3e-6, 1e-5, 3e-5, 1e-4)

WORD = re.compile(r"[A-Za-zéêèàç]+")
CAPITALISED = re.compile(r"(?:[a-z,]|\b(?:Mrs?|Dr|Capt|Col|St)\.) ([A-Z][a-zéêèàç]+)")  # inside of a sentence
TITLES = frozenset(
    WORD.findall(
        "Mr Mrs Miss Misses Messrs Sir Lady Lord Dr Capt Captain Col Colonel Lieut Admiral General Madam God Heaven Heavens "
        "Christmas Michaelmas Easter January February March April May June July August September October November December "
        "Monday Tuesday Wednesday Thursday Friday Saturday Sunday English French Oh Ah"
    )
)


def names_in(texts: Iterable[str]) -> frozenset[str]:
    """Return the words that are capitalised inside of sentences, and hardly ever written small."""
    inside, small = Counter[str](), Counter[str]()
    for text in texts:
        inside.update(CAPITALISED.findall(text))
        small.update(word for word in WORD.findall(text) if word.islower())
    return frozenset(
        word for word, count in inside.items() if small[word.lower()] <= 0.1 * count and word not in TITLES
    )


def masked(text: str, names: frozenset[str]) -> str:
    """Return the text with a dash for every name.

    >>> masked("Emma knew Mr. Knightley's house.", frozenset({"Emma", "Knightley"}))
    "—— knew Mr. ——'s house."
    """
    return WORD.sub(lambda word: MASK if word[0] in names else word[0], text)


def passages_of(paragraphs: list[str]) -> Iterator[str]:
    """Yield runs of sentences of `LEAST_WORDS` words or a little more, one sentence a line."""
    lines: list[str] = []
    for sentence in (s for paragraph in paragraphs for s in split_sentences(paragraph)):
        lines.append(sentence)
        if sum(len(line.split()) for line in lines) >= LEAST_WORDS:
            if len(passage := "\n".join(lines)) <= MOST_CHARACTERS:
                yield passage
            lines = []


def all_passages(package: Path) -> list[dict]:
    """Return every passage of every chapter, without names, in the order of the novels."""
    novels = [split_chapters(lines) for lines in read_novels(package)]
    names = names_in(paragraph for chapters in novels for chapter in chapters for paragraph in chapter)
    print(f"{len(names)} names, such as {', '.join(sorted(names)[::150])}")
    return [
        {
            "part": PARTS.get(number % 20, "training"),
            "novel": title,
            "chapter": number,
            "text": masked(passage, names),
        }
        for title, chapters in zip(NOVELS, novels, strict=True)
        for number, chapter in enumerate(chapters, start=1)
        for passage in passages_of(chapter)
    ]


def chosen(rows: list[dict], rng: np.random.Generator) -> list[dict]:
    """Return the same number of held-out passages of each novel and part, drawn at random, in their order."""
    found = []
    for title in NOVELS:
        for part in PARTS.values():
            own = [row for row in rows if row["novel"] == title and row["part"] == part]
            found += [own[index] for index in np.sort(rng.choice(len(own), PER_NOVEL, replace=False))]
    return found


def trained(features: torch.Tensor, labels: torch.Tensor, penalty: float) -> nn.Linear:
    """Return the log-linear model of least cross-entropy, novels weighted equally, plus penalty times squared weights."""
    head = nn.Linear(features.shape[1], len(NOVELS))
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    weights = len(labels) / len(NOVELS) / torch.bincount(labels, minlength=len(NOVELS))
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        losses = nn.functional.cross_entropy(head(features), labels, reduction="none")
        loss = (weights[labels] * losses).mean() + penalty * head.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return head


def said(head: nn.Linear, features: torch.Tensor, labels: torch.Tensor) -> tuple[float, float]:
    """Return log loss and accuracy."""
    with torch.no_grad():
        logits = head(features)
    return float(nn.functional.cross_entropy(logits, labels)), float((logits.argmax(1) == labels).float().mean())


def main(
    package: Annotated[Path, typer.Argument(help="The .deb file, or a folder into which it was unpacked.")],
    out: Annotated[Path, typer.Argument(help="The folder for passages.json.gz and labels.safetensors.")],
    seed: int = 0,
) -> None:
    """Write the held-out passages and the weights of the classifier."""
    torch.set_num_threads(1)
    rows = all_passages(package)
    texts = ["".join(c for c in row["text"] if c in SYMBOLS) for row in rows]
    features, labels = counts_of(texts), torch.tensor([NOVELS.index(row["novel"]) for row in rows])
    is_training = torch.tensor([row["part"] == "training" for row in rows])
    for_penalty = is_training & torch.tensor([row["chapter"] % 20 == PENALTY_CHAPTERS for row in rows])
    losses = {}
    for penalty in PENALTIES:
        head = trained(features[is_training & ~for_penalty], labels[is_training & ~for_penalty], penalty)
        losses[penalty], accuracy = said(head, features[for_penalty], labels[for_penalty])
        print(f"penalty {penalty:g}: log loss {losses[penalty]:.3f} nats, accuracy {accuracy:.3f}")
    head = trained(features[is_training], labels[is_training], min(losses, key=losses.__getitem__))
    held_out = chosen(
        [row | {"text": text} for row, text in zip(rows, texts, strict=True)], np.random.default_rng(seed)
    )
    out.mkdir(parents=True, exist_ok=True)
    content = json.dumps(held_out, ensure_ascii=False, indent=0).encode()
    (out / "passages.json.gz").write_bytes(gzip.compress(content, 9, mtime=0))
    save_file(
        {name: value.half().contiguous() for name, value in head.state_dict().items()}, out / "labels.safetensors"
    )
    print(f"{int(is_training.sum()):,} passages of training, {len(held_out)} held out")


if __name__ == "__main__":
    typer.run(main)
