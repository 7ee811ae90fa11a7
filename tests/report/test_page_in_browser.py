"""`smezo report` in Chromium: no sideways scroll at any width, dark mode, printed pages."""

import html
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

from smezo_cli.cli.verbs import main
from tests.report.test_page import hostile

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), ""
)

pytestmark = pytest.mark.skipif(not BROWSER, reason="there is no Chromium on this machine")

QUIET = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *(
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--hide-scrollbars",
    ),
)
WIDTHS = (390, 1280)

# A page in a frame is as wide as a phone, which a window of a browser cannot be.
FRAME = """
<iframe width="{width}" height="800" srcdoc="{page}"
  onload="const d = this.contentDocument, root = d.documentElement;
    const wide = [...d.querySelectorAll('body *:not(.skip)')].filter(e =>
      !e.closest('.scroll, svg') && e.getBoundingClientRect().right > {width}).map(e => e.tagName);
    const out = document.createElement('p');
    out.textContent = ['width', {width}, root.scrollWidth, wide.join(),
      this.contentWindow.getComputedStyle(d.body).backgroundColor,
      d.querySelectorAll('button').length].join(' | ');
    document.body.append(out)"></iframe>
"""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with words that do not break, long settings and several methods."""
    folder = tmp_path_factory.mktemp("page")
    for k in range(4):
        name = "a-very-long-name-of-a-run-" * 5 + str(k)
        hostile(folder / "runs", name, lr=10.0**-k, method=f"method_{'x' * 40}{k}")
    out = folder / "report.html"
    assert main(["report", "--runs-dir", str(folder / "runs"), "--out", str(out)]) == 0
    return out


def chromium(file: Path, *flags: str) -> str:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        done = subprocess.run(
            [BROWSER, *QUIET, f"--user-data-dir={profile}", *flags, file.as_uri()],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert done.returncode == 0, done.stderr
    return done.stdout


def look(page: Path, *flags: str) -> dict[int, list[str]]:
    """What the page measures in frames of each width: by width, the columns of FRAME."""
    text = html.escape(page.read_text(encoding="utf-8"), quote=True)
    frames = "".join(FRAME.replace("{width}", str(w)).replace("{page}", text) for w in WIDTHS)
    wrapper = page.with_name("frames.html")
    wrapper.write_text(f"<!DOCTYPE html><meta charset=utf-8><body>{frames}", encoding="utf-8")
    dom = chromium(
        wrapper, *flags, "--window-size=1400,900", "--virtual-time-budget=5000", "--dump-dom"
    )
    lines = [line.split(" | ") for line in re.findall(r"<p>width \| (.*?)</p>", dom)]
    assert len(lines) == len(WIDTHS), dom[-2000:]
    return {int(line[0]): line for line in lines}


def test_no_width_scrolls_sideways_and_the_ground_is_light(page: Path) -> None:
    for width, (_, needs, wide, ground, buttons) in look(page).items():
        assert (int(needs), wide) == (width, ""), width
        assert ground == "rgb(255, 255, 255)"
        assert int(buttons) == 4  # the policy of the page lets its own script run


def test_dark_is_asked_of_the_browser(page: Path) -> None:
    found = look(page, "--blink-settings=preferredColorScheme=0")
    assert {ground for _, _, _, ground, _ in found.values()} == {"rgb(22, 23, 26)"}


def test_it_prints_as_pages(page: Path) -> None:
    pdf = page.with_name("report.pdf")
    chromium(page, f"--print-to-pdf={pdf}", "--no-pdf-header-footer")
    pages = re.findall(rb"/Type\s*/Page\b(?!s)", pdf.read_bytes())
    assert len(pages) > 2
