"""Train the language model `austen` that ships with bayes_klrl: a small Llama on Jane Austen's six novels.

The text comes from the Debian package r-cran-janeaustenr; R itself is not needed:

    apt-get download r-cran-janeaustenr
    python examples/train_austen.py r-cran-janeaustenr_*.deb --minutes 85

Every sentence is followed by `<|endoftext|>`, so a sampled completion ends where a sentence does. Of each novel
(chapters numbered through its volumes) the chapters 20, 40, 60 are kept for validation, the chapters 10, 30, 50 for
the test, and neither is seen in training or by the tokenizer.
"""

import json
import math
import re
import struct
import subprocess
import tempfile
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

EOS, EOS_ID = "<|endoftext|>", 0
IGNORED = -100  # the label that cross-entropy leaves out
NUM_CHAPTERS = 269  # of the six novels together: 55 + 48 + 31 + 24 + 61 + 50

HEADING = re.compile(r"^ *(?:CHAPTER|Chapter) +(?:[IVXL]+|\d+) *$")
NOT_PROSE = re.compile(r"^ *(?:VOLUME [IVX]+|FINIS|Finis|THE END|[* ]+|\*Vide .*|\[(?:At|End) [^]]*\]?) *$")
ABBREVIATIONS = r"Mr|Mrs|Messrs|Dr|St|Esq|Rev|Hon|Capt|Col|Gen|Lieut|Vol|viz|Edw|&c|[A-HJ-Z]"
INTERJECTIONS = r"Oh|Ah|O|Lord"
NO_BOUNDARY = re.compile(rf"(?:(?<![\w&])(?:{ABBREVIATIONS})\.|(?<!\w)(?:{INTERJECTIONS})!)$")
BOUNDARY = re.compile(r"""[.!?]+["')\]]*\s+(?=["'(\[]*[A-Z0-9£])""")


# ------------------------------------------------------------------------------------------------ the text
def read_novels(package: Path) -> list[list[str]]:
    """The lines of each novel in `package`, a .deb file or a folder into which it was unpacked.

    A lazy-load file of R is a row of records, each 4 bytes of length and a zlib stream; inside is R's XDR
    serialisation of a character vector: its count, then for each string 4 bytes of flags, its length and its bytes.
    """
    if package.is_file():
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run(["dpkg", "-x", package, folder], check=True)
            return read_novels(Path(folder))
    data, novels = next(package.rglob("data/Rdata.rdb")).read_bytes(), []
    while data:
        stream = zlib.decompressobj()
        record, data = stream.decompress(data[4:]), stream.unused_data
        position = record.index(b"UTF-8") + 5
        (count,) = struct.unpack_from(">4xi", record, position)
        position, lines = position + 8, []
        for _ in range(count):
            (length,) = struct.unpack_from(">4xi", record, position)
            lines.append(record[position + 8 : position + 8 + length].decode())
            position += 8 + length
        novels.append(lines)
    return novels


def split_chapters(lines: list[str]) -> list[list[str]]:
    """The chapters of one novel, each a list of paragraphs; what precedes the first heading is dropped."""
    text = "\n".join(lines).split("\nA NOTE ON THE TEXT")[0]
    text = re.sub(r"\[[A-Z][^]]*\]", "", text)  # editors' remarks
    chapters: list[list[str]] = []
    for line in text.split("\n"):
        if HEADING.match(line):
            chapters.append([""])
        elif chapters and (not line.strip() or NOT_PROSE.match(line)):
            chapters[-1].append("")
        elif chapters:
            chapters[-1][-1] += " " + re.sub(r"[_*]", "", line)  # italics, footnote marks
    return [[" ".join(p.split()) for p in chapter if p.strip()] for chapter in chapters]


def split_sentences(paragraph: str) -> list[str]:
    """The sentences of a paragraph; closing quotes stay with the sentence they close.

    >>> split_sentences('"Oh! Mr. Bennet," said she. "Is it so?" he cried. "It is."')
    ['"Oh! Mr. Bennet," said she.', '"Is it so?" he cried.', '"It is."']
    """
    sentences, start = [], 0
    for match in BOUNDARY.finditer(paragraph):
        if not NO_BOUNDARY.search(paragraph[start : match.end()].rstrip()):
            sentences.append(paragraph[start : match.end()].rstrip())
            start = match.end()
    return [*sentences, paragraph[start:]]


def read_corpus(package: Path) -> dict[str, list[list[str]]]:
    """The sentences of each chapter, under "train", "validation" and "test"."""
    corpus: dict[str, list[list[str]]] = {"train": [], "validation": [], "test": []}
    for novel in read_novels(package):
        for number, paragraphs in enumerate(split_chapters(novel), start=1):
            part = {0: "validation", 10: "test"}.get(number % 20, "train")
            corpus[part].append([s for paragraph in paragraphs for s in split_sentences(paragraph)])
    if (found := sum(map(len, corpus.values()))) != NUM_CHAPTERS:
        raise ValueError(f"expected {NUM_CHAPTERS} chapters in {package}, found {found}: another edition?")
    return corpus


