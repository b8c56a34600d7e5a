"""The download scripts against a local web server with small archives."""

from __future__ import annotations

import hashlib
import io
import os
import re
import subprocess
import tarfile
import threading
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from shutil import which

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared" / "voc_masks"
pytestmark = pytest.mark.skipif(
    any(which(command) is None for command in ("bash", "curl", "unzip")), reason="needs bash, curl and unzip"
)

VOC_TAR = "VOCtrainval_11-May-2012.tar"
NAMES = [f"2007_{i:06}" for i in range(6)]
VAL = [NAMES[3], NAMES[1]]


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def zip_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


class Mirror:
    """A web server that supports ranges, counts requests and can disconnect in the middle of a file."""

    def __init__(self) -> None:
        base = "VOCdevkit/VOC2012"
        photos = {f"{base}/JPEGImages/{name}.jpg": os.urandom(30_000) for name in NAMES}
        lists = {f"{base}/ImageSets/Segmentation/val.txt": "".join(f"{n}\n" for n in VAL).encode()}
        ade = {
            f"ADEChallengeData2016/{kind}/{split}/ADE_{i}.{suffix}": b"x"
            for kind, suffix in (("images", "jpg"), ("annotations", "png"))
            for split in ("training", "validation")
            for i in range(3)
        }
        masks = {f"SegmentationClassAug/{name}.png": b"mask" for name in NAMES}
        self.files = {
            VOC_TAR: tar_of({**photos, **lists}),
            "SegmentationClassAug.zip": zip_of({**masks, "__MACOSX/._x": b"junk"}),
            "saliency_map.zip": zip_of({f"saliency_map/{name}.png": b"map" for name in NAMES}),
            "ADEChallengeData2016.zip": zip_of(ade),
        }
        self.requests: list[tuple[str, str, str | None]] = []
        self.break_after: int | None = None
        mirror = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.answer(body=False)

            def do_GET(self) -> None:
                self.answer(body=True)

            def answer(self, body: bool) -> None:
                name = Path(self.path).name
                asked = self.headers.get("Range")
                mirror.requests.append((self.command, name, asked))
                content = mirror.files.get(name)
                if content is None:
                    self.send_error(404)
                    return
                start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked else 0
                self.send_response(206 if asked else 200)
                self.send_header("Content-Length", str(len(content) - start))
                if asked:
                    self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
                self.end_headers()
                if body:
                    self.wfile.write(content[start:][: mirror.break_after])

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        url = f"http://127.0.0.1:{self.server.server_port}"
        voc, ade = self.files[VOC_TAR], self.files["ADEChallengeData2016.zip"]
        return {
            **{name: value for name, value in os.environ.items() if "proxy" not in name.lower()},
            "VOC_URL": url,
            "SSUL_URL": url,
            "ADE_URL": url,
            "VOC_SIZE": str(len(voc)),
            "VOC_MD5": hashlib.md5(voc).hexdigest(),
            "ADE_MD5": hashlib.md5(ade).hexdigest(),
        }


@pytest.fixture
def mirror() -> Iterator[Mirror]:
    server = Mirror()
    yield server
    server.server.shutdown()
    server.server.server_close()


