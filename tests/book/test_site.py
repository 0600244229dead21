"""The rendered book in a real browser, every other host blocked: it loads, says nothing wrong, and every control moves.

The pages are built before these tests run (`make test` does it, `make book` too).
"""

import functools
import gzip
import http.server
import json
import threading
from urllib.parse import urlsplit

import pytest
import yaml
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from tools.chapters import ROOT, chapters

pytestmark = pytest.mark.site

SITE = ROOT / "_build/html"
FLAGS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]
THEBE = "THEBE_JS_URL"  # the theme declares it twice; known, harmless, and the only page error allowed
PICTURE = """
explorer => {
  const figure = [...explorer.querySelectorAll("figure.gg")].find(f => f.offsetParent !== null);
  return figure ? [figure.querySelector("svg").outerHTML, figure.querySelector("figcaption").textContent] : null;
}
"""


def pages():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text())
    return [toc["root"], *(entry["file"] for part in toc["parts"] for entry in part["chapters"])]


@pytest.fixture(scope="module")
def server():
    assert (SITE / "index.html").exists(), "the book is not built: run `make book` first"

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE)) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path="/usr/bin/chromium", args=FLAGS)
        yield chromium
        chromium.close()


class Watched:
    """A page whose requests and errors are written down; every host but this one is blocked."""

    def __init__(self, browser, server, width=1280):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme="light")
        self.page = self.context.new_page()
        self.wrong = []
        self.context.route("**/*", self._route)
        self.page.on("pageerror", lambda error: self._note(f"page error: {error}"))
        self.page.on("console", lambda m: self._note(f"console: {m.text}") if m.type == "error" else None)
        self.page.on("requestfailed", lambda request: self._note(f"failed: {request.url}"))
        self.page.on("response", lambda r: self._note(f"{r.status}: {r.url}") if r.status >= 400 else None)
        self.server = server

    def _route(self, route):
        if urlsplit(route.request.url).hostname == "127.0.0.1":
            route.continue_()
        else:
            self._note(f"foreign request: {route.request.url}")
            route.abort()

    def _note(self, words):
        if THEBE not in words:
            self.wrong.append(words)

    def open(self, name):
        self.page.goto(f"{self.server}/{name}.html")
        self.page.wait_for_load_state("networkidle")
        figures = explorers(name)
        if figures:
            self.page.wait_for_function(f"document.querySelectorAll('figure.gg').length >= {figures}", timeout=30_000)
        return self.page


def views(name):
    """The short descriptions of a notebook's widget views, as its stored outputs have them."""
    path = ROOT / f"{name}.ipynb"
    if not path.exists():
        return []
    outputs = [output for cell in json.loads(path.read_text())["cells"] for output in cell.get("outputs", [])]
    data = [output.get("data", {}) for output in outputs]
    return ["".join(d["text/plain"]) for d in data if "application/vnd.jupyter.widget-view+json" in d]


def explorers(name):
    return sum(text.startswith("Explorer(") for text in views(name))


@pytest.fixture
def watched(browser, server):
    opened = []

    def make(**options):
        opened.append(Watched(browser, server, **options))
        return opened[-1]

    yield make
    for one in opened:
        one.context.close()


@pytest.mark.parametrize("name", pages())
def test_a_page_loads_and_says_nothing_wrong(name, watched):
    window = watched()
    page = window.open(name)
    page.wait_for_timeout(500)
    assert window.wrong == []
    assert page.locator("article h1").count() == 1
    maths = page.locator("span.math, div.math").count()
    if maths:
        page.wait_for_function("document.querySelectorAll('mjx-container').length > 0")
        assert page.locator("mjx-container").count() >= maths
        assert page.locator("mjx-merror, [data-mjx-error], merror").count() == 0
    assert page.locator("article img:not([alt])").count() == 0
    for href in page.locator("figure.gg a").evaluate_all("all => all.map(a => a.getAttribute('href'))"):
        assert (SITE / name).parent.joinpath(href).resolve().exists(), f"a map's link leads nowhere: {href}"


def serious(found):
    return [
        (v["id"], [node["html"][:150] for node in v["nodes"][:3]])
        for v in found.response["violations"] if v["impact"] in {"serious", "critical"}
    ]


@pytest.mark.parametrize("name", pages())
def test_a_page_is_accessible_and_its_pictures_follow_the_theme(name, watched):
    page = watched().open(name)
    # The theme's own chrome is not ours to audit; what the book writes is.
    assert serious(Axe().run(page, context="article", options={"rules": {"color-contrast": {"enabled": False}}})) == []
    inks = []
    for theme in ("light", "dark"):
        page.evaluate(f"document.documentElement.dataset.theme = '{theme}'")
        page.wait_for_timeout(100)
        # Code colours are the theme's too.
        words = {"include": [["article"]], "exclude": [["div.highlight"]]}
        assert serious(Axe().run(page, context=words, options={"runOnly": ["color-contrast"]})) == [], theme
        inks.append(page.locator("figure.gg svg").evaluate_all("all => all.map(s => getComputedStyle(s).color)"))
        assert "rgb(0, 0, 0)" not in inks[-1]
    assert all(light != dark for light, dark in zip(*inks, strict=True))


