"""The roofline chapter's pictures: every frame differs from the others, and says so in its caption."""

import pytest

from llmbook.gpu.roofline import figures
from llmbook.gpu.roofline.chains import CHAINS, counted
from llmbook.gpu.roofline.roofs import dtypes
from llmbook.kit.explore import MAX_BYTES, explore, picture

EXPLORERS = {
    "in_layer": {
        "gpu": ("T4", "B200 HGX"), "context": (1024, 32_768), "work": ("decode", "prefill"),
        "batch": lambda work: figures.BATCHES if work == "decode" else (1, 8),
    },
    "one_gemm": {
        "gpu": ("T4", "A100-80 SXM"), "M": (1, 4096), "N": (1024, 8192), "K": (1024, 8192),
        "dtype": lambda gpu: dtypes(gpu),
    },
    "all_roofs": {},
    "quantisation": {"gpu": ("A100-80 SXM", "H100 SXM"), "N": (1024, 8192), "M": (1, 128, 129, 4096)},
    "fusing": {"function": tuple(CHAINS), "step": lambda function: range(1, len(counted(function).ops) + 1)},
}


@pytest.mark.parametrize("name", EXPLORERS)
def test_every_frame_is_a_different_picture_with_a_different_caption(name):
    draw, caption = getattr(figures, name), getattr(figures, f"{name}_caption")
    frames, words = [], []

    def kept(**chosen):
        frames.append(draw(**chosen).as_str())
        words.append(caption(**chosen))
        return draw(**chosen)

    explore(kept, caption, **EXPLORERS[name])
    assert len(set(frames)) == len(set(words)) == len(frames)
    assert max(map(len, frames)) * 300 < 3 * MAX_BYTES
    assert "nan" not in "".join(frames)


def test_what_does_not_fit_is_said():
    sizes = {"context": 32_768, "work": "decode", "batch": 1024}
    assert "too much" in picture(figures.in_layer, figures.in_layer_caption, {"gpu": "H100 SXM", **sizes})
    small = {**sizes, "batch": 1, "context": 1024}
    assert "too much" not in picture(figures.in_layer, figures.in_layer_caption, {"gpu": "H100 SXM", **small})
