"""What the tools and tests know of the book: its chapters in order, their notebooks, and the repository's address."""

import re
from dataclasses import dataclass
from pathlib import Path

import nbformat
import yaml

ROOT = Path(__file__).parents[1]
PARTS = ("foundations", "block", "gpu", "parallel", "serving")


@dataclass(frozen=True)
class Chapter:
    part: str
    name: str
    root: Path = ROOT

    @property
    def notebook(self) -> Path:
        return self.root / "notebooks" / self.part / f"{self.name}.ipynb"

    @property
    def file(self) -> str:
        """As `_toc.yml` writes it."""
        return f"notebooks/{self.part}/{self.name}"

    def title(self) -> str:
        return _first_cell(self.notebook).splitlines()[0].removeprefix("# ").strip()

    def question(self) -> str:
        """The chapter's first sentence."""
        prose = " ".join(_first_cell(self.notebook).split("\n\n")[1].split())
        return re.split(r"(?<=[.?!])\s", prose.replace("**", ""))[0]


def chapters(root: Path = ROOT) -> list[Chapter]:
    """The chapters that `_toc.yml` lists, in its order."""
    toc = yaml.safe_load((root / "_toc.yml").read_text())
    files = [entry["file"] for part in toc["parts"] for entry in part["chapters"]]
    return [Chapter(*file.split("/")[1:], root=root) for file in files if file.startswith("notebooks/")]


def repository(root: Path = ROOT) -> str:
    """The one address of the repository, https://github.com/owner/name."""
    config = yaml.safe_load((root / "_config.yml").read_text())
    address: str = config["repository"]["url"]
    return address


def colab_link(chapter: Chapter) -> str:
    slug = repository(chapter.root).removeprefix("https://github.com/")
    return f"https://colab.research.google.com/github/{slug}/blob/main/{chapter.file}.ipynb"


def _first_cell(path: Path) -> str:
    source: str = nbformat.read(path, as_version=4).cells[0].source
    return source
