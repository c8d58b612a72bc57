"""Does one training step of a preset fit into 12 GB? Peak memory and clips a second, forward and backward, in bf16.

    python benchmarks/full_12gb.py [--preset full] [--batch 4] [--gb 12]

Needs a CUDA device. Writes benchmarks/results/<preset>_<gb>gb.json with chip, versions and settings.
"""
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
import tyro

from mmfer.core import EMOTIONS, MmferError, atomic_write
from mmfer.losses import MultimodalLoss
from mmfer.model import MultimodalFER

RESULTS = Path(__file__).parent / "results"


@dataclass
class Settings:
    "One training step of a preset under a hard memory cap."
    preset: str = "full"   # "tiny", "lightweight" or "full"
    batch: int = 4         # clips a step
    gb: float = 12.0       # the cap, GB
    frames: int = 16       # pictures a clip
    seconds: float = 3.0   # sound a clip
    steps: int = 10        # timed steps, after two that warm up


def synthetic_batch(settings, size, device):
    "Random clips of the wanted shape, and their labels."
    g = torch.Generator().manual_seed(0)
    audio = 0.1 * torch.randn(settings.batch, int(16_000 * settings.seconds), generator=g)
    video = torch.randint(0, 256, (settings.batch, settings.frames, 3, size, size), dtype=torch.uint8, generator=g)
    labels = torch.randint(len(EMOTIONS), (settings.batch,), generator=g)
    return dict(audio=audio.to(device), video=video.to(device)), labels.to(device)


def measure(settings):
    "Peak memory in GB and clips a second of forward, backward and update."
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, settings.gb * 2**30 / total))
    model, loss = MultimodalFER.from_preset(settings.preset).cuda().train(), MultimodalLoss()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    inputs, labels = synthetic_batch(settings, model.config.visual.image_size, "cuda")

    def step():
        with torch.autocast("cuda", torch.bfloat16): total = loss(model(**inputs), labels)["total"]
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        return total.item()

    for _ in range(2): step()
    torch.cuda.reset_peak_memory_stats()
    torch.cuda.synchronize()
    start = time.perf_counter()
    losses = [step() for _ in range(settings.steps)]
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    if not all(map(torch.isfinite, torch.tensor(losses))): raise MmferError(f"a loss was not finite: {losses}")
    return dict(peak_gb=torch.cuda.max_memory_reserved() / 2**30, clips_per_second=settings.steps * settings.batch / seconds)


def main(settings):
    if not torch.cuda.is_available(): raise MmferError("this benchmark needs a CUDA device: run it on a machine with a GPU")
    chip = dict(chip=torch.cuda.get_device_name(), torch=torch.__version__, transformers=transformers.__version__, python=platform.python_version())
    result = asdict(settings) | measure(settings) | chip
    with atomic_write(RESULTS / f"{settings.preset}_{settings.gb:.0f}gb.json") as f: json.dump(result, f, indent=1)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    try: main(tyro.cli(Settings))
    except MmferError as e: sys.exit(f"full_12gb: {e}")
