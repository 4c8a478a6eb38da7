"""tools/bench.py kernel: gated cross-attention, naive, by SDPA and by Triton on a GPU, and what the compiler
makes of its kernels, on any machine."""
import math
import os
import platform
import re
import subprocess
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor

import torch
import torch.nn.functional as F

import model
from model import block_sizes, gated_cross_attention, keys_values, pick_backend, triton

# ------------------------------------------------------------------------------------------------------------
# What the compiler makes of the kernels, on any machine: no GPU is needed to compile for one

ARCHITECTURES = {  # shared memory and registers per multiprocessor; 2,048 threads and 32 blocks on each
    "sm_80": {"target": ("cuda", 80, 32), "shared": 164 * 1024, "registers": 65536},
    "sm_90": {"target": ("cuda", 90, 32), "shared": 228 * 1024, "registers": 65536},
    "sm_100": {"target": ("cuda", 100, 32), "shared": 228 * 1024, "registers": 65536},
    "gfx942": {"target": ("hip", "gfx942", 64), "shared": 64 * 1024, "registers": 131072}}
KERNELS = ("forward", "dq", "dkv", "combine")


def compile_entry(entry):
    """(architecture, kernel, dtype, d, T) -> dict of what one table entry needs on one architecture."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    arch, name, dtype, d, T = entry
    kernel, sizes = getattr(model, f"{name}_kernel"), block_sizes(name, getattr(torch, dtype), d, T)
    options = {option: sizes.pop(option) for option in ("num_warps", "num_stages")}
    # the training form, which keeps the most in registers, for 8 heads
    constants = {"H": 8, "D": d, "STORE_Y": True, "STORE_O": True, **sizes}
    constants = {key: value for key, value in constants.items() if key in kernel.arg_names}
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[dtype]
    special = {"n_ptr": "*i64", "n_max_ptr": "*i64", "scale": "fp32"}
    special |= {f"{key}_ptr": "*fp32" for key in ("gate", "lse", "delta", "part", "part_lse")}
    special |= dict.fromkeys(constants, "constexpr")
    kinds = {arg: special.get(arg, f"*{short}" if "_ptr" in arg else "i32") for arg in kernel.arg_names}
    aligned = lambda arg: "_ptr" in arg or re.fullmatch("[qkv]_[btnh]", arg)  # 16 bytes, as at run time
    divisible = [(i,) for i, arg in enumerate(kernel.arg_names) if aligned(arg)]
    source = ASTSource(kernel, kinds, constants, {place: [["tt.divisibility", 16]] for place in divisible})
    compiled = triton.compile(source, target=GPUTarget(*ARCHITECTURES[arch]["target"]), options=options)
    if arch.startswith("sm_"):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "kernel.cubin")
            with open(path, "wb") as f:
                f.write(compiled.asm["cubin"])
            usage = subprocess.run([triton.knobs.nvidia.cuobjdump.path, "-res-usage", path], check=True,
                                   capture_output=True, text=True).stdout
        count = lambda field: int(re.search(rf"{field}:(\d+)", usage)[1])
        registers, spilled = count("REG"), count("STACK") + count("LOCAL")  # no arrays: a stack means spills
    else:
        count = lambda field: int(re.search(rf"\.{field}:\s*(\d+)", compiled.asm["amdgcn"])[1])
        registers, spilled = count("vgpr_count"), 4 * (count("vgpr_spill_count") + count("sgpr_spill_count"))
    threads, limits = options["num_warps"] * ARCHITECTURES[arch]["target"][2], ARCHITECTURES[arch]
    shared = compiled.metadata.shared
    per_block = shared + (1024 if arch.startswith("sm_") else 0)  # CUDA keeps 1 KB of each block for itself
    blocks = min(limits["registers"] // (math.ceil(registers / 8) * 8 * threads), 2048 // threads, 32,
                 limits["shared"] // max(per_block, 1))
    ptx = compiled.asm.get("ptx", "")
    return {"arch": arch, "kernel": name, "dtype": dtype, "d": d, **sizes, **options, "registers": registers,
            "spill_bytes": spilled, "shared_bytes": shared, "blocks_per_sm": blocks,
            "wgmma": ptx.count("wgmma.mma_async"), "async_copies": ptx.count("cp.async.cg")}


def aot_report():
    """Registers, spilled bytes, shared memory, blocks per SM: a dict per architecture and table entry."""
    if model.INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 replaces the kernels by interpreted ones; "
                           "unset it to compile them")
    entries = {}  # bfloat16 stands for float16: the same bytes; T picks the rows for short texts
    for arch in ARCHITECTURES:
        for name in KERNELS:
            for dtype in ("bfloat16", "float32"):
                for d in (32, 64, 128):
                    for T in (512,) if arch == "gfx942" else (16, 32, 512):
                        sizes = block_sizes(name, getattr(torch, dtype), d, T)
                        entries.setdefault((arch, name, dtype, d, *sizes.values()), (arch, name, dtype, d, T))
        entries[arch] = (arch, "dkv", "float16", 64, 512)
    with ProcessPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(pool.map(compile_entry, entries.values()))


def print_aot(rows):
    print("\ncompiled ahead of time, all heads of 64 channels and long texts "
          "(the summary is over every entry):")
    print(f"{'':8}{'kernel':10}{'dtype':10}{'tokens':>7}{'keys':>6}{'warps':>6}{'registers':>11}"
          f"{'spilled B':>11}{'shared B':>10}{'blocks/SM':>11}")
    longest = {(r["arch"], r["kernel"], r["dtype"]): r for r in rows if r["d"] == 64}  # later: longer texts
    for r in longest.values():
        print(f"{r['arch']:8}{r['kernel']:10}{r['dtype']:10}{r['BLOCK_T']:7}{r.get('BLOCK_N', '-'):>6}"
              f"{r['num_warps']:6}{r['registers']:11}"
              f"{r['spill_bytes']:11}{r['shared_bytes']:10}{r['blocks_per_sm']:11}")
    summary, worst = {}, ("spill_bytes", "shared_bytes", "registers")
    for arch in ARCHITECTURES:
        mine = [r for r in rows if r["arch"] == arch]
        summary[arch] = {key: max(r[key] for r in mine) for key in worst}
        summary[arch]["entries"] = len(mine)
        print(f"{arch:8}at most over {len(mine)} entries: {summary[arch]}")
    return summary


# ------------------------------------------------------------------------------------------------------------
# Time and memory


def timed(run, device, repeats=20):
    """-> (median, p20, p80) seconds, peak bytes above the start. Warm; on a GPU each run has a cold L2."""
    for _ in range(3):
        run()
    seconds, peak = [], None
    if device.type == "cuda":
        flush = torch.empty(256 * 2**20, dtype=torch.uint8, device=device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            flush.zero_()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize(device)
            seconds.append(start.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - before
    seconds.sort()
    return [seconds[int(part * (repeats - 1))] for part in (0.5, 0.2, 0.8)], peak


def per_clip(q, k, v, lengths, gate):
    """SDPA clip by clip over its own keys: no mask, but a launch per clip and lengths known to Python."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T or N, d)
    clips = [F.scaled_dot_product_attention(q[i:i + 1], k[i:i + 1, :, :n], v[i:i + 1, :, :n])
             for i, n in enumerate(lengths)]
    return (gate.tanh() * torch.cat(clips).transpose(1, 2)).to(q.dtype)


