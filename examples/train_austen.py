"""Train `austen`, the language model that ships with bayes_klrl: a small Llama on Jane Austen's six novels.

The text comes from the Debian package r-cran-janeaustenr; R itself is not needed:

    apt-get download r-cran-janeaustenr
    python examples/train_austen.py train r-cran-janeaustenr_*.deb austen --minutes 88 --compile
    python examples/train_austen.py report r-cran-janeaustenr_*.deb austen

Every sentence is followed by `<|endoftext|>`, so a sampled completion ends where a sentence does. Of each
novel (chapters numbered through its volumes) the chapters 20, 40, 60 are kept for validation and the chapters
10, 30, 50 for the test; neither the model nor the tokenizer learns from them.
"""

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
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

EOS, EOS_ID = "<|endoftext|>", 0
IGNORED = -100  # the label that cross-entropy leaves out
NUM_CHAPTERS = 55 + 48 + 31 + 24 + 61 + 50  # of the six novels

VOCAB_SIZE, CONTEXT, HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS = 2048, 256, 192, 4, 3
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY, DROPOUT = 12, 6e-3, 0.1, 0.1

HEADING = re.compile(r"^ *(?:CHAPTER|Chapter) +(?:[IVXL]+|\d+) *$")
NOT_PROSE = re.compile(r"^ *(?:VOLUME [IVX]+|FINIS|Finis|THE END|[* ]+|\*Vide .*) *$")
ABBREVIATIONS = r"Mr|Mrs|Messrs|Dr|St|Esq|Rev|Hon|Capt|Col|Gen|Lieut|Vol|viz|Edw|&c|[A-HJ-Z]"
INTERJECTIONS = r"Oh|Ah|O|Lord"
NO_BOUNDARY = re.compile(rf"(?:(?<![\w&])(?:{ABBREVIATIONS})\.|(?<!\w)(?:{INTERJECTIONS})!)$")
BOUNDARY = re.compile(r"""[.!?]+["')\]]*\s+(?=["'(\[]*[A-Z0-9£])""")


# ------------------------------------------------------------------------------------------ the text
def read_novels(package: Path) -> list[list[str]]:
    """The lines of each novel in `package`, a .deb file or a folder into which it was unpacked.

    R's lazy-load file is a row of records, each 4 bytes of length and a zlib stream. Inside is a character
    vector as R serialises it: its type and count, then each string's flags, length (4 bytes each) and bytes.
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


# ------------------------------------------------------------------------------------------ the tokens
def train_tokenizer(chapters: list[list[str]]) -> PreTrainedTokenizerFast:
    """Byte-level BPE in which `<|endoftext|>` begins, ends and pads, and which adds nothing by itself."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE, special_tokens=[EOS], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator((s for chapter in chapters for s in chapter), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=EOS, eos_token=EOS, pad_token=EOS, clean_up_tokenization_spaces=False
    )


def encode(chapters: list[list[str]], tokenizer: PreTrainedTokenizerFast) -> list[np.ndarray]:
    """Each chapter as one array of ids, EOS s1 EOS s2 ... EOS."""
    encoded = [tokenizer(chapter, add_special_tokens=False)["input_ids"] for chapter in chapters]
    return [np.array([EOS_ID, *(i for ids in sentences for i in [*ids, EOS_ID])]) for sentences in encoded]


def training_windows(streams: list[np.ndarray], rng: np.random.Generator) -> np.ndarray:
    """(W, CONTEXT + 1) windows in random order, each from a sentence's start on, that cover the chapters.

    A window begins with the EOS before its sentence, or three times in ten without, as a user's prompt does.
    """
    windows = []
    for stream in streams:
        starts = np.flatnonzero(stream[: -CONTEXT - 1] == EOS_ID)
        position = starts[starts <= rng.integers(CONTEXT)][-1]
        while True:
            first = position + (rng.random() < 0.3)
            windows.append(stream[first : first + CONTEXT + 1])
            if position == starts[-1]:
                break
            within = starts[(starts > position) & (starts <= position + CONTEXT)]
            position = within[-1] if len(within) else starts[starts > position][0]
    return rng.permutation(np.stack(windows))


