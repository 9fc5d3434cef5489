"""The backbone: the only file that touches timm's models.

Any model of timm gives patch tokens and one vector for the image. Transformers (ViT, BEiT, Swin) also take a mask, so
they can be students; plain ViTs start with MoCo v3's fixed positions and initialisation. Parameters keep timm's names
under `body.`, so that a trained one loads into plain timm.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import timm
import torch
import torch.nn.functional as F
from timm.layers.attention import Attention
from timm.models import checkpoint_seq, save_for_hf
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mimco_deploy.errors import ConfigError
from mimco_deploy.preprocess import CropMode, Interpolation
from mimco_deploy.training.config import BackboneConfig
from mimco_deploy.training.settings import differences
from mimco_deploy.training.vit import init_as_mocov3

CROP_SHARE = 0.875
"""Eval-time geometry: the centre crop's side over the resized short side, ImageNet's convention (224 of 256)."""


UNSTATED = "unstated"
"""Licence of weights of which nobody said one."""


class Geometry(NamedTuple):
    """How pictures become the square that a backbone was trained to see; see `preprocess`."""

    crop_share: float = CROP_SHARE
    interpolation: Interpolation = "bicubic"
    crop_mode: CropMode = "center"


class Features(NamedTuple):
    """What a backbone gives, after its last norm; not normalised."""

    own: Tensor
    """[B, D], the model's own vector for the image: its CLS token, or where it has none what it pools to."""
    patches: Tensor
    """[B, L, D], row by row"""

    def pooled(self, pooling: str) -> Tensor:
        """One vector an image, [B, D]: `mean` of the patch tokens, or for `cls` the model's own."""
        return self.patches.mean(dim=1) if pooling == "mean" else self.own


