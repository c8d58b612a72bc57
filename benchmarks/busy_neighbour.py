"""How long does `mmfer compare` on features take alone, and beside another program that keeps the cores busy?

    python benchmarks/busy_neighbour.py FEATURES.npz [--before FOLDER]

One split, late fusion, LFM2 and the baselines: four trainings. A neighbour is a plain Python loop (one core),
or torch's matrix products in two threads. `--before` names a folder with
another `mmfer`, timed in the same way.
"""
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import common
from tyro.conf import Positional

from mmfer.core import require

COMPARE = ["--systems", "late", "lfm2_lightweight", "--folds", "single"]
NEIGHBOURS = {
    "alone": None,
    "beside a Python loop": "while True: pass",
    "beside matrix products in 2 threads":
        "import torch; torch.set_num_threads(2); a = torch.randn(1000, 1000)\nwhile True: a @ a",
}
WARM_UP = 5.0  # seconds until a neighbour is at work


@dataclass
class Settings:
    features: Positional[Path]   # the .npz to compare on
    before: Path | None = None   # folder that holds another `mmfer`
    limit: int = 1800            # seconds after which a comparison is given up


def environment(library):
    "That of a user: no limit on threads; `library` comes before any installed mmfer."
    inherited = {k: v for k, v in os.environ.items() if not k.endswith("_NUM_THREADS")}
    return inherited | {"PYTHONPATH": str(library)}


def seconds(settings, library):
    "Wall time of one comparison, start of Python and of the workers included; None when it was given up."
    main = "from mmfer.cli import main; main()"
    with tempfile.TemporaryDirectory() as out:
        features = str(settings.features.resolve())
        line = [sys.executable, "-c", main, "compare", features, *COMPARE, "--out", out]
        start = time.perf_counter()
        process = subprocess.Popen(line, env=environment(library), cwd=out, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True)
        try: said = process.communicate(timeout=settings.limit)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            return None
        require(process.returncode == 0, f"the comparison failed: {said.strip().splitlines()[-1:]}")
        return round(time.perf_counter() - start, 1)


def beside(neighbour, settings, library):
    "The same while a neighbour is at work."
    if neighbour is None: return seconds(settings, library)
    other = subprocess.Popen([sys.executable, "-c", neighbour], env=environment(library))
    try:
        time.sleep(WARM_UP)
        return seconds(settings, library)
    finally: other.kill()


def told(version, figures, limit):
    said = [f"{name} {f'over {limit}' if s is None else f'{s:.0f}'} s" for name, s in figures.items()]
    return f"{version}: {', '.join(said)}"


def main(settings):
    require(settings.features.is_file(), f"{settings.features} is not there: name a features file (.npz)")
    versions = {"before": settings.before} if settings.before else {}
    versions["now"] = Path(__file__).resolve().parent.parent
    load = round(os.getloadavg()[0], 2)
    figures = {}
    for version, library in versions.items():
        figures[version] = {name: beside(code, settings, library) for name, code in NEIGHBOURS.items()}
    answer = "; ".join(told(version, s, settings.limit) for version, s in figures.items())
    facts = dict(compare=COMPARE, cores=os.cpu_count(), load_at_start=load)
    common.save("busy_neighbour", answer, seconds=figures, **facts)


if __name__ == "__main__": common.run(main, Settings)
