"""What a KV cache costs: bytes per token of published models, and how many sequences fit beside the weights."""

from dataclasses import dataclass, replace

from .heads import Heads


@dataclass(frozen=True)
class Model:
    """A published model's attention, from its config.json.

    Args:
        layers: L.
        attention: its heads.
        parameters: of the whole model, embeddings included.
        latent: elements per token and layer where one latent stands for all
            heads' keys and values (MLA: d_c + d_r); 0 for per-head KV.
    """

    layers: int
    attention: Heads
    parameters: int
    latent: int = 0

    @property
    def kind(self) -> str:
        a = self.attention
        if self.latent:
            return "MLA"
        return "MHA" if a.group == 1 else "MQA" if a.kv_heads == 1 else "GQA"

    def bytes_per_token(self, devices: int = 1, element: int = 2) -> int:
        """Cache bytes per token on each of the devices: 2·L·n_kv·d_h·element.

        element: bytes per number; 2 is bf16. A latent is shared by all heads,
        so that tensor parallelism copies it to every device.
        """
        share = self.attention.local(devices)
        per_layer = self.latent or 2 * share.n_local_kv_heads * share.head_dim
        return self.layers * per_layer * element


MODELS = {
    "Llama-2-7B": Model(32, Heads(4096, 32, 32), 6_738_415_616),
    "Llama-2-70B": Model(80, Heads(8192, 64, 8), 68_976_648_192),
    "Llama-3-8B": Model(32, Heads(4096, 32, 8), 8_030_261_248),
    "Llama-3-70B": Model(80, Heads(8192, 64, 8), 70_553_706_496),
    "Llama-3.1-405B": Model(126, Heads(16_384, 128, 8), 405_853_388_800),
    "Qwen-2.5-72B": Model(80, Heads(8192, 64, 8), 72_706_203_648),
    "Qwen3-32B": Model(64, Heads(5120, 64, 8, 128), 32_762_123_264),
    "Gemma-2B": Model(18, Heads(2048, 8, 1), 2_506_172_416),
    "DeepSeek-V3": Model(61, Heads(7168, 128, 128, 128), 671_026_419_200, latent=512 + 64),
}


def kv_bytes(
    model: Model, batch: int, tokens: int, devices: int = 1, element: int = 2
) -> int:
    """Cache bytes on each device for `batch` sequences of `tokens` tokens.

    Raises:
        ValueError: negative counts, or heads that do not divide.
    """
    if batch < 0 or tokens < 0:
        raise ValueError(
            f"batch and tokens count things, but are {batch} and {tokens}"
        )
    return batch * tokens * model.bytes_per_token(devices, element)


def sequences_that_fit(
    model: Model, tokens: int, memory: float, devices: int = 1, element: int = 2
) -> int:
    """How many sequences' caches fit beside the weights, 0 if not even those.

    Args:
        memory: bytes of each device. Weights are bf16, divided evenly;
            activations are left out.
        tokens: per sequence, at least 1.
        element: bytes per number of the cache.
    """
    if tokens < 1:
        raise ValueError(f"a sequence has at least 1 token, not {tokens}")
    left = memory - 2 * model.parameters / devices
    return max(0, int(left // kv_bytes(model, 1, tokens, devices, element)))


def devices_for_weights(model: Model, memory: float) -> int:
    """The fewest devices, in powers of two, that hold bf16 weights with a tenth of their memory left."""
    n = 1
    while 2 * model.parameters / n > 0.9 * memory:
        n *= 2
    return n


def with_other_heads(model: Model) -> dict[str, Model]:
    """The same model with every choice of KV heads, its own among them if it has 1, 8 or all, or DeepSeek's latent."""
    a = model.attention
    forms = {
        f"{kind}, {n}": replace(model, attention=Heads(a.dim, a.heads, n, a.head_dim), latent=0)
        for kind, n in (("MHA", a.heads), ("GQA", 8 if a.heads > 8 else 2), ("MQA", 1))
    }
    return forms | {"MLA, 512 + 64": replace(model, latent=512 + 64)}
