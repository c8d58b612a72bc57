"""What needs a GPU. Run with `pytest -m gpu` on a machine that has one."""
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
without_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pytestmark = [pytest.mark.gpu, without_gpu]


def test_a_step_of_full_fits_into_12_gb():
    from full_12gb import Settings, measure
    measured = measure(Settings(steps=2))
    assert measured["peak_gb"] <= 12 and measured["clips_per_second"] > 0
