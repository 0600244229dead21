"""FLOPs and bytes of the two forms as closed forms, and where they cross.

Counted is what differs between the forms: from the queries and the cached rows to the heads' outputs. The projections
around it are the same in all. "rebuilt": the latent is cached, all keys and values are made from it in every pass.
"absorbed": the latent is cached and attended to. "kept": made once, every head's keys and values are cached.
"""

from typing import NamedTuple

from llmbook.kit.hardware import GPU

from .sizes import Sizes

FORMS = ("rebuilt", "absorbed", "kept")


def need_form(form: str) -> None:
    if form not in FORMS:
        raise ValueError(f"the form is one of {FORMS}, not {form!r}")


def flop(
    s: Sizes, form: str, queries: int, keys: int, batch: int = 1
) -> dict[str, int]:
    """FLOPs of one layer, by where they go.

    Args:
        queries, keys: S new tokens and T rows, per sequence. A mask saves
            nothing in plain products.

    Raises:
        ValueError: an unknown form.
    """
    need_form(form)
    each = 2 * batch * s.heads
    through = s.latent * (s.nope + s.v)  # one vector through W_UK and W_UV
    if form == "rebuilt":
        return {
            "up-projections": each * keys * through,
            "attention": each * queries * keys * (s.qk + s.v),
        }
    width = s.row + s.latent if form == "absorbed" else s.qk + s.v
    return {
        "up-projections": each * queries * through,
        "attention": each * queries * keys * width,
    }


def traffic(
    s: Sizes, form: str, queries: int, keys: int, batch: int = 1, element: int = 2
) -> dict[str, int]:
    """Bytes one layer moves to and from HBM, by what they are.

    Scores stay on the chip, and a latent row that is key and value is read
    once. Rebuilt keys and values are written once and read once.
    """
    need_form(form)
    made = batch * s.heads * (s.nope + s.v)  # K and V of one token
    moved = {
        "weights": s.heads * s.latent * (s.nope + s.v),
        "cache": batch * keys * s.row,
        "rebuilt K, V": 2 * keys * made if form == "rebuilt" else 0,
        "queries, outputs": batch * queries * s.heads * (s.qk + s.v),
    }
    if form == "kept":
        moved["cache"] = batch * keys * s.elements_per_token("per head") // s.layers
        moved["queries, outputs"] += queries * made  # the new tokens' K and V
    if form == "absorbed":
        # down to the latent and back up: each is written, then read
        moved["queries, outputs"] += 4 * batch * queries * s.heads * s.latent
    return {name: element * n for name, n in moved.items()}


def cheaper_below(s: Sizes, keys: float) -> float:
    """S*, the queries per sequence below which the absorbed form has fewer FLOPs.

    T·A = S·A + S·T·B with A = d_c(nope + v), what rebuilding one key and
    value costs, and B = 2d_c − nope − v, what an absorbed score and value
    cost more. S* = T·A / (A + T·B); infinite where B ≤ 0 and T is large.
    """
    a, b = s.latent * (s.nope + s.v), 2 * s.latent - s.nope - s.v
    denominator = a / keys + b if keys else float("inf")
    return a / denominator if denominator > 0 else float("inf")


def absorbed_is_cheaper(s: Sizes, queries: int, keys: int) -> bool:
    """Whether the absorbed form has fewer FLOPs."""
    return sum(flop(s, "absorbed", queries, keys).values()) < sum(flop(s, "rebuilt", queries, keys).values())


def least_time(s: Sizes, form: str, queries: int, keys: int, batch: int, chip: GPU) -> float:
    """Seconds the roofline leaves one layer: the longer of computing and moving, bf16."""
    work = sum(flop(s, form, queries, keys, batch).values()) / (chip.half * 1e12)
    return max(work, sum(traffic(s, form, queries, keys, batch).values()) / (chip.bandwidth * 1e9))


def faster_below(s: Sizes, keys: int, batch: int, chip: GPU, rival: str = "rebuilt", most: int = 4096) -> int:
    """The fewest queries per sequence, up to `most`, at which the roofline no longer favours the absorbed form.

    Bisection: the absorbed form's lead over its rival changes sign once, as a test holds.
    """
    low, high = 0, most
    while high - low > 1:
        middle = (low + high) // 2
        absorbed, other = (least_time(s, form, middle, keys, batch, chip) for form in ("absorbed", rival))
        low, high = (middle, high) if absorbed < other else (low, middle)
    return high


def intensity(s: Sizes, form: str, queries: int, keys: int) -> float:
    """FLOP of scores and values per byte of the keys and values read, bf16; the batch cancels.

    absorbed: n_h·S·(2d_c + d_r) / (d_c + d_r), whatever T.
    """
    read = s.row
    if form != "absorbed":
        read = s.elements_per_token("per head") // s.layers
    return flop(s, form, queries, keys)["attention"] / (2 * keys * read)


class Rung(NamedTuple):
    """One layer decoding one token of one sequence with T tokens cached, weights left out.

    cached: elements per token. flop: of the attention and what rebuilds or
    absorbs. moved: elements of cache, and of rebuilt keys and values.
    """

    cached: int
    flop: int
    moved: int


def rungs(s: Sizes, tokens: int) -> dict[str, Rung]:
    """The four rungs of the ladder at a model's widths; the first three have no positions."""
    n_h, kv, d_c = s.heads, s.nope + s.v, s.latent
    rows = {"low-rank KV": d_c, "absorbed": d_c, "decoupled RoPE": s.row}
    ups = 2 * n_h * d_c * kv  # one vector through W_UK, one through W_UV
    return {
        "MHA": Rung(n_h * kv, 2 * n_h * tokens * kv, tokens * n_h * kv),
        "low-rank KV": Rung(
            d_c, tokens * ups + 2 * n_h * tokens * kv, tokens * (d_c + 2 * n_h * kv)
        ),
        **{
            name: Rung(rows[name], ups + 2 * n_h * tokens * (rows[name] + d_c), tokens * rows[name])
            for name in ("absorbed", "decoupled RoPE")
        },
    }
