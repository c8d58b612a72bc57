"""What all benchmarks share: which machine this is, how a result is kept, the time of a step.

With the variable MMFER_TRY_OUT, a folder, results go there and not among the measured ones, and a script that
measures a GPU runs without one: that shows that it works, and nothing else.
"""
import json
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import torch
import transformers

from mmfer.core import MmferError, atomic_write, require
from mmfer.media import write_clip

TRY_OUT = os.environ.get("MMFER_TRY_OUT")
RESULTS = Path(TRY_OUT or Path(__file__).parent / "results")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def machine():
    "The chip and the versions that a figure belongs to."
    facts = dict(device=DEVICE, chip=cpu_name(), threads=torch.get_num_threads(), torch=torch.__version__,
                 transformers=transformers.__version__, python=platform.python_version())
    if DEVICE == "cpu": return facts
    gpu = torch.cuda.get_device_properties()
    return facts | dict(chip=gpu.name, cpu=cpu_name(), memory_gb=gpu.total_memory / 2**30,
                        capability=f"{gpu.major}.{gpu.minor}", cuda=torch.version.cuda)


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


def require_gpu():
    there = DEVICE == "cuda" or TRY_OUT
    require(there, "this benchmark needs a CUDA device: run it on a machine with a GPU")


def wait_for_device():
    if DEVICE == "cuda": torch.cuda.synchronize()


def forget_memory():
    "Begin to measure the peak anew."
    if DEVICE == "cpu": return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def peak_gb():
    "GPU memory at its peak; None on a CPU, where only that of the process is known."
    return torch.cuda.max_memory_allocated() / 2**30 if DEVICE == "cuda" else None


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


def write_corpus(folder, clips, size, frames=16):
    "Noise with RAVDESS names, 4 s, 60 clips per actor: as hard to decode and to train on as anything else."
    rng = np.random.default_rng(0)
    for i in range(clips):
        name = f"01-01-{1 + i % 8:02d}-01-01-{1 + i % 60:02d}-{1 + i // 60:02d}.mp4"
        sound = 0.1 * rng.standard_normal(64_000).astype(np.float32)
        pictures = rng.integers(0, 256, (frames, size, size, 3), dtype=np.uint8)
        write_clip(Path(folder) / name, pictures, frames // 4, sound)


def autocast(precision):
    return torch.autocast(DEVICE, AUTOCAST.get(precision), enabled=precision in AUTOCAST)


def training_step(model, loss, batch, labels, precision):
    "A function that does one forward pass, backward pass and update."
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)
    scaler = torch.amp.GradScaler(DEVICE, enabled=precision == "fp16")

    def step():
        with autocast(precision): total = loss(model(**batch), labels)["total"]
        require(torch.isfinite(total), f"the loss became {total.item()}: these figures would mean nothing")
        scaler.scale(total).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    return step


def run(main, settings):
    "Read the command line and run; a mistake is one line."
    import tyro
    try: main(tyro.cli(settings))
    except MmferError as e: sys.exit(f"{Path(sys.argv[0]).stem}: {e}")
