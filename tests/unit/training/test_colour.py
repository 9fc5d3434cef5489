"""Changes of colour: Pillow's, the same for one view and for a batch; and recipes come at the paper's rates."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor
from torchvision.transforms.v2 import functional as tv

from mimco_deploy.drawings import KINDS, draw
from mimco_deploy.training.augment import MaskedTwoViews, ToInput, ToInputs, TwoViews
from mimco_deploy.training.colour import RECIPE, Colours, change_batch, change_view
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


def by_pillow(picture: Image.Image, recipe: Tensor) -> Tensor:
    """What torchvision's functions make of it by Pillow, which rounds between the steps."""
    steps = (tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue)
    *numbers, grey, sigma_px, solarised = recipe.tolist()
    for step in map(int, numbers[:4]):
        if step >= 0:
            picture = steps[step](picture, numbers[4 + step])
    if grey:
        picture = tv.rgb_to_grayscale(picture, num_output_channels=3)
    if sigma_px > 0.0:
        picture = picture.filter(ImageFilter.GaussianBlur(sigma_px))
    return as_tensor(tv.solarize(picture, 128) if solarised else picture)


def every_way(pictures: list[Image.Image], recipes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """By Pillow, each view alone, and all as a batch."""
    pairs = list(zip(pictures, recipes, strict=True))
    pillow = torch.stack([by_pillow(picture, recipe) for picture, recipe in pairs])
    alone = torch.stack([change_view(as_tensor(picture), recipe) for picture, recipe in pairs])
    assert alone.dtype == torch.uint8
    return pillow.float(), alone.float(), change_batch(torch.stack([as_tensor(p) for p in pictures]), recipes)


def most(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max())


def recipe(**changes: float) -> Tensor:
    names = ("op0", "op1", "op2", "op3", "brightness", "contrast", "saturation", "hue", "grey", "sigma", "solarise")
    return torch.tensor([changes.get(name, value) for name, value in zip(names, NOTHING, strict=True)])


@pytest.mark.parametrize(
    ("changes", "limit"),
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
def test_each_step_is_pillows(changes: dict[str, float], limit: float) -> None:
    pictures = [photo(number) for number in range(8)]
    pillow, alone, batch = every_way(pictures, recipe(**changes).repeat(8, 1))
    assert most(pillow, batch) <= limit
    assert most(alone, batch) <= 0.501
    assert bool((alone != torch.stack([as_tensor(p) for p in pictures])).any()) == bool(changes)


@pytest.mark.parametrize("share", [-0.1, -0.03, 0.02, 0.1])
def test_the_hue_is_torchvisions_without_pillows_rounding(share: float) -> None:
    pixels = torch.stack([as_tensor(photo(number)) for number in range(8)])
    turned = change_batch(pixels, recipe(op0=3, hue=share).repeat(8, 1))
    expected = tv.adjust_hue(pixels.float() / 255.0, share) * 255.0
    torch.testing.assert_close(turned, expected, atol=0.01, rtol=0.0)


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0])
def test_the_blur_is_pillows_to_the_border(sigma: float) -> None:
    """Pillow's Gaussian is three boxes; that costs a shade or two."""
    pillow, alone, batch = every_way([photo(n) for n in range(4)], recipe(sigma=sigma).repeat(4, 1))
    assert most(alone, batch) <= 0.501
    assert float((pillow - batch).abs().mean()) < 1.5
    borders = [(pillow - batch)[..., edge, :].abs().mean() for edge in (0, -1)]
    assert max(map(float, borders)) < 2.0


def test_the_blur_is_torchvisions() -> None:
    pixels = as_tensor(photo(0, 48))
    ours = change_view(pixels, recipe(sigma=1.5))
    theirs = tv.gaussian_blur(pixels.float(), [11, 11], [1.5, 1.5])
    assert most(ours[:, 6:-6, 6:-6].float(), theirs[:, 6:-6, 6:-6]) <= 0.501


def test_whole_recipes_give_the_same_pictures() -> None:
    torch.manual_seed(0)
    pictures = [photo(number) for number in range(200)]
    recipes = torch.stack([Colours((0.1, 1.0), blurred=0.5, solarised=0.2).draw() for _ in pictures])
    pillow, alone, batch = every_way(pictures, recipes)
    plain = recipes[:, 10] == 0  # where a shade is at the edge of solarisation, rounding between the steps decides
    apart = (pillow - batch).abs().mean(dim=(1, 2, 3))[plain]
    assert float(apart.mean()) < 2.0
    assert float(apart.max()) < 6.0  # of 255 shades: Pillow's hues are 256
    assert most(alone[plain], batch[plain]) <= 0.51
    assert float((alone - batch).abs().mean()) < 0.3
    changed = torch.stack([as_tensor(picture) for picture in pictures]) - alone
    assert float(changed.abs().mean()) > 10.0


def test_the_order_of_the_jitter_matters_and_is_kept() -> None:
    pictures = [photo(3)] * 2
    amounts = {"brightness": 1.4, "contrast": 0.6}
    recipes = torch.stack([recipe(op0=0, op1=1, **amounts), recipe(op0=1, op1=0, **amounts)])
    pillow, alone, batch = every_way(pictures, recipes)
    assert float((alone[0] - alone[1]).abs().mean()) > 2.0
    assert most(alone, batch) <= 0.501
    assert most(pillow, batch) <= 3.0


def test_solarisation_inverts_from_128_on() -> None:
    picture = Image.fromarray(np.array([[[127, 128, 255]]], np.uint8).repeat(2, 0).repeat(2, 1))
    _, _, batch = every_way([picture], recipe(solarise=1)[None])
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


def test_views_with_recipes_are_those_without() -> None:
    """The same generator gives the same crops and colours, whoever makes them."""
    views, to_inputs, normalise = ViewsConfig(min_crop_scale=0.2), ToInputs(BACKBONE), ToInput(BACKBONE)
    for number in range(20):
        torch.manual_seed(number)
        worker = TwoViews(16, views)(photo(number))
        torch.manual_seed(number)
        with_recipes = TwoViews(16, views, recipes=True)(photo(number))
        assert [view.dtype for view in with_recipes] == [torch.uint8, torch.float32] * 2
        device = to_inputs([view[None] for view in with_recipes])
        assert len(device) == 2
        for ours, theirs in zip(device, worker, strict=True):
            assert float((ours - normalise(theirs[None])).abs().mean()) < 0.01


def test_masks_stay_between_the_views() -> None:
    shape = mask_shape(16, 4, MaskConfig(mask_patch_size_px=4))
    torch.manual_seed(0)
    drawn = MaskedTwoViews(16, ViewsConfig(min_crop_scale=0.2), shape, "random", recipes=True)(photo(0))
    assert [view.dtype for view in drawn] == [torch.uint8, torch.float32, torch.bool] * 2
    inputs = ToInputs(BACKBONE)([view[None] for view in drawn])
    assert [(tensor.dtype, tensor.ndim) for tensor in inputs] == [(torch.float32, 4), (torch.bool, 3)] * 2