# ------------------------------------------------------------------------------------------------ the tokens
def train_tokenizer(chapters: list[list[str]], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which `<|endoftext|>` begins, ends and pads, and which adds nothing by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator((s for chapter in chapters for s in chapter), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )


def encode(chapters: list[list[str]], tokenizer: PreTrainedTokenizerFast, bpe_dropout: float = 0.0) -> list[np.ndarray]:
    """Each chapter as one array of ids, EOS s1 EOS s2 ... EOS; `bpe_dropout` skips merges at random."""
    bpe = tokenizer.backend_tokenizer
    bpe.model.dropout = bpe_dropout or None
    streams = []
    for chapter in chapters:
        ids = [EOS_ID]
        for encoding in bpe.encode_batch_fast(chapter, add_special_tokens=False):
            ids += [*encoding.ids, EOS_ID]
        streams.append(np.array(ids))
    bpe.model.dropout = None
    return streams


def training_windows(streams: list[np.ndarray], context: int, rng: np.random.Generator) -> np.ndarray:
    """(W, context + 1) windows in random order, each from the start of a sentence on, that cover the chapters.

    A window begins with the EOS before its sentence, or three times in ten without, as a user's prompt does.
    """
    windows = []
    for stream in streams:
        starts = np.flatnonzero(stream[: -context - 1] == EOS_ID)
        position = starts[starts <= rng.integers(context)][-1]
        while True:
            first = position + (rng.random() < 0.3)
            windows.append(stream[first : first + context + 1])
            if position == starts[-1]:
                break
            nexts = starts[(starts > position) & (starts <= position + context)]
            position = nexts[-1] if len(nexts) else starts[starts > position][0]
    return rng.permutation(np.stack(windows))


def scoring_windows(streams: list[np.ndarray], context: int, overlap: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and labels, (context,) each, in which every token of the chapters is a label exactly once.

    A window starts at the last sentence that begins `overlap` or more tokens before the first token not yet scored.
    """
    for stream in streams:
        starts, scored = np.flatnonzero(stream[:-1] == EOS_ID), 1
        while scored < len(stream):
            start = starts[starts <= max(0, scored - 1 - overlap)][-1]
            start = start if start + context > scored + overlap // 2 else scored - 1 - overlap
            window = stream[start : start + context + 1]
            inputs, labels = np.full(context, EOS_ID), np.full(context, IGNORED)
            inputs[: len(window) - 1] = window[:-1]
            labels[scored - start - 1 : len(window) - 1] = stream[scored : start + len(window)]
            yield inputs, labels
            scored = start + len(window)


# ------------------------------------------------------------------------------------------------ the model
def make_model(vocab_size: int, hidden: int, layers: int, context: int, dropout: float) -> LlamaForCausalLM:
    """A Llama with tied embeddings; dropout sits on the embedding and on what each block adds to the residual."""
    config = LlamaConfig(
        vocab_size=vocab_size, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=hidden // 64,
        intermediate_size=hidden * 5 // 2, max_position_embeddings=context, tie_word_embeddings=True,
        bos_token_id=EOS_ID, eos_token_id=EOS_ID, pad_token_id=EOS_ID, use_cache=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)

    def drop(module: torch.nn.Module, inputs: tuple, output):
        first, *rest = output if isinstance(output, tuple) else (output,)
        first = torch.nn.functional.dropout(first, dropout, module.training)
        return (first, *rest) if rest else first

    for module in [model.model.embed_tokens, *(m for b in model.model.layers for m in (b.self_attn, b.mlp))]:
        module.register_forward_hook(drop)
    return model


@torch.no_grad()
def total_nats(model: LlamaForCausalLM, streams: list[np.ndarray], context: int, overlap: int) -> float:
    """The negative log-likelihood of all tokens of `streams` but each one's first EOS."""
    model.eval()
    inputs, labels = map(np.stack, zip(*scoring_windows(streams, context, overlap), strict=True))
    nats = 0.0
    for rows in range(0, len(inputs), 16):
        logits = model(input_ids=torch.from_numpy(inputs[rows : rows + 16]), use_cache=False).logits
        targets = torch.from_numpy(labels[rows : rows + 16]).flatten()
        nats += torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets, reduction="sum").item()
    return nats


def losses(model, streams, chapters, context, overlap) -> tuple[float, float]:
    """Nats per token, EOS included, and bits per character of the sentences joined by one blank."""
    nats = total_nats(model, streams, context, overlap)
    num_characters = sum(len(" ".join(chapter)) for chapter in chapters)
    return nats / sum(len(s) - 1 for s in streams), nats / num_characters / math.log(2)


def make_optimizers(model: LlamaForCausalLM, lr: float, weight_decay: float, muon: bool) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    embedding = [model.model.embed_tokens.weight]
    adam = [{"params": norms, "weight_decay": 0.0}, {"params": embedding if muon else embedding + matrices}]
    optimizers = [torch.optim.AdamW(adam, lr=lr, betas=(0.9, 0.95), weight_decay=weight_decay)]
    if muon:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers
