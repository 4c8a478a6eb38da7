"""Where in a recording the model listens."""
import torch

from data import encode_prompts


@torch.no_grad()
def attention_over_time(model, prompt, windows):
    """Cross-attention of the last prompt token to one clip's windows (W, L), mean over gated blocks, heads
    and frequency bins: a weight per time step of the windows, summing to 1."""
    device = model.lm.norm.weight.device
    ids = torch.tensor(encode_prompts(model.tokenizer, [prompt]), device=device)
    audio, n_keys = model.listen(windows.to(device), torch.tensor([len(windows)]))
    kv = model.keys_values(audio)
    x, place, weights = model.lm.embed_tokens(ids), model.lm.place(ids), []
    for i, block in enumerate(model.lm.layers):  # AudioFlamingo.hidden, with a look at the weights on the way
        if i in kv:
            gated = model.xattn[str(i)]
            q = gated.attn.to_q(gated.attn.norm(x[0, -1])).view(gated.heads, gated.d)
            scores = torch.einsum("hd,nhd->hn", q, kv[i][0, :, 0]).float() / gated.d ** 0.5
            weights.append(scores.softmax(-1).mean(0))
            x = gated(x, kv[i], n_keys, model.backend)
        x = block(x, place)
    per_window = torch.stack(weights).mean(0).view(len(windows), 2, -1)  # token = frequency bin x time step
    return per_window.sum(1).flatten().cpu()
