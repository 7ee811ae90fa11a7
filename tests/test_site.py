"""The pages of docs/ as a site: built without a warning, whole, and of use without a network."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

CONFIG = ROOT / "scripts" / "site" / "mkdocs.yml"
CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
QUIET = (
    "--disable-background-networking --disable-component-update --disable-sync --no-first-run "
    "--headless --no-sandbox --disable-gpu --disable-quic --virtual-time-budget=10000 --dump-dom"
)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, strictly built: a page that is in no menu and a broken link or anchor end it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
    ended = subprocess.run(
        [*command, "--config-file", str(CONFIG), "--site-dir", str(folder)],
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert ended.returncode == 0, ended.stderr
    return folder


def _links(page: Path) -> set[str]:
    """The places that a page of the site leads to or takes something from."""
    return set(re.findall(r'(?:href|src)="?([^"# >]+)', page.read_text(encoding="utf-8")))


def test_every_link_of_the_site_leads_to_a_file(site: Path) -> None:
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) > 40
    for page in pages:
        for link in _links(page):
            if "://" not in link:
                assert (page.parent / link).exists(), f"{page.relative_to(site)}: {link}"


def test_links_that_leave_docs_lead_to_pages_of_the_site(site: Path) -> None:
    """README and CONTRIBUTING are pages, and so is a file that a page links to, as it is."""
    assert "start/first-run.html" in _links(site / "readme.html")
    assert "../contributing.html" in _links(site / "develop" / "house.html")
    assert "develop/house.html" in _links(site / "contributing.html")
    place = "files/conf/method/mezo.yaml.html"
    assert f"../{place}" in _links(site / "start" / "new-method.html")
    assert "smezo_cli.methods.mezo.MeZO" in (site / place).read_text(encoding="utf-8")


def test_the_site_takes_nothing_from_the_network(site: Path) -> None:
    """Links lead elsewhere; scripts, styles, fonts and pictures are its own."""
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        taken = re.findall(r'<(?:script|link|img|iframe)\b[^>]*(?:src|href)="?([^" >]+)', text)
        assert taken
        assert not [place for place in taken if "://" in place or place.startswith("//")]
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert not re.findall(r"""(?:@import|url\()\s*["']?(?:https?:)?//""", text)


@pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")
def test_the_search_works_from_the_disk(site: Path, tmp_path: Path) -> None:
    """Where a browser starts no worker: theme/assets/iframe-worker.js stands in for it."""
    page = f"{(site / 'index.html').as_uri()}?q=stratified"
    ended = subprocess.run(
        [str(CHROMIUM), *QUIET.split(), f"--user-data-dir={tmp_path}", page],
        capture_output=True,
        text=True,
        timeout=120,
    )
    found = re.findall(
        r'class="md-search-result__link"|href="([^"]*h=stratified[^"]*)"', ended.stdout
    )
    assert any("guide/batches.html" in link for link in found)
