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
clap_position: bool = False  # HTS-AT's position embedding (published: none): tokens tell times apart at once
clap_text_layers: int = 1000  # of the language model's blocks to read captions with; more than it has: all
clap_temperature: float = 0.02  # start value; learned. A clip near n texts at once has cosines of n^-1/2 only


@torch.no_grad()
def text_states(lm, tokenizer, texts, device, layers):
    """Mean-pooled states of the frozen language model after so many blocks: (n, D) float32."""
    order, states = sorted(range(len(texts)), key=lambda i: len(texts[i])), [None] * len(texts)
    for first in tqdm(range(0, len(order), 64), desc="captions", disable=None):
        part = order[first:first + 64]
        captions = [texts[i] for i in part]
        batch = tokenizer(captions, padding=True, padding_side="right", return_tensors="pt").to(device)
        hidden = lm(batch["input_ids"], layers=layers).float()
        mask = batch["attention_mask"][..., None]
        for i, state in zip(part, (hidden * mask).sum(1) / mask.sum(1)):
            states[i] = state
    return torch.stack(states)


def contrast(similarity, positive, own):
    """similarity (B, K); positive (B, K): captions of each clip; own (B, K): captions a clip is contrasted
    with. -> mean over pairs and both directions of -log(e^s / (e^s + sum over negatives)): every positive has
    to stand out from the negatives, and none competes with another."""
    negative = similarity.masked_fill(positive | ~own, -1e9)  # not -inf: some may have no negative at all
    loss = lambda dim: F.softplus(negative.logsumexp(dim, keepdim=True) - similarity)[positive].mean()
    return (loss(0) + loss(1)) / 2


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
                if p not in self.state:
                    self.state[p]["mean"] = torch.zeros_like(p)
                mean = self.state[p]["mean"].lerp_(p.grad, 1 - group["momentum"])
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


def captioned(manifests):
    """ValueError if there are no items, or one has no caption."""
    for m in manifests:
        if not len(m):
            raise UserError(f"{m.file}: total_num = 0, expected captioned clips")
        for j in range(len(m)):
            item = m.items[j]
            for field in ("output", "positives", "negatives"):
                texts = [item[field]] if field == "output" else item.get(field, [])
                if type(texts) is not list or not all(type(t) is str and t.strip() for t in texts):
                    expected = "a caption, not empty" if field == "output" else "a list of captions"
                    raise UserError(f"{m.file}: data['{j}'] {field} = {item[field]!r}, expected {expected}")
            own, changed = ({t.strip().lower() for t in texts} for texts in (
                [item["output"], *item.get("positives", [])], item.get("negatives", [])))
            if own & changed:
                raise UserError(f"{m.file}: data['{j}'] negatives = {min(own & changed)!r}, which is also a "
                                 f"caption of this clip")
    return manifests


