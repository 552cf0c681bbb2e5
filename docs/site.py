"""What the site has besides docs/: the README first, the notebooks as tutorials, how to contribute, changes."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
PAGES = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
REPOSITORY = "https://github.com/mlx-nb/mlx-nb/blob/main/"


@event_priority(100)  # before the plugin that turns notebooks into pages
def on_files(files: Files, config: Any) -> Files:
    """Add the pages that stand elsewhere in the repository."""
    for name, page in PAGES.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, page, content=text))
    for notebook in sorted((ROOT / "example_notebooks").glob("*.ipynb")):
        files.append(File(notebook.name, str(notebook.parent), config.site_dir, config.use_directory_urls))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links of the repository as links of the site."""
    if page.file.src_uri.endswith(".ipynb"):
        return markdown
    up = "../" * page.file.src_uri.count("/")
    of_root = page.file.src_uri in PAGES.values()
    folder = Path() if of_root else Path("docs") / Path(page.file.src_uri).parent

    def moved(match: re.Match[str]) -> str:
        target = os.path.normpath(folder / match[1])
        if target in PAGES:
            return f"]({up}{PAGES[target]})"
        if target.startswith("example_notebooks/"):
            return f"]({up}{Path(target).name})"
        if target.startswith("docs/"):
            return f"]({up}{target.removeprefix('docs/')}{match[2] or ''})"
        return f"]({REPOSITORY}{target})"

    return re.sub(r"\]\((?!https?://|#)([^)#\s]+)(#[^)]*)?\)", moved, markdown)
