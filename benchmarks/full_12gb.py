"""Does one training step of a preset fit into 12 GB? Peak memory, clips per second.

    python benchmarks/full_12gb.py [--preset full] [--batch 4] [--gb 12] [--precision bf16]

A step is a forward pass, a backward pass and an update. Needs a CUDA device, whose memory is capped for
this process.
"""
from dataclasses import asdict, dataclass

import torch
from common import DEVICE, run, save, seconds_per_call, synthetic_batch, training_step

from mmfer.core import require
from mmfer.corpus import RAVDESS_EMOTIONS
from mmfer.losses import MultimodalLoss
from mmfer.model import MultimodalFER


@dataclass
class Settings:
    "One training step of a preset under a hard memory cap."
    preset: str = "full"     # "tiny", "lightweight" or "full"
    batch: int = 4           # clips per step
    gb: float = 12.0         # the cap, GB
    precision: str = "bf16"  # "bf16", "fp16" or "no"
    steps: int = 10          # timed steps


def measure(settings):
    "Peak memory in GB and clips per second."
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, settings.gb * 2**30 / total))
    model = MultimodalFER.from_preset(settings.preset, RAVDESS_EMOTIONS).to(DEVICE).train()
    step = training_step(model, MultimodalLoss(), *synthetic_batch(model, settings.batch), settings.precision)
    seconds = seconds_per_call(step, settings.steps)
    return dict(peak_gb=torch.cuda.max_memory_reserved() / 2**30, clips_per_second=settings.batch / seconds)


def main(settings):
    require(DEVICE == "cuda", "this benchmark needs a CUDA device: run it on a machine with a GPU")
    figures = measure(settings)
    answer = "yes: peak {peak_gb:.1f} GB, {clips_per_second:.1f} clips/s".format(**figures)
    save(f"{settings.preset}_{settings.gb:.0f}gb", answer, **asdict(settings), **figures)


if __name__ == "__main__": run(main, Settings)
