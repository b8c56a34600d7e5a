"""The report's page in a real browser: no errors, and every figure is displayed."""

import base64
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from report_runs import write_run

from report import main

BROWSER = next(
    (
        path
        for name in ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
        if (path := shutil.which(name))
    ),
    None,
)
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="no Chromium (Debian: apt-get install --no-install-recommends chromium)"
)

# Appended to a copy of the page: writes what the browser displayed as text into the page.
PROBE = """<script>
addEventListener("load", () => {
  const images = [...document.images].map(i => ({alt: i.alt, done: i.complete, width: i.naturalWidth}));
  const overflow = document.documentElement.scrollWidth - innerWidth;
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const ground = getComputedStyle(document.body).backgroundColor;
  const found = document.createElement("pre");
  found.id = "found";
  found.textContent = btoa(unescape(encodeURIComponent(
    JSON.stringify({images, overflow, dark, ground, title: document.title}))));
  document.body.append(found);
});
</script>"""
COMPLAINT = re.compile(r"CONSOLE|Uncaught|Refused|ERR_")


def browse(page: Path, profile: Path, *flags: str) -> tuple[dict, str]:
    """The probe's findings in the page, and the browser's standard error."""
    assert BROWSER is not None
    command = [
        *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--no-first-run", "--disable-extensions", "--disable-background-networking"),
        *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=10000", "--window-size=1280,900"),
        *(f"--user-data-dir={profile}", "--host-resolver-rules=MAP * ~NOTFOUND", *flags, "--dump-dom"),
        page.as_uri(),
    ]
    outcome = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r'<pre id="found">([A-Za-z0-9+/=]+)</pre>', outcome.stdout)
    assert found is not None, outcome.stderr
    return json.loads(base64.b64decode(found[1])), outcome.stderr


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a report's page with the probe, in an otherwise empty folder."""
    logs = tmp_path_factory.mktemp("logs")
    write_run(logs, "MIB", 1)
    write_run(logs, "MIB", 2)
    write_run(logs, "ILT", 1, done=(0,), going_on=1)
    assert main([str(logs)]) == 0
    copy = tmp_path_factory.mktemp("alone") / "page.html"
    text = (logs / "report" / "report.html").read_text(encoding="utf-8")
    copy.write_text(text.replace("</body>", f"{PROBE}</body>"), encoding="utf-8")
    return copy


def test_every_figure_is_shown_without_errors(page: Path, tmp_path: Path) -> None:
    found, complaints = browse(page, tmp_path)
    pictures = page.read_text(encoding="utf-8").count("<img ")
    # Seven sections, among them two confusion matrices and two sample images; three runs' loss terms.
    assert pictures == len(found["images"]) == 5 + 2 + 2 + 3
    assert all(image["done"] and image["width"] > 100 and image["alt"] for image in found["images"])
    assert found["title"].startswith("Continual segmentation: VOC")
    assert found["overflow"] <= 0
    assert not COMPLAINT.search(complaints), complaints


def test_the_page_has_a_dark_colour_scheme(page: Path, tmp_path: Path) -> None:
    light, _ = browse(page, tmp_path / "light", "--blink-settings=preferredColorScheme=1")
    dark, _ = browse(page, tmp_path / "dark", "--blink-settings=preferredColorScheme=0")
    assert (light["dark"], dark["dark"]) == (False, True)
    assert light["ground"] != dark["ground"]


def test_the_probe_finds_faults(tmp_path: Path) -> None:
    """The probe finds a broken figure and a script's error."""
    page = tmp_path / "bad.html"
    page.write_text(
        f'<body><img src="data:image/png;base64,AAAA" alt="x"><script>nothing()</script>{PROBE}</body>'
    )
    found, complaints = browse(page, tmp_path / "profile")
    assert found["images"][0]["width"] == 0
    assert COMPLAINT.search(complaints)
