"""Where a model runs, and in which precision."""
import torch

from model import pick_backend
from tools.common import UserError


def pick_device(name="auto"):
    devices = ["cpu"]
    if torch.cuda.is_available():  # without a CUDA context: each rank makes its own, on its own GPU
        devices = ["cuda", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if name not in ("auto", *devices):
        raise UserError(f"device = {name!r}, expected auto or, on this machine, {', '.join(devices)}")
    return torch.device(devices[0] if name == "auto" else name)


def pick_precision(precision, device):
    """-> (dtype of products and frozen weights, reason). bf16 where the hardware multiplies it faster than
    float32; with fp32, float32 everywhere: no TF32 either."""
    if precision not in ("amp_bf16", "fp32"):
        raise UserError(f"precision = {precision!r}, expected amp_bf16 or fp32")
    torch.backends.cuda.matmul.allow_tf32 = precision != "fp32"
    torch.backends.cudnn.allow_tf32 = precision != "fp32"
    if precision == "fp32":
        return torch.float32, "asked for"
    has_bf16 = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.type == "cpu" and not has_bf16:
        return torch.float32, "this processor has no bf16 units, emulated bf16 is 5 times slower"
    return torch.bfloat16, "amp_bf16"


def pick_compute(c, device):
    """-> dtype of products and frozen weights, and a line for the log: device, dtype and attention backend,
    and why they were chosen."""
    dtype, reason = pick_precision(c.precision, device)
    backend, why = c.attention_backend, "asked for"
    if backend == "auto":
        backend, why = pick_backend(device)
    return dtype, f"{device} | {dtype} ({reason}) | cross-attention: {backend} ({why})"