def counted(T, lengths, N, H, d, size, backward):
    """-> (operations, least bytes): real keys, q, y and gradients move once; padded dk, dv are written."""
    B, keys, tokens = len(lengths), sum(lengths) * H * d * size, len(lengths) * T * H * d * size
    operations, moved = 4 * T * sum(lengths) * H * d, 2 * tokens + 2 * keys
    if backward:  # o and lse out; then q, o, dy, k, v, lse in and dq, dk, dv out
        moved += 5 * tokens + 2 * keys + 2 * B * N * H * d * size + 8 * B * H * T
        operations = operations * 7 // 2
    return operations, moved


def make_case(device, dtype, B, T, N, D, H, d):
    """-> leaves, dy, ragged lengths, attend(backend): attention alone if D = 0, else a whole gated block."""
    torch.manual_seed(0)
    make = lambda *shape: torch.randn(shape, device=device, dtype=dtype)
    lengths = [max(1, N * (B - i) // B // 64 * 64) for i in range(B)]  # the longest clip fills N
    n_keys, dy = torch.tensor(lengths, device=device), make(B, T, D or H * d)
    x, audio = make(B, T, D or H * d).requires_grad_(), make(B, N, 2048 if D else 2 * H * d).requires_grad_()
    if D:
        block = model.GatedCrossAttention(D, 2048, H, d).to(device, dtype)
        for gate in (block.attn_gate, block.ff_gate):
            gate.data.fill_(0.5)
        attend = lambda backend: block(x, *keys_values([block], audio), n_keys, backend)
        return [x, audio, *block.parameters()], dy, lengths, attend
    gate = torch.full((1,), 0.5, device=device, requires_grad=True)

    def attend(backend):
        q, (k, v) = x.view(B, T, H, d), audio.view(B, N, 2, H, d).unbind(2)
        y = per_clip(q, k, v, lengths, gate) if backend == "sdpa per clip" else gated_cross_attention(
            q, k, v, n_keys, gate, backend)
        return y.flatten(2)

    return [x, audio, gate], dy, lengths, attend


def kernel_rows(device, dtype, shapes, backends, H=8, d=64):
    """Times of every backend over shapes (B, T, N, D); D = 0: attention alone, else the whole gated block."""
    rate, bandwidth = None, None
    if device.type == "cuda":
        a = torch.randn(8192, 8192, device=device, dtype=dtype)
        rate = 2 * 8192**3 / timed(lambda: a @ a, device)[0][0]
        big = torch.empty(2**30, dtype=torch.uint8, device=device)
        bandwidth = 2 * big.numel() / timed(big.clone, device)[0][0]
        print(f"floor: {rate / 1e12:.0f} TFLOP/s measured matmul, {bandwidth / 1e9:.0f} GB/s measured copy")
    print(f"{'B':>3}{'T':>5}{'N':>6}{'D':>6}  {'':12}{'backend':14}{'ms':>9}{'p20':>9}{'p80':>9}"
          f"{'TFLOP/s':>9}{'GB/s':>8}{'peak MB':>9}{'floor ms':>10}")
    rows = []
    for B, T, N, D in shapes:
        leaves, dy, lengths, attend = make_case(device, dtype, B, T, N, D, H, d)
        for backward in (False, True):
            operations, moved = counted(T, lengths, N, H, d, dtype.itemsize, backward)
            if D:
                products = 2 * H * d * (2 * B * T * D + 2 * B * N * 2048) + 2 * B * T * 8 * D * D
                operations += products * (3 if backward else 1)
                moved += sum(t.numel() for t in leaves) * dtype.itemsize * (3 if backward else 1)
            floor = max(operations / rate, moved / bandwidth) if rate else None
            for backend in backends:
                if D and backend == "sdpa per clip":
                    continue

                def run(backend=backend, backward=backward, attend=attend, dy=dy, leaves=leaves):
                    if backward:
                        torch.autograd.grad(attend(backend), leaves, dy)
                    else:
                        with torch.no_grad():
                            attend(backend)

                (median, p20, p80), peak = timed(run, device)
                row = {"B": B, "T": T, "N": N, "D": D, "backward": backward, "backend": backend,
                       "ms": median * 1e3, "p20_ms": p20 * 1e3, "p80_ms": p80 * 1e3,
                       "tflops": operations / median / 1e12, "gb_per_s": moved / median / 1e9,
                       "peak_mb": peak and peak / 1e6, "floor_ms": floor and floor * 1e3}
                rows.append(row)
                on_gpu = f"{row['peak_mb']:9.1f}{row['floor_ms']:10.4f}" if rate else f"{'n/a':>9}{'n/a':>10}"
                print(f"{B:3}{T:5}{N:6}{D or '-':>6}  {'fwd + bwd' if backward else 'forward':12}{backend:14}"
                      f"{row['ms']:9.3f}{row['p20_ms']:9.3f}{row['p80_ms']:9.3f}{row['tflops']:9.3f}"
                      f"{row['gb_per_s']:8.1f}{on_gpu}")
    return rows


def kernel():
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    backend, reason = pick_backend(device)
    name = f"{platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    print(f"gated cross-attention, 8 heads of 64, on {name}, torch {torch.__version__}; "
          f"auto = {backend} ({reason})")
    figures = {"mode": "kernel", "device": name, "torch": torch.__version__,
               "auto": backend, "reason": reason}
    if device.type == "cuda":
        shapes = [(8, T, N, 0) for T in (32, 128, 256, 512) for N in (64, 768, 1920)]
        shapes += [(1, 1, 768, 0), (1, 1, 1920, 0)] + [(8, 256, 768, D) for D in (896, 1536, 2048)]
        backends = ["naive", "sdpa", "sdpa per clip"] + ["triton"] * (backend == "triton")
        figures["gpu"] = {"rows": kernel_rows(device, torch.bfloat16, shapes, backends), "dtype": "bfloat16"}
    else:
        figures["gpu"] = None
        shapes = [(2, 32, 64, 0), (2, 64, 192, 0), (1, 1, 768, 0), (2, 32, 192, 896)]
        rows = kernel_rows(device, torch.float32, shapes, ["naive", "sdpa"])
        figures["cpu"] = {"rows": rows, "dtype": "float32"}
    print("\nbytes moved by count, bfloat16, 8 clips of 768 keys: "
          "the least, and one (B, H, T, N) of the naive form")
    for T in (32, 128, 256, 512):
        least = [counted(T, [768] * 8, 768, 8, 64, 2, backward)[1] / 1e6 for backward in (False, True)]
        scores = 8 * 8 * T * 768 * 2 / 1e6
        print(f"T {T:4}: forward {least[0]:6.1f} MB, with backward {least[1]:6.1f} MB; "
              f"scores {scores:6.1f} MB")
    figures["aot"] = {}
    if triton.__version__:
        figures["aot"] = print_aot(aot_report())
    else:
        print("no report of the compiler: triton is not installed")
    return figures
