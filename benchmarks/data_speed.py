"""How many clips a second come from the original files, from a prepared set, and from the feature cache?

    python benchmarks/data_speed.py DATA [--faces yunet.onnx] [--repeats 5]

Reading: the same clips three times over, on one machine, in one run; the original files are decoded and searched for the face,
as an epoch without preparation would do. Training: an epoch of the lightweight preset (random weights cost the same) with the
frozen tower at work, and from the cache of its tokens.
"""
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import DEVICE, run, save, seconds_a_call
from torch.utils.data import DataLoader
from tyro.conf import Positional

from mmfer.cache import use_cache
from mmfer.datasets import clip_table, collate, model_inputs
from mmfer.losses import MultimodalLoss
from mmfer.media import read_clip
from mmfer.model import MultimodalFER
from mmfer.prepare import PreparedDataset, prepare, prepared_table
from mmfer.trainer import RECIPES
from mmfer.visual import YUNET, crop_faces, load_yunet


@dataclass
class Settings:
    "A few clips are enough: the cost is that of a clip."
    data: Positional[Path]  # folder of clips with RAVDESS names
    faces: str = YUNET      # face detector, or "none"
    clips: int = 6          # how many clips are read
    repeats: int = 5        # how often the prepared set and the cache are read


def raw_seconds(paths, faces):
    "Decoding and face search of the original files, seconds a clip."
    detector = faces if faces == "none" else load_yunet(faces)
    start = time.perf_counter()
    for path in paths: crop_faces(read_clip(path).frames, detector)
    return (time.perf_counter() - start) / len(paths)


def reading_seconds(dataset, repeats):
    return seconds_a_call(lambda: [dataset[i] for i in range(len(dataset))], repeats, warmup=1) / len(dataset)


def epoch_seconds(model, dataset, warmup=0):
    "Seconds a clip of training on one weight update's worth of clips, as the preset's recipe has it; the clips repeat."
    recipe, loss = RECIPES["lightweight"], MultimodalLoss()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    clips = [i % len(dataset) for i in range(recipe.batch_size * recipe.accumulation)]

    def update():
        for batch in DataLoader(dataset, recipe.batch_size, sampler=clips, collate_fn=collate):
            loss(model(**model_inputs(batch, DEVICE)), batch["labels"].to(DEVICE))["total"].backward()
        optimizer.step()
        optimizer.zero_grad()
    return seconds_a_call(update, 1, warmup) / len(clips)


def main(settings):
    paths = clip_table(settings.data)["path"][:settings.clips]
    model = MultimodalFER.from_preset("lightweight").to(DEVICE).train()
    with tempfile.TemporaryDirectory() as folder:
        prepare(settings.data, folder, faces=settings.faces)
        prepared = PreparedDataset(prepared_table(folder)[:settings.clips])
        cached = use_cache(model.visual, prepared, Path(folder) / "cache")
        figures = dict(raw_s=raw_seconds(paths, settings.faces), prepared_s=reading_seconds(prepared, settings.repeats), cached_s=reading_seconds(cached, settings.repeats),
                       epoch_prepared_s=epoch_seconds(model, prepared), epoch_cached_s=epoch_seconds(model, cached, warmup=1))
    figures |= dict(prepared_gain=figures["raw_s"] / figures["prepared_s"], cache_gain=figures["epoch_prepared_s"] / figures["epoch_cached_s"])
    answer = ("reading a clip: original {raw_s:.3f} s, prepared {prepared_s:.4f} s ({prepared_gain:.0f}x), cached {cached_s:.4f} s; "
              "training on a clip, lightweight: prepared {epoch_prepared_s:.2f} s, cached {epoch_cached_s:.2f} s ({cache_gain:.0f}x)")
    save(f"data_speed_{DEVICE}", answer.format(**figures), **asdict(settings) | dict(data=settings.data.name, faces=Path(settings.faces).name), **figures)


if __name__ == "__main__": run(main, Settings)