class Backbone(nn.Module):
    """A model of timm that gives all its tokens, and takes a mask where it is a transformer.

    Args:
        config: architecture and sizes.
        frozen_patch_embed: keep the patch embedding as the random projection it starts as (MoCo v3, section 4.2).
        body: the model itself where it is built already, with its weights.

    Raises:
        ConfigError: timm does not know the architecture or cannot build it so, or its patches do not tile the image.
    """

    def __init__(
        self, config: BackboneConfig, *, frozen_patch_embed: bool = False, body: nn.Module | None = None
    ) -> None:
        super().__init__()
        model: Any = body or _create(config)
        plain = type(model) is VisionTransformer and model.num_prefix_tokens == 1 and not model.no_embed_class
        if body is None and plain:
            init_as_mocov3(model)
        projection = getattr(getattr(model, "patch_embed", None), "proj", None)
        if type(projection) is nn.Conv2d and projection.stride == projection.kernel_size:
            projection.__class__ = _PatchProjection  # its weights and their names stay; only how it computes is another
        self.config = config
        self.body = model
        self._is_swin = isinstance(model, SwinTransformer)
        self.width: int = model.num_features
        self.own_width: int = model.head_hidden_size if config.global_pool else self.width
        self.stride_px: int = model.feature_info[-1]["reduction"]
        """Pixels along the side of an output token: a patch in a ViT, several of them in a Swin."""
        self.geometry = Geometry()
        self.built_with = ""
        """What else than the config decides its architecture, of models that mimco did not build."""
        self.licence = UNSTATED
        """Of the weights, where those who published them, or the teacher behind them, said so."""
        self.start = ""
        """Weights that its training started with, in words that mean something elsewhere; empty at random."""
        if body is None:
            self._check_size(config.image_size_px)
        if frozen_patch_embed and hasattr(model, "patch_embed"):  # the method refuses what has none
            self.body.patch_embed.requires_grad_(False)

    @property
    def patch_px(self) -> int:
        """Side of a patch as it is embedded and masked; of a transformer."""
        return int(self.body.patch_embed.patch_size[0])

    @property
    def encodes_parts(self) -> bool:
        """Whether it can encode some of the patches alone, beside a CLS token."""
        return isinstance(self.body, VisionTransformer) and _has_cls(self.body) and self.body.num_prefix_tokens == 1

    @property
    def grid(self) -> int:
        """Output tokens along one side; L is its square."""
        return math.ceil(self.config.image_size_px / self.stride_px)

    @property
    def has_cls(self) -> bool:
        """Whether it has a CLS token, which then is `Features.own` unless timm pools."""
        return _has_cls(self.body)

    @property
    def own_pooling(self) -> Literal["mean", "cls"]:
        """What `Features.own` is: the plain `mean` of the patch tokens, or a vector that the model makes, `cls`."""
        return "cls" if self.config.global_pool or _has_cls(self.body) else "mean"

    def new_mask_token(self) -> nn.Parameter:
        """A parameter [1, 1, width of an embedded patch] to stand in for masked patches.

        Raises:
            ConfigError: the architecture takes no masks.
        """
        takes_masks = isinstance(self.body, VisionTransformer | Beit | SwinTransformer)
        if not takes_masks:
            raise ConfigError(f"masks for {self.config.name}", expected="a student that is a ViT, BEiT or Swin of timm")
        width: int = self.body.patch_embed.proj.weight.shape[0]
        return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, width), std=0.02))

    def forward(
        self,
        images: Tensor,
        mask: Tensor | None = None,
        mask_token: Tensor | None = None,
        visible: Tensor | None = None,
    ) -> Features:
        """Encode.

        Args:
            images: [B, 3, H, W], normalised.
            mask: [B, H / patch, W / patch] bool, True = masked, or None.
            mask_token: [1, 1, D], stands in for masked patches after they are embedded and before positions are added;
                given with `mask`.
            visible: [B, V] int64, the only patches that a ViT encodes (MAE), or None for all.
        """
        if mask is None and visible is None:
            return self._features(self.body.forward_features(images))
        tokens = self.body.patch_embed(images)  # [B, L, D], of a Swin [B, h, w, D]
        if mask is not None:
            assert mask_token is not None, "a mask comes with its token"
            tokens = torch.where(mask.reshape(*tokens.shape[:-1], 1), mask_token.to(tokens.dtype), tokens)
        return self._features(self._encode(tokens, visible))

    def attend(self, images: Tensor) -> tuple[Features, Tensor]:
        """Encode, and say how much each patch means to the image.

        Args:
            images: [B, 3, H, W], normalised.

        Returns:
            Features, and [B, L] scores, higher means more: the last block's attention from the CLS token, mean over
            heads; where there is none, the cosine of the patch token with the image's own vector.

        Source: AttMask (arXiv 2203.12719), section 3.2; the cosine is our choice, for Swin.
        """
        body = self.body
        if not (isinstance(body, VisionTransformer) and _has_cls(body) and isinstance(body.blocks[-1], Block)):
            features = self(images)
            return features, F.cosine_similarity(features.patches, features.own.unsqueeze(1), dim=2)
        tokens = body.norm_pre(body._pos_embed(body.patch_embed(images)))
        tokens, last = body.blocks[:-1](tokens), body.blocks[-1]
        scores = _cls_attention(last.attn, last.norm1(tokens))[:, body.num_prefix_tokens :]
        return self._features(body.norm(last(tokens))), scores

    def resize(self, image_size_px: int) -> None:
        """Take images of another size: timm interpolates absolute positions; a Swin's windows stay as they are.

        Raises:
            ConfigError: the architecture is of one size, or its patches do not tile that one.
        """
        if image_size_px == self.config.image_size_px:
            return
        self._check_size(image_size_px)
        size, body = (image_size_px, image_size_px), self.body
        if isinstance(body, SwinTransformer | SwinTransformerV2):
            body.set_input_size(img_size=size, window_size=self._one_window(body))
        elif hasattr(body, "set_input_size"):
            body.set_input_size(img_size=size)
        elif hasattr(body, "patch_embed"):
            raise ConfigError(f"{self.config.name} at {image_size_px} px", expected=f"{self.config.image_size_px} px")
        self.config = dataclasses.replace(self.config, image_size_px=image_size_px)

    def _one_window(self, body: Any) -> tuple[int, int]:
        """The window of all stages, which stays; a stage of fewer tokens than that has one of its own size."""
        blocks = [stage.blocks[0] for stage in body.layers]
        window: tuple[int, int] = tuple(blocks[0].window_size)
        for block in blocks:
            if tuple(block.window_size) != tuple(map(min, window, block.input_resolution)):
                raise ConfigError(f"{self.config.name} at another size", expected="a Swin of one window size")
        return window

    def start_as(self, other: Backbone, setting: str) -> None:
        """Take another's weights, and what is known of their licence.

        Args:
            other: of the same architecture and sizes, drop path aside.
            setting: that asks for it.

        Raises:
            ConfigError: it differs; says in what.
        """
        same = dataclasses.replace(other.config, drop_path=self.config.drop_path, global_pool="")
        for key, ours, theirs in differences(self.config, same):
            raise ConfigError(f"{setting} with backbone.{key} {ours}", expected=f"{theirs}, as {other.config.name} has")
        try:
            self.load_state_dict(other.state_dict())
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:600]
            raise ConfigError(f"{setting}: {reason}", expected="weights that fit, or another start") from error
        self.licence = other.licence

    def checkpoint_gradients(self, enabled: bool) -> None:
        """Whether blocks compute their activations again in the backward pass instead of keeping them."""
        if hasattr(self.body, "set_grad_checkpointing"):
            self.body.set_grad_checkpointing(enabled)

    def _check_size(self, image_size_px: int) -> None:
        if hasattr(self.body, "patch_embed") and image_size_px % self.stride_px:  # convolutions pad
            raise ConfigError(
                f"{self.config.name} at {image_size_px} px, {self.stride_px} px a token",
                expected="a whole number of tokens",
            )

    def _encode(self, tokens: Tensor, visible: Tensor | None) -> Tensor:
        """From embedded patches to the last norm, as `forward_features` of the three families does."""
        body: Any = self.body
        assert visible is None or isinstance(body, VisionTransformer), "others encode all of the image"
        if self._is_swin:
            tokens = body.layers(tokens)
        elif isinstance(body, Beit):
            tokens = torch.cat([body.cls_token.expand(len(tokens), -1, -1), tokens], dim=1)
            tokens = body.pos_drop(tokens if body.pos_embed is None else tokens + body.pos_embed)
            bias = None if body.rel_pos_bias is None else body.rel_pos_bias()
            for block in body.blocks:
                run = functools.partial(block, shared_rel_pos_bias=bias)
                tokens = checkpoint(run, tokens, use_reentrant=False) if body.grad_checkpointing else run(tokens)
        else:
            tokens = body._pos_embed(tokens)  # [B, prefix + L, D]
            if visible is not None:
                prefix, patches = tokens.tensor_split([body.num_prefix_tokens], dim=1)
                rows = visible.unsqueeze(2).expand(-1, -1, patches.shape[2])
                tokens = torch.cat([prefix, patches.gather(1, rows)], dim=1)  # [B, prefix + V, D]
            tokens = body.norm_pre(tokens)
            tokens = checkpoint_seq(body.blocks, tokens) if body.grad_checkpointing else body.blocks(tokens)
        output: Tensor = body.norm(tokens)
        return output

    def _features(self, output: Tensor) -> Features:
        """Tokens of timm's three layouts → one."""
        if output.ndim == 3:  # [B, prefix + L, D]
            patches = output[:, getattr(self.body, "num_prefix_tokens", 0) :]
        elif getattr(self.body, "output_fmt", "NCHW") == "NHWC":
            patches = output.flatten(1, 2)
        else:
            patches = output.flatten(2).mT
        if self.config.global_pool:
            own = self.body.forward_head(output, pre_logits=True)
        else:
            own = output[:, 0] if _has_cls(self.body) else patches.mean(dim=1)
        return Features(own, patches)


