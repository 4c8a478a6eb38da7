"""Train a CLAP audio encoder (HTS-AT) on captioned manifests, against the texts as the frozen language model reads them.

    python prepare/clap.py config/demo.py                                          # the demo's encoder, 2 cores
    python prepare/clap.py my.py --clap_config='{"audiocaps-AudioCaptioning/train": 1}' --clap_out=clap/epoch_16.pt

Contrastive: the mean of the audio tokens and the mean of the language model's states over the caption, each through a
two-layer projection, are to be near for a clip's own captions and far for others (CLAP, arXiv 2211.06687). Captions
shared by several clips are positives of all of them. Manifest items may also carry "positives": other captions of the
clip, and "negatives": the caption with its composition changed (order, attributes), contrasted with this clip alone
(Audio Flamingo 2, arXiv 2503.03983, section 3.1).

Writes the published layout {"epoch", "name", "state_dict": {"module.audio_branch.*", ...}}, which clap_checkpoint reads.
"""
import math
import os
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import config as settings
from data import Batches, Clips, open_manifests
from model import AudioFlamingo, pick_device, pick_precision, save_atomically

clap_config: dict = {}  # {"Name-Task/split": any weight > 0}; outputs are the captions
clap_valid_config: dict = {}  # the same, for the retrieval score at the end
clap_out: str = "clap/epoch_16.pt"  # where the checkpoint goes
clap_steps: int = 1000  # optimizer steps
clap_batch_size: int = 32  # clips per step
clap_peak_lr: float = 2e-3  # of AdamW, one cycle: 10 % warm-up, cosine to zero
clap_text_bank: int = 4096  # captions contrasted per step: the batch's own, then others drawn at random
clap_augment: bool = True  # SpecAugment and drop path, as HTS-AT has them; a few hundred steps learn faster without
clap_text_layers: int = 1000  # of the language model's blocks to read captions with; more than it has: all
clap_temperature: float = 0.07  # start value; learned


def projection(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, outputs), nn.ReLU(), nn.Linear(outputs, outputs))


@torch.no_grad()
def text_states(model, texts, device, layers):
    """Mean-pooled states of the frozen language model after so many blocks: (n, D) float32."""
    order, states = sorted(range(len(texts)), key=lambda i: len(texts[i])), [None] * len(texts)
    for first in tqdm(range(0, len(order), 64), desc="captions", disable=None):
        part = order[first:first + 64]
        batch = model.tokenizer([texts[i] for i in part], padding=True, padding_side="right", return_tensors="pt").to(device)
        hidden = model.lm(batch["input_ids"], layers).float()
        mask = batch["attention_mask"][..., None]
        for i, state in zip(part, (hidden * mask).sum(1) / mask.sum(1)):
            states[i] = state
    return torch.stack(states)


def contrast(similarity, positive, own):
    """similarity (B, K); positive (B, K): captions of each clip; own (B, K): captions a clip is contrasted with.
    -> mean over pairs and both directions of -log(e^s / (e^s + sum over negatives)): every positive has to stand out
    from the negatives, and none competes with another."""
    negative = similarity.masked_fill(positive | ~own, -math.inf)
    return sum(F.softplus(negative.logsumexp(dim, keepdim=True) - similarity)[positive].mean() for dim in (0, 1)) / 2


