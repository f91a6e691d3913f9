"""Products by oneDNN against products in float64: values, gradients, gradients of gradients, and where they are not used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import bayes_klrl as bk
from bayes_klrl.models.torch_lm.tight import products
from bayes_klrl.models.torch_lm.tight.families import direct
from bayes_klrl.models.torch_lm.tight.products import gelu_linear, linear
from tests.helpers.tiny_models import tiny_gpt2, tiny_llama

pytestmark = [
    pytest.mark.skipif(products._product is None, reason="this torch has no oneDNN"),
    pytest.mark.filterwarnings("ignore:TF32 acceleration on top of oneDNN:UserWarning"),  # when flags are set
]

Product = Callable[..., Tensor]

SHAPES = {
    "rows": (64, 128, 512),
    "more inputs": (64, 512, 128),
    "few rows": (4, 512, 1024),
    "tokens of rows": (8, 16, 128, 256),
    "between two numbers of rows": (67, 128, 512),
    "more inputs, between": (1000, 256, 128),
    "one too many": (129, 128, 256),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes that oneDNN multiplies."""
    found: list[tuple[int, ...]] = []
    plain = products._product

    def counted(rows: Tensor, weight: Tensor, *more: Any) -> Tensor:
        found.append((*rows.shape, weight.shape[0]))
        result: Tensor = plain(rows, weight, *more)
        return result

    monkeypatch.setattr(products, "_product", counted)
    return found


