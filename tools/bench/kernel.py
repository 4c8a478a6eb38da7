"""tools/bench.py kernel: gated cross-attention by every backend, and what the compiler makes of the Triton
kernels, which needs no GPU."""
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import product

import torch

import model
from model import block_sizes, gated_cross_attention, pick_backend, triton
from tools.bench.common import time_in_turns
from tools.checkpoint.devices import pick_device

ARCHITECTURES = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64)}
KERNELS = ("forward", "dq", "dkv", "combine")
TYPES = {"scale": "fp32", "n_ptr": "*i64", "n_max_ptr": "*i64"}  # of kernels' arguments
TYPES |= dict.fromkeys(("gate_ptr", "lse_ptr", "delta_ptr", "part_ptr", "part_lse_ptr"), "*fp32")

# ------------------------------------------------------------------------------------------------------------
# Ahead of time


def compile_kernel(arch, name, dtype, d):
    """Compile one entry of the table of block sizes, in the form for training -> what it needs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kernel = getattr(model, f"{name}_kernel")
    sizes = block_sizes(name, dtype, d, T=512)
    options = {"num_warps": sizes.pop("num_warps"), "num_stages": sizes.pop("num_stages")}
    sizes |= {"H": 8, "D": d, "STORE_Y": True}
    pointer = "*bf16" if dtype == torch.bfloat16 else "*fp32"
    signature, constants, attributes = {}, {}, {}
    for i, argument in enumerate(kernel.arg_names):
        is_pointer = argument.endswith("_ptr")
        signature[argument] = TYPES.get(argument, pointer if is_pointer else "i32")
        if argument in sizes:
            signature[argument] = "constexpr"
            constants[argument] = sizes[argument]
        if is_pointer or re.fullmatch("[qkv]_[btnh]", argument):
            attributes[i,] = [["tt.divisibility", 16]]  # as at run time
    source = ASTSource(kernel, signature, constants, attributes)
    target = GPUTarget(*ARCHITECTURES[arch])
    compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm.get("ptx", "")
    return {
        "arch": arch,
        "kernel": name,
        "dtype": str(dtype),
        "spill_bytes": spilled_bytes(compiled),
        "shared_bytes": compiled.metadata.shared,
        "wgmma": ptx.count("wgmma.mma_async"),
        "async_copies": ptx.count("cp.async.cg")}


def spilled_bytes(compiled):
    if "amdgcn" in compiled.asm:
        registers = re.findall(r"gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])
        return 4 * sum(map(int, registers))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", f.name]
        usage = subprocess.check_output(command, text=True)
    sizes = re.findall(r"(?:STACK|LOCAL):(\d+)", usage)  # no arrays: a stack means spills
    return sum(map(int, sizes))


def compile_all():
    """Compile the table of block sizes; bfloat16 stands for float16: the same bytes. Short texts use less,
    and so do heads of 32, in the blocks of 64."""
    entries = product(ARCHITECTURES, KERNELS, (torch.bfloat16, torch.float32), (64, 128))
    with ProcessPoolExecutor() as pool:
        return list(pool.map(compile_kernel, *zip(*entries)))


def worst_entries(entries):
    """{architecture: the most that any entry spills and takes of shared memory}."""
    worst = {arch: {"spill_bytes": 0, "shared_bytes": 0} for arch in ARCHITECTURES}
    for entry in entries:
        for name, most in worst[entry["arch"]].items():
            worst[entry["arch"]][name] = max(most, entry[name])
    return worst


# ------------------------------------------------------------------------------------------------------------
# Time


def time_backends(device, dtype, shapes, backends):
    """-> a row of every shape (B, T, N), pass and backend: milliseconds; on a GPU peak memory."""
    rows = []
    for (B, T, N), backward in product(shapes, (False, True)):
        make = partial(torch.randn, device=device, dtype=dtype, requires_grad=backward)
        q = make(B, T, 8, 64)
        kv = make(B, N, 2, 8, 64)
        gate = make(1)
        n_keys = N * torch.arange(B, 0, -1, device=device) // B  # ragged clips

        def attend(backend):
            y = gated_cross_attention(q, *kv.unbind(2), n_keys, gate, backend)
            if backward:
                torch.autograd.grad(y.sum(), (q, kv, gate))

        shape = {"B": B, "T": T, "N": N, "backward": backward}
        print(shape)
        runs = {backend: partial(attend, backend) for backend in backends}
        for backend, seconds in time_in_turns(runs, device).items():
            row = shape | {"backend": backend, "ms": 1e3 * seconds}
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                runs[backend]()
                row["peak_mb"] = torch.cuda.max_memory_allocated() / 1e6  # with its inputs
            rows.append(row)
    return rows


def kernel(c):
    device = pick_device(c.device)
    backend, reason = pick_backend(device)
    figures = {"auto": backend, "reason": reason, "gpu": None, "aot": {}}
    if device.type == "cuda":
        shapes = product((1, 8), (1, 128, 512), (64, 768, 1920))
        backends = sorted({"naive", "sdpa", backend})
        rows = time_backends(device, torch.bfloat16, shapes, backends)
        figures["gpu"] = {"device": torch.cuda.get_device_name(device), "rows": rows}
    if triton.__version__:
        figures["aot"] = worst_entries(compile_all())
    else:
        print("no report of the compiler: triton is not installed")
    return figures
