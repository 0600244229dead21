"""Measure the book on the GPU at hand: `python -m llmbook.bench [chapter …]`, all chapters if none is named."""

import argparse
import importlib
import sys
import time
from pathlib import Path

from llmbook.kit import measure
from llmbook.kit.stopwatch import reason


def chapters() -> list[str]:
    """Every chapter with a benchmark, as part/chapter."""
    package = Path(__file__).parent
    return sorted(path.parent.relative_to(package).as_posix() for path in package.glob("*/*/benchmark.py"))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m llmbook.bench", description=__doc__)
    parser.add_argument("chapters", nargs="*", help="part/chapter, for example gpu/flash_attention")
    parser.add_argument("--list", action="store_true", help="name the chapters that have a benchmark")
    chosen = parser.parse_args(arguments)
    known = chapters()
    if chosen.list:
        print("\n".join(known))
        return 0
    if unknown := [name for name in chosen.chapters if name not in known]:
        print(f"no benchmark for {', '.join(unknown)}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    if not measure.gpu_here():
        print("No GPU here: nothing was measured, and nothing was written.", file=sys.stderr)
        return 2
    failed = sum(not bench(name) for name in chosen.chapters or known)
    return 1 if failed else 0


def bench(name: str) -> bool:
    """Measure one chapter and write its record; whether nothing was wrong or failed. No chapter stops the next."""
    began = time.perf_counter()
    print(f"{name}:", flush=True)
    try:
        module = importlib.import_module(f"llmbook.{name.replace('/', '.')}.benchmark")
        path, bad = measure.record(name, module.cases(), folder=measure.RECORDED)
    except Exception as why:
        print(f"{name}: {reason(why)}", file=sys.stderr)
        return False
    print(f"{name}: written to {path} after {time.perf_counter() - began:.0f} s\n", flush=True)
    if bad:
        print(f"{name}: {bad} wrong or failed, not timed", file=sys.stderr)
    return not bad


if __name__ == "__main__":
    sys.exit(main())
