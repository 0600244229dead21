"""Which tensors are pretended to be on the GPU, remembered by storage; all data stays on the CPU."""

from collections.abc import Iterable
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef

GPU, CPU = "cuda", "cpu"


class Places:
    """Where each storage is: on the GPU, on the CPU, or not decided yet.

    A storage is undecided when autograd's engine made it by itself (a gradient of zeros): it goes where it is used.
    """

    def __init__(self) -> None:
        self.on_gpu: dict[int, tuple[StorageWeakRef, int]] = {}  # and its bytes
        self.undecided: dict[int, StorageWeakRef] = {}
        self.peak, self._held, self._sweep_at = 0, 0, 256

    def of(self, tensor: torch.Tensor) -> str | None:
        """"cuda", "cpu", or None for what has no place of its own: undecided, meta, or without a storage."""
        storage = _storage(tensor)
        if storage is None:
            return None
        key = storage._cdata
        if key in self.on_gpu:
            if not self.on_gpu[key][0].expired():
                return GPU
            self._forget(key)
        if key in self.undecided and not self.undecided[key].expired():
            return None
        return CPU

    def settle(self, tensor: torch.Tensor, otherwise: str) -> str | None:
        """Its place; one that is undecided goes `otherwise`, now that somebody asks."""
        place, storage = self.of(tensor), _storage(tensor)
        if place is None and storage is not None and storage._cdata in self.undecided:
            self.put(tensor, otherwise)
            return otherwise
        return place

    def put(self, tensor: torch.Tensor, place: str | None) -> None:
        """Say where a tensor's storage is from now on; None leaves it undecided."""
        storage = _storage(tensor)
        if storage is None:
            return
        key = storage._cdata
        self.undecided.pop(key, None)
        if place == GPU:
            if key not in self.on_gpu or self.on_gpu[key][0].expired():
                self._forget(key)
                self.on_gpu[key] = (StorageWeakRef(storage), storage.nbytes())
                self._held += storage.nbytes()
                if len(self.on_gpu) > self._sweep_at:
                    self.allocated()
                    self._sweep_at = max(256, 2 * len(self.on_gpu))
                self.peak = max(self.peak, self._held)
            return
        self._forget(key)
        if place is None:
            self.undecided[key] = StorageWeakRef(storage)

    def allocated(self) -> int:
        """Bytes of all storages that live on the GPU."""
        for table in (self.on_gpu, self.undecided):
            for key, entry in list(table.items()):
                if (entry[0] if isinstance(entry, tuple) else entry).expired():
                    self._forget(key)
                    self.undecided.pop(key, None)
        return self._held

    def _forget(self, key: int) -> None:
        if key in self.on_gpu:
            self._held -= self.on_gpu.pop(key)[1]


def _storage(tensor: torch.Tensor) -> Any:
    """The storage under a tensor, functorch's wrappers taken off; None where there is none that counts."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    if tensor.is_sparse or type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        return None
    storage = tensor.untyped_storage()
    return None if storage.device.type == "meta" else storage


def tensors_in(values: Iterable[Any]) -> list[torch.Tensor]:
    """All tensors in arguments or results, lists and tuples included."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
        elif isinstance(value, dict):
            found += tensors_in(value.values())
    return found
