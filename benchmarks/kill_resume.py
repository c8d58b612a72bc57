"""Does a training that is killed with SIGKILL and resumed end with the very weights of the unbroken run?

    python benchmarks/kill_resume.py [--kills 20] [--seed 0]

Kills a small training at random batches: before a batch, after its weight update, or halfway through
writing a checkpoint; resumes it in a process that began with other weights, and compares bit by bit.
Runs on a CPU in minutes.
Writes benchmarks/results/kill_resume.json with chip, versions and command.
"""
import hashlib
import json
import multiprocessing
import os
import random
import signal
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import accelerate
import torch
from common import run, save

from mmfer.core import require, seed_everything
from mmfer.corpus import RAVDESS_EMOTIONS
from mmfer.model import MultimodalFER, preset_config
from mmfer.runs import Checkpoints
from mmfer.trainer import RECIPES, Trainer

BATCHES = 15  # three epochs of nine clips, two a batch
RECIPE = replace(RECIPES["tiny"], epochs=3, batch_size=2, accumulation=2, warmup_epochs=0.5,
                 schedule="restarts", save_batches=1, mixup=0.4, augment=["audio", "video"],
                 class_weights=True)
MOMENTS = ("before the batch", "after the batch", "while a checkpoint is written")


@dataclass
class Settings:
    "Kill a training at random batches, and resume it."
    kills: int = 20  # trainings to kill
    seed: int = 0    # draws batches and moments


class Clips(torch.utils.data.Dataset):
    "Made-up clips."
    def __init__(self, n):
        g = torch.Generator().manual_seed(0)
        self.items = [self.made_up(i, g) for i in range(n)]

    def made_up(self, i, g):
        audio = 0.1 * torch.randn(8_000, generator=g)
        video = torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8, generator=g)
        return dict(audio=audio, label=i % 8, clip=f"clip-{i}", video=video)

    def __len__(self): return len(self.items)
    def __getitem__(self, i): return dict(self.items[i])


def die(): os.kill(os.getpid(), signal.SIGKILL)


class Watched(Trainer):
    "Can be killed at a batch."
    seen = 0        # batches so far
    kill_at = None  # number of the batch
    moment = ""     # one of `MOMENTS`

    def train_step(self, batch):
        self.seen += 1
        if self.seen == self.kill_at and self.moment == MOMENTS[0]: die()
        return super().train_step(batch)

    def checkpoint(self, keep=False):
        if self.kill_at and self.seen >= self.kill_at: self.die_saving()
        super().checkpoint(keep)

    def die_saving(self):
        if self.moment == MOMENTS[1]: die()

        def half(state, file):
            file.write(os.urandom(100_000))
            file.flush()
            die()
        torch.save = half


def train(out, resume=False, kill_at=None, moment=""):
    "Train, and return what must be equal: a digest of all weights, and the history without its seconds."
    seed_everything(99 if resume else 0)
    config = preset_config("tiny", RAVDESS_EMOTIONS)
    config.modality_dropout = 0.5
    made = Watched(MultimodalFER(config), RECIPE, Clips(9), Clips(3), out, resume=resume)
    made.kill_at = kill_at
    made.moment = moment
    rows = [{k: v for k, v in row.items() if k not in ("seconds", "data_wait")} for row in made.fit()]
    weights = b"".join(v.numpy().tobytes() for v in made.objective.state_dict().values())
    return dict(weights=hashlib.sha256(weights).hexdigest(), history=rows)


def in_child(folder, *args):
    "Run `train` in a forked process; its exit code, and its result when it lived to give one."
    def job():
        torch.set_num_threads(1)  # threads do not survive a fork
        (folder / "result.json").write_text(json.dumps(train(folder / "run", *args)))
    child = multiprocessing.get_context("fork").Process(target=job)
    child.start()
    child.join()
    result = folder / "result.json"
    return child.exitcode, json.loads(result.read_text()) if result.exists() else None


def kill_once(batch, moment, whole):
    "One training killed and resumed: where, resumed from where, equal or not."
    with tempfile.TemporaryDirectory() as folder:
        code, _ = in_child(Path(folder), False, batch, moment)
        killed = code == -signal.SIGKILL
        require(killed, f"the training to be killed at batch {batch} ended with {code}: look at its output")
        note = json.loads(Checkpoints(Path(folder) / "run" / "checkpoint").newest().read_text())
        code, result = in_child(Path(folder), True)
        place = dict(epoch=note["epoch"], batch=note["batch"])
        equal = json.loads(json.dumps(whole)) == result
        return dict(batch=batch, moment=moment, resumed_from=place, exit_code=code, equal=equal)


def main(settings):
    start = time.perf_counter()
    draw = random.Random(settings.seed)
    with tempfile.TemporaryDirectory() as folder: code, whole = in_child(Path(folder))
    require(code == 0, "the unbroken training failed: look at its output above")
    kills = []
    for i in range(settings.kills):
        kills.append(kill_once(draw.randint(1, BATCHES), MOMENTS[i % 3], whole))
        print(f"{i + 1}/{settings.kills}: {kills[-1]}", flush=True)
    equal = sum(k["equal"] for k in kills)
    answer = f"{equal} of {settings.kills} killed trainings end with the weights of the unbroken one"
    seconds = round(time.perf_counter() - start, 1)
    save("kill_resume", answer, **asdict(settings), equal=equal, accelerate=accelerate.__version__,
         recipe=asdict(RECIPE), seconds=seconds, runs=kills)
    require(equal == settings.kills, "a resumed training differs: look at the list above")


if __name__ == "__main__":
    torch.set_num_threads(1)
    run(main, Settings)
