"""Which precision suits which chip, and a model that answers leaves no trace."""
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from mmfer.core import MmferError, inference, pick_tier, this_machine

CHIPS = {  # memory in GB and compute capability, as CUDA reports them
    "P100": (15.9, (6, 0), "no", "lightweight"),
    "V100": (15.8, (7, 0), "fp16", "lightweight"),
    "T4": (14.6, (7, 5), "fp16", "lightweight"),
    "A100": (39.6, (8, 0), "bf16", "full"),
    "L4": (22.0, (8, 9), "bf16", "lightweight"),
    "H100": (79.1, (9, 0), "bf16", "full"),
}


def pretend(monkeypatch, memory_gb, capability):
    major, minor = capability
    properties = SimpleNamespace(total_memory=int(memory_gb * 2**30), major=major, minor=minor)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: properties)


@pytest.mark.parametrize("chip", CHIPS)
def test_each_chip_gets_the_precision_that_it_computes_fast(chip, monkeypatch):
    memory_gb, capability, precision, preset = CHIPS[chip]
    pretend(monkeypatch, memory_gb, capability)
    tier = this_machine()
    assert (tier.device, tier.precision, tier.preset) == ("cuda", precision, preset)
    assert tier.memory_gb == pytest.approx(memory_gb, abs=0.01)


def test_a_cpu_computes_in_float32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert this_machine() == pick_tier("cpu")
    assert (this_machine().precision, this_machine().preset) == ("no", "tiny")


def network(): return nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.5))


@pytest.mark.parametrize("training", (True, False))
def test_after_inference_a_model_is_in_the_mode_it_had(training):
    model = network().train(training)
    with inference(model, "cpu"): assert not model.training
    assert model.training is training


def test_after_an_error_a_model_is_in_the_mode_it_had():
    model = network().train()
    with pytest.raises(ZeroDivisionError), inference(model, "cpu"): 1 / 0
    assert model.training and not torch.is_inference_mode_enabled()


class Travelled(nn.Linear):
    "Notes where it is sent, and whether in inference mode, in which weights lose their gradients for good."

    def __init__(self):
        super().__init__(4, 3)
        self.journey = []

    def to(self, device):
        self.journey.append((str(device), torch.is_inference_mode_enabled()))
        return self


def test_a_model_goes_to_the_accelerator_and_comes_home(monkeypatch):
    pretend(monkeypatch, 14.6, (7, 5))
    model = Travelled()
    with inference(model) as device: assert device.type == "cuda"
    assert model.journey == [("cuda", False), ("cpu", False)]


@pytest.mark.parametrize("chip", ("T4", "A100"))
def test_the_accelerator_answers_in_its_precision(chip, monkeypatch):
    memory_gb, capability, precision, _ = CHIPS[chip]
    pretend(monkeypatch, memory_gb, capability)
    asked = []

    def autocast(device, dtype, enabled):
        asked.append((device, dtype, enabled))
        return torch.no_grad()
    monkeypatch.setattr(torch, "autocast", autocast)
    with inference(Travelled()): pass
    with inference(Travelled(), "cpu"): pass
    half = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert asked == [("cuda", half, True), ("cpu", None, False)]


def test_a_model_can_be_trained_after_inference():
    model = network()
    with inference(model, "cpu", "bf16"): answer = model(torch.ones(2, 4))
    assert answer.dtype == torch.bfloat16 and not answer.requires_grad
    model(torch.ones(2, 4)).sum().backward()
    assert model[0].weight.grad is not None


def test_an_unknown_precision_is_refused():
    with pytest.raises(MmferError, match="precision 'half' is unknown: choose one of no, fp16, bf16"):
        with inference(network(), "cpu", "half"): pass


WORKER = """
import os, subprocess, sys, time
child = 'import os, sys, time; from mmfer.core import start_worker; start_worker(int(sys.argv[1])); ' \\
        'print(os.getpid(), flush=True); time.sleep(60)'
subprocess.Popen([sys.executable, '-c', child, str(os.getpid())])
time.sleep(60)
"""


def test_a_worker_goes_with_its_parent():
    with subprocess.Popen([sys.executable, "-c", WORKER], stdout=subprocess.PIPE, text=True) as parent:
        worker = Path("/proc") / parent.stdout.readline().strip()
        parent.kill()
    limit = time.monotonic() + 30
    while worker.exists() and time.monotonic() < limit: time.sleep(0.1)
    assert not worker.exists()


MODULES = sorted((Path(__file__).parent.parent / "mmfer").glob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_the_library_imports_itself_by_relative_names(path):
    "nbdev passes over an import of several lines whose last line is shorter than its first words."
    assert not re.findall(r"^(?:from|import) mmfer\b.*", path.read_text(encoding="utf-8"), re.MULTILINE)
