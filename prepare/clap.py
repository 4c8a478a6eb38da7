"""Train a CLAP audio encoder (HTS-AT) on captioned manifests, against texts as the frozen LM reads them.

    python prepare/clap.py config/demo.py        # the demo's encoder, 2 cores
    python prepare/clap.py my.py --clap_config='{"audiocaps-AudioCaptioning/train": 1}' --clap_out=clap/my.pt

Contrastive: the mean of the audio tokens, through a linear map, and the mean of the language model's states
over the caption, through two layers, are to be near for a clip's own captions and far for others (CLAP, arXiv
2211.06687). Captions shared by several clips are positives of all of them. Manifest items may also carry
"positives": other captions of the clip, and "negatives": captions with their composition changed (order,
attributes), contrasted with this clip alone (Audio Flamingo 2, arXiv 2503.03983, section 3.1).

Writes the published layout, which clap_checkpoint reads:
{"epoch", "name", "state_dict": {"module.audio_branch.*", ...}}.
"""
import math
import os
import sys
import time
from collections import Counter
from functools import cache, partial
from itertools import chain, count

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import config as settings
from checkpoint import load_language_model
from data import AUDIO_SETTINGS, Clips, open_manifests
from model import ClapEncoder, log_mel, to_float
from tools.data.batches import plan_batches
from tools.checkpoint.devices import pick_device, pick_precision
from tools.checkpoint.files import save_atomically
from tools.common import UserError, check_writable

clap_config: dict = {}  # {"Name-Task/split": any weight > 0}; outputs are the captions
clap_valid_config: dict = {}  # the same, for the retrieval score at the end
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


@torch.no_grad()
def text_states(lm, tokenizer, device, layers, texts):
    """Mean-pooled states of the frozen language model after its first `layers` blocks: (n, D) float32. The
    texts are different ones."""
    by_length = sorted(texts, key=len)
    states = {}
    for first in tqdm(range(0, len(by_length), 64), desc="captions", disable=None):
        part = by_length[first:first + 64]
        batch = tokenizer(part, padding=True, padding_side="right", return_tensors="pt").to(device)
        hidden = lm(batch["input_ids"], layers=layers).float()
        mask = batch["attention_mask"][..., None]
        states.update(zip(part, (hidden * mask).sum(1) / mask.sum(1)))
    return torch.stack([states[text] for text in texts])


