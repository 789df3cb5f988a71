"""What MkDocs is told beyond mkdocs.yml: where links lead that leave ``docs/``, and pictures that lie elsewhere.

The pages are written to be read in the repository as well, so their links are relative. The one address that everything
is built from is ``[project.urls]`` of pyproject.toml.
"""

from __future__ import annotations

import os.path
import re
import tomllib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)\s#:]+)(#[^)]*)?\)")
PICTURES = "bench/results"


def within_site(markdown: str, folder: str) -> str:
    """``markdown`` of a page in ``folder`` of the repository: what is not in ``docs/`` leads to the repository."""

    def one(match: re.Match[str]) -> str:
        start, target, anchor = match[1], match[2], match[3] or ""
        path = os.path.normpath(os.path.join(folder, target))
        if path.startswith("docs/"):
            return f"{start}{path.removeprefix('docs/')}{anchor})"
        if path == "README.md":
            return f"{start}index.md{anchor})"
        if start.startswith("!"):
            return f"{start}{path})"
        return f"{start}{URLS['Repository']}/blob/main/{path}{anchor})"

    return LINK.sub(one, markdown)


def on_config(config: Any) -> Any:
    config.repo_url, config.site_url = URLS["Repository"], URLS["Documentation"]
    config.repo_name = URLS["Repository"].removeprefix("https://github.com/")  # told from the address before hooks run
    return config


def on_files(files: Any, config: Any) -> Any:
    """The home page is README, and the pictures of the benchmarks lie beside their records."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    for picture in sorted((ROOT / PICTURES).glob("*.png")):
        files.append(File.generated(config, f"{PICTURES}/{picture.name}", abs_src_path=str(picture)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    return within_site(markdown, "." if page.file.src_uri == "index.md" else "docs")
