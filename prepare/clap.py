"""Train a CLAP audio encoder (HTS-AT) on captioned manifests, against texts as the frozen LM reads them.

    python prepare/clap.py config/demo_clap.py   # the demo's encoder, 2 cores
    python prepare/clap.py my.py --clap_config='{"audiocaps-AudioCaptioning/train": 1}' --clap_out=clap/my.pt

Contrastive: the mean of the audio tokens, through a linear map, and the mean of the language model's states
over the caption, through two layers, are to be near for a clip's own captions and far for others (CLAP, arXiv
2211.06687). Captions shared by several clips are positives of all of them. Manifest items may also carry
"positives": other captions of the clip, and "negatives": captions with their composition changed (order,
attributes), contrasted with this clip alone (Audio Flamingo 2, arXiv 2503.03983, section 3.1).

Writes the published layout, which clap_checkpoint reads: {"state_dict": {"module.audio_branch.*", ...}}.
"""
import math
import os
import sys
from collections import Counter
from functools import cache
from itertools import count

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import config as settings
from checkpoint import check_shapes, load_language_model
from data import AUDIO_SETTINGS, Clips, open_manifests
from model import ClapEncoder, log_mel, to_float
from tools.data.batches import plan_batches
from tools.checkpoint.devices import pick_device, pick_precision
from tools.checkpoint.files import save_atomically
from tools.common import UserError, check_writable

clap_config: dict = {}  # {"Name-Task/split": any weight > 0}; outputs are the captions
clap_out: str = "clap/epoch_16.pt"  # where the checkpoint goes
clap_steps: int = 1000  # optimizer steps
clap_batch_size: int = 32  # clips per step
clap_peak_lr: float = 2e-3  # of AdamW, one cycle: 10 % warm-up, cosine to zero
clap_muon_lr: float = 1e-2  # the same for matrices, which Muon trains (demo: in a third of AdamW's steps)
clap_text_bank: int = 256  # captions contrasted at every step beside the batch's own: those of the most clips
clap_augment: bool = True  # HTS-AT's SpecAugment and drop path; a few hundred steps learn faster without
clap_position: bool = False  # HTS-AT's position embedding (published: none): early and late tokens differ
clap_text_layers: int = 1000  # of the language model's blocks to read captions with; more than it has: all
clap_temperature: float = 0.02  # start value; learned. A clip near n texts at once has cosines of n^-1/2 only

WEIGHT_DECAY = 0.05
MOMENTUM = 0.95  # Muon's


@torch.no_grad()
def text_states(lm, tokenizer, device, texts, layers):
    """Mean-pooled states of the frozen language model after its first `layers` blocks: (n, D) float32."""
    means = []
    for first in tqdm(range(0, len(texts), 64), desc="captions", disable=None):
        part = texts[first:first + 64]
        batch = tokenizer(part, padding=True, padding_side="right", return_tensors="pt").to(device)
        hidden = lm(batch["input_ids"], layers=layers).float()
        mask = batch["attention_mask"][..., None]
        means.append((hidden * mask).sum(1) / mask.sum(1))
    return torch.cat(means)


def contrast(similarity, positive, contrasted):
    """Multi-positive InfoNCE. similarity (B, K); positive (B, K): captions of each clip; contrasted (B, K):
    captions a clip is contrasted with. -> mean over pairs and both directions of
    -log(e^s / (e^s + sum over negatives)): positives do not compete with each other."""
    negative = similarity.masked_fill(positive | ~contrasted, -1e9)  # not -inf: some may have no negative
    by_text = F.softplus(negative.logsumexp(0, keepdim=True) - similarity)[positive].mean()
    by_clip = F.softplus(negative.logsumexp(1, keepdim=True) - similarity)[positive].mean()
    return (by_text + by_clip) / 2


def quintic(square):
    """x x^T -> the factor an iteration multiplies x by: 3.4445 - 4.7750 x x^T + 2.0315 (x x^T)^2."""
    factor = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
    factor.diagonal().add_(3.4445)
    return factor


