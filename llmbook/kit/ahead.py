"""Compile Triton kernels for GPUs that are not here, and report what the compiler made of them.

`python -m llmbook.kit.ahead` compiles every kernel of the book for six generations; `report` does it for one kernel
module, in a process of its own, and returns the rows.
"""

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .generations import generation
from .without_triton import SENTENCE as MISSING

TARGETS = (75, 80, 89, 90, 100, 120)


def report(*modules: str) -> list[dict[str, Any]]:
    """Compile the `BUILDS` of these kernel modules for their targets, in a fresh process that does not interpret.

    Args:
        modules: "llmbook.gpu.flash_attention.kernel" for all its builds; with ":2" for its third alone, with "@90" for
            sm_90 alone, with both for both.

    Returns:
        One row per kernel and target: kernel, sm, shared (bytes), limit (bytes), registers, spills (bytes of local
        memory per thread), warps, and two instructions found in the PTX, or "": tensor_core (the matrix product's)
        and copy (the asynchronous one from HBM to shared memory).

    Raises:
        RuntimeError: the compiler refused a kernel; its message is passed on. Or there is no Triton here.
    """
    if find_spec("triton") is None:
        raise RuntimeError(MISSING)
    # No GPU is shown to it, so that it does the same where there is one, and takes none of its memory.
    environment = {**os.environ, "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "llmbook.kit.ahead", "--json", *modules]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"compiling {', '.join(modules)} ahead of time failed:\n{done.stderr[-3000:]}")
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def kernel_modules() -> list[str]:
    """Every chapter's kernel module, by name."""
    package = Path(__file__).parents[1]
    return sorted(
        ".".join(("llmbook", *path.relative_to(package).with_suffix("").parts))
        for path in package.glob("*/*/kernel*.py")
    )


def _wanted(name: str) -> list[tuple[Any, int]]:
    """The builds and targets that "module", "module:build", "module@sm" or "module:build@sm" names."""
    found = re.fullmatch(r"([\w.]+)(?::(\d+))?(?:@(\d+))?", name)
    if found is None:
        raise ValueError(f"{name!r} names no kernels: write module, module:build, module@sm or module:build@sm")
    builds = importlib.import_module(found[1]).BUILDS
    picked = builds if found[2] is None else [builds[int(found[2])]]
    return [
        (build, sm) for build in picked for sm in build.targets or TARGETS if found[3] is None or sm == int(found[3])
    ]


def _compile(build: Any, sm: int) -> dict[str, Any]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    constants = build.constants(sm)
    signature = {
        name: "constexpr" if name in constants else build.signature[name] for name in build.kernel.arg_names
    }
    # Triton specialises what is a multiple of 16; assume so of pointers and strides, as real ones are.
    aligned: dict[tuple[int, ...], list[list[Any]]] = {}
    for i, name in enumerate(build.kernel.arg_names):
        if isinstance(signature[name], tuple):
            aligned.update({(i, k): [["tt.divisibility", 16]] for k in range(len(signature[name]))})
        elif signature[name].startswith("*"):
            aligned[i,] = [["tt.divisibility", 16]]
    source = ASTSource(build.kernel, signature, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", sm, 32), options=build.options(sm))
    registers, spills = _resources(compiled.asm["cubin"])
    found = re.findall(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", compiled.asm["ptx"])
    copies = re.findall(r"cp\.async\.bulk\.tensor|cp\.async(?=\.c[ag])", compiled.asm["ptx"])
    return {
        "kernel": build.kernel.__name__, "constants": constants, "sm": sm,
        "shared": compiled.metadata.shared, "limit": generation(sm).shared, "registers": registers, "spills": spills,
        "warps": compiled.metadata.num_warps, "tensor_core": found[0] if found else "",
        "copy": copies[0] if copies else "",
    }


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread and bytes of local memory (spills), as `cuobjdump` reads them from the binary."""
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        listing = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = re.search(r"REG:(\d+)", listing), re.search(r"STACK:(\d+)", listing)
    if registers is None or stack is None:
        raise RuntimeError(f"cuobjdump reported no resource usage:\n{listing}")
    return int(registers.group(1)), int(stack.group(1))


def main(arguments: list[str]) -> int:
    if find_spec("triton") is None:
        print(MISSING, file=sys.stderr)
        return 2
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        print("TRITON_INTERPRET=1 is set: this process cannot compile; unset it", file=sys.stderr)
        return 2
    os.environ["TRITON_INTERPRET"] = "0"  # so that kernel modules do not choose the interpreter for want of a GPU
    as_json = "--json" in arguments
    modules = [argument for argument in arguments if argument != "--json"] or kernel_modules()
    rows = [_compile(build, sm) for name in modules for build, sm in _wanted(name)]
    if as_json:
        print(json.dumps(rows))
        return 0
    for row in rows:
        print(
            f"{row['kernel']:28} sm_{row['sm']:<4} shared {row['shared']:>7,} of {row['limit']:>7,} B  "
            f"registers {row['registers']:>3}  spills {row['spills']:>4} B  {row['tensor_core']}"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
