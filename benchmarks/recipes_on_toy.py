"""Does the recipe of each preset learn on the toy, and how far does it get?

    python benchmarks/recipes_on_toy.py [--recipes lightweight full] [--starts loaded fresh] [--seeds 0 1 2]

Small towers in the place of the presets' large ones, but each recipe as it is: its rates, augmentation,
mixup, warmup, schedule and early stopping, its 16 clips per update in one batch, and at least `--updates`
updates. "fresh" starts from random numbers. "loaded" starts where the preset does: the vision tower (frozen),
the audio encoder and, for `full`, the fusion's layers come from a model that learned from other toy speakers,
and all the rest is fresh. On the toy, sound alone can tell 1/2 of the clips, and so can pictures; together
they can tell all.
"""
import tempfile
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from itertools import product
from statistics import mean

from common import run, save

from mmfer.core import seed_everything
from mmfer.corpus import Corpus
from mmfer.model import MultimodalFER, preset_config
from mmfer.processor import ClipDataset, Processor
from mmfer.toy import make_toy
from mmfer.trainer import RECIPES, Trainer, with_min_updates
from mmfer.weights import Origin

LOADED = {"tiny": (), "lightweight": ("audio", "vision"), "full": ("audio", "vision", "fusion")}


@dataclass
class Settings:
    "What is trained, and how often."
    recipes: tuple[str, ...] = ("tiny", "lightweight", "full")
    starts: tuple[str, ...] = ("loaded", "fresh")
    seeds: tuple[int, ...] = (0, 1, 2)
    speakers: int = 12       # half of them for what is loaded; of each half, two for validation
    clips: int = 32          # clips per speaker
    updates: int = 300       # weight updates of a training, at least
    precision: str = "no"    # "no" or "bf16"


def build(corpus, name):
    "The preset in small: its depth over time and its fusion's depth, the sizes of tiny."
    config = preset_config("tiny", corpus.emotions)
    like = preset_config(name, corpus.emotions)
    config.visual = replace(config.visual, temporal_layers=like.visual.temporal_layers)
    return MultimodalFER(config)


def take_over(model, source, parts):
    "Weights of another model for some parts, as if they had been loaded from a checkpoint."
    note = dict(source="the toy", revision="1", layers=2, held=2, licence="none", megabytes=0.0)
    model.config.origins = [Origin(part=part, **note) for part in parts]
    source.config.origins = model.config.origins
    for part, module in model.loaded_parts().items():
        module.load_state_dict(source.loaded_parts()[part].state_dict())
    if "vision" in parts: model.visual.freeze()
    return model


def train(model, recipe, data):
    "The history of a training in a folder that is thrown away."
    with tempfile.TemporaryDirectory() as folder:
        cache = None if any(p.requires_grad for p in model.visual.vision.parameters()) else f"{folder}/cache"
        return Trainer(model, recipe, *data, f"{folder}/run", cache=cache).fit()


def recipe_of(name, settings, clips, seed):
    recipe = replace(RECIPES[name], seed=seed, precision=settings.precision, batch_size=16, accumulation=1)
    return with_min_updates(recipe, clips, settings.updates)


def result(name, start, seed, history):
    best = max(row["val_uar"] for row in history)
    return dict(recipe=name, start=start, seed=seed, epochs=len(history), uar=best)


def keep(settings, rows):
    "Write what there is so far."
    found = defaultdict(list)
    for row in rows: found[f"{row['recipe']}, {row['start']}"].append(row["uar"])
    told = [f"{name}: {mean(uars):.2f} ({min(uars):.2f} to {max(uars):.2f}, {len(uars)} seeds)"
            for name, uars in found.items()]
    answer = "best validation UAR, mean and range: " + "; ".join(told)
    save("recipes_on_toy", answer, **asdict(settings), rows=rows)


def main(settings):
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        sizes = dict(actors=settings.speakers, clips_per_actor=settings.clips, seconds=1.5)
        make_toy(folder, **sizes, progress=False)
        corpus = Corpus.from_folder(folder)
        reader = Processor.for_model(preset_config("tiny", corpus.emotions), faces="none", n_frames=8)
        half = settings.speakers // 2
        groups = (corpus.speakers[:half - 2], corpus.speakers[half - 2:half],
                  corpus.speakers[half:-2], corpus.speakers[-2:])
        source_train, source_val, train_set, val_set = [ClipDataset(corpus.of(who), reader) for who in groups]
        seed_everything(0)
        source = build(corpus, "tiny")
        if "loaded" in settings.starts:
            train(source, with_min_updates(RECIPES["tiny"], len(source_train)), (source_train, source_val))
        for start, name, seed in product(settings.starts, settings.recipes, settings.seeds):
            if start == "loaded" and not LOADED[name]: continue
            seed_everything(seed)
            model = build(corpus, name)
            if start == "loaded": take_over(model, source, LOADED[name])
            history = train(model, recipe_of(name, settings, len(train_set), seed), (train_set, val_set))
            rows.append(result(name, start, seed, history))
            keep(settings, rows)


if __name__ == "__main__": run(main, Settings)