class _PatchProjection(nn.Conv2d):
    """A convolution whose windows touch: on a GPU a matrix product, which takes a tenth of the time there."""

    def forward(self, images: Tensor) -> Tensor:
        """[B, C, H, W] → [B, D, h, w]."""
        return self.as_product(images) if images.is_cuda else super().forward(images)

    def as_product(self, images: Tensor) -> Tensor:
        """The same, up to the order of the sums."""
        (batch, channels, high, wide), (height, width) = images.shape, self.kernel_size
        windows = images.reshape(batch, channels, high // height, height, wide // width, width).permute(
            0, 2, 4, 1, 3, 5
        )
        return F.linear(windows.flatten(3), self.weight.flatten(1), self.bias).permute(0, 3, 1, 2)


def write_attention_out(module: nn.Module) -> None:
    """Let ViT blocks compute attention as two products and a softmax, which CPUs train faster than torch's fused one.

    Its backward pass is what takes so long there; Swin's, which adds a bias, gains nothing (docs/decisions.md).
    """
    for part in module.modules():
        if isinstance(part, Attention):
            part.fused_attn = False  # type: ignore[misc]  # timm's mark is for TorchScript


def _has_cls(body: nn.Module) -> bool:
    return isinstance(body, Beit) or (isinstance(body, VisionTransformer) and body.has_class_token)


