"""Does the capstone, killed in each step, reach its end from an empty machine, and what does each step take?

    python benchmarks/rehearse.py [--small] [--root FOLDER]

A server on this machine stands in for the Hugging Face Hub (real names, formats and sizes, random weights)
and for RAVDESS's archives (real clips where `../shared/data` is at hand, else cartoons). The notebook runs
unedited from the first cell; it is killed with SIGKILL while it fetches, prepares, fills the cache, and in
each stage; and each time all cells are run again. Nothing that was finished may be done twice.
Writes benchmarks/results/rehearsal.json (rehearsal_small.json): seconds, peak memory, disk of each step.
"""
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from statistics import mean

import pandas as pd
import psutil
from common import run, save
from stand_in.files import write_archives, write_detector, write_weights
from stand_in.server import StandIn

from mmfer.core import require

REPO = Path(__file__).resolve().parent.parent
RECORDINGS = REPO.parent / "shared" / "data"
BIN = REPO / ".venv" / "bin"
ACTORS = ["01", "02", "03", "04"]
TOWER = "hub/google/siglip2-base-patch16-224/model.safetensors"
PACES = {"ravdess": 10e6}  # bytes per second: slow enough to be killed in the middle
STAGES = ("1_branches", "2_fusion", "3_end_to_end")


@dataclass
class Settings:
    "Rehearse the capstone on a machine with nothing on it."
    small: bool = False  # preset tiny: no pretrained weights, one clip per emotion and actor
    root: Path = Path(tempfile.gettempdir()) / "mmfer-rehearsal"  # what the server holds is kept here: 3 GB


class Watch:
    "Looks at a process and its children from outside: memory and disk over time."

    def __init__(self, folder):
        self.folder = folder  # whose size is watched
        self.samples = []     # (time, resident MB of all processes, MB on disk)
        self.loads = []       # of the whole machine, other programs included

    def look(self, process):
        "Once every half second."
        if self.samples and time.time() - self.samples[-1][0] < 0.5: return
        resident = sum(_resident(p) for p in _family(process))
        self.samples.append((time.time(), resident / 1e6, _megabytes(self.folder)))
        self.loads.append(os.getloadavg()[0])

    def between(self, start, end):
        "Peak memory, and disk at the end; of a step shorter than a second, as they were around it."
        seen = [(memory, disk) for at, memory, disk in self.samples if start - 1 <= at <= end + 1]
        return dict(peak_memory_mb=round(max(seen)[0]), disk_mb=round(seen[-1][1]))


