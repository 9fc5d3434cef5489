"""Export as one transaction: load → convert → prove → put the bundle in place."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import statistics
import tempfile
import time
from collections.abc import Container, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnx
import torch

from mimco_deploy.atomic import only_writer, staged_dir
from mimco_deploy.bundle import (
    CARD_FILE,
    MODEL_FILES,
    PARITY_FILE,
    SPEC_FILE,
    Bundle,
    EncoderSpec,
    Golden,
    Precision,
    read_bundle,
    write_contract,
    write_golden,
)
from mimco_deploy.bundle_archive import is_archive, pack
from mimco_deploy.errors import BundleError, CheckpointError, ConfigError, ParityError
from mimco_deploy.export.card import bundle_licence, model_card
from mimco_deploy.export.half import to_half
from mimco_deploy.export.parity import (
    PATCH_PICTURES,
    ArtefactParity,
    Pictures,
    check_half_without_gpu,
    check_parity,
    read_parity,
    write_parity,
)
from mimco_deploy.export.quantize import quantize
from mimco_deploy.export.student import EncoderModule, Source, fingerprint, resize
from mimco_deploy.export.to_onnx import OPSET, convert
from mimco_deploy.serving.agreement import MIN_PICTURES
from mimco_deploy.serving.encoders.onnx import OnnxEncoder
from mimco_deploy.serving.encoders.proof import first_line
from mimco_deploy.serving.engines import ENGINES
from mimco_deploy.serving.sample import draw_pictures, sample_folder

logger = logging.getLogger(__name__)

GOLDEN_PICTURES = 8
DRAWN_PICTURES = 48
CHECK_PICTURES = 128
CALIBRATION_PICTURES = 64
_TIMED_BATCH, _TIMED_ROUNDS = 8, 5


@dataclass(frozen=True, kw_only=True)
class ExportOptions:
    """What to make of the weights."""

    precisions: Sequence[Precision] = ("fp32",)
    """fp32 is always made: the others are made from it."""
    image_size_px: int | None = None
    """Side of the input; by default the one that the weights were trained at."""
    with_patches: bool = False
    """Whether patch tokens are a second output."""
    check: Path | None = None
    """Folder of pictures to prove neighbours on, and to calibrate int8 with; drawn ones by default."""
    licence: str | None = None
    """Of the weights, in words."""


@dataclass(frozen=True)
class Exported:
    """What came of an export."""

    spec: EncoderSpec
    artefacts: tuple[ArtefactParity, ...]
    """The proofs of what is in the bundle."""
    refused: tuple[ParityError, ...]
    """Of precisions that were asked for and did not pass, and so are not in it."""

    def document(self) -> dict[str, object]:
        """For JSON."""
        artefacts = [asdict(artefact) for artefact in self.artefacts]
        return {
            "licence": self.spec.licence,
            "fingerprint": self.spec.fingerprint,
            "artefacts": artefacts,
            "refused": [str(error) for error in self.refused],
        }

    def check(self) -> None:
        """Nothing where all passed.

        Raises:
            ParityError: precisions were refused; tells each.
        """
        if self.refused:
            found = "; ".join(error.found for error in self.refused)
            raise ParityError(found, expected=" and ".join(dict.fromkeys(error.expected for error in self.refused)))

    def table(self) -> tuple[list[str], list[list[str]]]:
        """For people: column titles and rows."""
        titles = ["graph", "max difference", "min cosine", "top-10 overlap", "pictures", "speed", "run by"]
        rows = []
        for proof in self.artefacts:
            found, faster = proof.neighbours, proof.speed_against_fp32
            overlap = "not measured" if found.overlap is None else f"{found.overlap:.3f}"
            speed = "" if faster is None else f"{faster:.2f} × fp32"
            pictures = f"{found.pictures} {'drawn' if proof.pictures_from == 'drawn' else 'of yours'}"
            row = [MODEL_FILES[proof.precision], f"{proof.max_abs:.1e}", f"{proof.min_cosine:.6f}", overlap, pictures]
            rows.append([*row, speed, proof.provider])
        return titles, rows


def export_encoder(source: Source, target: Path, options: ExportOptions | None = None) -> Exported:
    """Turn trained weights into a bundle.

    A graph that fails its proof does not ship; where that is the fp32 one, nothing does and an older bundle stays.
    Other precisions that an older bundle of the same encoder holds are kept.

    Args:
        source: the weights.
        target: the bundle's folder, or a `.zip` or `.tar` to write; of a link, what it leads to.
        options: see there.

    Raises:
        ConfigError: the architecture is not of that size, gives no square of patches, or cannot be exported; no
            pictures to check with; something else is there, or another process exports there.
        CheckpointError: the embeddings are not finite.
        ParityError: the fp32 graph does not answer as torch does.
    """
    options = options or ExportOptions()
    target = target.resolve()
    _refuse_what_is_no_bundle(target)
    with only_writer(target, ConfigError(f"another export writes {target}", expected="one at a time")):
        if not is_archive(target):
            return _export(source, target, target, options)
        with tempfile.TemporaryDirectory() as folder:
            exported = _export(source, Path(folder) / "encoder", target, options)
            pack(Path(folder) / "encoder", target)
        return exported


def _refuse_what_is_no_bundle(target: Path) -> None:
    """A bundle takes the place of a bundle, and of nothing else that a person may have there.

    Raises:
        ConfigError: something else is there.
    """
    expected = "a new name, or a bundle to replace"
    if target == Path.cwd() or target in Path.cwd().parents:
        raise ConfigError(f"{target} is the current folder or holds it", expected=expected)
    if not target.exists():
        return
    if target.is_dir() and not is_archive(target):
        whole = not any(target.iterdir()) or (target / SPEC_FILE).is_file()
    else:
        try:
            whole = bool(read_bundle(target).precisions)
        except BundleError:
            whole = False
    if not whole:
        raise ConfigError(f"{target} is there and is no bundle", expected=expected)


def _export(source: Source, target: Path, older: Path, options: ExportOptions) -> Exported:
    """Write the folder `target`, with what the bundle `older` has of the same encoder."""
    if options.image_size_px is not None:
        resize(source.backbone, options.image_size_px)
    module = EncoderModule(source.backbone, source.pooling, with_patches=options.with_patches)
    material = _Material.gather(module, options)
    spec = _describe(module, source, options.licence, material.golden)
    wanted = [precision for precision in MODEL_FILES if precision in options.precisions and precision != "fp32"]
    with staged_dir(target) as staging:
        model = convert(module)
        (staging / MODEL_FILES["fp32"]).write_bytes(model.SerializeToString())
        write_golden(staging, material.golden)
        write_contract(staging, spec)
        bundle = read_bundle(staging)
        fp32 = OnnxEncoder(bundle, "fp32")
        artefacts = [check_parity(fp32, material.golden, material.pictures)]
        refused: dict[Precision, ParityError] = {}
        for precision in wanted:
            try:
                artefacts.append(_add(precision, model, fp32, bundle, material))
            except ParityError as error:
                (staging / MODEL_FILES[precision]).unlink(missing_ok=True)
                refused[precision] = error
        defaults = _keep_others(older, staging, spec, artefacts, refused)
        write_parity(staging / PARITY_FILE, artefacts)
        (staging / CARD_FILE).write_text(model_card(spec, source, artefacts), encoding="utf-8", errors="replace")
        write_contract(staging, spec, defaults, {artefact.precision for artefact in artefacts})
    return Exported(spec, tuple(artefacts), tuple(refused.values()))


@dataclass(frozen=True)
class _Material:
    """Pictures with what torch makes of them."""

    golden: Golden
    pictures: Pictures
    calibration: npt.NDArray[np.uint8] | None

    @classmethod
    def gather(cls, module: EncoderModule, options: ExportOptions) -> _Material:
        config, geometry = module.backbone.config, module.backbone.geometry
        side = config.image_size_px
        drawn = draw_pictures(GOLDEN_PICTURES, side, *geometry)  # drawn: no picture of the user's leaves in the bundle
        golden = Golden(drawn, _embed(module, drawn))
        tokens = _patch_tokens(module, drawn[:PATCH_PICTURES]) if module.with_patches else None
        calibration = None
        if options.check is None:
            origin, pictures = "drawn", draw_pictures(DRAWN_PICTURES, side, *geometry, seed=0)
        else:
            sample = sample_folder(options.check, CHECK_PICTURES + CALIBRATION_PICTURES, side, *geometry)
            if len(sample) < MIN_PICTURES:
                raise ConfigError(
                    f"{len(sample)} pictures in {options.check}",
                    expected=f"at least {MIN_PICTURES} to prove neighbours on",
                )
            spare = min(CALIBRATION_PICTURES, len(sample) // 3, len(sample) - MIN_PICTURES)
            kept = spare if "int8" in options.precisions else 0
            origin, pictures = "folder", sample[kept:][:CHECK_PICTURES]  # never those it was calibrated on
            calibration = sample[:kept] if kept else None
        return cls(golden, Pictures(origin, pictures, _embed(module, pictures), tokens), calibration)


def _embed(module: EncoderModule, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        batches = [module(torch.from_numpy(images[start : start + 8])) for start in range(0, len(images), 8)]
    embeddings = np.concatenate([(batch[0] if module.with_patches else batch).numpy() for batch in batches])
    if not np.isfinite(embeddings).all():
        broken = (name for name, value in module.backbone.body.state_dict().items() if not value.isfinite().all())
        cause = next((f"nor is its weight {name}" for name in broken), "though all its weights are")
        raise CheckpointError(f"the model's embeddings are not finite, {cause}", expected="weights of a sound model")
    return embeddings


def _patch_tokens(module: EncoderModule, images: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
    with torch.inference_mode():
        tokens: npt.NDArray[np.float32] = module(torch.from_numpy(images))[1].numpy()
    name, grid = module.backbone.config.name, module.backbone.grid
    if tokens.shape[1] != grid**2:
        raise ConfigError(
            f"{name} gives {tokens.shape[1]} tokens",
            expected=f"{grid}² = {grid**2} for --with-patches, which is not possible for it: leave it out",
        )
    return tokens


def _describe(module: EncoderModule, source: Source, licence: str | None, golden: Golden) -> EncoderSpec:
    config, geometry = module.backbone.config, module.backbone.geometry
    return EncoderSpec(
        architecture=config.name,
        image_size_px=config.image_size_px,
        crop_share=geometry.crop_share,
        interpolation=geometry.interpolation,
        crop_mode=geometry.crop_mode,
        embedding_dim=golden.embeddings.shape[1],
        pooling=source.pooling,
        patch_grid=module.backbone.grid if module.with_patches else 0,
        fingerprint=fingerprint(module),
        licence=bundle_licence(source, licence),
        weights_source=source.weights,
        teacher_source=source.teacher,
        opset=OPSET,
    )


def _add(
    precision: Precision, model: onnx.ModelProto, fp32: OnnxEncoder, bundle: Bundle, material: _Material
) -> ArtefactParity:
    """Make the graph of another precision, in the folder of the unfinished bundle, and prove it.

    Raises:
        ParityError: it does not pass, cannot be made or does not run; or it is int8, and not faster than fp32.
    """
    if precision == "int8":
        return _add_int8(bundle, material)
    assert precision != "fp32", "which is what the others are made from"
    grown = dataclasses.replace(bundle, precisions=("fp32", precision))
    with _refusing(precision):
        grown.model(precision).write_bytes(to_half(model, precision).SerializeToString())
        if fp32.provider == "CPUExecutionProvider":
            return check_half_without_gpu(grown, precision, material.golden, material.pictures)
        encoder = OnnxEncoder(grown, precision, "cuda", strict=True)  # a CPU would run it in fp32, and prove nothing
        return check_parity(encoder, material.golden, material.pictures)


@contextlib.contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Make a ParityError of whatever goes wrong: one graph that cannot be had costs the others nothing.

    Raises:
        ParityError: something went wrong.
    """
    try:
        yield
    except ParityError:
        raise
    except Exception as error:  # of converters and runtimes, whose own classes share no base
        raise ParityError(
            f"{what} cannot be made or does not run: {first_line(error)}", expected="a graph that runs"
        ) from error


