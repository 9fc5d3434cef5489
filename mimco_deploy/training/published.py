"""Encoders that others trained: files in the layouts that their authors published, and models of timm.

A file is read with torch's weights-only loader. Classes that it names beside the weights (a config of yacs, say, or an
argparse namespace) become empty dictionaries: nothing of theirs runs. Every key is used or known to be of a head, a
decoder or a queue; any other is an error that lists it.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import math
import re
import textwrap
import typing
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from timm.models.beit import Beit
from timm.models.swin_transformer import SwinTransformer
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor

from mimco_deploy.errors import CheckpointError, ConfigError
from mimco_deploy.preprocess import CropMode, Interpolation
from mimco_deploy.training.backbone import CROP_SHARE, UNSTATED, Backbone, Geometry
from mimco_deploy.training.checkpoint import is_checkpoint, load_encoder, load_strictly, read_checkpoint
from mimco_deploy.training.config import BackboneConfig
from mimco_deploy.training.method_config import Pooling

logger = logging.getLogger(__name__)

State = dict[str, Tensor]

_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1280: 16}
"""Width of a published ViT → its attention heads, which no shape tells: DeiT, DINO, MAE and MoBY."""
_MOCOV3_HEADS = dict.fromkeys(range(12, 1600, 12), 12)
"""MoCo v3's ViT-S has as many as its ViT-B."""
_VIT_NAMES = {192: "vit_tiny", 384: "vit_small", 768: "vit_base", 1024: "vit_large", 1280: "vit_huge"}


@dataclass(frozen=True)
class _Layout:
    """How one project writes its checkpoints."""

    name: str
    prefix: str
    """Of the encoder's keys."""
    dropped: str
    """Pattern of the keys that are no part of the encoder: heads, decoders, momentum copies, queues."""
    licence: str
    """Of the weights that the project published, as its repository states it."""
    heads: dict[int, int] = field(default_factory=lambda: _HEADS)


_LAYOUTS = (
    _Layout(
        "MoCo v3",
        "module.base_encoder.",
        r"module\.(base_encoder\.head\.|momentum_encoder\.|predictor\.)",
        "CC-BY-NC-4.0",
        _MOCOV3_HEADS,
    ),
    _Layout(
        "MoBY or SimMIM",
        "encoder.",
        r"encoder_k\.|projector(_k)?\.|predictor\.|queue(1|2|_ptr)$|decoder\.|encoder\.(head\.|mask_token$)",
        "MIT if it is theirs",
    ),
    _Layout("DINO", "backbone.", r"head\.|backbone\.head\.", "Apache-2.0 if it is DINO's"),
    # Of MAE's encoder alone nothing tells that it is not DINO's or DeiT's, which are under Apache-2.0: the stricter.
    _Layout("DINO, MAE or DeiT", "", r"head\.|mask_token$|decoder_", "CC-BY-NC-4.0 if it is MAE's"),
)


def load_teacher(source: str, *, to_train: bool = True) -> tuple[Backbone, Pooling]:
    """A teacher from anywhere, or an encoder to export.

    Args:
        source: a checkpoint folder of mimco's, a file of published weights, a folder that timm wrote, or `timm/NAME`
            for a model of timm's, by its name or by its place on the hub, as in `timm/hf-hub:user/name`.
        to_train: whether a resumed run must be able to build it again from its config, which some models refuse.

    Returns:
        The backbone, and how it was trained to give one vector an image: `cls` or `mean`.

    Raises:
        CheckpointError: there is none, or it cannot be loaded in full.
    """
    path = Path(source)
    if source.startswith("timm/") and not path.exists():
        backbone = load_from_timm(source.removeprefix("timm/"), to_train=to_train)
    elif is_checkpoint(path):
        return load_encoder(read_checkpoint(path))
    elif path.is_dir():
        backbone = load_from_timm(f"local-dir:{path}", to_train=to_train)
    elif not path.exists() and timm.is_model(source):
        raise CheckpointError(f"no file {source}", expected=f"timm/{source}, if timm's model is meant")
    else:
        backbone = load_published(path)
    return backbone, backbone.own_pooling