def orthogonalize(x):
    """Newton-Schulz: every singular value of a matrix to about 1, by products of the short side alone."""
    if x.shape[0] > x.shape[1]:
        return orthogonalize(x.T).T
    x = x / (x.norm() + 1e-7)
    square = x @ x.T
    product = factor = quintic(square)
    for _ in range(4):
        square = factor @ square @ factor
        factor = quintic(square)
        product = factor @ product
    return product @ x


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before they are added (Jordan et al. 2024), scaled to the
    size of an AdamW step (arXiv 2502.16982). In float32, where torch.optim.Muon rounds to bf16, which not
    every CPU multiplies."""

    def __init__(self, matrices, lr):
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self):
        (group,) = self.param_groups
        lr = group["lr"]
        for p in group["params"]:
            mean = self.state[p].setdefault("mean", torch.zeros_like(p))
            mean.lerp_(p.grad, 1 - MOMENTUM)
            direction = orthogonalize(p.grad.lerp(mean, MOMENTUM))  # Nesterov
            size = 0.2 * max(p.shape) ** 0.5  # of an AdamW step
            p.mul_(1 - lr * WEIGHT_DECAY)
            p.sub_(direction, alpha=size * lr)


# ------------------------------------------------------------------------------------------------------------
# Data


class Captions:
    """The captions of clips, numbered. numbers: {caption: number}; positives, negatives: of each clip; bank:
    the captions of most clips."""

    def __init__(self, clips, bank_size):
        self.numbers, self.positives, self.negatives = {}, [], []
        for m, j in clips.rows:
            manifest = clips.manifests[m]
            item = manifest.items[j]
            self.positives.append(self.number([item["output"], *item.get("positives", [])]))
            self.negatives.append(self.number(item.get("negatives", [])))
            if "" in self.numbers:
                raise UserError(f"{manifest.file}: data['{j}'] has an empty caption")
        if len(self.numbers) < 2:
            raise UserError("clap_config: expected at least two different captions")
        self.counts = Counter(text for texts in self.positives for text in texts)
        self.bank = {text for text, _ in self.counts.most_common(bank_size)}

    def number(self, texts):
        return [self.numbers.setdefault(text.strip().lower(), len(self.numbers)) for text in texts]

    def targets(self, rows):
        """Of a batch of B clips: the numbers (K,) of their captions and of the text bank; (B, K) which of
        them are a clip's own; (B, K) with which it is contrasted: all captions, of the negatives its own."""
        texts = sorted(self.bank.union(*(self.positives[i] + self.negatives[i] for i in rows)))
        positive = [[text in self.positives[i] for text in texts] for i in rows]
        contrasted = [[text in self.counts or text in self.negatives[i] for text in texts] for i in rows]
        return texts, torch.tensor(positive), torch.tensor(contrasted)


class LogMels:
    """Log-mels of clips. Those that can't be read are skipped and named; UserError above max_bad_fraction."""

    def __init__(self, clips, c, device):
        self.clips, self.device, self.unread = clips, device, set()
        self.most_unread = min(len(clips) - 1, max(1, c.max_bad_fraction * len(clips)))
        if c.cache_audio:
            self.read = cache(self.read)

    def read(self, i):
        """-> (W, frames, 64) of W windows, or None."""
        clip = self.clips[i]
        if clip["windows"] is not None:
            return log_mel(to_float(clip["windows"].to(self.device)))
        if i not in self.unread:
            tqdm.write(f"skipped: {clip['error']}", file=sys.stderr)
            self.unread.add(i)
        if len(self.unread) > self.most_unread:
            raise UserError(f"{len(self.unread)} of {len(self.clips)} clips can't be read (more than "
                            f"max_bad_fraction), last {clip['error']}")
        return None

    def endless_batches(self, batch_size, seed):
        """Yield {row: log-mel}. Every epoch has each readable clip once, in an order of its own."""
        no_sizes = np.zeros((len(self.clips), 2), np.int64)
        for epoch in count():
            for (rows,) in plan_batches(no_sizes, batch_size, [seed, epoch]):
                mels = {i: self.read(i) for i in rows.tolist()}
                mels = {i: mel for i, mel in mels.items() if mel is not None}
                if mels:
                    yield mels


# ------------------------------------------------------------------------------------------------------------
# Model and training


