"""What mkdocs does beyond its configuration: it makes the home page, and the tree that the API pages are read from."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "build" / "docs"


def on_startup(**_: Any) -> None:
    """Lay out the package as it is once installed: kernels/ and bench/ lie in it, and beside it in a checkout.

    Before the configuration is read, since a path that is not there yet is dropped from it.
    """
    shutil.rmtree(SOURCES, ignore_errors=True)
    for source, target in (("rjepa_triton", ""), ("kernels", "kernels"), ("bench", "bench")):
        for file in sorted((ROOT / source).rglob("*.py")):
            copy = SOURCES / "rjepa_triton" / target / file.relative_to(ROOT / source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.symlink_to(file)
            if not (file.parent / "__init__.py").exists():
                (copy.parent / "__init__.py").touch()  # the reader of sources goes into packages alone


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Make the home page: the README, with its links as they are from docs/."""
    text = (ROOT / "README.md").read_text().replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files
