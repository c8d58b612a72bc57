"""How long does a training step take, and how much memory at its peak, by preset, batch and precision?

    python benchmarks/step_time.py [--presets tiny lightweight] [--batches 4 16] [--precisions no]

Synthetic clips of 16 pictures and 3 s of sound; random weights, which cost the same; fp16 with a gradient
scaler, as on a T4. On a CPU the peak is that of the process and is not given.
"""
from dataclasses import asdict, dataclass
from itertools import product

import torch
from common import DEVICE, forget_memory, peak_gb, run, save, seconds_per_call, synthetic_batch, training_step

from mmfer.corpus import RAVDESS_EMOTIONS
from mmfer.losses import MultimodalLoss
from mmfer.model import MultimodalFER


@dataclass
class Settings:
    "Every combination is measured."
    presets: tuple[str, ...] = ("tiny", "lightweight", "full") if DEVICE == "cuda" else ("tiny",)
    batches: tuple[int, ...] = (4, 8, 16)
    precisions: tuple[str, ...] = ("no", "fp16", "bf16") if DEVICE == "cuda" else ("no",)
    steps: int = 5  # timed steps


def measure(preset, batch, precision, steps):
    "One row: seconds per step, clips per second, peak GB (CUDA only); None where it does not fit."
    row = dict(preset=preset, batch=batch, precision=precision)
    forget_memory()
    model = MultimodalFER.from_preset(preset, RAVDESS_EMOTIONS, weights="none").to(DEVICE).train()
    step = training_step(model, MultimodalLoss(), *synthetic_batch(model, batch), precision)
    try: seconds = seconds_per_call(step, steps)
    except torch.OutOfMemoryError: return row | dict(seconds=None, clips_per_second=None, peak_gb=None)
    return row | dict(seconds=seconds, clips_per_second=batch / seconds, peak_gb=peak_gb())


def sentence(row):
    what = f"{row['preset']}, batch {row['batch']}, {row['precision']}"
    if row["seconds"] is None: return f"{what}: out of memory"
    return f"{what}: {row['seconds']:.2f} s" + (f", {row['peak_gb']:.1f} GB" if row["peak_gb"] else "")


def main(settings):
    combinations = product(settings.presets, settings.batches, settings.precisions)
    rows = [measure(*combination, settings.steps) for combination in combinations]
    save(f"step_time_{DEVICE}", "; ".join(map(sentence, rows)), **asdict(settings), rows=rows)


if __name__ == "__main__": run(main, Settings)