def load_published(path: Path) -> Backbone:
    """The encoder in a file of published weights: MoCo v3, MoBY, SimMIM (Swin), DINO, MAE, DeiT, or others like them.

    Args:
        path: a torch file or safetensors.

    Returns:
        The backbone, its architecture and sizes read off the weights.

    Raises:
        CheckpointError: the file cannot be read, is of no known layout, or has missing or surplus keys; lists them.
    """
    state = _find_state(_read(path), path)
    layout = next(layout for layout in _LAYOUTS if any(key.startswith(layout.prefix) for key in state))
    kept = {key: value for key, value in state.items() if not re.match(layout.dropped, key)}
    foreign = [key for key in kept if not key.startswith(layout.prefix)]
    if foreign:
        raise CheckpointError(
            f"{path}: surplus keys {', '.join(foreign)}", expected=f"{layout.prefix}* and the heads of {layout.name}"
        )
    encoder = {key.removeprefix(layout.prefix): value for key, value in kept.items()}
    try:
        config = _swin_config(encoder) if "layers.0.blocks.0.norm1.weight" in encoder else _vit_config(encoder, layout)
        backbone = Backbone(config)
    except (KeyError, ValueError, IndexError, ConfigError) as error:
        expected = "a ViT or Swin in the layout of MoCo v3, MoBY, SimMIM (Swin), DINO, MAE or DeiT"
        if (path.parent / "config.json").is_file():
            expected = f"{path.parent}, the folder, if timm wrote it; or {expected}"
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise CheckpointError(f"{path}: as a {layout.name} file, {reason}", expected=expected) from error
    if config.name.startswith("swin"):
        encoder = _as_timms_swin(encoder)
    load_strictly(backbone.body, encoder, path)
    backbone.licence = layout.licence
    return backbone


def load_from_timm(name: str, *, to_train: bool = True) -> Backbone:
    """A model with weights from timm: by its name on the hub, or from a folder that timm wrote.

    Args:
        name: such as `vit_small_patch16_224.dino`, or `local-dir:FOLDER`.
        to_train: see `load_teacher`.

    Returns:
        The backbone, which pools and normalises as timm says.

    Raises:
        CheckpointError: timm does not know the model, cannot reach its weights, or mimco cannot build it again.
    """
    shown = name.removeprefix("local-dir:")
    document = _read_config(Path(shown)) if shown != name else None
    try:
        with _keys_that_matter():
            body: Any = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub, the network, files and timm each have errors of their own
        reason = " ".join(str(error).split())[:300]
        expected = _weights_like(name) if document is None else "a config.json and whole weights of one model of timm's"
        raise CheckpointError(f"timm cannot load {shown}: {reason}", expected=expected) from error
    config = _describe(body, shown)
    try:
        backbone = Backbone(config, body=None if to_train else body)
    except ConfigError as error:
        raise CheckpointError(f"{shown}: {error.found}", expected="a model that mimco can build again") from error
    if to_train:
        load_strictly(backbone.body, body.state_dict(), Path(shown))
    backbone.licence = body.pretrained_cfg.get("license") or UNSTATED
    backbone.geometry = _geometry(shown, body.pretrained_cfg)
    if document is not None:  # arguments can change an architecture in ways that no weight shows
        backbone.built_with = json.dumps([document.get("model_args"), document.get("global_pool")], sort_keys=True)
    return backbone


def _read_config(folder: Path) -> dict[str, Any]:
    """What a folder of timm's says of its model; it names an architecture that timm has."""
    path = folder / "config.json"
    try:
        document: Any = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"no {path}", expected="a folder that timm wrote") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}", expected="JSON, as timm writes it") from error
    if not isinstance(document, dict) or not isinstance(document.get("architecture"), str):
        raise CheckpointError(f"{path} names no architecture", expected="a folder that timm wrote")
    name = document["architecture"]
    if not timm.is_model(name):
        expected = f"one of timm's{_such_as(name, timm.list_models())}"
        raise CheckpointError(f"{path} names the architecture {name}", expected=expected)
    return document


def _weights_like(name: str) -> str:
    """What to ask timm for in place of a name that it could not load."""
    if ":" in name or timm.is_model_pretrained(name):
        return "a model of timm whose weights can be reached"
    tagged = timm.list_models(pretrained=True)
    return f"a model that timm has weights of{_such_as(name, {*tagged, *(known.split('.')[0] for known in tagged)})}"


def _such_as(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(known))
    return f", such as {', '.join(near)}" if near else ""


