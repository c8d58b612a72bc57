"""What all benchmarks share: which machine this is, how a result is kept, the time of a step."""
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import torch
import transformers

from mmfer.core import MmferError, atomic_write, require

RESULTS = Path(__file__).parent / "results"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def machine():
    "The chip and the versions that a figure belongs to."
    chip = torch.cuda.get_device_name() if DEVICE == "cuda" else cpu_name()
    return dict(chip=chip, threads=torch.get_num_threads(), torch=torch.__version__,
                transformers=transformers.__version__, python=platform.python_version())


def cpu_name():
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def command():
    "How to get this result again; folders of the user are left out."
    words = [Path(w).name if Path(w).exists() else w for w in sys.argv[1:]]
    return shlex.join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def save(name, answer, **figures):
    "Keep a result and print it. `answer` is the sentence that the table shows."
    result = dict(answer=answer, command=command(), **figures, machine=machine())
    with atomic_write(RESULTS / f"{name}.json") as f: json.dump(result, f, indent=1)
    print(json.dumps(result, indent=1))


def wait_for_device():
    if DEVICE == "cuda": torch.cuda.synchronize()


def seconds_per_call(f, calls, warmup=2):
    "Mean wall time of a call, after a few that are not counted."
    for _ in range(warmup): f()
    wait_for_device()
    start = time.perf_counter()
    for _ in range(calls): f()
    wait_for_device()
    return (time.perf_counter() - start) / calls


def synthetic_batch(model, clips, frames=16, seconds=3.0):
    "Random clips of the shape that a model takes, and their labels, on the device."
    g = torch.Generator().manual_seed(0)
    size = model.config.visual.image_size
    audio = 0.1 * torch.randn(clips, int(16_000 * seconds), generator=g)
    video = torch.randint(0, 256, (clips, frames, 3, size, size), dtype=torch.uint8, generator=g)
    labels = torch.randint(len(model.config.emotions), (clips,), generator=g)
    return dict(audio=audio.to(DEVICE), video=video.to(DEVICE)), labels.to(DEVICE)


def autocast(precision):
    return torch.autocast(DEVICE, AUTOCAST.get(precision), enabled=precision in AUTOCAST)


def training_step(model, loss, batch, labels, precision):
    "A function that does one forward pass, backward pass and update."
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)

    def step():
        with autocast(precision): total = loss(model(**batch), labels)["total"]
        require(torch.isfinite(total), f"the loss became {total.item()}: these figures would mean nothing")
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return step


def run(main, settings):
    "Read the command line and run; a mistake is one line."
    import tyro
    try: main(tyro.cli(settings))
    except MmferError as e: sys.exit(f"{Path(sys.argv[0]).stem}: {e}")