def contrast(similarity, positive, contrasted):
    """Multi-positive InfoNCE. similarity (B, K); positive (B, K): captions of each clip; contrasted (B, K):
    captions a clip is contrasted with. -> mean over pairs and both directions of
    -log(e^s / (e^s + sum over negatives)): positives do not compete with each other."""
    negative = similarity.masked_fill(positive | ~contrasted, -1e9)  # not -inf: some may have no negative
    by_text = F.softplus(negative.logsumexp(0, keepdim=True) - similarity)[positive].mean()
    by_clip = F.softplus(negative.logsumexp(1, keepdim=True) - similarity)[positive].mean()
    return (by_text + by_clip) / 2


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal before they are added (Jordan et al. 2024), scaled to the
    size of an AdamW step (arXiv 2502.16982). In float32, where torch.optim.Muon rounds to bf16, which not
    every CPU multiplies."""

    def __init__(self, matrices, lr, weight_decay, momentum=0.95):
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @staticmethod
    def quintic(square):
        """x x^T -> the factor an iteration multiplies x by: 3.4445 - 4.7750 x x^T + 2.0315 (x x^T)^2."""
        factor = torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315)
        factor.diagonal().add_(3.4445)
        return factor

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["momentum"])
                x = p.grad.lerp(mean, group["momentum"])  # Nesterov
                tall = x.shape[0] > x.shape[1]
                x = (x.T if tall else x) / (x.norm() + 1e-7)
                # Newton-Schulz: every singular value to about 1, by products of the short side alone
                square = x @ x.T
                factor = product = self.quintic(square)
                for _ in range(4):
                    square = factor @ square @ factor
                    factor = self.quintic(square)
                    product = factor @ product
                x = product @ x
                x = x.T if tall else x
                size = 0.2 * max(x.shape) ** 0.5  # of an AdamW step
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(x, alpha=size * group["lr"])


# ------------------------------------------------------------------------------------------------------------
# Data


class Captions:
    """The captions of clips, numbered. numbers: {caption: number}; positives, negatives: of each clip."""

    def __init__(self, clips, bank_size):
        self.numbers, self.positives, self.negatives = {}, [], []
        for m, j in clips.rows:
            item = clips.manifests[m].items[j]
            self.positives.append(self.number([item["output"], *item.get("positives", [])]))
            self.negatives.append(self.number(item.get("negatives", [])))
            if "" in self.numbers:
                raise UserError(f"{clips.manifests[m].file}: data['{j}'] has an empty caption")
        if len(self.numbers) < 2:
            raise UserError("clap_config: expected at least two different captions")
        self.counts = Counter(chain.from_iterable(self.positives))
        self.bank = {text for text, _ in self.counts.most_common(bank_size)}

    def number(self, texts):
        texts = [text.strip().lower() for text in texts]
        return [self.numbers.setdefault(text, len(self.numbers)) for text in texts]

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

    def batch(self, rows):
        """-> the rows that can be read, and their log-mels."""
        mels = {i: self.read(i) for i in rows}
        rows = [i for i in rows if mels[i] is not None]
        return rows, [mels[i] for i in rows]


def endless_batches(log_mels, batch_size, seed):
    """Yield rows and their log-mels. Every epoch has each readable clip once, in an order of its own."""
    no_sizes = np.zeros((len(log_mels.clips), 2), np.int64)
    for epoch in count():
        for (rows,) in plan_batches(no_sizes, batch_size, [seed, epoch]):
            rows, mels = log_mels.batch(rows.tolist())
            if rows:
                yield rows, mels


# ------------------------------------------------------------------------------------------------------------
# Model and training


class ClapModel(nn.Module):
    """Audio encoder, projections of audio and text to one space, logit scale."""

    def __init__(self, c, text_width, width=256):
        super().__init__()
        self.encoder = ClapEncoder(c.clap_embed_dim, c.clap_depths, c.clap_num_heads, c.clap_spec_size,
                                   c.clap_position, c.clap_augment).requires_grad_(False)
        for p in self.encoder.trainable():
            p.requires_grad_(True)
        for module in self.encoder.modules():
            if isinstance(module, nn.Linear):  # by fan-in: HTS-AT's own 0.02 suits a width of 1000, not 32
                nn.init.trunc_normal_(module.weight, std=module.in_features ** -0.5)
        # linear: what distinguishes captions is then linear in the tokens, as cross-attention reads them
        self.audio_projection = nn.Linear(self.encoder.width, width)
        self.text_projection = nn.Sequential(nn.Linear(text_width, width), nn.ReLU(), nn.Linear(width, width))
        self.logit_scale_a = nn.Parameter(torch.tensor(math.log(1 / c.clap_temperature)))

    def embed_audio(self, mels, autocast):
        """Log-mels (W, frames, 64) of B clips -> (B, width), of length 1: mean over tokens and windows."""
        with autocast:
            tokens = self.encoder.encode(torch.cat(mels))  # (sum W, S, C)
        clips = tokens.float().mean(1).split([len(mel) for mel in mels])
        pooled = torch.stack([windows.mean(0) for windows in clips])
        return F.normalize(self.audio_projection(pooled), dim=-1)

    def embed_text(self, states):
        """States (n, D) of the language model -> (n, width), of length 1."""
        return F.normalize(self.text_projection(states), dim=-1)


def make_optimizers(c, model):
    """Muon for matrices and AdamW for the rest, and their schedules: one cycle each."""
    matrices = [m.weight for m in model.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad]
    others = [p for p in model.parameters() if p.requires_grad and p not in set(matrices)]
    muon = Muon(matrices, c.clap_muon_lr, weight_decay=0.05)
    adamw = torch.optim.AdamW(others, c.clap_peak_lr, weight_decay=0.05, fused=True)
    one_cycle = partial(torch.optim.lr_scheduler.OneCycleLR, total_steps=c.clap_steps, pct_start=0.1,
                        cycle_momentum=False)
    return (muon, adamw), (one_cycle(muon, c.clap_muon_lr), one_cycle(adamw, c.clap_peak_lr))


def save_clap(model, epoch, path):
    """The published layout; UserError where a weight is not finite."""
    state = {}
    for name, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise UserError(f"{name} is not finite (clap_peak_lr, clap_muon_lr), nothing is written")
        state["module." + name.replace("encoder.htsat", "audio_branch")] = tensor.cpu()
    save_atomically({"epoch": epoch, "name": "clap", "state_dict": state}, path)


@torch.no_grad()
def print_retrieval(model, log_mels, embed_captions, autocast):
    """Print how often the nearest caption is a clip's own, on clips that were not trained on."""
    rows, mels = log_mels.batch(range(len(log_mels.clips)))
    audio = torch.cat([model.embed_audio([mel], autocast) for mel in mels])
    answers = [log_mels.clips.item(i)["output"].strip().lower() for i in rows]
    names = sorted(set(answers))
    nearest = (audio @ embed_captions(names).T).argmax(1).tolist()
    right = np.mean([names[n] == answer for n, answer in zip(nearest, answers)])
    print(f"audio to caption, unseen clips: {right:.1%} right of {len(names)} captions "
          f"(chance {1 / len(names):.1%})")


