"""The shared shapes: valid SVG whose geometry says what the data says."""

import re
import xml.etree.ElementTree as ET

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmbook.kit import draw

SVG = "{http://www.w3.org/2000/svg}"


def parse(*parts, width=400, height=200):
    return ET.fromstring(draw.canvas(width, height, *parts).as_str())


@given(st.text(alphabet=st.characters(blacklist_categories=("Cs", "Cc")), max_size=20))
def test_any_words_make_valid_xml(words):
    root = parse(draw.text(0, 10, words), draw.box(0, 0, 50, 20, "#123456", words))
    assert any((element.text or "") == words for element in root.iter(f"{SVG}text")) or not words


@given(st.integers(1, 7), st.integers(1, 7))
def test_a_matrix_paints_every_tile_once(rows, columns):
    root = parse(draw.matrix(0, 0, rows, columns, 20, lambda r, c: ("#112233" if (r + c) % 2 else "#445566", 1.0)))
    runs = [run for path in root.iter(f"{SVG}path") for run in re.findall(r"h([\d.]+)", path.get("d"))]
    assert sum(round((float(run) + 2) / 20) for run in runs) == rows * columns


def test_a_matrix_writes_its_values():
    root = parse(draw.matrix(0, 0, 2, 2, 30, lambda r, c: ("#112233", 1.0), values=[[1, 2], [3, 4]]))
    assert [element.text for element in root.iter(f"{SVG}text")] == ["1", "2", "3", "4"]


def test_a_timeline_is_to_scale():
    spans = [draw.Span(0, 0, 1, "F", "0"), draw.Span(0, 1, 3, "B", "0"), draw.Span(1, 1, 2, "F", "0")]
    root = parse(draw.timeline(0, 0, 364, 30, spans, ["a", "b"], until=3))
    forward, backward = (path.get("d") for path in root.iter(f"{SVG}path"))
    widths = [float(w) + 1 for w in re.findall(r"h([\d.]+)", forward + backward)]
    assert widths == pytest.approx([100, 100, 200])


def test_a_timeline_labels_what_has_room():
    spans = [draw.Span(0, 0, 1, "F", "7"), draw.Span(0, 1, 1.01, "F", "8")]
    root = parse(draw.timeline(0, 0, 364, 30, spans, ["rank 0"], until=3))
    assert [element.text for element in root.iter(f"{SVG}text")] == ["rank 0", "7"]


def test_a_ledger_shows_an_overflow_beyond_its_end():
    root = parse(draw.ledger(0, 0, 100, 20, [draw.Bar("a", 60, "Q"), draw.Bar("b", 60, "K")], 100))
    pieces = [rect for rect in root.iter(f"{SVG}rect") if rect.get("fill") != "none"]
    assert max(float(piece.get("x")) + float(piece.get("width")) for piece in pieces) > 100
    assert any("120 of 100" in (element.text or "") for element in root.iter(f"{SVG}text"))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_a_ring_has_a_hop_from_each_rank_to_the_next(n):
    root = parse(draw.ring(100, 100, 60, [str(i) for i in range(n)], ["#112233"] * n, lit=0))
    assert len(list(root.iter(f"{SVG}circle"))) == n
    assert len(list(root.iter(f"{SVG}polygon"))) == (n if n > 1 else 0)


def test_source_keeps_indentation_and_lights_lines():
    root = parse(draw.source(0, 0, 300, ["def f():", "    return 1"], {1}))
    first, second = (float(element.get("x")) for element in root.iter(f"{SVG}text"))
    assert second > first
    assert len(list(root.iter(f"{SVG}rect"))) == 1
