"""Changes of colour: Pillow and the device make the same of a recipe, and recipes come at the paper's rates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from mimco_deploy.drawings import KINDS, draw
from mimco_deploy.training.augment import MaskedTwoViews, ToInput, ToInputs, TwoViews
from mimco_deploy.training.colour import RECIPE, Colours, change_batch, change_picture
from mimco_deploy.training.config import MaskConfig, ViewsConfig
from mimco_deploy.training.masking import mask_shape
from tests.unit.training.small import BACKBONE

OFTEN = Colours((0.1, 1.0), blurred=0.5, solarised=0.5)
NOTHING = (-1, -1, -1, -1, 1, 1, 1, 0, 0, 0, 0)


def photo(number: int, side: int = 32) -> Image.Image:
    """A drawing with noise over it, in many colours."""
    noise = np.random.default_rng(number).normal(0, 20, (side, side, 3))
    pixels = np.asarray(draw(KINDS[number % len(KINDS)], number, side), np.float64) + noise
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def as_tensor(picture: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def both(pictures: list[Image.Image], recipes: Tensor) -> tuple[Tensor, Tensor]:
    """What Pillow makes of each, and what the batch makes of all."""
    alone = torch.stack([as_tensor(change_picture(p, r)) for p, r in zip(pictures, recipes, strict=True)])
    return alone.float(), change_batch(torch.stack([as_tensor(p) for p in pictures]), recipes)


def recipe(**changes: float) -> Tensor:
    names = ("op0", "op1", "op2", "op3", "brightness", "contrast", "saturation", "hue", "grey", "sigma", "solarise")
    return torch.tensor([changes.get(name, value) for name, value in zip(names, NOTHING, strict=True)])


@pytest.mark.parametrize(
    ("changes", "most"),
    [
        ({"op0": 0, "brightness": 1.3}, 1.0),
        ({"op0": 0, "brightness": 0.6}, 1.0),
        ({"op0": 1, "contrast": 1.4}, 2.0),
        ({"op0": 1, "contrast": 0.7}, 2.0),
        ({"op0": 2, "saturation": 1.2}, 2.0),
        ({"op0": 2, "saturation": 0.8}, 2.0),
        ({"op0": 3, "hue": 0.1}, 10.0),  # Pillow's HSV has 256 hues
        ({"op0": 3, "hue": -0.1}, 10.0),
        ({"grey": 1}, 1.0),
        ({"solarise": 1}, 0.0),
        ({}, 0.0),
    ],
)
def test_each_step_is_pillows(changes: dict[str, float], most: float) -> None:
    pictures = [photo(number) for number in range(8)]
    alone, batch = both(pictures, recipe(**changes).repeat(8, 1))
    assert float((alone - batch).abs().max()) <= most
    assert bool((alone != torch.stack([as_tensor(p) for p in pictures])).any()) == bool(changes)


@pytest.mark.parametrize("share", [-0.1, -0.03, 0.02, 0.1])
def test_the_hue_is_torchvisions_without_pillows_rounding(share: float) -> None:
    pixels = torch.stack([as_tensor(photo(number)) for number in range(8)])
    turned = change_batch(pixels, recipe(op0=3, hue=share).repeat(8, 1))
    expected = tv.adjust_hue(pixels.float() / 255.0, share) * 255.0
    torch.testing.assert_close(turned, expected, atol=0.01, rtol=0.0)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
def test_the_blur_is_pillows_to_the_border(sigma: float) -> None:
    """Pillow's Gaussian is three boxes; a tenth of the shades between neighbours is what that costs."""
    alone, batch = both([photo(n) for n in range(4)], recipe(sigma=sigma).repeat(4, 1))
    assert float((alone - batch).abs().mean()) < 1.5
    borders = [(alone - batch)[..., edge, :].abs().mean() for edge in (0, -1)]
    assert max(map(float, borders)) < 2.0


def test_whole_recipes_give_the_same_pictures() -> None:
    torch.manual_seed(0)
    recipes = torch.stack([Colours((0.1, 1.0), blurred=0.5, solarised=0.0).draw() for _ in range(200)])
    alone, batch = both([photo(number) for number in range(200)], recipes)
    apart = (alone - batch).abs().mean(dim=(1, 2, 3))
    assert float(apart.mean()) < 2.0
    assert float(apart.max()) < 6.0  # of 255 shades: Pillow rounds between the steps, its hues most of all
    changed = torch.stack([as_tensor(photo(n)) for n in range(200)]) - alone
    assert float(changed.abs().mean()) > 10.0