def _family(process):
    try: return [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess: return []


def _resident(process):
    try: return process.memory_info().rss
    except psutil.NoSuchProcess: return 0


def _megabytes(folder):
    "What is on the disk; files and folders may vanish meanwhile."
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try: total += os.lstat(os.path.join(where, name)).st_blocks * 512
            except FileNotFoundError: pass
    return total / 1e6


def _kill(process):
    "SIGKILL for the notebook's runner, its kernel and all of their workers."
    for p in _family(process):
        try: p.kill()
        except psutil.NoSuchProcess: pass
    process.wait()


class Machine:
    "A machine with nothing on it but mmfer: what the notebook writes there, and how it is started."

    def __init__(self, folder, server, preset):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        self.folder = folder
        self.keep = folder / "data"
        self.out = folder / "runs" / f"ravdess-{preset}"
        self.watch = Watch(folder)
        self.environment = os.environ | dict(
            HF_ENDPOINT=server.url, HF_HOME=str(folder / "hub"), HF_HUB_OFFLINE="0", IN_TEST="0",
            MMFER_RAVDESS_URL=f"{server.url}/ravdess", PATH=f"{BIN}:{os.environ['PATH']}")

    def run(self, command, is_due=None):
        "To the end, or until it is due to be killed. Returns when it began and when it ended."
        began = time.time()
        log_file = self.folder / "log.txt"
        folder = REPO if command[0] == "make" else self.folder
        with open(log_file, "w") as log:
            process = psutil.Popen(
                command, cwd=folder, env=self.environment, stdout=log, stderr=subprocess.STDOUT)
        killed = False
        while process.poll() is None and not killed:
            self.watch.look(process)
            killed = is_due is not None and is_due()
            time.sleep(0.05)
        if killed: _kill(process)
        words = shlex.join(command)
        require(killed or process.returncode == 0, f"{words} ended with an error: see {log_file}")
        require(killed or not is_due, f"{words} ended before it could be killed: see {log_file}")
        return began, time.time()

    def row(self, run, step, began, ended):
        return dict(run=run, step=step, seconds=round(ended - began, 1), **self.watch.between(began, ended))

    def run_capstone(self, command, run, is_due=None):
        "All cells from the first. Returns one row per step."
        _, ended = self.run([*command, f"KEEP={self.keep}", f"RUN={self.out}"], is_due)
        steps = _steps(self.out / "capstone.ipynb", ended)
        return [self.row(run, step, *times) for step, times in steps.items()]

    def finished(self):
        "What must not be made again, with the time it was made."
        files = [*self.keep.glob("ravdess/clips/*.npz"), *self.keep.glob("cache/*/*.npy")]
        return {file: file.stat().st_mtime_ns for file in files}


def _steps(notebook, ended):
    "{step: (its start, its end)}: a cell belongs to the last cell before it whose id begins with `step-`."
    step = "begin"
    steps = {}
    for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"]:
        if cell["id"].startswith("step-"): step = cell["id"].removeprefix("step-")
        times = cell["metadata"].get("papermill", {})
        if not times.get("start_time"): continue
        start = datetime.fromisoformat(times["start_time"]).timestamp()
        end = datetime.fromisoformat(times["end_time"]).timestamp() if times.get("end_time") else ended
        steps[step] = (steps.get(step, (start,))[0], end)
    return steps


def _archive(actor): return f"ravdess/Video_Speech_Actor_{actor}.zip"


def kills(machine, server, small):
    "[(where, whether it is time)] in the order of the capstone."
    def half_sent(name): return lambda: server.sent[name] > (server.root / name).stat().st_size / 2

    def files(folder, pattern, n=1): return lambda: len(list(folder.glob(pattern))) >= n

    fused = machine.out / "fold_1" / "fused"
    clips = 8 if small else 16  # of an actor
    prepared = files(machine.keep, "ravdess/clips/*.npz", clips * 3 // 2)
    pretrained = [
        ("tower's weights half fetched", half_sent(TOWER)),
        ("tower's cache begun", files(machine.keep, "cache/*/*.npy", 10))]
    stages = [(f"{stage}, after an epoch", files(fused / stage, "training_history.json")) for stage in STAGES]
    weights, cache = ([], []) if small else ([pretrained[0]], [pretrained[1]])
    fetched = ("second archive half fetched", half_sent(_archive("02")))
    return [*weights, fetched, ("second actor half prepared", prepared), *cache, *stages]


def rehearse(machine, server, small, commands):
    "Kill the capstone in each step and run it again, to the end; then the other commands. Returns the rows."
    capstone, *others = commands
    rows = []
    for where, is_due in [*kills(machine, server, small), ("at the end", None)]:
        before = machine.finished()
        rows += machine.run_capstone(capstone, where, is_due)
        _require_not_again(before, machine)
    for command in others:
        times = machine.run(command)
        rows.append(machine.row("command line", shlex.join(command), *times))
    for actor in ACTORS:
        name = _archive(actor)
        times = server.sent[name] / (server.root / name).stat().st_size
        require(times < 1.5, f"{name} was fetched {times:.1f} times: a download that broke off must go on")
    return rows


def _require_not_again(before, machine):
    after = machine.finished()
    again = sorted(file.name for file, made in before.items() if after.get(file) != made)
    require(not again, f"made again: {', '.join(again[:5])}: what is finished must stay")


def readme_commands(small, cartoons):
    "What README's section on real people says, with what makes it small added."
    section = (REPO / "README.md").read_text(encoding="utf-8").split("## Train on real people\n")[1]
    blocks = re.findall(r"^```bash\n(.*?)^```", section.split("\n## ")[0], re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("lightweight", "tiny" if small else "lightweight").splitlines()
    actors = f"1-{len(ACTORS)}"
    form = f"-p epochs 8 -p stages three -p actors {actors}" + " -p faces none" * cartoons
    added = {
        "make train": [f"FORM={form}"],
        "mmfer download": ["--actors", actors] + ["--faces", "none"] * cartoons,
        "mmfer train": ["--epochs", "3"]}
    commands = [shlex.split(line, comments=True) for line in lines]
    return [command + added.get(" ".join(command[:2]), []) for command in commands]


def main(settings):
    recordings = RECORDINGS if RECORDINGS.is_dir() else None
    root = settings.root
    if recordings: write_detector(root / "hub", recordings / "yunet" / "yunet_n_dynamic.onnx")
    if not settings.small: write_weights(root / "hub")
    write_archives(root, ACTORS, recordings, per_emotion=1 if settings.small else 2)
    commands = readme_commands(settings.small, cartoons=not recordings)  # in which YuNet finds no face
    preset = "tiny" if settings.small else "lightweight"
    with StandIn(root, PACES, breaks={_archive("01")}).running() as server:
        machine = Machine(root / "machine", server, preset)
        with zipfile.ZipFile(root / _archive("01")) as z:
            (machine.folder / "my_clip.mp4").write_bytes(z.read(z.namelist()[0]))
        started = time.time()
        rows = pd.DataFrame(rehearse(machine, server, settings.small, commands))
        seconds = time.time() - started
    print(rows.to_string(index=False))
    load = mean(machine.watch.loads)
    memory = rows.peak_memory_mb.max() / 1e3
    disk = rows.disk_mb.max() / 1e3
    answer = (
        f"{preset}, {len(ACTORS)} actors: killed {rows.run.nunique() - 2} times, all done after "
        f"{seconds / 60:.0f} min at a load of {load:.0f}; "
        f"at most {memory:.1f} GB of memory, {disk:.1f} GB of disk")
    name = "rehearsal_small" if settings.small else "rehearsal"
    clips = "real" if recordings else "cartoons"
    save(name, answer, clips=clips, seconds=round(seconds), rows=rows.to_dict("records"))


if __name__ == "__main__": run(main, Settings)
