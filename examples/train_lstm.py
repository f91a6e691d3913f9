"""Train the LSTM of the gallery: characters of how Jane Austen's sentences begin, eight minutes on one CPU core.

The text comes from the Debian package r-cran-janeaustenr, as for `train_austen.py`; R itself is not needed:

    apt-get download r-cran-janeaustenr
    python examples/train_lstm.py r-cran-janeaustenr_*.deb bayes_klrl/gallery/shipped/lstm --minutes 8

The model reads lower case, without quotation marks and brackets, and learns the first 32 characters of each sentence, with its
end if that is among them. Of each novel the chapters 20, 40, 60 are validation and the chapters 10, 30, 50 test.
"""

import re
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from train_austen import read_corpus
from transformers import PreTrainedTokenizerFast

import bayes_klrl as bk
from bayes_klrl.gallery.models.lstm_lm import LSTMConfig, LSTMForCausalLM

EOS, EOS_ID, IGNORED = "<|end|>", 0, -100
ALPHABET = " !',-.:;?abcdefghijklmnopqrstuvwxyz"
LENGTH, EMBEDDING, HIDDEN, DROPOUT = 32, 64, 256, 0.1
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 96, 4e-3, 0.01


def plain(sentence: str) -> str:
    """A sentence in lower case, without accents, quotation marks and brackets."""
    letters = unicodedata.normalize("NFKD", sentence.lower().translate(str.maketrans("\u2018\u2019\u2014", "''-")))
    return " ".join(re.sub(r'["\u201c\u201d()\[\]]|[\u0300-\u036f]', "", letters).split())


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token for each character of ALPHABET; the end of a text is token 0, which also begins and pads."""
    characters = Tokenizer(models.WordLevel({EOS: EOS_ID} | {c: i for i, c in enumerate(ALPHABET, start=1)}))
    characters.normalizer = normalizers.Lowercase()
    characters.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    characters.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=characters, bos_token=EOS, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )


def encode(chapters: list[list[str]]) -> np.ndarray:
    """Rows of LENGTH + 1 ids: EOS, a sentence's first characters, EOS if they are all; IGNORED behind. (W, LENGTH + 1)."""
    number = {character: i for i, character in enumerate(ALPHABET, start=1)}
    rows = []
    for sentence in (plain(sentence) for chapter in chapters for sentence in chapter):
        if sentence and set(sentence) <= set(ALPHABET):
            ids = [EOS_ID, *(number[character] for character in sentence), EOS_ID][: LENGTH + 1]
            rows.append(ids + [IGNORED] * (LENGTH + 1 - len(ids)))
    return np.array(rows)


def batches(rows: np.ndarray, rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Epoch after epoch without end, (BATCH_SIZE, LENGTH + 1) ids each."""
    while True:
        yield from torch.from_numpy(rng.permutation(rows)).split(BATCH_SIZE)


def nats(model: LSTMForCausalLM, rows: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    """Nats of the tokens of some rows, the end included."""
    logits = model(input_ids=rows[:, :-1].clamp(min=0)).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction=reduction)


@torch.no_grad()
def bits_per_character(model: LSTMForCausalLM, rows: np.ndarray) -> float:
    """Bits per token of some rows; every token is a character or the end."""
    model.eval()
    total = sum(nats(model, part, "sum").item() for part in torch.from_numpy(rows).split(512))
    return total / (rows[:, 1:] != IGNORED).sum() / np.log(2)


def main(
    package: Annotated[Path, typer.Argument(help="The .deb file, or a folder into which it was unpacked.")],
    out: Annotated[Path, typer.Argument(help="The folder for the model.")],
    minutes: Annotated[float, typer.Option(help="CPU minutes of training, in which the rate falls to 0.")] = 8,
    seed: int = 0,
) -> None:
    """Train the model, write it in half precision, and print bits per character."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    parts = {part: encode(chapters) for part, chapters in read_corpus(package).items()}
    config = LSTMConfig(
        vocab_size=len(ALPHABET) + 1, embedding_size=EMBEDDING, hidden_size=HIDDEN, dropout=DROPOUT, eos_token_id=EOS_ID
    )
    model = LSTMForCausalLM(config)
    print(f"{model.num_parameters():,} parameters, sentences", {part: len(rows) for part, rows in parts.items()})
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.98), weight_decay=WEIGHT_DECAY)
    begin, progress, history = time.process_time(), 0.0, []
    for step, batch in enumerate(batches(parts["train"], np.random.default_rng(seed)), start=1):
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(0.01 + progress / 0.02, 1 - progress)
        loss = nats(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        history.append(loss.item() / np.log(2))
        progress = min(1.0, (time.process_time() - begin) / (60 * minutes))
        if step % 250 == 0 or progress == 1:
            seen = step * BATCH_SIZE / len(parts["train"])
            validation = bits_per_character(model, parts["validation"])
            recent = np.mean(history[-250:])
            print(f"step {step}, epoch {seen:.1f}: {recent:.3f} bits, validation {validation:.3f}", flush=True)
        if progress == 1:
            break
    bk.TorchLM(model.half(), make_tokenizer()).save_pretrained(out)
    written = bk.TorchLM.from_pretrained(out).module
    parts["train"] = parts["train"][::16]  # about as much text as the others
    found = {part: round(float(bits_per_character(written, rows)), 4) for part, rows in parts.items()}
    print("bits per character of the written model:", found)


if __name__ == "__main__":
    typer.run(main)
