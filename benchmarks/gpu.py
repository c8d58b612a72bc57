"""Do the tests that need a GPU pass?

    make gpu
    python benchmarks/gpu.py [--smoke]

Runs `pytest -m gpu`, then every benchmark of a GPU, each in a process of its own, and writes the table. What
fails is named at the end, and the others still run. `--smoke` tries all of it out in tiny sizes, also without
a GPU, and keeps nothing.
"""
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from common import require_gpu, run, save

from mmfer.core import require

HERE = Path(__file__).parent
SIZES = "--presets tiny --batches 2 --precisions no bf16 --steps 1"
JOBS = {  # script -> its arguments, and those of a try-out
    "step_time.py": ("", SIZES),
    "full_12gb.py": ("", "--preset tiny --batch 2 --steps 1"),
    "siglip_speed.py": ("", "--preset tiny --batch 2 --calls 1 --matrix 64"),
    "data_speed.py": ("--clips 64", "--preset tiny --clips 2 --repeats 1"),
    "inference_speed.py": ("", "--presets tiny --clips 2 --batch 2"),
    "epoch_cost.py": ("--preset lightweight", "--preset tiny --clips 18 --epochs 2 --workers 0"),
}
BESIDE = {  # the same on the CPU of the same machine
    "inference_speed.py": ("--presets tiny lightweight full --clips 4 --batch 4", "--presets tiny --clips 1"),
}


@dataclass
class Settings:
    smoke: bool = False  # tiny sizes, also without a GPU; nothing is kept


def run_tests(environment):
    "What pytest says of the tests that need a GPU in its last line, and whether all is well."
    line = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(HERE.parent / "tests")]
    process = subprocess.run(line, env=environment, stdout=subprocess.PIPE, text=True)
    print(process.stdout, flush=True)
    told = process.stdout.strip().splitlines()[-1]
    return re.sub(r" in [\d.]+s.*", "", told), process.returncode == 0


def run_jobs(jobs, environment, smoke):
    "Run scripts one after the other; the names of those that fail."
    failed = []
    for script, (usual, tiny) in jobs.items():
        print(f"== {script}", flush=True)
        line = [sys.executable, str(HERE / script), *(tiny if smoke else usual).split()]
        if subprocess.run(line, env=environment).returncode: failed.append(script)
    return failed


def main(settings):
    if not settings.smoke: require_gpu()
    with tempfile.TemporaryDirectory() as try_out:
        environment = os.environ | (dict(MMFER_TRY_OUT=try_out) if settings.smoke else {})
        start = time.perf_counter()
        told, passed = run_tests(environment)
        if not settings.smoke: save("gpu_tests", told, seconds=time.perf_counter() - start)
        failed = [] if passed else ["the tests"]
        failed += run_jobs(JOBS, environment, settings.smoke)
        failed += run_jobs(BESIDE, environment | dict(CUDA_VISIBLE_DEVICES=""), settings.smoke)
    if not settings.smoke: subprocess.run([sys.executable, str(HERE / "readme.py"), "--write"], check=True)
    require(not failed, f"not well: {', '.join(failed)}, see above")


if __name__ == "__main__": run(main, Settings)