def _add_int8(bundle: Bundle, material: _Material) -> ArtefactParity:
    """The fastest of the ways that pass. On a CPU, which it is made for."""
    fp32 = OnnxEncoder(bundle, "fp32", "cpu")
    passed: list[tuple[float, Path, ArtefactParity]] = []
    failures = []
    with tempfile.TemporaryDirectory() as folder:
        for calibration in (None,) if material.calibration is None else (None, material.calibration):
            place = Path(tempfile.mkdtemp(dir=folder))
            candidate = dataclasses.replace(bundle, path=place, precisions=("int8",))
            way, speed = "static" if calibration is not None else "dynamic", 0.0
            try:
                with _refusing("it"):
                    made = quantize(bundle.model("fp32"), candidate.model("int8"), calibration)
                    if made is None:
                        failures.append("dynamic: the graph has nothing to quantise without calibration")
                        continue
                    way, encoder = made, OnnxEncoder(candidate, "int8", "cpu")
                    speed = _speed_ratio(encoder, fp32, material.pictures.images[:_TIMED_BATCH])
                    report = check_parity(encoder, material.golden, material.pictures)
            except ParityError as error:
                told = f", {speed:.2f} times as fast as fp32" if speed else ""
                failures.append(f"{way}{told}: {error.found}")
                continue
            logger.info(
                "int8, %s: %.2f times as fast as fp32, top-10 overlap %s", way, speed, report.neighbours.overlap
            )
            if speed > 1.0:
                passed.append((speed, candidate.model("int8"), report))
            else:
                failures.append(f"{way}: {speed:.2f} times as fast as fp32, top-10 overlap {report.neighbours.overlap}")
        if not passed:
            raise ParityError(f"int8 is not worth it: {'; '.join(failures)}", expected="faster than fp32, and as good")
        speed, model, report = max(passed, key=lambda way: way[0])
        shutil.copyfile(model, bundle.path / MODEL_FILES["int8"])
    return dataclasses.replace(report, speed_against_fp32=speed)


