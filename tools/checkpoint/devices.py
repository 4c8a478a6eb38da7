"""Where a model runs, and in which precision."""
import torch

from tools.common import UserError


def pick_device(name="auto"):
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type != "cuda":
            torch.zeros(1, device=device).item()  # a kind that holds no numbers, or is not here
    except (RuntimeError, AssertionError, ImportError) as error:
        raise UserError(f"device = {name!r}, expected auto, cpu, cuda or cuda:<n>") from error
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(f"device = {name!r}, but {f'only {count}' if count else 'no'} CUDA device is "
                         f"available here")
    return device


def pick_precision(precision, device):
    """-> (dtype of products and frozen weights, reason). bf16 where the hardware multiplies it faster than
    float32."""
    if precision not in ("amp_bf16", "fp32"):
        raise UserError(f"precision = {precision!r}, expected amp_bf16 or fp32")
    if precision == "fp32":
        return torch.float32, "asked for"
    units = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    if device.type == "cpu" and not units:
        return torch.float32, "this processor has no bf16 units, emulated bf16 is 5 times slower"
    return torch.bfloat16, "amp_bf16"