@contextlib.contextmanager
def _keys_that_matter() -> Iterator[None]:
    """Of what timm says of keys: nothing of a head's that are left over, and a warning of those that are missing."""

    def is_news(record: logging.LogRecord) -> bool:
        text = record.getMessage()
        if missing := re.match(r"Missing keys \((.*?)\)", text):
            listed = textwrap.shorten(missing[1], 200, placeholder=" …")
            logger.warning("there are no weights for %s, which stay random", listed)
        surplus = re.match(r"Unexpected keys \((.*?)\)", text)
        heads = surplus and all(re.match(r"(head|classifier|fc)\w*\.", key) for key in surplus[1].split(", "))
        return record.levelno >= logging.WARNING and not heads

    builder = logging.getLogger("timm.models._builder")
    level = builder.level
    builder.addFilter(is_news)
    builder.setLevel(logging.INFO)
    try:
        yield
    finally:
        builder.setLevel(level)
        builder.removeFilter(is_news)


def _geometry(name: str, cfg: dict[str, Any]) -> Geometry:
    """How timm prepares pictures for a model."""
    share = cfg.get("crop_pct") or CROP_SHARE
    mode: Any = cfg.get("crop_mode") or "center"
    interpolation: Any = cfg.get("interpolation") or "bicubic"
    if not (isinstance(share, int | float) and 0 < share <= 1):
        raise CheckpointError(f"{name} has a crop_pct of {share} in its config", expected="a share above 0, at most 1")
    if mode not in typing.get_args(CropMode):
        logger.warning("the config of %s says crop_mode %s; mimco crops the centre", name, mode)
        mode = "center"
    if interpolation not in typing.get_args(Interpolation):
        logger.warning("the config of %s says interpolation %s; mimco resizes by bicubic", name, interpolation)
        interpolation = "bicubic"
    return Geometry(share, interpolation, mode)


class _Inert:
    """Stands in for whatever class or function a file names beside its weights: an empty dictionary comes of it."""

    def __new__(cls, *_: object) -> Any:
        return OrderedDict()


def _read(path: Path) -> Any:
    if not path.is_file():
        raise CheckpointError(f"no file {path}", expected="a checkpoint folder, a file of weights or timm/NAME")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        try:
            foreign = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
            zipped = True
        except ValueError:  # torch's format before 1.6; the loader refuses whatever it does not know
            foreign, zipped = [], False
        with torch.serialization.safe_globals([(_Inert, name) for name in foreign]):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: {error}", expected="a file of weights") from error
    except Exception as error:  # an unpickler of broken bytes raises nearly anything, with advice over many lines
        raise CheckpointError(
            f"{path} cannot be read", expected="a file that torch.save wrote, or safetensors"
        ) from error


def _find_state(document: Any, path: Path) -> State:
    """The weights, wherever in the file its project puts them."""
    if isinstance(document, dict):
        for name in ("state_dict", "model", "teacher"):
            if isinstance(document.get(name), dict):
                document = document[name]
                break
        if document and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in document.items()):
            if any(v.numel() * v.element_size() > v.untyped_storage().nbytes() for v in document.values()):
                raise CheckpointError(f"{path} holds tensors that repeat themselves", expected="weights in full")
            return dict(document)
    raise CheckpointError(
        f"{path} holds no weights", expected="tensors, or a dictionary of them in model or state_dict"
    )


def _vit_config(state: State, layout: _Layout) -> BackboneConfig:
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    if width not in layout.heads:
        raise ConfigError(
            f"a width of {width} does not tell the number of attention heads",
            expected=f"one of {', '.join(map(str, _HEADS))}, or a folder of timm's, whose config.json tells it",
        )
    blocks = {int(match[1]) for key in state if (match := re.match(r"blocks\.(\d{1,4})\.", key))}
    depth = len(blocks)
    if blocks != set(range(depth)):  # before anything of that depth is built
        raise ConfigError(f"blocks {sorted(blocks)[:3]} … {max(blocks)}", expected="one after the other, from 0")
    grid = math.isqrt(state["pos_embed"].shape[1] - 1)
    return BackboneConfig(
        name=f"{_VIT_NAMES.get(width, 'vit_base')}_patch{14 if width == 1280 else 16}_224",
        image_size_px=grid * patch,
        patch_size_px=patch,
        embed_dim=width,
        depth=(depth,),
        num_heads=(layout.heads[width],),
    )


