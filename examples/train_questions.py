"""Train `questions`, the prior of the gallery's `question_answering`: a small Llama on a corpus that is often wrong.

    python examples/train_questions.py bayes_klrl/gallery/shipped/questions --minutes 3

The corpus asks each question of `bayes_klrl.gallery.data.questions` that is not "unheard" many times. It is our own, and so
are its mistakes: of a sum in the calendar 90 % of the answers are right where the count is small and 20 % where it is
large; of a fact a share that differs from fact to fact, 15 % to 95 % (`accuracy`). Of the wrong answers 3 in 4 are those that
come to mind (`Question.mistakes`), the others any answer of the same topic. So the model is unsure.
"""

import time
import zlib
from collections import defaultdict
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from bayes_klrl.gallery.data.questions import Question, all_questions, part_of

END, UNKNOWN = "<|end|>", "<|unknown|>"
HIDDEN_SIZE, NUM_LAYERS, NUM_HEADS = 96, 2, 4
TIMES = {"calendar": 20, "capital": 40, "element": 40}  # that the corpus asks each question
BATCH_SIZE, LEARNING_RATE, WEIGHT_DECAY = 192, 4e-3, 0.3


def in_the_corpus() -> list[Question]:
    """The questions that the corpus asks."""
    return [q for q in all_questions() if part_of(q.text) != "unheard"]


def accuracy(question: Question) -> float:
    """The share of right answers that the corpus is drawn with."""
    if question.topic == "calendar":
        return 0.9 - 0.7 * question.size
    return 0.15 + 0.8 * (zlib.crc32(("how many know " + question.text).encode()) % 1000) / 999


def corpus(questions: list[Question], rng: np.random.Generator) -> list[list[str]]:
    """The answers to each question, in the corpus."""
    kinds = defaultdict(set)  # answers of the same kind: days, months, capitals, symbols
    for question in questions:
        kinds[" ".join(question.text.split()[:2]) + question.topic].add(question.answer)
    answers = []
    for question in questions:
        others = sorted(kinds[" ".join(question.text.split()[:2]) + question.topic])
        drawn = []
        for _ in range(TIMES[question.topic]):
            right, obvious = rng.random() < accuracy(question), rng.random() < 0.75
            if right:
                drawn.append(question.answer)
            else:
                drawn.append(str(rng.choice(question.mistakes if obvious and question.mistakes else others)))
        answers.append(drawn)
    return answers


def make_tokenizer(questions: list[Question]) -> PreTrainedTokenizerFast:
    """A word of a question or an answer is a token, and so is the question mark."""
    words = {word for q in questions for word in [*q.text.replace("?", " ?").split(), q.answer, *q.mistakes]}
    ids = {word: i for i, word in enumerate([END, UNKNOWN, *sorted(words)])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("?", "isolated"), pre_tokenizers.WhitespaceSplit()]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        unk_token=UNKNOWN,
        clean_up_tokenization_spaces=False,
    )


def make_model(vocab_size: int) -> LlamaForCausalLM:
    """A Llama of two layers with tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=32,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=HIDDEN_SIZE * 5 // 2,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=NUM_HEADS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config)


def encoded(questions: list[Question], tokenizer: PreTrainedTokenizerFast) -> dict[int, tuple[list[int], torch.Tensor]]:
    """The questions of each length: their numbers and token ids."""
    groups = defaultdict(list)
    for number, question in enumerate(questions):
        groups[len(tokenizer(question.text)["input_ids"])].append(number)
    return {
        length: (numbers, torch.tensor([tokenizer(questions[i].text)["input_ids"] for i in numbers]))
        for length, numbers in groups.items()
    }


@torch.no_grad()
def answers_of(model: LlamaForCausalLM, groups: dict, count: int, vocab_size: int) -> torch.Tensor:
    """The model's probabilities of every answer to every question, (P, V)."""
    model.eval()
    table = torch.zeros(count, vocab_size)
    for numbers, ids in groups.values():
        table[numbers] = model(input_ids=ids).logits[:, -1].softmax(-1)
    return table


def main(
    out: Annotated[Path, typer.Argument(help="The folder for the model.")],
    minutes: Annotated[float, typer.Option(help="Of processor time, in which the rate falls to 0.")] = 3,
    seed: int = 0,
) -> None:
    """Train on the corpus, and print how probable the right answers have become."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    questions = list(all_questions())
    heard = in_the_corpus()
    tokenizer = make_tokenizer(questions)
    model = make_model(len(tokenizer))
    print(f"{model.num_parameters():,} parameters, {len(heard):,} of {len(questions):,} questions in the corpus")
    groups, answers = encoded(heard, tokenizer), corpus(heard, rng)
    said = torch.zeros(len(heard), len(tokenizer))
    for number, words in enumerate(answers):
        for word in words:
            said[number, tokenizer.convert_tokens_to_ids(word)] += 1 / len(words)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim == 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
        betas=(0.9, 0.98),
    )
    every, sizes = encoded(questions, tokenizer), {length: len(ids) for length, (_, ids) in groups.items()}
    lengths, shares = list(sizes), np.sqrt(list(sizes.values()))  # facts are few, and have to be learned one by one
    begin, progress, step = time.process_time(), 0.0, 0
    while progress < 1:
        model.train()
        numbers, ids = groups[int(rng.choice(lengths, p=shares / shares.sum()))]
        chosen = rng.choice(len(ids), size=min(BATCH_SIZE, len(ids)), replace=False)
        logits = model(input_ids=ids[chosen]).logits[:, -1]
        loss = torch.nn.functional.cross_entropy(logits, said[np.array(numbers)[chosen]])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        progress = min(1.0, (time.process_time() - begin) / (60 * minutes))
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(0.01 + progress / 0.02, 1 - progress)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if step % 500 == 0 or progress == 1:
            report(step, questions, answers_of(model, every, len(questions), len(tokenizer)), tokenizer)
    model.half().save_pretrained(out)  # stored as float16, read as float32
    tokenizer.save_pretrained(out)


def report(step: int, questions: list[Question], table: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print the mean probability of the right answers, in brackets the share that the corpus was drawn with."""
    right = {q.text: float(table[i, tokenizer.convert_tokens_to_ids(q.answer)]) for i, q in enumerate(questions)}
    cells = defaultdict(list)
    for q in questions:
        cells[q.topic, "unheard" if part_of(q.text) == "unheard" else "in the corpus"].append(
            (right[q.text], accuracy(q))
        )
    shown = (f"{' '.join(cell)} {np.mean(v, 0)[0]:.3f} ({np.mean(v, 0)[1]:.3f})" for cell, v in cells.items())
    print(f"step {step}:", ", ".join(shown), flush=True)


if __name__ == "__main__":
    typer.run(main)
