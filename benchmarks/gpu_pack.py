"""What a GPU machine without network access needs beside the checkout, and its installation there.

    python -m benchmarks.gpu_pack pack [--data_root DIR] [--weights FILE] [--mib 64]     with network access
    python -m benchmarks.gpu_pack unpack                                             on the GPU machine

``pack`` collects in ``build/gpu``, which travels with the checkout: wheels of the small packages that the
program and its tests import, VOC's photos as one file, and MobileNetV2's weights. Training photos are left
out, evenly over the list, until checkout and pack have at most ``--mib`` MiB. PyTorch and the large packages
(``LARGE``) must be on the machine; ``unpack`` names those that are not. It installs, in ``build/gpu_site``,
only packages that are missing or older than the requirements, and writes the photos to ``build/gpu_photos``.
"""

from __future__ import annotations

import argparse
import io
import lzma
import re
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path

from utils.command import run_command
from utils.errors import UserError
from utils.option_types import Parser, path_option, positive_int

PACK, SITE, PHOTOS = Path("build/gpu"), Path("build/gpu_site"), Path("build/gpu_photos")
WEIGHTS = Path("build/gpu_weights.pth")
ARCHIVE, PACKED_WEIGHTS = PACK / "photos.tar.gz", PACK / "mobilenet_v2.pth.xz"
REQUIREMENTS = ("requirements.txt", "requirements-dev.txt")
LARGE = ("torch", "torchvision", "numpy", "pillow", "matplotlib", "scikit-learn", "transformers")
# Of no use there: linters, what only downloads, and a large package that no test with the mark cuda needs.
NOT_THERE = ("ruff", "mypy", "types-PyYAML", "types-tqdm", "hf-xet", "wandb")
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")


def pack(options: argparse.Namespace) -> None:
    """Download and collect; print the sizes."""
    wheels = PACK / "wheels"
    for old in wheels.glob("*.whl"):
        old.unlink()
    platforms = [word for name in PLATFORMS for word in ("--platform", name)]
    download = ["download", "--quiet", "--no-deps", "--only-binary=:all:", "--implementation", "cp"]
    version = ["--python-version", options.python, *platforms]
    subprocess.run([sys.executable, "-m", "pip", *download, *version, "-d", wheels, *needed()], check=True)
    if options.weights:
        PACKED_WEIGHTS.write_bytes(lzma.compress(options.weights.read_bytes()))
    listed = subprocess.run(["git", "ls-files", "-z"], capture_output=True, check=True).stdout
    tree = sum(Path(name).stat().st_size for name in listed.decode().split("\0") if name)
    ARCHIVE.unlink(missing_ok=True)
    left = options.mib * 2**20 - tree - _size(PACK) - 2**20  # what a transfer adds for each file
    if options.data_root:
        pack_photos(options.data_root / "PascalVOC12", left)
    print(f"checkout {tree / 2**20:.1f} MiB, {PACK} {_size(PACK) / 2**20:.1f} MiB, of {options.mib} MiB")


def needed() -> list[str]:
    """The requirements but the large ones, and what they need in turn, in the versions installed here."""
    from packaging.requirements import (
        Requirement,  # installed with the requirements, unlike on a bare machine
    )

    apart = {_normal(name) for name in (*LARGE, *NOT_THERE)}
    waiting, versions = list(_bounds()), dict[str, str]()
    while waiting:
        if (name := waiting.pop()) in apart or name in versions:
            continue
        versions[name] = metadata.version(name)
        needs = [Requirement(line) for line in metadata.requires(name) or ()]
        waiting += [_normal(n.name) for n in needs if n.marker is None or n.marker.evaluate({"extra": ""})]
    return [f"{name}=={version}" for name, version in versions.items()]