def tensors(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Return inputs, weight and bias that want a gradient, the same in every precision."""
    generator = torch.Generator().manual_seed(0)
    *batch, num_inputs, num_outputs = shape
    sizes = [(*batch, num_inputs), (num_outputs, num_inputs), (num_outputs,)]
    inputs, weight, bias = (torch.randn(size, generator=generator) for size in sizes)
    made = [each.to(dtype).requires_grad_() for each in (inputs, weight / num_inputs**0.5, bias)]
    return made[0], made[1], made[2]


def twice_differentiated(function: Product, inputs: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    """Return the value, the gradients of a function of it, and the gradients of a function of these."""
    everything = (inputs, weight, bias)
    value = function(*everything)
    gradients = torch.autograd.grad(value.sin().sum(), everything, create_graph=True)
    seconds = torch.autograd.grad(sum(each.square().sum() for each in gradients), everything)
    return [each.detach() for each in (value, *gradients, *seconds)]


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients_are_those_in_double_precision(
    shape: tuple[int, ...], calls: list[tuple[int, ...]]
) -> None:
    found = twice_differentiated(linear, *tensors(shape))
    assert len(calls) >= 6  # the value, two gradients, and what their own gradients take
    exact = twice_differentiated(F.linear, *tensors(shape, torch.float64))
    plain = twice_differentiated(F.linear, *tensors(shape))
    for own, theirs, expected in zip(found, plain, exact, strict=True):
        scale = expected.abs().max()
        assert (own - expected).abs().max() / scale < max(4 * (theirs - expected).abs().max() / scale, 1e-6)


@pytest.mark.parametrize("sizes", [(128, 512), (512, 128)])
def test_numbers_of_rows_that_onednn_sees_are_few(sizes: tuple[int, int], calls: list[tuple[int, ...]]) -> None:
    """Each is compiled and kept: after 60 steps of training with completions of all lengths that took 260 MB."""
    weight, bias = torch.randn(sizes[1], sizes[0]), torch.randn(sizes[1])
    inputs = torch.randn(2048, sizes[0])
    expected = F.linear(inputs, weight, bias)
    for num_rows in [*range(4, 600), 601, 777, 1024, 1025, 1300, 2000, 2048]:
        torch.testing.assert_close(linear(inputs[:num_rows], weight, bias), expected[:num_rows], rtol=0, atol=1e-3)
    assert len({shape[0] for shape in calls}) < 70
    assert {shape[0] for shape in calls} >= {64, 128, 512, 1024, 2048}  # the usual ones are neither filled up nor split
    with torch.no_grad():
        gelu = gelu_linear(inputs[:601], weight, bias)
    torch.testing.assert_close(gelu, F.gelu(expected[:601], approximate="tanh"), rtol=0, atol=1e-3)


def test_a_gradient_that_was_expanded_is_right(calls: list[tuple[int, ...]]) -> None:
    """The gradient of a sum holds one number, with strides of 0."""
    inputs, weight, bias = tensors((64, 128, 512))
    linear(inputs, weight, bias).sum().backward()
    assert len(calls) == 3
    assert inputs.grad is not None
    assert weight.grad is not None
    torch.testing.assert_close(inputs.grad, weight.detach().sum(0).expand(64, -1), rtol=0, atol=1e-4)
    torch.testing.assert_close(weight.grad, inputs.detach().sum(0).expand(512, -1), rtol=0, atol=1e-4)


def test_the_activation_in_the_same_kernel_is_the_one_with_a_gradient(calls: list[tuple[int, ...]]) -> None:
    inputs, weight, bias = tensors((64, 128, 512))
    with torch.no_grad():
        found = gelu_linear(inputs, weight, bias)
    exact = F.gelu(F.linear(*tensors((64, 128, 512), torch.float64)), approximate="tanh")
    differentiable = gelu_linear(inputs, weight, bias)
    assert calls == [(64, 128, 512)] * 2
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=2e-6)
    torch.testing.assert_close(differentiable.double(), exact, rtol=0, atol=2e-6)
    gradients = torch.autograd.grad(differentiable.sum(), (inputs, weight, bias))
    other = tensors((64, 128, 512), torch.float64)
    expected = torch.autograd.grad(F.gelu(F.linear(*other), approximate="tanh").sum(), other)
    for own, each in zip(gradients, expected, strict=True):
        torch.testing.assert_close(own.double(), each, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "what", ["half", "double", "one row", "three rows", "small", "vector", "autocast", "off", "subclass"]
)
def test_torch_multiplies_where_onednn_does_not_suit(what: str, calls: list[tuple[int, ...]]) -> None:
    inputs, weight, bias = (each.detach() for each in tensors((64, 128, 512)))
    if what in ("half", "double"):
        dtype = torch.bfloat16 if what == "half" else torch.float64
        inputs, weight, bias = (each.to(dtype) for each in (inputs, weight, bias))
    few = {"one row": inputs[:1], "three rows": inputs[:3], "small": inputs[:16], "vector": inputs[0]}
    inputs = few.get(what, inputs)
    if what == "subclass":  # as a parameter that is spread over processes
        inputs = inputs.as_subclass(type("Spread", (Tensor,), {}))
    with (
        torch.autocast("cpu", enabled=what == "autocast"),
        torch.backends.mkldnn.flags(enabled=what != "off"),  # type: ignore[no-untyped-call]
    ):
        found = linear(inputs, weight, bias)
        expected = F.linear(inputs, weight, bias)
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)
    assert calls == []


@pytest.mark.parametrize("way", ["in place", "data in place", "new data"])
def test_a_weight_that_has_changed_is_used(way: str, calls: list[tuple[int, ...]]) -> None:
    """The trap: a copy of the weight in oneDNN's own order would be stale after an update that leaves no trace."""
    layer = nn.Linear(128, 512)
    function, inputs = direct(layer), torch.randn(64, 128, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = function(inputs)
        if way == "in place":
            layer.weight.mul_(2)
        elif way == "data in place":
            layer.weight.data.mul_(2)
        else:
            layer.weight.data = layer.weight.data * 2
        after = function(inputs)
    assert len(calls) == 2
    torch.testing.assert_close(after - layer.bias, 2 * (before - layer.bias), rtol=0, atol=1e-5)


@pytest.mark.parametrize("build", [tiny_gpt2, tiny_llama])
def test_a_model_decodes_and_trains_by_them_and_gives_the_same_numbers(
    build: Callable[..., Any], calls: list[tuple[int, ...]]
) -> None:
    options = {"n_embd": 96} if build is tiny_gpt2 else {"hidden_size": 96, "intermediate_size": 384}
    lm = bk.TorchLM(build(vocab_size=400, eos_token_id=0, **options))
    posterior = bk.Posterior(
        lm, bk.TokenReward(lambda tokens, lengths: lengths * 0.1, alpha=1.0), prompts=[[1, 2, 3]], max_new_tokens=6
    )
    draws = bk.ImportanceSampling(64).run(posterior, seed=0)
    assert calls
    before = len(calls)
    scores = lm.token_log_probs([[1, 2, 3]], draws.sequences)
    scores.sum().backward()
    assert len(calls) > before + 20
    own = [parameter.grad.clone() for parameter in lm.parameters() if parameter.grad is not None]
    lm.module.zero_grad()
    with torch.backends.mkldnn.flags(enabled=False):  # type: ignore[no-untyped-call]
        again = bk.ImportanceSampling(64).run(posterior, seed=0)
        theirs = lm.token_log_probs([[1, 2, 3]], draws.sequences)
        theirs.sum().backward()
    assert (draws.tokens == again.tokens).all()
    torch.testing.assert_close(scores, theirs, rtol=0, atol=2e-5)
    gradients = [parameter.grad for parameter in lm.parameters() if parameter.grad is not None]
    assert len(own) == len(gradients) > 10
    for first, second in zip(own, gradients, strict=True):
        torch.testing.assert_close(first, second, rtol=1e-3, atol=1e-3)
