"""Does one training step of a preset fit into 12 GB? Peak memory, clips per second.

    python benchmarks/full_12gb.py [--preset full] [--batch 4] [--gb 12] [--precision bf16]

A step is a forward pass, a backward pass and an update. Needs a CUDA device, whose memory is capped for
this process. Random weights; they cost the same.
"""
from dataclasses import asdict, dataclass

import torch
from common import (
    DEVICE, forget_memory, require_gpu, run, save, seconds_per_call, synthetic_batch, training_step)

from mmfer.core import this_machine
from mmfer.corpus import RAVDESS_EMOTIONS
from mmfer.losses import MultimodalLoss
from mmfer.model import MultimodalFER


@dataclass
class Settings:
    "One training step of a preset under a hard memory cap."
    preset: str = "full"     # "tiny", "lightweight" or "full"
    batch: int = 4           # clips per step
    gb: float = 12.0         # the cap, GB
    precision: str = this_machine().precision  # "bf16", "fp16" or "no"
    steps: int = 10          # timed steps


def measure(settings):
    "Peak memory in GB, with all that the allocator holds, and clips per second."
    forget_memory()
    if DEVICE == "cuda":
        total = torch.cuda.get_device_properties().total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, settings.gb * 2**30 / total))
    model = MultimodalFER.from_preset(settings.preset, RAVDESS_EMOTIONS, weights="none").to(DEVICE).train()
    step = training_step(model, MultimodalLoss(), *synthetic_batch(model, settings.batch), settings.precision)
    seconds = seconds_per_call(step, settings.steps)
    peak = torch.cuda.max_memory_reserved() / 2**30 if DEVICE == "cuda" else 0.0
    return dict(peak_gb=peak, clips_per_second=settings.batch / seconds)


def main(settings):
    require_gpu()
    try: figures = measure(settings)
    except torch.OutOfMemoryError: figures = {}
    told = "yes: peak {peak_gb:.1f} GB, {clips_per_second:.1f} clips/s"
    answer = told.format(**figures) if figures else "no"
    save(f"{settings.preset}_{settings.gb:.0f}gb", answer, **asdict(settings), **figures)


if __name__ == "__main__": run(main, Settings)