def _speed_ratio(encoder: OnnxEncoder, reference: OnnxEncoder, images: npt.NDArray[np.uint8]) -> float:
    """Time of the reference over that of the encoder, medians of rounds in turn."""
    seconds: dict[OnnxEncoder, list[float]] = {encoder: [], reference: []}
    for timed in seconds:
        timed.embed(images)
    for _ in range(_TIMED_ROUNDS):
        for timed, found in seconds.items():
            start = time.perf_counter()
            timed.embed(images)
            found.append(time.perf_counter() - start)
    return statistics.median(seconds[reference]) / statistics.median(seconds[encoder])


def _keep_others(
    target: Path,
    staging: Path,
    spec: EncoderSpec,
    artefacts: list[ArtefactParity],
    refused: Container[Precision],
) -> dict[str, Precision]:
    """Take over what an older bundle of the same encoder has in other precisions; the defaults that still hold.

    Not what was refused just now. Words about the weights may differ: graphs do not depend on them.
    """
    try:
        old = read_bundle(target)
        proofs = {proof.precision: proof for proof in read_parity(old.path / PARITY_FILE)}
    except (BundleError, OSError, ValueError, KeyError, TypeError):  # the proofs of a bundle need not be ours
        return {}
    words = {name: getattr(spec, name) for name in ("licence", "weights_source", "teacher_source")}
    if dataclasses.replace(old.spec, **words) != spec:
        return {}
    made = {artefact.precision for artefact in artefacts}
    for precision in old.precisions:
        if precision not in made and precision not in refused and precision in proofs:
            shutil.copyfile(old.model(precision), staging / MODEL_FILES[precision])
            artefacts.append(proofs[precision])
    if (old.path / ENGINES).is_dir():  # each says which graph it is of
        shutil.copytree(old.path / ENGINES, staging / ENGINES)
    there = {artefact.precision for artefact in artefacts}
    return {device: precision for device, precision in old.defaults.items() if precision in there}