def main(c):
    start = time.time()
    if not c.clap_config:
        raise ValueError("clap_config is empty: name the manifests whose outputs are captions")
    device = pick_device(c.device)
    dtype, reason = pick_precision(c.precision, device)
    torch.manual_seed(c.seed)
    model = AudioFlamingo.from_config(c).requires_grad_(False).cast(dtype).to(device)
    clap = model.clap.float().requires_grad_(True)
    for name, p in clap.named_parameters():
        if "mel_conv2d" in name or "fusion_model" in name:  # the branch for longer clips gets no gradient
            p.requires_grad_(False)
    for module in clap.modules():
        if isinstance(module, nn.Linear):  # by fan-in: HTS-AT's own 0.02 suits widths of a thousand, not of 32
            nn.init.trunc_normal_(module.weight, std=module.in_features ** -0.5)
        if not c.clap_augment and type(module).__name__ == "DropPath":
            module.drop_prob = 0.0
    if not c.clap_augment:
        clap.htsat.spec_augmenter = nn.Identity()

    manifests = list(open_manifests(c, c.clap_config).values())
    clips, texts, index = Clips(manifests, None, c), [], {}

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
    print(f"{len(clips)} clips, {len(texts)} captions | text bank {min(c.clap_text_bank, len(texts))} | {device}, {dtype} "
          f"({reason})")
    states = text_states(model, texts, device, c.clap_text_layers)
    mean, std = states.mean(0), states.std(0) + 1e-3
    states = (states - mean) / std
    everyones = torch.ones(len(texts), dtype=torch.bool)  # captions that are some clip's positive contrast with all
    everyones[[t for n in negatives for t in n]] = False

    width = 256
    audio_projection, text_projection = projection(clap.width, width).to(device), projection(states.shape[1], width).to(device)
    logit_scale = nn.Parameter(torch.tensor(math.log(1 / c.clap_temperature), device=device))
    weights = [p for p in clap.parameters() if p.requires_grad]
    trained = weights + [*audio_projection.parameters(), *text_projection.parameters(), logit_scale]
    optimizer = torch.optim.AdamW(trained, lr=c.clap_peak_lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, c.clap_peak_lr, c.clap_steps, pct_start=0.1)

    clap.train()
    bar, step, epoch, losses = tqdm(total=c.clap_steps, desc="clap", disable=None), 0, 0, []
    while step < c.clap_steps:
        for rows in Batches(np.zeros((len(clips), 2)), c.clap_batch_size, [c.seed, epoch]):
            items = [(clips[i][0], i) for i in rows]
            items = [(windows, i) for windows, i in items if windows is not None]
            windows = torch.cat([w for w, _ in items]).to(device).float() / 32767
            clip_of = torch.tensor([b for b, (w, _) in enumerate(items) for _ in range(len(w))], device=device)
            own_texts = {t for _, i in items for t in positives[i] + negatives[i]}
            others = torch.randperm(len(texts))[:max(0, c.clap_text_bank - len(own_texts))].tolist()
            bank = sorted(own_texts | {t for t in others if everyones[t]})
            place = {t: k for k, t in enumerate(bank)}
            positive = torch.zeros(len(items), len(bank), dtype=torch.bool)
            own = everyones[bank].expand(len(items), -1).clone()
            for b, (_, i) in enumerate(items):
                positive[b, [place[t] for t in positives[i]]] = True
                own[b, [place[t] for t in positives[i] + negatives[i]]] = True
            with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
                tokens = clap(windows)  # (sum W, S, C)
            pooled = torch.zeros(len(items), clap.width, device=device).index_add(0, clip_of, tokens.float().mean(1))
            pooled = pooled / torch.bincount(clip_of)[:, None]
            a = F.normalize(audio_projection(pooled), dim=-1)
            t = F.normalize(text_projection(states[bank]), dim=-1)
            loss = contrast(logit_scale.exp() * a @ t.T, positive.to(device), own.to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            step += 1
            bar.update()
            if step % 100 == 0 or step == c.clap_steps:
                tqdm.write(f"clap step {step}/{c.clap_steps} | loss {np.mean(losses[-100:]):.3f} | scale "
                           f"{logit_scale.exp().item():.1f} | {(time.time() - start) / step * 1000:.0f} ms/step overall")
            if step == c.clap_steps:
                break
        epoch += 1
    bar.close()

    clap.eval()
    if c.clap_valid_config:
        check = Clips(list(open_manifests(c, c.clap_valid_config).values()), None, c)
        truth = [check.item(i)["output"].strip().lower() for i in range(len(check))]
        names = sorted(set(truth))
        with torch.no_grad(), torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            asked = text_states(model, names, device, c.clap_text_layers)
            t = F.normalize(text_projection((asked - mean) / std).float(), dim=-1)
            a = [clap(check[i][0].to(device).float() / 32767).float().mean((0, 1)) for i in range(len(check))]
            best = (F.normalize(audio_projection(torch.stack(a)).float(), dim=-1) @ t.T).argmax(1)
        right = np.mean([names[b] == text for b, text in zip(best.tolist(), truth)])
        print(f"audio to caption, unseen clips: {right:.1%} right of {len(names)} captions (chance {1 / len(names):.1%})")

    parts = {"audio_branch": clap.htsat, "audio_projection": audio_projection, "text_projection": text_projection}
    state = {f"module.{part}.{n}": t.cpu() for part, module in parts.items() for n, t in module.state_dict().items()}
    state["module.logit_scale_a"] = logit_scale.detach().cpu()
    os.makedirs(os.path.dirname(c.clap_out) or ".", exist_ok=True)
    save_atomically({"epoch": epoch, "name": "clap", "state_dict": state}, c.clap_out)
    print(f"wrote {c.clap_out} | {time.time() - start:.0f} s")


if __name__ == "__main__":
    settings.run(main, "prepare/clap.py")