def pack_photos(root: Path, limit: int) -> None:
    """Write all validation photos and as many training photos as fit into ``limit`` bytes.

    Raises:
        UserError: not even the validation photos fit, or there is no list.
    """
    lists = {name: root / "splits" / f"{name}.txt" for name in ("val", "train_aug")}
    missing = next((path for path in lists.values() if not path.is_file()), None)
    if missing is not None:
        raise UserError(f"--data_root: {missing} is missing; give the folder that holds PascalVOC12")
    lines = {name: path.read_text(encoding="utf-8").splitlines() for name, path in lists.items()}
    train = lines["train_aug"]
    space = limit - sum(_packed(root, line) for line in lines["val"])
    kept = train[:0]
    for count in range(len(train), 0, -max(1, len(train) // 100)):
        kept = [train[i * len(train) // count] for i in range(count)]
        if sum(_packed(root, line) for line in kept) <= space:
            break
    else:
        raise UserError(f"--mib: the photos of {root} do not fit; give a larger one or drop --data_root")
    lines["train_aug"] = kept
    with tarfile.open(ARCHIVE, "w:gz", format=tarfile.GNU_FORMAT) as archive:
        for name, chosen in lines.items():
            content = "".join(f"{line}\n" for line in chosen).encode()
            entry = tarfile.TarInfo(f"PascalVOC12/splits/{name}.txt")
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
            for file in _files(root, chosen):
                archive.add(file, f"PascalVOC12/{file.relative_to(root)}")
    print(f"{len(kept)} of {len(train)} training and {len(lines['val'])} validation photos")


def _files(root: Path, lines: Sequence[str]) -> Iterator[Path]:
    for line in lines:
        yield from (root / word.lstrip("/") for word in line.split())


def _packed(root: Path, line: str) -> int:
    """Bytes of a photo and its mask in the archive, at most: masks share their palettes."""
    return sum(file.stat().st_size for file in _files(root, [line]))


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def unpack() -> None:
    """Install what is missing; extract photos and weights."""
    bounds = _bounds()
    wheels = sorted(PACK.glob("wheels/*.whl"))
    lacking = [str(wheel) for wheel in wheels if _lacks(wheel.name.partition("-")[0], bounds)]
    if lacking:
        install = ["install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
        subprocess.run(
            [sys.executable, "-m", "pip", *install, "--upgrade", "--target", SITE, *lacking], check=True
        )
        print("installed:", " ".join(Path(wheel).name for wheel in lacking))
    absent = [name for name in LARGE if _lacks(name, bounds)]
    if absent:
        print("this machine lacks, or has in an older version:", ", ".join(absent))
    if ARCHIVE.is_file():
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(PHOTOS, filter="data")
    if PACKED_WEIGHTS.is_file():
        WEIGHTS.write_bytes(lzma.decompress(PACKED_WEIGHTS.read_bytes()))


def _bounds() -> dict[str, list[int]]:
    """Lowest version of each requirement, by normalised name."""
    text = "\n".join(Path(name).read_text(encoding="utf-8") for name in REQUIREMENTS)
    return {_normal(name): _numbers(low) for name, low in re.findall(r"^([\w-]+)>=([\d.]+)", text, re.M)}


def _lacks(name: str, bounds: dict[str, list[int]]) -> bool:
    """Whether a package is missing here or older than required."""
    try:
        return _numbers(metadata.version(name)) < bounds.get(_normal(name), [])
    except metadata.PackageNotFoundError:
        return True


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "_", name).lower()


def _numbers(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("what", choices=("pack", "unpack"))
    parser.add_argument("--data_root", type=path_option, help="folder that holds PascalVOC12")
    parser.add_argument("--weights", type=path_option, help="MobileNetV2's pretrained weights")
    parser.add_argument("--mib", type=positive_int, default=64, help="of checkout and pack together")
    parser.add_argument("--python", default="3.12", help="version on the GPU machine")
    options = parser.parse_args(argv)
    if options.what == "pack":
        pack(options)
    else:
        unpack()
    return 0


if __name__ == "__main__":
    sys.exit(run_command("benchmarks.gpu_pack", main))
