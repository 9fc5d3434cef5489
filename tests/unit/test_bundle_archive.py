"""Bundles as one file: whole ones open like a folder, and nothing else does or leaves its place."""

from __future__ import annotations

import gzip
import io
import random
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest

from mimco_deploy.bundle import read_bundle
from mimco_deploy.bundle_archive import pack, unpack
from mimco_deploy.errors import BundleError
from mimco_deploy.serving.encoders import load_encoder
from tests.helpers import golden_images, tiny_bundle

NAMES = [
    "encoder.zip",
    "encoder.ZIP",
    "encoder.tar",
    "encoder.tar.gz",
    "encoder.tgz",
    "encoder.tar.xz",
    "encoder.tar.bz2",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle") / "encoder")


@pytest.mark.parametrize("name", NAMES)
def test_an_archive_opens_as_its_folder_does(folder: Path, tmp_path: Path, name: str) -> None:
    pack(folder, tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    encoder = load_encoder(tmp_path / name)
    images = golden_images()
    np.testing.assert_array_equal(encoder.embed(images), load_encoder(folder).embed(images))
    assert encoder.spec == read_bundle(folder).spec


@pytest.mark.parametrize("within", ["", "encoder/"])
@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_nothing_is_unpacked_but_what_a_bundle_has(folder: Path, tmp_path: Path, suffix: str, within: str) -> None:
    place = tmp_path / "made" / within
    shutil.copytree(folder, place)
    for name in ("engines/a.plan", "big.bin", "engines.json", "deeper/model.onnx"):
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(b"x")
    pack(tmp_path / "made", tmp_path / f"e{suffix}")
    bundle = read_bundle(tmp_path / f"e{suffix}")
    found = {path.relative_to(bundle.path).as_posix() for path in bundle.path.rglob("*") if path.is_file()}
    mine = {path.name for path in folder.iterdir()} | {"engines/a.plan"}
    assert found == (mine if within else mine | {"deeper/model.onnx"})


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
def test_an_archive_of_the_folder_itself_opens_too(folder: Path, tmp_path: Path, kind: str) -> None:
    made = shutil.make_archive(str(tmp_path / "any"), kind, folder.parent, "encoder")
    assert read_bundle(Path(made)).spec == read_bundle(folder).spec


def test_what_was_unpacked_goes_with_the_bundle(folder: Path, tmp_path: Path) -> None:
    pack(folder, tmp_path / "encoder.zip")
    bundle = read_bundle(tmp_path / "encoder.zip")
    place = bundle.path
    assert place.is_dir()
    del bundle
    assert not place.exists()


@pytest.mark.parametrize("name", NAMES)
def test_an_archive_cut_anywhere_is_a_bundle_error(folder: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    pack(folder, path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for length in [0, 1, 10, *(rng.randrange(len(whole) // 2) for _ in range(12)), len(whole) // 2]:
        path.write_bytes(whole[:length])
        with pytest.raises(BundleError):
            read_bundle(path)


@pytest.mark.parametrize("name", ["encoder.zip", "encoder.tar", "encoder.tar.gz", "encoder.tar.xz", "encoder.tar.bz2"])
def test_a_flipped_byte_is_a_bundle_error_or_changes_nothing(folder: Path, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    pack(folder, path)
    whole, spec = path.read_bytes(), read_bundle(folder).spec
    rng = random.Random(1)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert read_bundle(path).spec == spec  # a date, a name's padding
        except BundleError:
            refused += 1
    assert refused > 30


@pytest.mark.parametrize(
    "name", ["../out.txt", "/out.txt", "//out.txt", "///out.txt", "a/../../out.txt", "a/b/c/d/e.txt", "a\\..\\out.txt"]
)
@pytest.mark.parametrize("suffix", [".zip", ".tar"])
def test_a_member_out_of_place_is_refused(tmp_path: Path, name: str, suffix: str) -> None:
    path = tmp_path / f"bad{suffix}"
    if suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(name, b"x")
    else:
        with tarfile.open(path, "w") as tar:
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    with pytest.raises(BundleError, match="has no place in a bundle"):
        unpack(path)


@pytest.mark.parametrize("header", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_a_header_that_unpacks_to_megabytes_is_refused(tmp_path: Path, header: bytes) -> None:
    """It is read whole before the first member is seen; compressed it takes next to nothing."""
    size = 4 << 20
    info = tarfile.TarInfo("long")
    info.type, info.size = header, size
    member = tarfile.TarInfo("encoder.json")
    content = info.tobuf(tarfile.GNU_FORMAT) + b"a" * size + member.tobuf() + b"\0" * 1024
    (tmp_path / "bad.tar.gz").write_bytes(gzip.compress(content))
    with pytest.raises(BundleError, match=r"a header of 4,194,304 bytes"):
        unpack(tmp_path / "bad.tar.gz")


def test_folders_count_as_members(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "bad.tar", "w") as tar:
        for number in range(300):
            folder = tarfile.TarInfo(f"f{number}")
            folder.type = tarfile.DIRTYPE
            tar.addfile(folder)
    with pytest.raises(BundleError, match="more than 256 members"):
        unpack(tmp_path / "bad.tar")


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    path = tmp_path / "bad.tar"
    member = tarfile.TarInfo("model.onnx")
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(path, "w") as tar:
        tar.addfile(member)
    with pytest.raises(BundleError, match="cannot be unpacked"):
        unpack(path)


def test_two_members_of_one_name_are_refused(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "bad.tar"
    with tarfile.open(path, "w") as tar:
        for _ in range(2):
            tar.add(folder / "encoder.json", "encoder.json")
    with pytest.raises(BundleError, match="cannot be unpacked"):
        unpack(path)


def test_more_bytes_than_an_encoder_has_are_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mimco_deploy.bundle_archive._MAX_BYTES", 1 << 20)
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("model.onnx", bytes(1 << 24))
    with pytest.raises(BundleError, match="more than 1,048,576 bytes"):
        unpack(path)


@pytest.mark.parametrize("suffix", [".zip", ".tar.gz"])
def test_the_sizes_that_are_stated_are_summed_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str
) -> None:
    (tmp_path / "made").mkdir()
    for name in ("a.bin", "b.bin"):
        (tmp_path / "made" / name).write_bytes(bytes(600_000))
    pack(tmp_path / "made", tmp_path / f"bomb{suffix}")
    monkeypatch.setattr("mimco_deploy.bundle_archive._MAX_BYTES", 1 << 20)
    with pytest.raises(BundleError, match="more than 1,048,576 bytes"):
        unpack(tmp_path / f"bomb{suffix}")


def test_a_file_that_is_no_archive_is_refused_with_its_name(tmp_path: Path) -> None:
    for name in NAMES:
        (tmp_path / name).write_bytes(b"\x89PNG, or anything else")
        with pytest.raises(BundleError, match=f"{name} cannot be unpacked"):
            read_bundle(tmp_path / name)
    with pytest.raises(BundleError, match=r"run: mimco export --format onnx --output '.*/no where\.zip'"):
        read_bundle(tmp_path / "no where.zip")


def test_a_systems_own_files_beside_the_folder_are_no_harm(folder: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:
        for file in folder.iterdir():
            archive.write(file, f"my encoder/{file.name}")
        archive.writestr("__MACOSX/my encoder/._encoder.json", b"x")
        archive.writestr(".DS_Store", b"x")
    assert read_bundle(tmp_path / "mac.zip").spec == read_bundle(folder).spec
