"""What each layer adds: the stream after every layer, read by the last norm and the head (nostalgebraist 2020)."""

from typing import Any

import torch
from torch import Tensor

from .model import Llama


@torch.no_grad()
def lens(model: Llama, ids: Tensor) -> Tensor:
    """Logits as if the model ended after 0, 1, …, L layers.

    ids: [B, S]. Returns [L + 1, B, S, V]; the last are the model's own.
    """
    decoder: Any = model.model
    x = decoder.embed_tokens(ids)
    streams = [x]
    for layer in decoder.layers:
        x = layer(x)
        streams.append(x)
    return model.lm_head(decoder.norm(torch.stack(streams)))