def training_batches(streams: list[np.ndarray], rng: np.random.Generator) -> Iterator[torch.Tensor]:
    """Epoch after epoch without end, (BATCH_SIZE, CONTEXT + 1) ids each."""
    while True:
        for batch in torch.from_numpy(training_windows(streams, rng)).split(BATCH_SIZE):
            if len(batch) == BATCH_SIZE:
                yield batch


def scoring_windows(streams: list[np.ndarray], overlap: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and labels, (CONTEXT,) each, in which every token of the chapters is a label exactly once.

    A window starts with the last sentence that begins `overlap` or more tokens before what is not yet scored.
    """
    for stream in streams:
        starts, scored = np.flatnonzero(stream[:-1] == EOS_ID), 1
        while scored < len(stream):
            start = starts[starts <= max(0, scored - 1 - overlap)][-1]
            if start + CONTEXT <= scored + overlap // 2:  # a very long sentence: cut into it
                start = scored - 1 - overlap
            window = stream[start : start + CONTEXT + 1]
            inputs, labels = np.full(CONTEXT, EOS_ID), np.full(CONTEXT, IGNORED)
            inputs[: len(window) - 1] = window[:-1]
            labels[scored - start - 1 : len(window) - 1] = stream[scored : start + len(window)]
            yield inputs, labels
            scored = start + len(window)


# ------------------------------------------------------------------------------------------ the model
def make_model() -> LlamaForCausalLM:
    """A Llama with tied embeddings; dropout sits on the embedding and on all that is added to it."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        max_position_embeddings=CONTEXT,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=HIDDEN_SIZE * 5 // 2,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        tie_word_embeddings=True,
        bos_token_id=EOS_ID,
        eos_token_id=EOS_ID,
        pad_token_id=EOS_ID,
    )
    model = LlamaForCausalLM(config)

    def drop(module: torch.nn.Module, inputs: tuple, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        if isinstance(output, tuple):  # of attention: what it adds, and its weights
            return (drop(module, inputs, output[0]), *output[1:])
        return torch.nn.functional.dropout(output, DROPOUT, module.training)

    blocks = [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]
    for module in [model.model.embed_tokens, *blocks]:
        module.register_forward_hook(drop)
    return model


def orthogonalise(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """About U V' for each matrix U S V' of a stack, by Newton-Schulz iterations (Jordan et al., 2024)."""
    x = matrices.mT if matrices.shape[-2] > matrices.shape[-1] else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if matrices.shape[-2] > matrices.shape[-1] else x


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised, with steps as large as Adam's; one parameter group for each shape.

    In short trials it was far ahead of AdamW alone: 1.84 against 2.13 bits per character after 150 seconds, both
    untuned. `torch.optim.Muon` does the same in bfloat16, over twenty times as slow on a CPU without it.
    """

    def __init__(self, matrices: list[torch.nn.Parameter], *, lr: float, weight_decay: float, momentum: float = 0.95):
        shapes = {p.shape: [q for q in matrices if q.shape == p.shape] for p in matrices}
        defaults = {"lr": lr, "weight_decay": weight_decay, "momentum": momentum}
        super().__init__([{"params": group} for group in shapes.values()], defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One step down the gradients, and the weights' decay."""
        for group in self.param_groups:
            gradients = torch.stack([p.grad for p in group["params"]])
            average = group.setdefault("average", torch.zeros_like(gradients))
            average.lerp_(gradients, 1 - group["momentum"])
            update = orthogonalise(gradients.lerp(average, group["momentum"]))
            update *= 0.2 * max(update.shape[-2:]) ** 0.5
            for p, u in zip(group["params"], update, strict=True):
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(u, alpha=group["lr"])


def make_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW for the embedding and (without decay) the norms."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    norms = [p for p in model.parameters() if p.ndim == 1]
    adam = [{"params": [model.model.embed_tokens.weight]}, {"params": norms, "weight_decay": 0.0}]
    return [
        torch.optim.AdamW(adam, betas=(0.9, 0.95), weight_decay=WEIGHT_DECAY),
        Muon(matrices, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    ]


@torch.no_grad()
def losses(
    model: PreTrainedModel, streams: list[np.ndarray], chapters: list[list[str]], overlap: int = 0
) -> tuple[float, float]:
    """Nats per token, EOS included, and bits per character of the sentences joined by one blank."""
    model.eval()
    windows = zip(*scoring_windows(streams, overlap), strict=True)
    inputs, labels = (torch.from_numpy(np.stack(arrays)) for arrays in windows)
    nats = 0.0
    for rows, targets in zip(inputs.split(16), labels.split(16), strict=True):
        logits = model(input_ids=rows, use_cache=False).logits.flatten(0, 1)
        nats += torch.nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum").item()
    num_tokens = sum(len(stream) - 1 for stream in streams)
    num_characters = sum(len(" ".join(chapter)) for chapter in chapters)
    return nats / num_tokens, nats / num_characters / math.log(2)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write what `from_pretrained` reads, the weights in half precision."""
    halves = LlamaForCausalLM(model.config).to(torch.float16)
    halves.load_state_dict(model.state_dict())
    halves.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # the class's name that transformers 4 knows, too
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


# ------------------------------------------------------------------------------------------ the commands
app = typer.Typer(add_completion=False, help="Train the shipped language model, or report on it.")


@app.command()
def train(
    package: Annotated[Path, typer.Argument(help="The .deb file, or a folder into which it was unpacked.")],
    out: Annotated[Path, typer.Argument(help="The folder for the model.")],
    minutes: Annotated[float, typer.Option(help="For training, in which the rate falls to 0.")] = 88,
    compiled: Annotated[bool, typer.Option("--compile", help="With torch.compile; wants a C++ compiler.")] = False,
    seed: int = 0,
) -> None:
    """Train tokenizer and model; `out` always holds the state of least validation loss so far."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    corpus = read_corpus(package)
    tokenizer = train_tokenizer(corpus["train"])
    streams = {part: encode(chapters, tokenizer) for part, chapters in corpus.items()}
    model = make_model()
    optimizers = make_optimizers(model)
    print(f"{model.num_parameters():,} parameters, tokens", {k: sum(map(len, v)) for k, v in streams.items()})

    def batch_loss(batch: torch.Tensor) -> torch.Tensor:
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    if compiled:
        batch_loss = torch.compile(batch_loss, dynamic=False)
    batches = training_batches(streams["train"], np.random.default_rng(seed))
    best, history, progress, begin = math.inf, [], 0.0, time.monotonic()
    for step, batch in enumerate(batches, start=1):
        model.train()
        loss = batch_loss(batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * min(0.01 + progress / 0.02, 1 - progress)
            optimizer.step()
        model.zero_grad()
        history.append(loss.item())
        progress = min(1.0, (time.monotonic() - begin) / (60 * minutes))
        if step % 200 == 0 or progress == 1:
            nats, bits = losses(model, streams["validation"], corpus["validation"])
            training = f"training {np.mean(history[-200:]):.4f} nats/token"
            validation = f"validation {nats:.4f} nats/token, {bits:.4f} bits/character"
            print(f"step {step}, {progress:.1%}: {training}, {validation}", flush=True)
            if nats < best:
                best = nats
                save(model, tokenizer, out)
        if progress == 1:
            break


@app.command()
def report(package: Path, folder: Path, prompt: str = "It was a fine morning", num_draws: int = 1000) -> None:
    """Print the saved model's losses, and how completions of `prompt`, 24 tokens at most, turn out."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    corpus = read_corpus(package)
    corpus["train"] = corpus["train"][::16]  # about as much text as the test's
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    for part, chapters in corpus.items():
        streams = encode(chapters, tokenizer)
        for overlap in (0, CONTEXT // 2):
            nats, bits = losses(model, streams, chapters, overlap)
            print(f"{part}, overlap {overlap}: {nats:.4f} nats/token, {bits:.4f} bits/character")
    for begin in (prompt, EOS):
        ids = tokenizer([begin] * num_draws, return_tensors="pt")["input_ids"]
        mask = torch.ones_like(ids)  # EOS pads, too
        draws = model.generate(ids, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=24)
        ended = draws[:, ids.shape[1] :] == EOS_ID
        lengths = torch.where(ended.any(1), ended.int().argmax(1) + 1, 24).float()
        print(f"{begin!r}: {ended.any(1).float().mean():.3f} ended, {lengths.mean():.1f} tokens on average")
        print(*tokenizer.batch_decode(draws[:8], skip_special_tokens=True), sep="\n")


if __name__ == "__main__":
    app()
