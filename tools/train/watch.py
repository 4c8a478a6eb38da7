"""How training steps went: left on the device while they run, read back in one place."""
import sys

import torch
from tqdm import tqdm

from tools.common import UserError
from tools.train import run as runs

COUNTS = ("labelled", "bad", "items", "cut", "long", "unheard")  # of a step, over all ranks


def count_tokens(batch):
    return int((batch["labels"].numpy()[:, 1:] != -100).sum())


def count(batch):
    """COUNTS of a micro-batch of this rank: (6,) float64 on the host."""
    return torch.tensor([count_tokens(batch), len(batch["bad"]), len(batch["paths"]), batch["cut"],
                         batch["long"], batch["unheard"]], dtype=torch.float64)


class Watch:
    """at: where the run stands, of which it counts skipped_steps; seen: {one of COUNTS: so far}."""

    def __init__(self, c, run, at, seen, device, control, newest):
        self.c, self.run, self.at, self.seen, self.control = c, run, at, seen, control
        self.recent, self.totals = [], torch.zeros(len(COUNTS), dtype=torch.float64, device=device)
        self.sick, self.probe = 0, None  # steps in a row without an update; a batch that had a loss
        self.newest, self.first = newest, at["step"]  # good checkpoint; the step it goes on from
        self.rates = f"learning_rate = {c.learning_rate:g}, weight_decay = {c.weight_decay:g}"

    def add(self, step, flag, counts, group):
        """flag and counts: tensors on the device; 0: the step made an update, 1: it was not finite, 2: it had
        no labelled token."""
        self.totals += counts
        paths, bad = ([x for batch in group for x in batch[name]] for name in ("paths", "bad"))
        self.recent.append((step, flag, paths, bad))
        self.probe = self.probe or (group[0], flag)

    def say(self, text):
        if not self.run.rank:
            tqdm.write(text, file=sys.stderr)

    def look(self, last_step):
        """Read the steps since the last look; ValueError where training makes no sense any more."""
        c, seen, at, cause = self.c, self.seen, self.at, ""
        flags = torch.stack([flag for _, flag, *_ in self.recent]).tolist() if self.recent else []
        seen.update((name, seen[name] + more) for name, more in zip(COUNTS, self.totals.tolist()))
        self.totals.zero_()
        unread = [(step, cause) for step, *_, bad in self.recent for cause in bad]
        for step, cause in runs.all_gather_lists(unread, self.control):
            self.say(f"skipped: {cause}")
            self.run.write(epoch=at["next_epoch"], step=step, skipped=cause)
        for (step, _, paths, _), flag in zip(self.recent, flags):
            self.sick = self.sick + 1 if flag else 0
            if flag:
                at["skipped_steps"] += 1
                what = "no labelled token" if flag == 2 else "loss or gradient not finite"
                paths = runs.all_gather_lists(paths, self.control)
                self.say(f"step {step}: {what}, no update; its items: {', '.join(paths)}")
                self.run.write(step=step, no_update=what, items=paths)
        if self.probe and float(self.probe[1]):
            self.probe = None
        self.recent.clear()
        files = seen["items"] + seen["bad"]
        if seen["bad"] > c.max_bad_fraction * max(files, 100):
            raise UserError(f"{seen['bad']:.0f} of the {files:.0f} audio files so far could not be used "
                             f"(more than max_bad_fraction = {c.max_bad_fraction}); last: {cause}")
        taken = at["step"] - self.first
        enough = 2 if self.first else 1  # a resumed run may have one step left, and it may be sick
        all_sick = self.sick == taken >= enough and at["step"] == last_step
        if self.sick > c.max_bad_steps or all_sick:
            why = f"{self.rates}, precision = {c.precision}"
            if flag == 2:
                why = (f"{seen['cut']:.0f} of {seen['items']:.0f} answers were cut off by max_tokens = "
                       f"{c.max_tokens}, {seen['bad']:.0f} clips not read")
            raise UserError(f"step {at['step']}: {self.sick} steps in a row made no update (max_bad_steps = "
                             f"{c.max_bad_steps}): {what}; {why}; the last good checkpoint: {self.newest}")

    @torch.no_grad()
    def check_weights(self, model, loss):
        """A batch that had a loss must have one still, before weights are called a checkpoint."""
        model.eval()
        finite = self.probe is None or bool(loss(self.probe[0]).isfinite())
        model.train()
        if runs.any_rank([not finite], self.control)[0]:
            raise UserError(f"step {self.at['step']}: the weights give no finite loss any more "
                             f"({self.rates}): not saved; the last good checkpoint: {self.newest}")
