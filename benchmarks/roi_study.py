"""Does choosing patches help, once a small part of the face decides?

    python benchmarks/roi_study.py [--towers frozen trained] [--seeds 0 1 2 3 4] [--variants softmax ...]

The visual branch in its smallest size, on the four groups of toy faces. `sorrow` and `stern`, the pair,
differ in the colour of two cheek spots alone, and lamps on the wall show the same colours. Every seed draws
its own speakers, clips and weights, and is judged on speakers that were not trained on. A frozen tower keeps
its random weights, so that its tokens carry little more than their patch of the picture; a trained tower
learns with the rest. The mask says which patches have their centre in the box of brows, eyes, cheeks and
mouth. A result is kept after each training: stopped and started again, the script goes on where it was.
"""
import json
import time
from dataclasses import asdict, dataclass
from itertools import product
from statistics import mean

import numpy as np
import torch
import torch.nn.functional as F
from common import RESULTS, run, save
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from tqdm.auto import tqdm

from mmfer.core import count_parameters, seed_everything
from mmfer.toy import FACE_GROUPS, make_actor, perform, script
from mmfer.visual import ROICompressor, VisualBranch, _global_tokens

GROUPS = list(FACE_GROUPS)
TOWERS = ("frozen", "trained")
CHOICE = ("towers", "seeds", "variants")  # settings that say which trainings, and not how
PAIR = [GROUPS.index("sorrow"), GROUPS.index("stern")]


@dataclass
class Settings:
    "What is trained, and how often."
    towers: tuple[str, ...] = TOWERS
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    variants: tuple[str, ...] = ()  # names of `VARIANTS`; none: all of them
    train_speakers: int = 7
    test_speakers: int = 4
    clips: int = 60             # per speaker
    frames: int = 8             # pictures per clip of 2 s
    frozen_epochs: int = 12
    trained_epochs: int = 16
    batch: int = 16


class GlobalTokens(nn.Module):
    "The four global tokens and no patch, in the place of a `ROICompressor`."

    def __init__(self, dim, k):
        super().__init__()
        self.global_scale = nn.Parameter(torch.ones(4, dim))

    def forward(self, tokens, roi):
        kept = torch.zeros(len(tokens), 0, dtype=torch.long, device=tokens.device)
        return self.global_scale * _global_tokens(tokens), tokens.new_zeros(tokens.shape[:2]), kept, kept


class AllTokens(nn.Module):
    "Every patch with the same weight, in the place of a `ROICompressor`."

    def __init__(self, dim, k):
        super().__init__()
        self.global_scale = nn.Parameter(torch.zeros(0))  # the branch asks it for its precision

    def forward(self, tokens, roi):
        ones = tokens.new_ones(tokens.shape[:2])
        kept = torch.arange(tokens.shape[1], device=tokens.device).expand(len(tokens), -1)
        return tokens, 0 * ones, kept, ones


class SigmoidGates(ROICompressor):
    "Each kept patch is gated by the sigmoid of its own score; they do not compete."

    def forward(self, tokens, roi):
        compressed, scores, kept, _ = super().forward(tokens, roi)
        gates = scores.gather(1, kept).sigmoid()
        patches = gates[..., None] * tokens.gather(1, kept[..., None].expand(-1, -1, tokens.shape[-1]))
        return torch.cat([patches, compressed[:, self.k :]], 1), scores, kept, gates


class AttentionPool(nn.Module):
    "A learned query asks all tokens of a frame, in the place of a `FramePool`."

    def __init__(self, dim, heads):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, dim) / dim**0.5)
        self.attention = nn.MultiheadAttention(dim, heads, batch_first=True)
        self.norm = nn.LayerNorm(dim)

    def forward(self, tokens):
        query = self.query.expand(len(tokens), -1, -1)
        return self.norm(self.attention(query, tokens, tokens, need_weights=False)[0][:, 0])