@pytest.mark.parametrize("name", pages())
def test_a_phone_scrolls_pictures_not_the_page(name, watched):
    window = watched(width=390)
    page = window.open(name)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    for figure in page.locator("figure.gg > div").all():
        assert figure.bounding_box()["width"] <= 390
    assert window.wrong == []


@pytest.mark.parametrize("name", [c.file for c in chapters()])
def test_every_slider_menu_and_play_button_moves_the_picture(name, watched):
    window = watched()
    page = window.open(name)
    found = page.locator("div.cell_output:has(.jupyter-widgets figure.gg)")
    assert found.count() == explorers(name)
    moved = 0
    for i in range(found.count()):
        explorer = found.nth(i)
        explorer.scroll_into_view_if_needed()
        for control in explorer.locator(".noUi-handle:visible").all():
            moved += move_slider(page, explorer, control)
        for menu in explorer.locator("select:visible").all():
            moved += move_menu(page, explorer, menu)
        for play in explorer.locator(".widget-play:visible").all():
            moved += press_play(page, explorer, play)
    assert moved
    assert window.wrong == []


def picture(explorer):
    return explorer.evaluate(PICTURE)


def changed(page, explorer, before, what):
    """Wait for the next picture; picture and caption both have to change."""
    for _ in range(60):
        now = picture(explorer)
        if now and now != before:
            assert now[0] != before[0], f"{what}: the caption changed, the picture did not"
            assert now[1] != before[1], f"{what}: the picture changed, the caption did not"
            return now
        page.wait_for_timeout(10)
    raise AssertionError(f"{what}: nothing changed")


def move_slider(page, explorer, handle):
    """From one end to the other by keyboard, a new picture at every stop."""
    before, name = picture(explorer), handle.get_attribute("aria-label")
    assert name, "a slider without a name for screen readers"
    handle.focus()
    start = float(handle.get_attribute("aria-valuenow"))
    page.keyboard.press("Home")
    if start > 0:
        before = changed(page, explorer, before, f"{name}: Home")
    stops = int(float(handle.get_attribute("aria-valuemax")))
    for stop in range(stops):
        page.keyboard.press("ArrowRight")
        before = changed(page, explorer, before, f"{name}: stop {stop + 1} of {stops}")
    return stops


def move_menu(page, explorer, menu):
    options = menu.locator("option").count()
    before, start = picture(explorer), menu.evaluate("menu => menu.selectedIndex")
    for index in [i for i in range(options) if i != start] + [start]:
        menu.select_option(index=index)
        before = changed(page, explorer, before, f"menu {menu.get_attribute('aria-label')}: {index}")
    return options


def press_play(page, explorer, play):
    play.locator("button[aria-label=Stop]").click()
    page.wait_for_timeout(100)
    before = picture(explorer)
    play.locator("button[aria-label=Play]").click()
    page.wait_for_timeout(900)
    changed(page, explorer, before, "play")
    play.locator("button[aria-label=Stop]").click()
    return 1


@pytest.mark.parametrize("name", [c.file for c in chapters()])
def test_every_quiz_answers_every_choice(name, watched):
    page = watched().open(name)
    quizzes = page.locator("div.cell_output:has(input[type=radio])")
    assert quizzes.count() == sum(text.startswith("Quiz:") for text in views(name)) > 0
    for i in range(quizzes.count()):
        quiz = quizzes.nth(i)
        answers = set()
        for radio in quiz.locator("input[type=radio]").all():
            radio.check()
            page.wait_for_timeout(100)
            answers.add(quiz.locator("em:visible").inner_text())
        assert len(answers) == quiz.locator("input[type=radio]").count()


@pytest.mark.parametrize("name", pages())
def test_a_page_is_within_its_size(name):
    raw = (SITE / f"{name}.html").read_bytes()
    assert len(raw) <= 5_000_000
    assert len(gzip.compress(raw)) <= 900_000


@pytest.mark.parametrize(("words", "found"), [("bubble", "pipeline_parallel"), ("流水线", "glossary")])
def test_search_finds_a_chapter_and_a_chinese_term(words, found, watched):
    window = watched()
    window.page.goto(f"{window.server}/search.html?q={words}")
    window.page.wait_for_selector(f"#search-results a[href*={found}]", timeout=20_000)
    assert window.wrong == []
