"""How many clips per second come from the original files, from a prepared set, and from the feature cache?

    python benchmarks/data_speed.py [--data FOLDER] [--faces yunet.onnx] [--repeats 5]

Reading: the same clips three times over, on one machine, in one run; the original files are decoded and
searched for the face, as an epoch without preparation would do. Training: one weight update of the
lightweight preset (random weights cost the same), in this machine's precision, with the frozen tower at
work, and from the cache of its tokens. Without a folder the clips are noise of the model's size, without a
face: then the figures of the original files mean little.
"""
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from common import DEVICE, autocast, run, save, seconds_per_call, write_corpus
from torch.utils.data import DataLoader

from mmfer.cache import use_cache
from mmfer.core import this_machine
from mmfer.corpus import RAVDESS_EMOTIONS
from mmfer.faces import YUNET
from mmfer.losses import MultimodalLoss
from mmfer.model import MultimodalFER
from mmfer.prepare import corpus_of, open_clips
from mmfer.processor import Processor, collate, model_inputs
from mmfer.trainer import RECIPES


@dataclass
class Settings:
    "A few clips are enough: the cost is that of a clip."
    data: Path | None = None     # folder of clips with RAVDESS names, or a CSV file
    faces: str = YUNET           # face detector, or "none"
    preset: str = "lightweight"  # which model trains; its tower is frozen
    clips: int = 6          # how many clips are read
    repeats: int = 5        # how often the prepared set and the cache are read


def raw_seconds(paths, processor):
    "Decoding and face search of the original files, seconds per clip."
    start = time.perf_counter()
    for path in paths: processor.item(processor.read(path))
    return (time.perf_counter() - start) / len(paths)


def reading_seconds(dataset, repeats):
    "Seconds per clip."
    def read_all(): return [dataset[i] for i in range(len(dataset))]
    return seconds_per_call(read_all, repeats, warmup=1) / len(dataset)


def update_seconds(model, dataset, recipe, warmup=0):
    "Seconds per clip of training on as many clips as one weight update of the recipe takes; they repeat."
    loss = MultimodalLoss()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    clips = [i % len(dataset) for i in range(recipe.batch_size * recipe.accumulation)]

    def update():
        for batch in DataLoader(dataset, recipe.batch_size, sampler=clips, collate_fn=collate):
            with autocast(this_machine().precision):
                total = loss(model(**model_inputs(batch, DEVICE)), batch["labels"].to(DEVICE))["total"]
            total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return seconds_per_call(update, 1, warmup) / len(clips)


def main(settings):
    recipe = RECIPES[settings.preset]
    model = MultimodalFER.from_preset(settings.preset, RAVDESS_EMOTIONS, weights="none").to(DEVICE).train()
    model.visual.freeze()
    with tempfile.TemporaryDirectory() as folder:
        data = settings.data or Path(folder) / "noise"
        faces = settings.faces if settings.data else "none"
        if settings.data is None: write_corpus(data, settings.clips, model.config.visual.image_size)
        processor = Processor.for_model(model.config, faces=faces)
        paths = corpus_of(data).table["path"][:settings.clips]
        clips = open_clips(data, model.config, Path(folder) / "prepared", faces)
        prepared = clips.select(clips.corpus.where(clips.corpus.table.index < settings.clips))
        cached = use_cache(model.visual, prepared, Path(folder) / "cache")
        figures = dict(raw_s=raw_seconds(paths, processor),
                       prepared_s=reading_seconds(prepared, settings.repeats),
                       cached_s=reading_seconds(cached, settings.repeats),
                       epoch_prepared_s=update_seconds(model, prepared, recipe),
                       epoch_cached_s=update_seconds(model, cached, recipe, warmup=1))
    figures["prepared_gain"] = figures["raw_s"] / figures["prepared_s"]
    figures["cache_gain"] = figures["epoch_prepared_s"] / figures["epoch_cached_s"]
    answer = ("reading a clip: original {raw_s:.3f} s, prepared {prepared_s:.4f} s ({prepared_gain:.0f}x), "
              "cached {cached_s:.4f} s; training on a clip, {preset}: prepared {epoch_prepared_s:.3f} s, "
              "cached {epoch_cached_s:.3f} s ({cache_gain:.0f}x)")
    names = dict(data=settings.data.name if settings.data else "noise", faces=Path(faces).name)
    figures = asdict(settings) | names | figures
    save(f"data_speed_{DEVICE}", answer.format(**figures), **figures)


if __name__ == "__main__": run(main, Settings)
