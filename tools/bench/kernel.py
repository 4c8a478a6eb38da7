"""tools/bench.py kernel: gated cross-attention by every backend, and what the compiler makes of the Triton
kernels, which needs no GPU."""
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import torch

import model
from model import block_sizes, gated_cross_attention, pick_backend, triton
from tools.bench.common import print_table, time_in_turns
from tools.checkpoint.devices import pick_device

ARCHITECTURES = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "sm_100": ("cuda", 100, 32),
                 "gfx942": ("hip", "gfx942", 64)}
KERNELS = ("forward", "dq", "dkv", "combine")
TRITON_NAMES = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}

# ------------------------------------------------------------------------------------------------------------
# Ahead of time


def compile_kernel(arch, name, dtype, d, T=512):
    """Compile one entry of the table of block sizes, in the form for training -> what it needs."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    kernel, sizes = getattr(model, f"{name}_kernel"), block_sizes(name, getattr(torch, dtype), d, T)
    entry = {"arch": arch, "kernel": name, "dtype": dtype, "d": d, **sizes}
    options = {option: sizes.pop(option) for option in ("num_warps", "num_stages")}
    constants = {"H": 8, "D": d, "STORE_Y": True} | sizes
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    types = {"scale": "fp32", "n_ptr": "*i64", "n_max_ptr": "*i64"}
    types |= {f"{key}_ptr": "*fp32" for key in ("gate", "lse", "delta", "part", "part_lse")}
    types |= dict.fromkeys(constants, "constexpr")
    signature, attributes = {}, {}
    for i, argument in enumerate(kernel.arg_names):
        default = f"*{TRITON_NAMES[dtype]}" if argument.endswith("_ptr") else "i32"
        signature[argument] = types.get(argument, default)
        if argument.endswith("_ptr") or re.fullmatch("[qkv]_[btnh]", argument):
            attributes[i,] = [["tt.divisibility", 16]]  # as at run time
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget(*ARCHITECTURES[arch]), options=options)
    ptx = compiled.asm.get("ptx", "")
    return entry | {"spill_bytes": spilled_bytes(compiled), "shared_bytes": compiled.metadata.shared,
                    "wgmma": ptx.count("wgmma.mma_async"), "async_copies": ptx.count("cp.async.cg")}


def spilled_bytes(compiled):
    if "amdgcn" in compiled.asm:
        return 4 * sum(map(int, re.findall(r"gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"])))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(compiled.asm["cubin"])
        f.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", f.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return sum(map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", usage)))  # no arrays: a stack means spills


def compile_all(architectures=ARCHITECTURES):
    """Compile the table of block sizes; bfloat16 stands for float16: the same bytes. Short texts take less."""
    if model.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 replaces the kernels by interpreted ones: unset it to compile them")
    entries = product(architectures, KERNELS, ("bfloat16", "float32"), (32, 64, 128))
    with ProcessPoolExecutor() as pool:
        return list(pool.map(compile_kernel, *zip(*entries)))


def worst_entries(entries):
    """{architecture: the most that any entry spills and takes of shared memory}."""
    return {arch: {key: max(entry[key] for entry in entries if entry["arch"] == arch)
                   for key in ("spill_bytes", "shared_bytes")} for arch in ARCHITECTURES}


# ------------------------------------------------------------------------------------------------------------
# Time


def time_backends(device, dtype, shapes, backends, heads=8, d=64):
    """-> a row of every shape (B, T, N), pass and backend: milliseconds, TFLOP/s; on a GPU peak memory."""
    rows = []
    for (B, T, N), backward in product(shapes, (False, True)):
        torch.manual_seed(0)
        n_keys = (N * torch.arange(B, 0, -1) // B).clamp(min=1).to(device)  # ragged clips
        q = torch.randn(B, T, heads, d, device=device, dtype=dtype, requires_grad=backward)
        kv = torch.randn(B, N, 2, heads, d, device=device, dtype=dtype, requires_grad=backward)
        gate = torch.full((1,), 0.5, device=device, requires_grad=backward)

        def attend(backend):
            y = gated_cross_attention(q, *kv.unbind(2), n_keys, gate, backend)
            if backward:
                torch.autograd.grad(y.sum(), (q, kv, gate))

        seconds = time_in_turns({name: lambda name=name: attend(name) for name in backends}, device)
        operations = 4 * T * int(n_keys.sum()) * heads * d * (3.5 if backward else 1)
        for name, (low, median, high) in seconds.items():
            rows.append({"B": B, "T": T, "N": N, "backward": backward, "backend": name, "ms": 1e3 * median,
                         "p20_ms": 1e3 * low, "p80_ms": 1e3 * high, "tflops": operations / median / 1e12,
                         "peak_mb": peak_megabytes(lambda: attend(name), device)})
    return rows


def peak_megabytes(run, device):
    """What a run allocates; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    return (torch.cuda.max_memory_allocated(device) - before) / 1e6


def kernel(c):
    device = pick_device(c.device)
    backend, reason = pick_backend(device)
    print(f"gated cross-attention, 8 heads of 64, torch {torch.__version__}; auto = {backend} ({reason})")
    figures = {"mode": "kernel", "device": str(device), "torch": torch.__version__, "auto": backend,
               "gpu": None, "aot": {}}
    if device.type == "cuda":
        shapes = [*product((8,), (32, 128, 512), (64, 768, 1920)), (1, 1, 1920)]
        backends = ["naive", "sdpa"] + ["triton"] * (backend == "triton")
        rows = time_backends(device, torch.bfloat16, shapes, backends)
        figures["gpu"] = {"name": torch.cuda.get_device_name(device), "dtype": "bfloat16", "rows": rows}
    else:
        rows = time_backends(device, torch.float32, [(2, 32, 64), (2, 64, 192), (1, 1, 768)], ["naive", "sdpa"])
        figures["cpu"] = {"dtype": "float32", "rows": rows}
    print_table(list(rows[0]), [row.values() for row in rows])
    if triton.__version__:
        figures["aot"] = worst_entries(compile_all())
        print_table(["compiled ahead of time, at most", "spilled bytes", "shared bytes"],
                    [[arch, *most.values()] for arch, most in figures["aot"].items()])
    else:
        print("no report of the compiler: triton is not installed")
    return figures
