"""What does an epoch of RAVDESS' size cost, what share of it is waiting for data, how long is a training?

    python benchmarks/epoch_cost.py [--preset lightweight] [--clips 960] [--epochs 3] [--workers 4]

Synthetic clips of RAVDESS' shape (4 s, 16 pictures at the preset's size), written as a prepared set and
trained with the preset's recipe, with the feature cache where the tower is frozen. With all the epochs
of the recipe (the default on a GPU) the time of the whole training is given too, the cache's filling
included.
"""
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from common import DEVICE, run, save

from mmfer.core import this_machine
from mmfer.corpus import RAVDESS_EMOTIONS
from mmfer.media import write_clip
from mmfer.model import MultimodalFER
from mmfer.prepare import open_clips
from mmfer.trainer import RECIPES, Trainer


@dataclass
class Settings:
    "By default what this machine can train."
    preset: str = this_machine().preset
    clips: int = 960 if DEVICE == "cuda" else 120
    epochs: int = RECIPES[this_machine().preset].epochs if DEVICE == "cuda" else 3
    workers: int = 4 if DEVICE == "cuda" else 1


def write_corpus(folder, clips, size):
    "Noise with RAVDESS names: as hard to decode and to train on as anything else."
    rng = np.random.default_rng(0)
    for i in range(clips):
        name = f"01-01-{1 + i % 8:02d}-01-01-{1 + i % 60:02d}-{1 + i // 60:02d}.mp4"
        sound = 0.1 * rng.standard_normal(64_000).astype(np.float32)
        pictures = rng.integers(0, 256, (16, size, size, 3), dtype=np.uint8)
        write_clip(Path(folder) / name, pictures, 4, sound)


def main(settings):
    model = MultimodalFER.from_preset(settings.preset, RAVDESS_EMOTIONS)
    recipe = RECIPES[settings.preset]
    short = replace(recipe, epochs=settings.epochs, workers=settings.workers)
    if DEVICE == "cpu": short = replace(short, precision="no")
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_corpus(folder / "clips", settings.clips, model.config.visual.image_size)
        train = open_clips(folder / "clips", model.config, folder / "prepared", faces="none")
        val = train.select(train.corpus.where(train.corpus.table.index < 16))
        start = time.perf_counter()
        history = Trainer(model, short, train, val, folder / "run", cache=folder / "cache").fit()
        seconds = time.perf_counter() - start
    epoch = float(np.mean([row["seconds"] for row in history[1:]]))
    figures = dict(epoch_s=epoch, data_wait=float(np.mean([row["data_wait"] for row in history[1:]])))
    answer = "{preset}, {clips} clips: {epoch_s:.1f} s per epoch, {data_wait:.1%} of it waiting for data"
    if settings.epochs >= recipe.epochs:
        figures["whole_training_s"] = seconds
        answer += ", the whole training {whole_training_s:.0f} s"
    save(f"epoch_cost_{DEVICE}", answer.format(**asdict(settings), **figures), **asdict(settings), **figures)


if __name__ == "__main__": run(main, Settings)
