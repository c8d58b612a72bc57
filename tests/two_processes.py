"""What each process of `test_two_processes_are_one` does: train, be cut off, resume, write the result."""
import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState

from mmfer.core import seed_everything
from mmfer.corpus import RAVDESS_EMOTIONS
from mmfer.model import MultimodalFER, preset_config
from mmfer.runs import Checkpoints, RunFolder
from mmfer.trainer import RECIPES, Trainer
from test_trainer import Clips, without_times

# BatchNorm averages over the clips of one process, so it is frozen; dropout is off, each draws its own
RECIPE = replace(RECIPES["tiny"], epochs=2, batch_size=2, warmup_epochs=0.5, freeze=["audio"], save_batches=1)


STILL = dict(freeze=["audio", "visual"], audio_loss=0.0, visual_loss=0.0)  # so that the tower can be cached


class Cut(Exception): pass


class Breaking(Trainer):
    stop_at = -1

    def train_step(self, batch):
        if self.stop_at == 0: raise Cut
        self.stop_at -= 1
        return super().train_step(batch)


def train(out, batch_size, resume=False, stop_at=-1, dropout=0.0, clips=8, cache=None, **changes):
    "History without times, and a digest of the weights."
    seed_everything(0)
    config = preset_config("tiny", RAVDESS_EMOTIONS)
    config.modality_dropout = dropout
    for part in ("audio", "visual", "fusion", "classifier"):
        setattr(config, part, replace(getattr(config, part), dropout=dropout))
    recipe = replace(RECIPE, batch_size=batch_size, **changes)
    made = Breaking(MultimodalFER(config), recipe, Clips(clips), Clips(3), out, resume=resume, cache=cache)
    made.stop_at = stop_at
    try: made.fit()
    except Cut: return None
    weights = b"".join(p.detach().numpy().tobytes() for p in made.model.parameters())
    return dict(history=without_times(made.progress.history), weights=hashlib.sha256(weights).hexdigest())


def judge(out):
    recipe = replace(RECIPE, epochs=1, freeze=[], alignment_loss=0.5, class_weights=True)
    seed_everything(0)
    model = MultimodalFER(preset_config("tiny", RAVDESS_EMOTIONS))
    return Trainer(model, recipe, Clips(8), Clips(9), out)


def judged(out):
    "Validation with all that looks at a whole batch, by a model whose batch norm learns."
    made = judge(out)
    made.fit()
    return {name: value for name, value in made.progress.history[0].items() if name.startswith("val")}


def judged_again(out):
    "What one process finds with the state that was saved."
    made = judge(out / "again")
    made.objective.load_state_dict(RunFolder(out).checkpoints.load()["objective"])
    return made.validate()


def refuse(*args, **kwargs): raise AssertionError("only the first process may write")


def job(rank, port, out):
    "One of two processes."
    torch.set_num_threads(1)  # threads do not survive a fork
    AcceleratorState._reset_state(reset_partial_state=True)  # what the forked process knew: that it is alone
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port), ACCELERATE_USE_CPU="true")
    if rank: Checkpoints.save = RunFolder.write_json = RunFolder.save_model = refuse
    out = Path(out)
    results = dict(plain=train(out / "plain", 2), grouped=train(out / "grouped", 2, accumulation=2))
    results["cached"] = train(out / "cached", 2, cache=out / "cache", **STILL)
    results["judged"] = judged(out / "judged")
    results["whole"] = train(out / "whole", 2, dropout=0.3, clips=9)
    train(out / "cut", 2, stop_at=4, dropout=0.3, clips=9)
    results["resumed"] = train(out / "cut", 2, resume=True, dropout=0.3, clips=9)
    (out / f"result-{rank}.json").write_text(json.dumps(results))
