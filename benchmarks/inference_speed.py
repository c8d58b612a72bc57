"""How fast are answers and explanations, on a GPU and on a CPU?

    python benchmarks/inference_speed.py [--presets tiny lightweight full] [--clips 16]

`predict` on clips of 16 pictures and 3 s of sound, clips per second; `explain` by all its methods, and the
longest of them, `occlude`, of one clip, seconds; in this machine's precision. Random weights; they cost the
same. Where there is a GPU, `CUDA_VISIBLE_DEVICES=` before the command hides it.
"""
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from common import DEVICE, run, save, seconds_per_call

from mmfer.core import this_machine
from mmfer.corpus import RAVDESS_EMOTIONS
from mmfer.evaluate import predict
from mmfer.explain import explain, occlude
from mmfer.faces import middle_square
from mmfer.model import MultimodalFER
from mmfer.processor import FaceClip, Processor, collate


@dataclass
class Settings:
    "Every preset is asked."
    presets: tuple[str, ...] = ("tiny", "lightweight", "full") if DEVICE == "cuda" else ("tiny",)
    clips: int = 16       # for `predict`
    batch: int = 8        # clips per batch
    calls: int = 3        # timed calls on the GPU; on the CPU it is one


def made_up(i, size, frames=16, seconds=3.0):
    "A clip of noise."
    rng = np.random.default_rng(i)
    audio = 0.1 * rng.standard_normal(int(16_000 * seconds)).astype(np.float32)
    pictures = rng.integers(0, 256, (frames, size, size, 3), dtype=np.uint8)
    times = (np.arange(frames) + 0.5) / frames * seconds
    return FaceClip(Path(f"noise-{i}.mp4"), audio, pictures, times, seconds, track=middle_square(pictures))


def measure(preset, settings):
    "One row: what a preset takes."
    model = MultimodalFER.from_preset(preset, RAVDESS_EMOTIONS, weights="none").to(DEVICE)
    processor = Processor.for_model(model.config, faces="none")
    clips = [made_up(i, model.config.visual.image_size) for i in range(settings.clips)]
    items = [processor.item(clip) | dict(clip=clip.path.stem, label=0) for clip in clips]
    batches = [collate(items[i:i + settings.batch]) for i in range(0, len(items), settings.batch)]
    calls = (settings.calls, 1) if DEVICE == "cuda" else (1, 0)

    def seconds(f, *args, **kwargs): return seconds_per_call(lambda: f(model, *args, **kwargs), *calls)
    speed = settings.clips / seconds(predict, batches, progress=False)
    explain_s = seconds(explain, processor, clips[0])
    occlude_s = seconds(occlude, processor, clips[0], progress=False)
    return dict(preset=preset, clips_per_second=speed, explain_s=explain_s, occlude_s=occlude_s)


def sentence(row):
    return ("{preset}: predict {clips_per_second:.1f} clips/s, explain {explain_s:.2f} s, "
            "occlude {occlude_s:.2f} s").format(**row)


def main(settings):
    rows = [measure(preset, settings) for preset in settings.presets]
    tier = this_machine()
    told = f"{tier.device}, precision {tier.precision}: {'; '.join(map(sentence, rows))}"
    save(f"inference_speed_{tier.device}", told, **asdict(settings), precision=tier.precision, rows=rows)


if __name__ == "__main__": run(main, Settings)
