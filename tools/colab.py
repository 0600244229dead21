"""Run all as on Colab: `python -m tools.colab [--list FILE]`, in an environment of the versions that Colab publishes.

The list (tools/colab.txt, with its date) is Colab's GPU image; packages that llmbook or the notebooks need are
installed in those versions, llmbook is installed as a reader installs it, and what that changed is an error. Then every
notebook runs without a GPU, outputs compared, and with a pretended T4, and the unit tests run there too. All failures
are listed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from tools.chapters import ROOT

LIST = Path(__file__).with_name("colab.txt")
BOOK = ("torch", "triton", "numpy", "matplotlib", "ipywidgets", "transformers", "safetensors", "tqdm", "cloudpickle")
RUN = ("ipython", "ipykernel", "nbclient", "nbformat", "PyYAML", "pytest")  # of the list
TESTS = ("hypothesis", "pytest-xdist", "resvg-py", "nbval")  # not of the list
ADDED = {"llmbook", "svg.py"}  # all that an installation of llmbook may add there
UNITS = tuple(f"tests/{part}" for part in ("foundations", "block", "gpu", "parallel", "kit"))
Versions = dict[str, str]


def read(path: Path) -> tuple[str, Versions]:
    """The list's first line, and its versions by name; CUDA's own packages left out, which torch's build decides."""
    lines = path.read_text(encoding="utf-8").splitlines()
    title = lines[0].removeprefix("# ") if lines[0].startswith("#") else path.name
    pairs = [line.split("==") for line in lines if re.fullmatch(r"[\w.-]+==\S+", line)]
    return title, {
        _canonical(name): version.split("+")[0] for name, version in pairs if not name.startswith(("cuda-", "nvidia-"))
    }


def interpreter(title: str) -> str:
    """The Python that the list names, where this machine has it; else this one."""
    found = re.search(r"Python (\d+\.\d+)", title)
    wanted = found[1] if found else "3.13"
    versions = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    pyenv = sorted(versions.glob(f"{wanted}.*/bin/python"))
    return str(pyenv[-1]) if pyenv else shutil.which(f"python{wanted}") or sys.executable


def differences(title: str, listed: Versions, installed: Versions, python: str) -> list[str]:
    """What this environment has in other versions than the list."""
    found = re.search(r"Python (\S+?)[;,]", title)
    changed = [
        f"{name} {version} here, {listed[name]} there" for name, version in sorted(installed.items())
        if name in listed and listed[name] != version.split("+")[0]
    ]
    return ([f"Python {python} here, {found[1]} there"] if found and found[1] != python else []) + changed


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


class Environment:
    """A virtual environment of Colab's versions."""

    def __init__(self, folder: Path, python: str) -> None:
        self.python = folder / "bin/python"
        if not self.python.exists():
            subprocess.run([python, "-m", "venv", str(folder)], check=True)

    def call(self, *arguments: str, **environment: str) -> int:
        """The exit code of `python …` there, with this tree's llmbook."""
        around = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        around |= {"PYTHONPATH": str(ROOT), **environment}
        return subprocess.run([str(self.python), *arguments], cwd=ROOT, check=False, env=around).returncode

    def pip(self, *arguments: str) -> None:
        """Raises CalledProcessError where pip fails."""
        quiet = ["--quiet", "--disable-pip-version-check"]
        subprocess.run([str(self.python), "-m", "pip", *quiet, *arguments], check=True)

    def installed(self) -> Versions:
        freeze = [str(self.python), "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"]
        lines = subprocess.run(freeze, capture_output=True, text=True, check=True).stdout.splitlines()
        return {_canonical(name): version for name, _, version in (line.partition("==") for line in lines)}

    def version(self) -> str:
        ask = [str(self.python), "-c", "import platform; print(platform.python_version())"]
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()


def build(folder: Path, path: Path) -> tuple[Environment, list[str]]:
    """Colab's versions, and llmbook installed over them; and what is wrong with that."""
    title, listed = read(path)
    environment = Environment(folder, interpreter(title))
    pins = folder / "pins.txt"
    pins.write_text("\n".join(f"{name}=={version}" for name, version in listed.items()), encoding="utf-8")
    environment.pip("install", "--constraint", str(pins), *BOOK, *RUN)
    before = environment.installed()
    environment.pip("install", str(ROOT))
    after = environment.installed()
    changed = {name for name in before | after if before.get(name) != after.get(name)} - {_canonical(n) for n in ADDED}
    environment.pip("install", "--constraint", str(pins), *TESTS)
    print(f"Colab's list: {title}")
    for line in differences(title, listed, environment.installed(), environment.version()):
        print(f"  differs: {line}")
    return environment, [f"installing llmbook changes {', '.join(sorted(changed))}"] if changed else []


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.colab", description=__doc__)
    parser.add_argument("--list", type=Path, default=LIST, help="a `pip freeze` of Colab's GPU image")
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 4))
    chosen = parser.parse_args(arguments)
    environment, failed = build(ROOT / ".colab", chosen.list)
    jobs = ["--jobs", str(chosen.jobs)]
    steps = {
        "notebooks without a GPU, outputs compared": ["-m", "tools.run", "--compare", *jobs],
        "notebooks with a pretended T4": ["-m", "tools.run", "--pretend", "75", *jobs],
        # Warnings of packages older than the lock's are theirs; the tools and the site are built with the lock.
        "unit tests": [
            "-m", "pytest", "-q", "-W", "default", "-n", str(chosen.jobs), "--dist", "loadscope", *UNITS,
        ],
    }
    for name, command in steps.items():
        print(f"\n=== {name}", flush=True)
        settings = {"CUDA_VISIBLE_DEVICES": "", "TRITON_INTERPRET": "1"} if "--compare" in command else {}
        if environment.call(*command, **settings):
            failed.append(name)
    print("\nAs on Colab: " + ("; ".join(f"FAILED: {name}" for name in failed) if failed else "everything passed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