def test_the_order_of_the_jitter_matters_and_is_kept() -> None:
    pictures = [photo(3)] * 2
    amounts = {"brightness": 1.4, "contrast": 0.6}
    recipes = torch.stack([recipe(op0=0, op1=1, **amounts), recipe(op0=1, op1=0, **amounts)])
    alone, batch = both(pictures, recipes)
    assert float((alone[0] - alone[1]).abs().mean()) > 2.0
    assert float((alone - batch).abs().max()) <= 3.0


def test_solarisation_inverts_from_128_on() -> None:
    picture = Image.fromarray(np.array([[[127, 128, 255]]], np.uint8).repeat(2, 0).repeat(2, 1))
    _, batch = both([picture], recipe(solarise=1)[None])
    assert batch[0, :, 0, 0].tolist() == [127.0, 127.0, 0.0]


def test_shades_stay_in_their_range() -> None:
    torch.manual_seed(1)
    recipes = torch.stack([OFTEN.draw() for _ in range(64)])
    extreme = [
        Image.fromarray(np.random.default_rng(n).choice([0, 255], (16, 16, 3)).astype(np.uint8)) for n in range(64)
    ]
    batch = change_batch(torch.stack([as_tensor(p) for p in extreme]), recipes)
    assert float(batch.min()) >= -1e-3
    assert float(batch.max()) <= 255.001
    assert bool(batch.isfinite().all())


def test_recipes_come_at_the_papers_rates() -> None:
    torch.manual_seed(0)
    drawn = torch.stack([Colours((0.2, 2.0), blurred=0.1, solarised=0.2).draw() for _ in range(4000)])
    assert drawn.shape == (4000, RECIPE)
    jittered = drawn[drawn[:, 0] >= 0]
    for share, expected in (
        (len(jittered) / 4000, 0.8),
        (float(drawn[:, 8].mean()), 0.2),
        (float((drawn[:, 9] > 0).float().mean()), 0.1),
        (float(drawn[:, 10].mean()), 0.2),
    ):
        assert share == pytest.approx(expected, abs=5 * (expected * (1 - expected) / 4000) ** 0.5)
    assert all(sorted(row) == [0, 1, 2, 3] for row in jittered[:, :4].tolist())
    assert len({tuple(row) for row in jittered[:, :4].tolist()}) == 24
    for column, middle, reach in ((4, 1.0, 0.4), (5, 1.0, 0.4), (6, 1.0, 0.2), (7, 0.0, 0.1)):
        values = jittered[:, column]
        assert middle - reach <= float(values.min()) < middle - 0.97 * reach
        assert middle + 0.97 * reach < float(values.max()) <= middle + reach
        assert float(values.mean()) == pytest.approx(middle, abs=0.05 * reach)
    blurs = drawn[drawn[:, 9] > 0, 9]
    assert 0.2 <= float(blurs.min()) < 0.3
    assert 1.9 < float(blurs.max()) <= 2.0


def test_views_with_recipes_are_those_of_pillow() -> None:
    """The same generator gives the same crops and colours, whoever makes them."""
    views, to_inputs, normalise = ViewsConfig(min_crop_scale=0.2), ToInputs(BACKBONE), ToInput(BACKBONE)
    for number in range(20):
        torch.manual_seed(number)
        pillow = TwoViews(16, views)(photo(number))
        torch.manual_seed(number)
        with_recipes = TwoViews(16, views, recipes=True)(photo(number))
        assert [view.dtype for view in with_recipes] == [torch.uint8, torch.float32] * 2
        device = to_inputs([view[None] for view in with_recipes])
        assert len(device) == 2
        for ours, theirs in zip(device, pillow, strict=True):
            solarised = bool(with_recipes[3][10])
            assert solarised or float((ours - normalise(theirs[None])).abs().mean()) < 0.06


def test_masks_stay_between_the_views() -> None:
    shape = mask_shape(16, 4, MaskConfig(mask_patch_size_px=4))
    torch.manual_seed(0)
    drawn = MaskedTwoViews(16, ViewsConfig(min_crop_scale=0.2), shape, "random", recipes=True)(photo(0))
    assert [view.dtype for view in drawn] == [torch.uint8, torch.float32, torch.bool] * 2
    inputs = ToInputs(BACKBONE)([view[None] for view in drawn])
    assert [(tensor.dtype, tensor.ndim) for tensor in inputs] == [(torch.float32, 4), (torch.bool, 3)] * 2
