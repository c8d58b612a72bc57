"""How many pictures per second pass the SigLIP2 base tower, plain and compiled, and what share of the peak?

    python benchmarks/siglip_speed.py [--batch 256] [--precision bf16]

The peak is measured too, not read off a data sheet: the best of a few square matrix products in the same
precision. Random weights; they cost the same.
"""
from dataclasses import asdict, dataclass

import torch
from common import DEVICE, autocast, run, save, seconds_per_call
from torch.utils.flop_counter import FlopCounterMode

from mmfer.core import this_machine
from mmfer.visual import VISUAL_PRESETS, build_siglip


@dataclass
class Settings:
    "The forward pass alone, in inference mode."
    preset: str = "lightweight"                             # whose tower: that of lightweight is SigLIP2 base
    batch: int = 256 if DEVICE == "cuda" else 4             # pictures per call
    precision: str = this_machine().precision
    calls: int = 20 if DEVICE == "cuda" else 2              # timed calls
    matrix: int = 8192 if DEVICE == "cuda" else 1024        # side of the matrix product


def matrix_peak(settings):
    "Floating point operations per second of a large matrix product."
    x = torch.randn(settings.matrix, settings.matrix, device=DEVICE)
    with autocast(settings.precision):
        x = x.to(torch.get_autocast_dtype(DEVICE)) if settings.precision != "no" else x
        return max(2 * settings.matrix**3 / seconds_per_call(lambda: x @ x, settings.calls) for _ in range(3))


def flops_per_picture(tower, pictures):
    with FlopCounterMode(display=False) as counter: tower(pictures[:1])
    return counter.get_total_flops()


@torch.inference_mode()
def main(settings):
    config = VISUAL_PRESETS[settings.preset]
    tower = build_siglip(config).to(DEVICE).eval()
    pictures = torch.randn(settings.batch, 3, config.image_size, config.image_size, device=DEVICE)
    flops = flops_per_picture(tower, pictures)
    peak = matrix_peak(settings)
    figures = dict(gflops_per_picture=flops / 1e9, matrix_peak_tflops=peak / 1e12)
    for name, model in {"plain": tower, "compiled": torch.compile(tower)}.items():
        with autocast(settings.precision): seconds = seconds_per_call(lambda: model(pictures), settings.calls)
        speed = settings.batch / seconds
        figures |= {f"{name}_pictures_per_second": speed, f"{name}_share_of_peak": speed * flops / peak}
    answer = ("plain {plain_pictures_per_second:.0f}/s ({plain_share_of_peak:.0%} of the measured peak), "
              "compiled {compiled_pictures_per_second:.0f}/s ({compiled_share_of_peak:.0%})")
    save(f"siglip_speed_{DEVICE}", answer.format(**figures), **asdict(settings), **figures)


if __name__ == "__main__": run(main, Settings)