class ClapModel(nn.Module):
    """Audio encoder, projections of audio and text to one space, logit scale."""

    def __init__(self, c, text_width, width=256):
        super().__init__()
        self.encoder = ClapEncoder(
            c.clap_embed_dim,
            c.clap_depths,
            c.clap_num_heads,
            c.clap_spec_size,
            c.clap_position,
            c.clap_augment)
        for module in self.encoder.modules():
            if isinstance(module, nn.Linear):  # by fan-in: HTS-AT's own 0.02 suits a width of 1000, not 32
                nn.init.trunc_normal_(module.weight, std=module.in_features ** -0.5)
        # linear: what distinguishes captions is then linear in the tokens, as cross-attention reads them
        self.audio_projection = nn.Linear(self.encoder.width, width)
        self.text_projection = nn.Sequential(
            nn.Linear(text_width, width),
            nn.ReLU(),
            nn.Linear(width, width))
        self.logit_scale_a = nn.Parameter(torch.tensor(math.log(1 / c.clap_temperature)))

    def embed_audio(self, mels, autocast):
        """Log-mels (W, frames, 64) of B clips -> (B, width), of length 1: mean over tokens and windows."""
        with autocast:
            tokens = self.encoder.encode(torch.cat(mels))  # (sum W, S, C)
        clips = tokens.float().mean(1).split(list(map(len, mels)))
        pooled = torch.stack([windows.mean(0) for windows in clips])
        return F.normalize(self.audio_projection(pooled), dim=-1)


def make_optimizers(c, model):
    """Muon for matrices, AdamW for the rest."""
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    others = [p for p in model.parameters() if p not in set(matrices)]
    adamw = torch.optim.AdamW(others, c.clap_peak_lr, weight_decay=WEIGHT_DECAY, fused=True)
    return Muon(matrices, c.clap_muon_lr), adamw


def rate_factor(step, steps):
    """Learning rate over its peak: 10 % warm-up from 0.04, then down to 0, both along a cosine."""
    peak = max(steps / 10 - 1, 1)
    if step < peak:
        return 0.52 - 0.48 * math.cos(math.pi * step / peak)
    return 0.5 + 0.5 * math.cos(math.pi * (step - peak) / max(steps - 1 - peak, 1))


def main(c):
    check_shapes(c, "settings")
    if c.clap_temperature < 1e-3:
        raise UserError(f"clap_temperature = {c.clap_temperature}, expected 0.001 or more")
    out = settings.resolve_path(c.clap_out)
    check_writable(out)
    os.makedirs(os.path.dirname(out), exist_ok=True)
    device = pick_device(c.device)
    dtype, reason = pick_precision(c.precision, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)

    manifests = list(open_manifests(c, c.clap_config).values())
    audio_config = {name: getattr(c, name) for name in AUDIO_SETTINGS}
    clips = Clips(manifests, None, audio_config)
    captions = Captions(clips, c.clap_text_bank)
    print(f"{len(clips)} clips, {len(captions.numbers)} captions | {device}, {dtype} ({reason})")
    torch.manual_seed(c.seed)
    lm, tokenizer = load_language_model(c, device, dtype)
    states = text_states(lm, tokenizer, device, list(captions.numbers), c.clap_text_layers)
    states = (states - states.mean(0)) / (states.std(0) + 1e-3)

    model = ClapModel(c, states.shape[1]).to(device)
    optimizers = make_optimizers(c, model)
    batches = LogMels(clips, c, device).endless_batches(c.clap_batch_size, c.seed)
    losses = []
    model.train()
    for step, mels in zip(tqdm(range(1, c.clap_steps + 1), "clap", disable=None), batches):
        texts, positive, contrasted = captions.targets(mels)
        audio = model.embed_audio(list(mels.values()), autocast)  # (B, 256)
        text = F.normalize(model.text_projection(states[texts]), dim=-1)  # (K, 256)
        similarity = model.logit_scale_a.exp() * audio @ text.T
        loss = contrast(similarity, positive.to(device), contrasted.to(device))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if not (loss + norm).isfinite():
            raise UserError(f"step {step}: loss {loss.item()}, gradient norm {norm.item()} (clap_peak_lr, "
                            "clap_muon_lr, clap_temperature), nothing is written")
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = optimizer.defaults["lr"] * rate_factor(step - 1, c.clap_steps)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % 100 == 0 or step == c.clap_steps:
            if not any(losses):
                raise UserError("loss 0 at every step: a clip has no caption to be contrasted with "
                                "(clap_batch_size, clap_text_bank), nothing is written")
            tqdm.write(f"clap step {step}/{c.clap_steps} | loss {np.mean(losses[-100:]):.3f}")

    state = {}
    for name, tensor in model.state_dict().items():
        state["module." + name.replace("encoder.htsat", "audio_branch")] = tensor.cpu()
    save_atomically({"state_dict": state}, out)
    print(f"wrote {c.clap_out}")


if __name__ == "__main__":
    settings.run(main, __file__)