def main(c):
    start = time.time()
    if not c.clap_config:
        raise UserError("clap_config is empty: name the manifests whose outputs are captions")
    out = settings.resolve_path(c.clap_out)
    check_writable(out)
    os.makedirs(os.path.dirname(out), exist_ok=True)
    manifests = captioned(list(open_manifests(c, c.clap_config).values()))
    check = captioned(list(open_manifests(c, c.clap_valid_config).values()))
    if len({m.items[j]["output"].strip().lower() for m in manifests for j in range(len(m))}) < 2:
        raise UserError(f"clap_config: all captions of {manifests[0].file} are alike, expected some to tell "
                         f"apart")
    device = pick_device(c.device)
    dtype, reason = pick_precision(c.precision, device)
    torch.manual_seed(c.seed)
    lm, tokenizer = load_language_model(c, device, dtype)
    clap = ClapEncoder(c.clap_embed_dim, c.clap_depths, c.clap_num_heads, c.clap_spec_size, c.clap_position,
                       c.clap_augment).to(device).requires_grad_(False)
    for p in clap.trainable():
        p.requires_grad_(True)
    for module in clap.modules():
        if isinstance(module, nn.Linear):  # by fan-in: HTS-AT's own 0.02 suits widths of a thousand, not 32
            nn.init.trunc_normal_(module.weight, std=module.in_features ** -0.5)

    audio_config = {name: getattr(c, name) for name in AUDIO_SETTINGS} | {"sample_rate": clap.sample_rate}
    clips, texts, index = Clips(manifests, None, audio_config), [], {}

    def number(text):
        text = text.strip().lower()
        if text not in index:
            index[text] = len(texts)
            texts.append(text)
        return index[text]

    positives, negatives = [], []
    for m, j in clips.rows:
        item = manifests[m].items[j]
        positives.append([number(text) for text in [item["output"], *item.get("positives", [])]])
        negatives.append([number(text) for text in item.get("negatives", [])])
    print(f"{len(clips)} clips, {len(texts)} captions | text bank {min(c.clap_text_bank, len(texts))} | "
          f"{device}, {dtype} ({reason})")
    states = text_states(lm, tokenizer, texts, device, c.clap_text_layers)
    mean, std = states.mean(0), states.std(0) + 1e-3
    states = (states - mean) / std
    shared = [t for t, _ in Counter(t for p in positives for t in p).most_common(c.clap_text_bank)]
    everyones = torch.ones(len(texts), dtype=torch.bool)  # what is some clip's positive contrasts with all
    everyones[[t for n in negatives for t in n]] = False
    everyones[[t for p in positives for t in p]] = True

    width = 256
    # Linear: what tells captions apart is then linear in the tokens, as the cross-attention will read them.
    audio_projection = nn.Linear(clap.width, width).to(device)
    text_layers = nn.Linear(states.shape[1], width), nn.ReLU(), nn.Linear(width, width)
    text_projection = nn.Sequential(*text_layers).to(device)
    logit_scale = nn.Parameter(torch.tensor(math.log(1 / c.clap_temperature), device=device))
    learners = (clap, audio_projection, text_projection)
    layers = [m for learner in learners for m in learner.modules() if isinstance(m, nn.Linear)]
    matrices = [m.weight for m in layers if m.weight.requires_grad]
    trained = [p for learner in learners for p in learner.parameters() if p.requires_grad]
    others = [p for p in trained if not any(p is m for m in matrices)] + [logit_scale]
    adamw = torch.optim.AdamW(others, c.clap_peak_lr, weight_decay=0.05, fused=True)
    optimizers = [Muon(matrices, c.clap_muon_lr, 0.05), adamw]
    cycle = {"total_steps": c.clap_steps, "pct_start": 0.1, "cycle_momentum": False}
    schedules = [torch.optim.lr_scheduler.OneCycleLR(o, o.defaults["lr"], **cycle) for o in optimizers]

    def log_mels(rows):
        """The log-mels of some clips and whose each is; cache_audio keeps them: a third of a step's time."""
        found = []
        for i in rows:
            clip = {} if i in mel_cache or i in unread else clips[i]
            if clip.get("error"):
                unread[i] = clip["error"]
                tqdm.write(f"skipped: {unread[i]}", file=sys.stderr)
                if len(unread) > min(len(clips) - 1, max(1, c.max_bad_fraction * len(clips))):
                    raise UserError(f"{len(unread)} of {len(clips)} clips could not be used (more than "
                                     f"max_bad_fraction = {c.max_bad_fraction}); last: {unread[i]}")
            if i in unread:
                continue
            mel = mel_cache[i] if i in mel_cache else log_mel(to_float(clip["windows"].to(device)))
            found.append((i, mel))
        if not found:
            return None, None, []
        mel_cache.update(found if c.cache_audio else ())
        clip_of = [b for b, (_, mel) in enumerate(found) for _ in mel]
        mels = torch.cat([mel for _, mel in found])
        return mels, torch.tensor(clip_of, device=device), [i for i, _ in found]

    mel_cache, unread = {}, {}  # by clip: log-mels, and why it cannot be read
    clap.train()
    bar, step, epoch, losses = tqdm(total=c.clap_steps, desc="clap", disable=None), 0, 0, []
    while step < c.clap_steps:
        no_sizes = np.zeros((len(clips), 2), np.int64)
        for (rows,) in plan_batches(no_sizes, c.clap_batch_size, [c.seed, epoch]):
            mels, clip_of, rows = log_mels(rows.tolist())
            if not rows:
                continue
            own_texts = {t for i in rows for t in positives[i] + negatives[i]}
            bank = sorted(own_texts | set(shared))
            place = {t: k for k, t in enumerate(bank)}
            positive = torch.zeros(len(rows), len(bank), dtype=torch.bool)
            own = everyones[bank].expand(len(rows), -1).clone()
            for b, i in enumerate(rows):
                positive[b, [place[t] for t in positives[i]]] = True
                own[b, [place[t] for t in positives[i] + negatives[i]]] = True
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                tokens = clap.encode(mels)  # (sum W, S, C)
            windows = tokens.float().mean(1)
            pooled = torch.zeros(len(rows), clap.width, device=device).index_add(0, clip_of, windows)
            pooled = pooled / torch.bincount(clip_of)[:, None]
            a = F.normalize(audio_projection(pooled), dim=-1)
            t = F.normalize(text_projection(states[bank]), dim=-1)
            loss = contrast(logit_scale.exp() * a @ t.T, positive.to(device), own.to(device))
            loss.backward()
            norm = nn.utils.clip_grad_norm_(trained + [logit_scale], 1.0)
            if not (loss + norm).isfinite():
                paths = ", ".join(clips.item(i)["path"] for i in rows)
                raise UserError(f"step {step + 1}: loss {loss.item()}, gradient norm {norm.item()} ("
                                 f"clap_peak_lr = {c.clap_peak_lr}); nothing is written. Its clips: {paths}")
            for optimizer, schedule in zip(optimizers, schedules):
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
            losses.append(loss.item())
            step += 1
            bar.update()
            if step % 100 == 0 or step == c.clap_steps:
                pace = (time.time() - start) / step * 1000
                tqdm.write(f"clap step {step}/{c.clap_steps} | loss {np.mean(losses[-100:]):.3f} | "
                           f"scale {logit_scale.exp().item():.1f} | {pace:.0f} ms/step overall")
            if step == c.clap_steps:
                break
        epoch += 1
    bar.close()

    parts = dict(audio_branch=clap.htsat, audio_projection=audio_projection, text_projection=text_projection)
    weights = [(f"{part}.{n}", t) for part, module in parts.items() for n, t in module.state_dict().items()]
    state = {f"module.{name}": t.cpu() for name, t in weights}
    state["module.logit_scale_a"] = logit_scale.detach().cpu()
    if broken := [n for n, t in state.items() if t.is_floating_point() and not t.isfinite().all()]:
        raise UserError(f"{broken[0]} is not finite after step {step} (clap_peak_lr = {c.clap_peak_lr}); "
                         f"nothing is written")
    save_atomically({"epoch": epoch, "name": "clap", "state_dict": state}, out)
    print(f"wrote {c.clap_out} | {time.time() - start:.0f} s")

    clap.eval()
    if check:
        heard, truth = [], []
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            for clip in map(Clips(check, None, audio_config).__getitem__, range(sum(map(len, check)))):
                if clip["windows"] is None:
                    print(f"skipped: {clip['error']}", file=sys.stderr)
                    continue
                heard.append(clap(to_float(clip["windows"].to(device))).float().mean((0, 1)))
                truth.append(clip["output"].strip().lower())
            if not heard:
                raise UserError("clap_valid_config: none of its clips could be read; the encoder is written")
            names = sorted(set(truth))
            asked = text_states(lm, tokenizer, names, device, c.clap_text_layers)
            t = F.normalize(text_projection((asked - mean) / std).float(), dim=-1)
            best = (F.normalize(audio_projection(torch.stack(heard)).float(), dim=-1) @ t.T).argmax(1)
        right = np.mean([names[b] == text for b, text in zip(best.tolist(), truth)])
        print(f"audio to caption, unseen clips: {right:.1%} right of {len(names)} captions "
              f"(chance {1 / len(names):.1%})")


if __name__ == "__main__":
    settings.run(main, "prepare/clap.py")
