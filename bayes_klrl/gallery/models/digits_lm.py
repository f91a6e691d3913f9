"""A small convolutional network that reads handwritten digits, as a language model of one label token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from bayes_klrl.gallery.data.digits import DIGITS, LEVELS, Images
from bayes_klrl.gallery.models.label_lm import LabelLM, minimise

__all__ = ["calibrate", "digits_lm"]


def digits_lm(images: Images, calibration: Images, *, seed: int, steps: int = 150) -> LabelLM:
    """Return the classifier: trained by cross-entropy on the images, then calibrated on other ones.

    Parameters
    ----------
    images, calibration
        The images of the training, and those that the temperature is fitted to.
    seed
        Seed of the initial weights; all else is a function of them.
    steps
        Number of Adam's steps, each on all images.
    """
    network = convolutions(torch.Generator().manual_seed(seed))
    lm = LabelLM(network, pixels_of, symbols=LEVELS, labels=DIGITS)
    labels = torch.as_tensor(images.labels)
    minimise(lm, lambda: nn.functional.nll_loss(lm.label_log_probs(images.prompts), labels), steps=steps)
    calibrate(lm, network[-1], calibration)
    return lm


def pixels_of(prompts: Sequence[str]) -> Tensor:
    """Return the images of P prompts, (P, 1, 8, 8), from 0 to 1."""
    levels = torch.tensor([[LEVELS.index(character) for character in prompt] for prompt in prompts])
    return levels.float().view(-1, 1, 8, 8) / 16


def convolutions(generator: torch.Generator) -> nn.Sequential:
    """Return a network of 1,900 weights, all uniform within 1 / sqrt(number of inputs)."""
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(8, 16, 3, padding=1),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(64, len(DIGITS)),
    )
    with torch.no_grad():
        for layer in network:
            if isinstance(layer, nn.Conv2d | nn.Linear):
                for weights in (layer.weight, layer.bias):
                    assert weights is not None
                    weights.uniform_(-1, 1, generator=generator).div_(layer.weight[0].numel() ** 0.5)
    return network


@torch.no_grad()
def calibrate(lm: LabelLM, last: nn.Module, images: Images) -> float:
    """Divide the weights of the last layer by the temperature of least log loss on some images, and return it."""
    log_probs, labels = lm.label_log_probs(images.prompts), torch.as_tensor(images.labels)
    temperatures = torch.logspace(-0.5, 1, 61)
    losses = [nn.functional.nll_loss((log_probs / t).log_softmax(1), labels) for t in temperatures]
    best = float(temperatures[int(torch.stack(losses).argmin())])
    for weights in last.parameters():
        weights.div_(best)
    return best
