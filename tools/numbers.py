"""How long things take on this machine: `make numbers`. Printed, not asserted: a busy machine is not a bug."""

import functools
import gzip
import http.server
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import sync_playwright

from llmbook.kit import ranks
from llmbook.parallel.pipeline_parallel.schedules import one_f_one_b
from llmbook.parallel.pipeline_parallel.simulate import simulate
from tools.chapters import ROOT, chapters

# From the key press until the next picture is on the screen, in the page's own clock.
ANSWER = """
() => new Promise(done => {
  const explorer = [...document.querySelectorAll("div.cell_output")].find(cell => cell.querySelector(".noUi-handle"));
  const handle = explorer.querySelector(".noUi-handle"), before = explorer.querySelector("figure.gg").outerHTML;
  const key = handle.getAttribute("aria-valuenow") > 0 ? "ArrowLeft" : "ArrowRight", began = performance.now();
  const look = () => explorer.querySelector("figure.gg")?.outerHTML !== before
    ? requestAnimationFrame(() => done(performance.now() - began)) : requestAnimationFrame(look);
  handle.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  look();
})
"""


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def say(what: str, measured: float, bound: float, unit: str = "s") -> None:
    print(f"{what:58}{measured:9.2f} {unit:4} target {bound:g}{'' if measured <= bound else '  OVER'}", flush=True)


def shell(command: str, cwd: Path = ROOT) -> float:
    return seconds(lambda: subprocess.run(command, shell=True, cwd=cwd, check=True, capture_output=True))


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        """No line per request."""


def slider_answers(site: Path) -> dict[str, float]:
    """Milliseconds from a key press on each chapter's first slider to its next picture."""
    handler = functools.partial(Quiet, directory=site)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server, sync_playwright() as playwright:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=flags)
        answers = {}
        for chapter in chapters():
            page = browser.new_page()
            page.goto(f"http://127.0.0.1:{server.server_port}/{chapter.file}.html")
            page.wait_for_selector("figure.gg svg")
            page.wait_for_selector(".noUi-handle")
            answers[chapter.file] = sorted(page.evaluate(ANSWER) for _ in range(5))[2]
            page.close()
        browser.close()
        server.shutdown()
    return answers


def main() -> int:
    def start(n: int) -> float:
        return seconds(lambda: ranks.run(lambda comm: comm.rank, n))

    start(1)
    say("ranks.run on 4 processes", start(4), 0.5)
    say("ranks.run on 8 processes", start(8), 1)
    big = one_f_one_b(64, 1024)
    say("simulate 64 stages × 1,024 micro-batches", seconds(lambda: simulate(big, {"F": 1, "B": 2})), 1)
    for chapter in chapters():
        say(f"replay {chapter.file}", shell(f"{sys.executable} -m tools.refresh --check {chapter.file}.ipynb"), 30)
    say("build the book", shell("rm -rf _build && make book"), 60)
    for chapter in chapters():
        raw = (ROOT / f"_build/html/{chapter.file}.html").read_bytes()
        say(f"page {chapter.file}", len(raw) / 1e6, 5, "MB")
        say(f"page {chapter.file}, gzipped", len(gzip.compress(raw)) / 1e3, 900, "KB")
    for name, answer in slider_answers(ROOT / "_build/html").items():
        say(f"slider {name}", answer, 50, "ms")
    with tempfile.TemporaryDirectory() as folder:
        clone = Path(folder) / "clone"
        subprocess.run(["git", "clone", "-q", ROOT, clone], check=True)
        say("fresh clone to built book", shell("make book", clone), 180)
    return 0


if __name__ == "__main__":
    sys.exit(main())