def _create(config: BackboneConfig) -> nn.Module:
    args = {"drop_path_rate": config.drop_path, **timm_args(config)}
    while True:
        try:
            model: nn.Module = timm.create_model(config.name, **args)
            return model
        except (RuntimeError, TypeError, ValueError, AssertionError) as error:
            optional = (name for name in ("img_size", "drop_path_rate") if name in args and name in str(error))
            surplus = next(optional, None)  # not every architecture takes these two
            if surplus is None or not isinstance(error, TypeError):
                raise ConfigError(
                    f"backbone {config.name}: {error}", expected="a model of timm, such as vit_small_patch16_224"
                ) from error
            del args[surplus]


def timm_args(config: BackboneConfig) -> dict[str, Any]:
    """Arguments that make `timm.create_model(config.name, …)` build this backbone.

    Raises:
        ConfigError: there are several numbers where the architecture takes one.
    """
    sizes: dict[str, Any] = {
        "patch_size": config.patch_size_px,
        "embed_dim": config.embed_dim,
        "num_heads": config.num_heads,
        "window_size": config.window,
    }
    if config.name.startswith("swin"):
        sizes["depths"] = config.depth
    else:
        for name in ("depth", "num_heads"):
            values: tuple[int, ...] = getattr(config, name)
            if len(values) > 1:
                raise ConfigError(f"backbone.{name} {values} for {config.name}", expected="one number")
            sizes[name] = values[0] if values else 0
    given = {name: size for name, size in sizes.items() if size}
    return {"img_size": config.image_size_px, "num_classes": 0, "global_pool": config.global_pool, **given}


def weights_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, types, shapes and values of tensors."""
    digest = hashlib.sha256()
    for name, value in sorted(state.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def save_as_timm(backbone: Backbone, folder: Path, licence: str) -> None:
    """Write a folder that `timm.create_model("local-dir:<folder>", pretrained=True)` loads.

    timm fills its config from the architecture's published weights; what describes those and not ours is replaced.

    Args:
        backbone: whose weights it holds.
        folder: to write.
        licence: of the weights, by all that they were learnt from.
    """
    ours = {
        "tag": "",
        "license": licence,
        "mean": backbone.config.mean,
        "std": backbone.config.std,
        "crop_pct": backbone.geometry.crop_share,
        "interpolation": backbone.geometry.interpolation,
        "crop_mode": backbone.geometry.crop_mode,
    }
    save_for_hf(
        backbone.body,
        str(folder),
        model_config={"pretrained_cfg": ours},
        model_args=timm_args(backbone.config),
        safe_serialization=True,
    )


def _cls_attention(attention: Any, tokens: Tensor) -> Tensor:
    """Mean over heads of the CLS token's attention weights, [B, N], of timm's attention over tokens [B, N, D]."""
    batch, count, _ = tokens.shape
    qkv = attention.qkv(tokens).reshape(batch, count, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
    query, key = attention.q_norm(qkv[0, :, :, :1]), attention.k_norm(qkv[1])  # [B, heads, 1 or N, D/heads]
    weights: Tensor = (query @ key.mT * attention.scale).float().softmax(dim=-1)
    return weights.mean(dim=1).squeeze(1)
