"""How much disk does a training need, for each preset and system, in one stage and in three?

    python benchmarks/run_disk.py [--presets tiny lightweight full]

The models are built on PyTorch's meta device, which has shapes and no numbers, with the parts noted as
loaded that the preset loads. Models and checkpoints of one run, as `stages_disk_need` says; what the patch
tokens of RAVDESS' 1440 clips take stands beside it, since they may lie on another disk.
"""
from dataclasses import asdict, dataclass, replace

import torch
from common import run, save

from mmfer.cache import entry_bytes
from mmfer.corpus import RAVDESS_EMOTIONS
from mmfer.model import PRESETS, MultimodalFER, preset_config
from mmfer.processor import Processor
from mmfer.stages import one_stage, stages_disk_need, three_stages
from mmfer.trainer import RECIPES
from mmfer.weights import PRETRAINED, Origin, loadable_parts

SYSTEMS = ("lfm2", "audio_only", "visual_only")  # what the capstone trains


@dataclass
class Settings:
    "Every combination is counted."
    presets: tuple[str, ...] = PRESETS
    clips: int = 1440  # for the patch tokens


def build(preset, system):
    "A preset without numbers, with a note of what it loads."
    config = preset_config(preset, RAVDESS_EMOTIONS, system)
    note = dict(revision="1", layers=1, held=1, licence="none", megabytes=0.0)
    parts = [part for part in PRETRAINED[preset] if part in loadable_parts(system)]
    origins = [Origin(part=part, source=str(PRETRAINED[preset][part]), **note) for part in parts]
    with torch.device("meta"): return MultimodalFER(replace(config, origins=origins))


def token_gb(model, clips):
    "Patch tokens of a corpus; none where the tower learns."
    if model.visual is None or not model.config.visual.freeze: return 0.0
    frames = Processor.for_model(model.config).n_frames
    return clips * entry_bytes(model.config.visual, frames) / 1e9


def main(settings):
    rows = []
    for preset in settings.presets:
        for system in SYSTEMS:
            model = build(preset, system)
            for plan in (one_stage, three_stages):
                need = stages_disk_need(model, plan(RECIPES[preset]))
                row = dict(preset=preset, system=system, plan=plan.__name__)
                row["tokens_gb"] = token_gb(model, settings.clips)
                rows.append(row | {f"{name.replace(' ', '_')}_gb": size / 1e9 for name, size in need.items()})
    told = []
    for preset in settings.presets:
        of = [row for row in rows if row["preset"] == preset]
        one = [row["total_gb"] for row in of if row["plan"] == "one_stage"]
        three = [row["total_gb"] for row in of if row["plan"] == "three_stages"]
        told.append(f"{preset}: {one[0]:.2g} GB in one stage, {three[0]:.2g} GB in three; "
                    f"with both single modalities {sum(one):.2g} and {sum(three):.2g} GB")
    save("run_disk", "; ".join(told), **asdict(settings), rows=rows)


if __name__ == "__main__": run(main, Settings)
