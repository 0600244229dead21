"""The widths of multi-head latent attention, and those of DeepSeek's published models (their config.json)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Sizes:
    """Widths of one MLA layer, all in elements.

    Args:
        dim: D, width of the stream.
        heads: n_h.
        latent: d_c, width of c, from which all heads' keys and values are made.
        nope, rope: widths of a head's query and key without and with RoPE.
        v: width of a head's value.
        q_rank: width of the query's own latent; None: queries come from D.
        layers: of the whole model, for its cache.

    Raises:
        ValueError: a width below 1, or an odd `rope`.
    """

    dim: int
    heads: int
    latent: int
    nope: int
    rope: int
    v: int
    q_rank: int | None = None
    layers: int = 1

    def __post_init__(self) -> None:
        small = {name: n for name, n in vars(self).items() if n is not None and n < 1}
        if small:
            raise ValueError(f"every width must be at least 1, but {small} is not")
        if self.rope % 2:
            raise ValueError(f"rope must be even, because RoPE turns pairs, not {self.rope}")

    @property
    def qk(self) -> int:
        """Width of a head's whole query and key."""
        return self.nope + self.rope

    @property
    def row(self) -> int:
        """What one token leaves in the cache of one layer: c and one rotary key."""
        return self.latent + self.rope

    def elements_per_token(self, form: str = "latent") -> int:
        """Elements of cache per token, all layers, by what is kept.

        Args:
            form: "latent": c and the rotary key. "per head": every head's rebuilt key, rotary part and value. "MHA":
                what MHA with as many heads, each `nope` wide, would keep.

        Raises:
            ValueError: another form.
        """
        kept = {"latent": self.row, "per head": self.heads * (self.qk + self.v), "MHA": 2 * self.heads * self.nope}
        if form not in kept:
            raise ValueError(f"what is kept is one of {sorted(kept)}, not {form!r}")
        return self.layers * kept[form]

    @property
    def like_gqa(self) -> float:
        """The number of KV heads, each `nope` wide, with which GQA would keep as much."""
        return self.row / (2 * self.nope)


V3 = Sizes(7168, 128, 512, 128, 64, 128, 1536, 61)
V2 = Sizes(5120, 128, 512, 128, 64, 128, 1536, 60)
V2_LITE = Sizes(2048, 16, 512, 128, 64, 128, None, 27)
PUBLISHED = {"DeepSeek-V3": V3, "DeepSeek-V2": V2, "DeepSeek-V2-Lite": V2_LITE}