# what stands for the compressor, whether attention pools its tokens, whether it gets the mask
VARIANTS = {
    "global tokens only": (GlobalTokens, False, False),
    "mean of all tokens": (AllTokens, False, False),
    "softmax": (ROICompressor, False, False),
    "softmax, mask": (ROICompressor, False, True),
    "sigmoid": (SigmoidGates, False, False),
    "sigmoid, mask": (SigmoidGates, False, True),
    "softmax, mask, attention pooling": (ROICompressor, True, True),
    "attention pooling over all tokens": (AllTokens, True, False),
}


def build(variant, preset="tiny"):
    compressor, attends, _ = VARIANTS[variant]
    branch = VisualBranch.from_preset(preset, n_emotions=len(GROUPS))
    c = branch.config
    branch.roi = compressor(c.d_model, c.top_k)
    if attends: branch.pool = AttentionPool(c.d_model, c.heads)
    return branch


def mask_of(box, grid=8):
    "Which patches have their centre in a box, `[N]`."
    x0, y0, x1, y1 = box
    centre = (np.arange(grid) + 0.5) / grid
    return np.outer((centre > y0) & (centre < y1), (centre > x0) & (centre < x1)).ravel()


def draw(speakers, seed, settings):
    "Pictures `[n, T, 3, H, W]`, groups `[n]` and masks `[n, N]` of all clips of some speakers."
    video = []
    labels = []
    masks = []
    for speaker in tqdm(speakers, desc=f"drawing, seed {seed}", unit="speaker"):
        for part in script(make_actor(speaker, seed), settings.clips, seed):
            frames, _, truth = perform(part, fps=settings.frames // 2)
            video.append(frames)
            labels.append(GROUPS.index(truth["face_group"]))
            masks.append(mask_of(truth["box"]))
    pictures = torch.tensor(np.stack(video)).permute(0, 1, 4, 2, 3)
    return pictures, torch.tensor(labels), torch.tensor(np.stack(masks))


def train(branch, inputs, labels, epochs, batch):
    "CPU seconds per update."
    weights = [p for p in branch.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, 2e-3, weight_decay=0.01)
    steps = epochs * (len(labels) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)
    branch.train()
    start = time.process_time()
    for _ in range(epochs):
        for some in torch.randperm(len(labels)).split(batch)[: len(labels) // batch]:
            out = branch(**{name: values[some] for name, values in inputs.items()})
            loss = F.cross_entropy(out.logits, labels[some], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            schedule.step()
    return (time.process_time() - start) / steps


@torch.no_grad()
def judge(branch, inputs, labels, masks):
    "Accuracy over all and on the pair, and what share of the choice lies in the box."
    outs = [branch.eval()(**{name: values[some] for name, values in inputs.items()})
            for some in torch.arange(len(labels)).split(60)]
    right = torch.cat([out.logits for out in outs]).argmax(1) == labels
    is_pair = torch.isin(labels, torch.tensor(PAIR))
    result = dict(accuracy=right.float().mean().item(), pair=right[is_pair].float().mean().item())
    kept = torch.cat([out.kept for out in outs])
    if kept.shape[2] == 0: return result | dict(kept_in_box=None, gates_in_box=None)
    inside = masks[:, None].expand(-1, kept.shape[1], -1).gather(2, kept).float()
    gates = torch.cat([out.gates for out in outs])
    weight = (gates * inside).sum(2) / gates.sum(2)
    return result | dict(kept_in_box=inside.mean().item(), gates_in_box=weight.mean().item())


def try_variant(tower, variant, seed, data, settings):
    "Train and judge one variant; `data` are the training's and the test's (inputs, groups, masks)."
    seed_everything(seed)
    branch = build(variant)
    if tower == "frozen": branch.freeze()
    uses_mask = VARIANTS[variant][2]
    (inputs, labels), (unseen, answers) = [
        (x | dict(roi_mask=masks) if uses_mask else x, y) for x, y, masks in data]
    epochs = settings.frozen_epochs if tower == "frozen" else settings.trained_epochs
    seconds = train(branch, inputs, labels, epochs, settings.batch)
    masks = data[1][2]
    chance = dict(chance_in_box=masks.float().mean().item(), cpu_seconds_per_step=seconds)
    return dict(tower=tower, variant=variant, seed=seed) | judge(branch, unseen, answers, masks) | chance


@torch.no_grad()
def tokens_of(data, seed):
    "The tokens of a frozen tower with random weights stand in the place of the pictures."
    seed_everything(seed)
    tower = build("softmax").eval()
    out = []
    for inputs, labels, masks in data:
        video = inputs["video"]
        tokens = tower.encode(video.flatten(0, 1)).unflatten(0, video.shape[:2])
        out.append((dict(tokens=tokens), labels, masks))
    return out


def cost(variant):
    "Parameters and FLOPs per frame between tower and time, of `tiny` and of `full`."
    found = dict(variant=variant)
    for preset in ("tiny", "full"):
        with torch.device("meta"):
            branch = build(variant, preset)
            tokens = torch.zeros(1, branch.config.grid**2, branch.dim)
            mask = torch.zeros(tokens.shape[:2])
        with FlopCounterMode(display=False) as counter: branch.pool(branch.roi(tokens, mask)[0])
        found[f"{preset}_parameters"] = count_parameters(branch.roi) + count_parameters(branch.pool)
        found[f"{preset}_mflops"] = counter.get_total_flops() / 1e6
    return found


def cell(rows, name):
    "Mean and range of a figure, with the number of seeds."
    values = [row[name] for row in rows if row[name] is not None]
    if not values: return "-" if rows else "not measured"
    if len(values) == 1: return f"{values[0]:.2f} (1 seed)"
    return f"{mean(values):.2f} ({min(values):.2f} to {max(values):.2f}, {len(values)} seeds)"


def table(rows, tower):
    "What chapter 07 shows, as Markdown."
    figures = {"accuracy": "accuracy", "sorrow and stern": "pair", "kept on the face": "kept_in_box"}
    lines = [["way", *figures], ["---"] * (1 + len(figures))]
    for variant in VARIANTS:
        mine = [row for row in rows if (row["tower"], row["variant"]) == (tower, variant)]
        lines.append([variant, *(cell(mine, name) for name in figures.values())])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def fixed(settings):
    "What must be the same in all trainings that stand in one table."
    return {name: value for name, value in asdict(settings).items() if name not in CHOICE}


def keep(settings, rows):
    "Write what there is so far."
    told = []
    for tower in TOWERS:
        found = {name: [r["accuracy"] for r in rows if (r["tower"], r["variant"]) == (tower, name)]
                 for name in VARIANTS}
        means = ", ".join(f"{name}: {mean(got):.2f}" for name, got in found.items() if got)
        seeds = sorted({row["seed"] for row in rows if row["tower"] == tower})
        if means: told.append(f"{tower} tower, {len(seeds)} seed{'s' * (len(seeds) > 1)}: {means}")
    answer = "accuracy on unseen speakers, mean: " + "; ".join(told)
    save("roi_study", answer, **fixed(settings), cost=[cost(name) for name in VARIANTS], rows=rows)


def done_before(settings):
    "The rows of an earlier call whose trainings were the same, for whatever towers, seeds and variants."
    path = RESULTS / "roi_study.json"
    if not path.exists(): return []
    found = json.loads(path.read_text())
    same = all(found.get(name) == value for name, value in fixed(settings).items())
    return found["rows"] if same else []


def main(settings):
    torch.set_num_threads(1)
    rows = done_before(settings)
    for tower, seed in product(settings.towers, settings.seeds):
        done = [row["variant"] for row in rows if (row["tower"], row["seed"]) == (tower, seed)]
        missing = [name for name in settings.variants or VARIANTS if name not in done]
        if not missing: continue
        n = settings.train_speakers
        groups = (range(1, n + 1), range(n + 1, n + 1 + settings.test_speakers))
        drawn = [draw(speakers, seed, settings) for speakers in groups]
        data = [(dict(video=video), labels, masks) for video, labels, masks in drawn]
        if tower == "frozen": data = tokens_of(data, seed)
        for variant in missing:
            rows.append(try_variant(tower, variant, seed, data, settings))
            keep(settings, rows)
    keep(settings, rows)
    for tower in TOWERS: print(f"\n{tower}\n\n{table(rows, tower)}")


if __name__ == "__main__": run(main, Settings)