def run(mirror: Mirror, data: str, *arguments: str | Path, **environment: str):
    return subprocess.run(
        ["bash", str(ROOT / "data" / f"download_{data}.sh"), *map(str, arguments)],
        env={**mirror.environment, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_voc_without_existing_files(mirror, tmp_path):
    done = run(mirror, "voc", tmp_path)
    assert done.returncode == 0, done.stderr
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    assert sorted(p.name for p in voc.iterdir()) == [
        "ImageSets", "JPEGImages", "SegmentationClassAug", "saliency_map", "splits",
    ]  # fmt: skip
    assert len(list((voc / "JPEGImages").iterdir())) == len(NAMES)

    def lines(names: list[str]) -> str:
        return "".join(f"/JPEGImages/{n}.jpg /SegmentationClassAug/{n}.png\n" for n in names)

    assert (voc / "splits" / "val.txt").read_text() == lines(VAL)
    assert (voc / "splits" / "train_aug.txt").read_text() == lines([n for n in NAMES if n not in VAL])
    assert "the published list has 10582 images" in done.stdout
    assert not list(tmp_path.glob(".unpack*")) and not list(tmp_path.rglob("*.part"))


def test_second_run_makes_no_requests_and_no_changes(mirror, tmp_path):
    run(mirror, "voc", tmp_path)
    before, asked = tree(tmp_path), len(mirror.requests)
    again = run(mirror, "voc", tmp_path)
    assert again.returncode == 0 and len(mirror.requests) == asked
    assert tree(tmp_path) == before


def test_ade(mirror, tmp_path):
    done = run(mirror, "ade", tmp_path)
    assert done.returncode == 0, done.stderr
    ade = tmp_path / "ADEChallengeData2016"
    assert len(list(ade.rglob("*.jpg"))) == len(list(ade.rglob("*.png"))) == 6
    assert "3 training images; the release has 20210" in done.stdout


@pytest.mark.parametrize("data", ["voc", "ade"])
def test_dry_run_does_nothing(mirror, tmp_path, data):
    target = tmp_path / "data"
    done = run(mirror, data, "--dry-run", target)
    assert done.returncode == 0, done.stderr
    assert "download http://127.0.0.1" in done.stdout and "unpack " in done.stdout
    assert not mirror.requests and not target.exists()


def test_home_folder_in_quotes(mirror, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    done = run(mirror, "ade", "~/data")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data" / "ADEChallengeData2016").is_dir() and not (ROOT / "~").exists()
    refused = run(mirror, "ade", "~nobody-of-that-name/data")
    assert refused.returncode != 0 and "write the full path" in refused.stderr


def test_interrupted_download_is_resumed(mirror, tmp_path):
    part = tmp_path / "downloads" / f"{VOC_TAR}.part"
    part.parent.mkdir()
    part.write_bytes(mirror.files[VOC_TAR][:50_000])
    done = run(mirror, "voc", tmp_path)
    assert done.returncode == 0, done.stderr
    assert ("GET", VOC_TAR, "bytes=50000-") in mirror.requests
    assert (tmp_path / "downloads" / VOC_TAR).read_bytes() == mirror.files[VOC_TAR]


def test_server_that_disconnects(mirror, tmp_path):
    mirror.break_after = 20_000
    broken = run(mirror, "voc", tmp_path)
    assert broken.returncode == 1
    assert "download failed; run again to resume" in broken.stderr
    assert not (tmp_path / "VOCdevkit").exists()
    assert (tmp_path / "downloads" / f"{VOC_TAR}.part").stat().st_size > 0
    mirror.break_after = None
    assert run(mirror, "voc", tmp_path).returncode == 0


def test_bad_checksum_is_refused_and_the_next_run_starts_anew(mirror, tmp_path):
    bad = run(mirror, "voc", tmp_path, VOC_MD5="0" * 32)
    assert bad.returncode == 1
    assert f"instead of {'0' * 32}; kept as" in bad.stderr
    assert not (tmp_path / "VOCdevkit").exists()
    assert [p.name for p in (tmp_path / "downloads").iterdir()] == [f"{VOC_TAR}.bad"]
    assert run(mirror, "voc", tmp_path).returncode == 0


def test_wrong_size_is_refused(mirror, tmp_path):
    bad = run(mirror, "voc", tmp_path, VOC_SIZE="1000000")
    assert bad.returncode == 1
    assert re.search(r"the download has \d+ bytes instead of 1000000", bad.stderr)


def test_archive_of_the_user_with_a_wrong_checksum_is_kept(mirror, tmp_path):
    mine = tmp_path / "downloads" / VOC_TAR
    mine.parent.mkdir()
    mine.write_bytes(b"mine")
    bad = run(mirror, "voc", tmp_path)
    assert bad.returncode == 1 and "move it away and run again" in bad.stderr
    assert mine.read_bytes() == b"mine" and not mirror.requests


def test_damaged_zip_is_refused(mirror, tmp_path):
    content = bytearray(mirror.files["SegmentationClassAug.zip"])
    content[content.index(b"mask")] ^= 1  # the archive's own checksum must notice
    mirror.files["SegmentationClassAug.zip"] = bytes(content)
    bad = run(mirror, "voc", tmp_path)
    assert bad.returncode == 1 and "SegmentationClassAug.zip is damaged" in bad.stderr
    assert not (tmp_path / "VOCdevkit" / "VOC2012" / "SegmentationClassAug").exists()
    assert not list(tmp_path.glob(".unpack*"))


def test_full_disk(mirror, tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "df").write_text("#!/bin/sh\necho Filesystem blocks Used Free\necho /dev/x 9 9 3 99% /\n")
    (tools / "df").chmod(0o755)
    data = tmp_path / "data"
    bad = run(mirror, "voc", data, PATH=f"{tools}:{os.environ['PATH']}")
    assert bad.returncode == 1
    assert re.search(r"3072 bytes free, \d+ bytes needed; free some space or give another folder", bad.stderr)
    assert not any(request[0] == "GET" for request in mirror.requests)
    assert not list((data / "downloads").iterdir())


def test_existing_data_stays(mirror, tmp_path):
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    mine = {
        "ImageSets/Segmentation/val.txt": b"2007_000000\n",
        "SegmentationClassAug/2007_000000.png": b"my mask",
        "splits/train_aug.txt": b"my list\n",
    }
    for name, content in mine.items():
        (voc / name).parent.mkdir(parents=True, exist_ok=True)
        (voc / name).write_bytes(content)
    done = run(mirror, "voc", tmp_path)
    assert done.returncode == 0, done.stderr
    now = tree(voc)
    assert all(now[name] == content for name, content in mine.items())
    assert now["splits/val.txt"].startswith(b"/JPEGImages/2007_000000.jpg ")
    assert len(list((voc / "JPEGImages").iterdir())) == len(NAMES)
    assert len(list((voc / "SegmentationClassAug").iterdir())) == 1


def test_missing_archive(mirror, tmp_path):
    del mirror.files["saliency_map.zip"]
    gone = run(mirror, "voc", tmp_path)
    assert gone.returncode == 1
    assert "saliency_map.zip cannot be reached; try again later, or name a mirror" in gone.stderr


def test_unknown_option(mirror):
    wrong = run(mirror, "voc", "--fast")
    assert wrong.returncode == 1 and "unknown option --fast" in wrong.stderr


def test_https_is_the_rule():
    for script in ("voc", "ade"):
        text = (ROOT / "data" / f"download_{script}.sh").read_text()
        assert not re.search(r":-http://", text)
    functions = (ROOT / "data" / "download_functions.sh").read_text()
    assert "--proto-redir" in functions and "--insecure" not in functions


@pytest.mark.skipif(not SHARED.is_dir(), reason="the VOC masks in shared/voc_masks are not there")
def test_derived_lists_are_the_published_ones(mirror, tmp_path):
    voc = tmp_path / "VOCdevkit" / "VOC2012"
    for name in ("JPEGImages", "saliency_map", "ImageSets/Segmentation"):
        (voc / name).mkdir(parents=True)
    (voc / "SegmentationClassAug").mkdir()
    for mask in (SHARED / "SegmentationClassAug").iterdir():
        (voc / "SegmentationClassAug" / mask.name).touch()
    official = [
        Path(line.split()[1]).stem for line in (SHARED / "splits" / "val.txt").read_text().splitlines()
    ]
    (voc / "ImageSets" / "Segmentation" / "val.txt").write_text("\n".join(official) + "\n")
    done = run(mirror, "voc", tmp_path)
    assert done.returncode == 0 and "warning" not in done.stdout
    for split in ("train_aug.txt", "val.txt"):
        assert (voc / "splits" / split).read_text() == (SHARED / "splits" / split).read_text()
