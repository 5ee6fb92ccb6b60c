"""Deformable attention against a loop that takes its samples one by one."""

import math

import pytest
import torch
from torch import Tensor

from vkd_plugin.models.vidt.deformable_attention import KERNELS, DeformableAttention, deformable_attention

SIZES = [(4, 6), (3, 1), (1, 1)]
BATCH, QUERIES, HEADS, CHANNELS, POINTS = 2, 3, 2, 2, 2


def arguments(dtype: torch.dtype = torch.float64) -> tuple[Tensor, list[tuple[int, int]], Tensor, Tensor]:
    """Places lie also outside of the maps, and on their edges and corners."""
    generator = torch.Generator().manual_seed(0)
    length = sum(height * width for height, width in SIZES)
    value = torch.randn(BATCH, length, HEADS, CHANNELS, generator=generator, dtype=torch.float64)
    places = (BATCH, QUERIES, HEADS, len(SIZES), POINTS)
    locations = 2 * torch.rand(*places, 2, generator=generator, dtype=torch.float64) - 0.5
    locations[0, 0, 0] = 0.0
    locations[0, 1, 0] = 1.0
    weights = torch.rand(places, generator=generator, dtype=torch.float64)
    return value.to(dtype), SIZES, locations.to(dtype), weights.to(dtype)


def sampled(image: Tensor, x: float, y: float) -> Tensor:
    """The value (K,) of a map (H, W, K) at pixel (x, y), whose neighbours' centres are whole numbers."""
    found = image.new_zeros(image.shape[-1])
    for column in (math.floor(x), math.floor(x) + 1):
        for row in (math.floor(y), math.floor(y) + 1):
            if 0 <= row < image.shape[0] and 0 <= column < image.shape[1]:
                found += image[row, column] * (1 - abs(x - column)) * (1 - abs(y - row))
    return found


def by_loop(value: Tensor, sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
    result = value.new_zeros(*locations.shape[:3], value.shape[-1])
    for image, query, head in torch.cartesian_prod(*(torch.arange(n) for n in locations.shape[:3])).tolist():
        start = 0
        for level, (height, width) in enumerate(sizes):
            own = value[image, start : start + height * width, head].view(height, width, -1)
            start += height * width
            for point in range(locations.shape[4]):
                x, y = locations[image, query, head, level, point].tolist()
                weight = weights[image, query, head, level, point]
                result[image, query, head] += weight * sampled(own, x * width - 0.5, y * height - 0.5)
    return result.flatten(2)


def test_against_the_loop() -> None:
    torch.testing.assert_close(deformable_attention(*arguments()), by_loop(*arguments()), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(deformable_attention(*arguments(torch.float32)), by_loop(*arguments()).float())


def test_gradients() -> None:
    value, sizes, locations, weights = (x.requires_grad_() if isinstance(x, Tensor) else x for x in arguments())
    # Bilinear samples have a kink where places meet the centres of pixels; these are kept off it.
    with torch.no_grad():
        locations[0, :2, 0] = 0.3
    assert torch.autograd.gradcheck(lambda *x: deformable_attention(x[0], sizes, *x[1:]), (value, locations, weights))


def test_one_graph() -> None:
    compiled = torch.compile(deformable_attention, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments()), deformable_attention(*arguments()))


# The module.


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, list[tuple[int, int]], Tensor]:
    generator = torch.Generator().manual_seed(1)
    length = sum(height * width for height, width in SIZES)
    query, memory = (torch.randn(2, n, 8, generator=generator) for n in (QUERIES, length))
    boxes = torch.rand(2, QUERIES, len(SIZES), 4, generator=generator)
    padding = torch.zeros(2, length, dtype=torch.bool)
    padding[1, ::2] = True
    return query.to(dtype), boxes.to(dtype), memory.to(dtype), SIZES, padding


def attention(**kwargs: str) -> DeformableAttention:
    torch.manual_seed(0)
    layer = DeformableAttention(8, num_levels=3, num_heads=2, num_points=4, **kwargs)
    for linear in (layer.sampling_offsets, layer.attention_weights):
        torch.nn.init.normal_(linear.weight, std=0.3)
    return layer


@torch.no_grad()
def test_the_module_against_the_loop() -> None:
    layer = attention().double()
    query, boxes, memory, sizes, padding = inputs(torch.float64)
    value = layer.value_proj(memory)
    value[padding] = 0
    offsets = layer.sampling_offsets(query).view(2, QUERIES, 2, 3, 4, 2)
    weights = layer.attention_weights(query).view(2, QUERIES, 2, 12).softmax(-1).view(2, QUERIES, 2, 3, 4)
    centres, sides = boxes[:, :, None, :, None].split(2, dim=-1)
    locations = centres + offsets * sides / 8  # an offset of all four points is half a box
    expected = layer.output_proj(by_loop(value.unflatten(-1, (2, 4)), sizes, locations, weights))
    torch.testing.assert_close(layer(query, boxes, memory, sizes, padding), expected, rtol=1e-12, atol=1e-12)


def test_it_looks_around_itself_at_first() -> None:
    layer = DeformableAttention(256)
    offsets = layer.sampling_offsets(torch.randn(1, 256)).view(8, 4, 4, 2)
    torch.testing.assert_close(offsets[0, 0], torch.tensor([[1.0, 0], [2, 0], [3, 0], [4, 0]]))
    torch.testing.assert_close(offsets[1, 2], torch.tensor([[1.0, 1], [2, 2], [3, 3], [4, 4]]))
    torch.testing.assert_close(offsets[6, 3, 0], torch.tensor([0.0, -1]))
    assert layer.attention_weights(torch.randn(1, 256)).count_nonzero() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_places_and_sums_are_float32_under_autocast(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Tensor] = []

    def kernel(value: Tensor, sizes: list[tuple[int, int]], locations: Tensor, weights: Tensor) -> Tensor:
        seen.extend((value, locations, weights))
        return deformable_attention(value, sizes, locations, weights)

    monkeypatch.setitem(KERNELS, "watched", kernel)
    layer = attention(kernel="watched")
    expected = layer(*inputs())
    with torch.autocast("cpu", dtype):
        found = layer(*inputs())
    assert found.dtype == dtype
    assert {x.dtype for x in seen} == {torch.float32}
    assert torch.equal(seen[1], seen[4])  # no place has moved
    assert torch.equal(seen[2], seen[5])
    torch.testing.assert_close(found.float(), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_modules_of_another_precision(dtype: torch.dtype) -> None:
    layer = attention().to(dtype)
    query, boxes, memory, sizes, padding = inputs(dtype)
    found = layer(query, boxes.float(), memory, sizes, padding)
    assert found.dtype == dtype
    found.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_the_module_is_one_graph() -> None:
    layer = attention()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*inputs()), layer(*inputs()))


def test_kernels_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no attention kernel 'grid_sampel' \(did you mean 'grid_sample'\?\)"):
        attention(kernel="grid_sampel")
    monkeypatch.setitem(KERNELS, "nothing", lambda value, sizes, locations, weights: torch.zeros(2, QUERIES, 8))
    assert torch.equal(attention(kernel="nothing")(*inputs())[0, 0], attention().output_proj.bias)
