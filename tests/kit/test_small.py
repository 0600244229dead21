"""Exercises, errata, hardware and kernels: small tools, each with its errors."""

import pytest
import torch

from llmbook.kit import kernels
from llmbook.kit.erratum import MIME, erratum
from llmbook.kit.exercise import exercise, expect
from llmbook.kit.hardware import GPUS, LINKS, SHARED_PER_BLOCK, gpu


@exercise
def double_it(answer):
    expect(answer(2) == 4, f"answer(2) is {answer(2)}, not 4")
    return "doubled."


@pytest.mark.parametrize(
    ("answer", "right", "words"),
    [
        (..., False, "not attempted yet"),
        (lambda x: 2 * x, True, "✓ double it: doubled."),
        (lambda x: x, False, "✗ double it: answer(2) is 2, not 4"),
        (lambda x: x / 0, False, "your answer raised ZeroDivisionError"),
        (3, False, "your answer raised TypeError"),
    ],
)
def test_a_checker_never_stops_the_notebook(answer, right, words, capsys):
    verdict, sentence = double_it.verdict(answer)
    assert (verdict, words in sentence) == (right, True)
    assert double_it(answer) is None
    assert words in capsys.readouterr().out


def test_an_erratum_stands_only_on_its_proof():
    row = erratum("§1", "a < b", "wrong", True, shown="2 > 1", holds="a > b")
    bundle = row._repr_mimebundle_()
    assert bundle[MIME]["claim"] == "a < b"
    assert "a &lt; b" in bundle["text/html"]
    with pytest.raises(AssertionError, match="does not bear out"):
        erratum("§1", "a < b", "wrong", False, shown="", holds="")
    with pytest.raises(ValueError, match="a verdict is one of"):
        erratum("§1", "a < b", "maybe", True, shown="", holds="")


def test_every_number_of_the_hardware_table_has_a_source_and_its_arithmetic_holds():
    for g in GPUS:
        assert g.source.startswith("https://")
        assert g.shared * 1024 - SHARED_PER_BLOCK[g.sm] in (0, 1024)
        assert g.ridge == pytest.approx(g.half * 1000 / g.bandwidth)
    assert {link.source[:8] for link in LINKS} == {"https://"}
    assert len({g.name for g in GPUS}) == len(GPUS)


def test_the_peak_rates_follow_from_units_and_clock():
    """SMs × FMA per clock × 2 × boost clock, from the vendors' architecture papers."""
    chips = (("A100-80 SXM", 1024, 1.41), ("H100 SXM", 2048, 1.83), ("RTX 4090", 256, 2.52), ("T4", 512, 1.59))
    for name, fma, ghz in chips:
        g = gpu(name)
        assert g.half == pytest.approx(g.sms * fma * 2 * ghz / 1000, rel=2e-3)


def test_an_unknown_gpu_is_refused_with_the_known_ones():
    with pytest.raises(KeyError, match="H100 SXM"):
        gpu("H1000")


def test_kernels_refuse_tensors_they_cannot_reach():
    with pytest.raises(ValueError, match="kernels run on cpu here, but"):
        kernels.need_same_device(a=torch.ones(1), b=torch.ones(1, device="meta"))
    assert kernels.INTERPRETED
