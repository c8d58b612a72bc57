"""Multimodal emotion recognition: audio and video of a face in, an emotion out.

A name is loaded when it is asked for: `from mmfer import Processor` loads the module where `Processor` lives.
`import mmfer` alone loads nothing, PyTorch included.
"""
import importlib

__version__ = "0.1.0"

_NAMES = {  # module -> its names that are offered here
    "core": "MmferError seed_everything this_machine",
    "media": "Clip read_clip show_clip",
    "toy": "make_toy",
    "corpus": "Corpus Split",
    "processor": "Processor ClipDataset collate model_inputs",
    "model": "MultimodalFER ModelConfig preset_config",
    "runs": "load_run",
    "trainer": "Trainer TrainConfig",
    "evaluate": "score",
    "prepare": "corpus_of open_clips",
    "ablations": "compare",
}
_HOME = {name: module for module, names in _NAMES.items() for name in names.split()}
__all__ = [*_HOME]


def __getattr__(name):
    if name not in _HOME: raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__():
    return sorted({*globals(), *__all__})