def main(c):
    start = time.time()
    if not c.clap_config:
        raise UserError("clap_config is empty: name the manifests whose outputs are captions")
    out = settings.resolve_path(c.clap_out)
    check_writable(out)
    os.makedirs(os.path.dirname(out), exist_ok=True)
    device = pick_device(c.device)
    dtype, reason = pick_precision(c.precision, device)
    autocast = torch.autocast(device.type, dtype, enabled=dtype is not torch.float32)

    manifests = list(open_manifests(c, c.clap_config).values())
    valid_manifests = list(open_manifests(c, c.clap_valid_config).values())
    audio_config = {name: getattr(c, name) for name in AUDIO_SETTINGS}
    clips = Clips(manifests, None, audio_config)
    captions = Captions(clips, c.clap_text_bank)
    log_mels = LogMels(clips, c, device)
    print(f"{len(clips)} clips, {len(captions.numbers)} captions, text bank {len(captions.bank)} | {device}, "
          f"{dtype} ({reason})")
    torch.manual_seed(c.seed)
    lm, tokenizer = load_language_model(c, device, dtype)
    read_captions = partial(text_states, lm, tokenizer, device, c.clap_text_layers)
    states = read_captions(list(captions.numbers))
    mean, std = states.mean(0), states.std(0) + 1e-3
    states = (states - mean) / std

    model = ClapModel(c, states.shape[1]).to(device)
    optimizers, schedules = make_optimizers(c, model)
    trained = [p for p in model.parameters() if p.requires_grad]
    batches = endless_batches(log_mels, c.clap_batch_size, c.seed)
    losses = []
    model.train()
    for step, (rows, mels) in zip(tqdm(range(1, c.clap_steps + 1), "clap", disable=None), batches):
        texts, positive, contrasted = captions.targets(rows)
        audio = model.embed_audio(mels, autocast)  # (B, 256)
        text = model.embed_text(states[texts])  # (K, 256)
        similarity = model.logit_scale_a.exp() * audio @ text.T
        loss = contrast(similarity, positive.to(device), contrasted.to(device))
        loss.backward()
        norm = nn.utils.clip_grad_norm_(trained, 1.0)
        if not (loss + norm).isfinite():
            paths = ", ".join(clips.item(i)["path"] for i in rows)
            raise UserError(f"step {step}: loss {loss.item()}, gradient norm {norm.item()} (clap_peak_lr, "
                            f"clap_muon_lr), nothing is written. Its clips: {paths}")
        for optimizer, schedule in zip(optimizers, schedules):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            schedule.step()
        losses.append(loss.item())
        if step % 100 == 0 or step == c.clap_steps:
            tqdm.write(f"clap step {step}/{c.clap_steps} | loss {np.mean(losses[-100:]):.3f} | scale "
                       f"{model.logit_scale_a.exp().item():.1f} | {time.time() - start:.0f} s")
    save_clap(model, c.clap_steps * c.clap_batch_size // len(clips), out)
    print(f"wrote {c.clap_out} | {time.time() - start:.0f} s")

    if valid_manifests:
        model.eval()
        valid_mels = LogMels(Clips(valid_manifests, None, audio_config), c, device)
        embed_captions = lambda names: model.embed_text((read_captions(names) - mean) / std)
        print_retrieval(model, valid_mels, embed_captions, autocast)


if __name__ == "__main__":
    settings.run(main, __file__)
