"""What does an epoch of RAVDESS' size cost, what share of it is waiting for data, how long is a training?

    python benchmarks/epoch_cost.py [--preset lightweight] [--clips 960] [--epochs 3] [--workers 4]

Synthetic clips of RAVDESS' shape (4 s, 16 pictures at the preset's size), written as a prepared set and
trained with the preset's recipe in this machine's precision, with the feature cache where the tower is frozen
(random weights cost the same). With all the epochs of the recipe (the default on a GPU) the time of the whole
training is given too, the cache's filling included; it does not stop early.
"""
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from common import DEVICE, run, save, write_corpus

from mmfer.core import this_machine
from mmfer.corpus import RAVDESS_EMOTIONS
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


def main(settings):
    model = MultimodalFER.from_preset(settings.preset, RAVDESS_EMOTIONS, weights="none")
    recipe = RECIPES[settings.preset]
    precision = this_machine().precision
    short = replace(recipe, epochs=settings.epochs, workers=settings.workers, precision=precision, patience=0)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write_corpus(folder / "clips", settings.clips, model.config.visual.image_size)
        train = open_clips(folder / "clips", model.config, folder / "prepared", faces="none")
        val = train.select(train.corpus.where(train.corpus.table.index < 16))
        start = time.perf_counter()
        history = Trainer(model, short, train, val, folder / "run", cache=folder / "cache").fit()
        seconds = time.perf_counter() - start
    epoch = float(np.mean([row["seconds"] for row in history[1:]]))
    waiting = float(np.mean([row["data_wait"] for row in history[1:]]))
    figures = dict(epoch_s=epoch, data_wait=waiting, precision=precision)
    answer = ("{preset}, {clips} clips, precision {precision}: {epoch_s:.1f} s per epoch, "
              "{data_wait:.1%} of it waiting for data")
    if settings.epochs >= recipe.epochs:
        figures["whole_training_s"] = seconds
        answer += ", the whole training {whole_training_s:.0f} s"
    figures = asdict(settings) | figures
    save(f"epoch_cost_{settings.preset}_{DEVICE}", answer.format(**figures), **figures)


if __name__ == "__main__": run(main, Settings)