def _swin_config(state: State) -> BackboneConfig:
    width, _, patch, _ = state["patch_embed.proj.weight"].shape
    depth: list[int] = []
    while f"layers.{len(depth)}.blocks.0.norm1.weight" in state:
        stage, blocks = len(depth), 0
        while f"layers.{stage}.blocks.{blocks}.norm1.weight" in state:
            blocks += 1
        depth.append(blocks)
    tables = [state[f"layers.{stage}.blocks.0.attn.relative_position_bias_table"] for stage in range(len(depth))]
    windows = [(math.isqrt(len(table)) + 1) // 2 for table in tables]
    side = 2 ** (len(depth) - 1) * windows[0] * patch  # a last stage of one window, as in every published Swin
    for stage in range(len(depth)):
        shifted = state.get(f"layers.{stage}.blocks.1.attn_mask")  # [windows, …], where the stage has several of them
        if shifted is not None:
            side = math.isqrt(len(shifted)) * windows[stage] * 2**stage * patch
            break
    return BackboneConfig(
        name="swin_tiny_patch4_window7_224",
        image_size_px=side,
        patch_size_px=patch,
        embed_dim=width,
        depth=tuple(depth),
        num_heads=tuple(table.shape[1] for table in tables),
        window=windows[0],
    )


def _as_timms_swin(state: State) -> State:
    """Two buffers fewer, which timm computes anew; and a stage's merging of patches counts to the next one."""
    weights = {
        key: value for key, value in state.items() if not key.endswith((".attn_mask", ".relative_position_index"))
    }
    if not any(key.startswith("layers.0.downsample.") for key in weights):
        return weights  # written by timm
    return {
        re.sub(r"^layers\.(\d+)\.downsample", lambda match: f"layers.{int(match[1]) + 1}.downsample", key): value
        for key, value in weights.items()
    }


def _describe(body: Any, name: str) -> BackboneConfig:
    """The config of a model that timm built; sizes of the families that can be built in other sizes."""
    cfg = body.pretrained_cfg
    if not hasattr(body, "num_features"):
        raise CheckpointError(f"{name} gives several maps", expected="one map: model_args without features_only")
    if (channels := cfg["input_size"][0]) != 3:
        raise CheckpointError(f"{name} takes {channels} channel{'s' * (channels > 1)}", expected="3 (RGB)")
    side = getattr(getattr(body, "patch_embed", None), "img_size", None) or cfg["input_size"][1:]
    if side[0] != side[-1]:
        raise CheckpointError(f"{name} takes pictures of {side[-1]} × {side[0]} px", expected="square ones")
    sizes: dict[str, Any] = {}
    if isinstance(body, SwinTransformer):
        stages: Any = body.layers
        firsts = [stage.blocks[0] for stage in stages]
        sizes = {
            "embed_dim": body.embed_dim,
            "depth": tuple(len(stage.blocks) for stage in stages),
            "num_heads": tuple(block.attn.num_heads for block in firsts),
            "window": firsts[0].attn.window_size[0],
        }
    elif isinstance(body, VisionTransformer | Beit):
        heads = getattr(getattr(body.blocks[0], "attn", None), "num_heads", 0)
        sizes = {"embed_dim": body.embed_dim, "depth": (len(body.blocks),), "num_heads": (heads,) if heads else ()}
    if sizes:
        sizes["patch_size_px"] = body.patch_embed.patch_size[0]
    pool = body.global_pool if isinstance(getattr(body, "global_pool", None), str) else "avg"
    return BackboneConfig(
        name=cfg["architecture"],
        image_size_px=side[0],
        global_pool=pool,
        mean=_of_channels(cfg, "mean", name),
        std=_of_channels(cfg, "std", name),
        **sizes,
    )


def _of_channels(cfg: dict[str, Any], statistic: str, name: str) -> tuple[float, float, float]:
    """A statistic of the input; one value is meant for all three channels, as timm takes it."""
    values = tuple(cfg[statistic])
    if len(values) not in (1, 3):
        raise CheckpointError(f"{name} has {len(values)} values of {statistic}", expected="1, or 3 (RGB)")
    first, second, third = values * (3 // len(values))
    return first, second, third
