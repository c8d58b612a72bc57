"""One road from a file to a batch: the same for every command, saved beside the model, complete."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfer.core import MmferError
from mmfer.corpus import Corpus
from mmfer.faces import resize
from mmfer.media import Clip, read_clip
from mmfer.model import MultimodalFER, preset_config
from mmfer.processor import ClipDataset, FaceClip, Processor, collate, file_fingerprint, model_inputs
from mmfer.toy import make_toy

PLAIN = dict(image_size=64, grid=8, crop_size=64, n_frames=4, faces="none")


def plain(**changes): return Processor(**PLAIN | changes)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    return Corpus.from_folder(make_toy(folder, actors=1, clips_per_actor=4, workers=1, progress=False))


# one clip

def test_a_model_takes_what_the_processor_makes(toy):
    model = MultimodalFER.from_preset("tiny", toy.emotions).eval()
    inputs = Processor.for_model(model.config, faces="none")(toy.table.path[0])
    assert {k: tuple(v.shape) for k, v in inputs.items() if v.ndim > 1} == {
        "audio": (1, 32000), "video": (1, 16, 3, 64, 64), "roi_mask": (1, 16, 64)}
    assert model(**inputs).logits.shape == (1, 8)


def test_a_file_a_clip_and_a_face_clip_give_the_same_inputs(toy):
    path = toy.table.path[1]
    processor = plain()
    clip = read_clip(path, n_frames=4)
    for source in (clip, processor.crop(clip), processor.read(path), [path]):
        for key, value in processor(source).items(): assert torch.equal(value, processor(path)[key])


def test_inputs_go_to_the_device_that_is_asked_for(toy):
    path = toy.table.path[0]
    assert {values.device.type for values in plain()(path).values()} == {"cpu"}
    assert {values.device.type for values in plain()(path, device="meta").values()} == {"meta"}


def test_several_clips_become_one_batch(toy):
    both = plain()(toy.table.path[:2].tolist())
    assert len(both["audio"]) == 2
    assert torch.equal(both["video"][1], plain()(toy.table.path[1])["video"][0])


def test_pictures_pass_through_the_crop_size_to_that_of_the_model(toy):
    "A prepared set keeps crops of one size for every model: it must not matter where they are resized."
    frames = plain(crop_size=48).read(toy.table.path[0]).frames
    assert frames.shape == (4, 48, 48, 3)
    item = plain(crop_size=48, image_size=32).item(plain(crop_size=48).read(toy.table.path[0]))
    assert np.array_equal(item["video"].numpy().transpose(0, 2, 3, 1), resize(frames, 32))


@pytest.mark.parametrize("system, has", [("audio_only", {"audio"}), ("visual_only", {"video", "roi_mask"})])
def test_a_system_of_one_modality_reads_that_one(toy, system, has):
    processor = Processor.for_model(preset_config("tiny", toy.emotions, system), faces="none")
    inputs = processor(toy.table.path[0])
    assert has == {k for k, v in inputs.items() if v.ndim > 1}


def without(clip, modality):
    if modality == "audio":
        return Clip(clip.path, None, clip.frames, clip.times, clip.duration, "no sound track")
    return Clip(clip.path, clip.audio, None, np.zeros(0), clip.duration, "", "no picture track")


@pytest.mark.parametrize("modality, says", [("audio", "no sound track"), ("video", "no picture track")])
def test_what_is_missing_is_told_and_never_zero(toy, modality, says):
    clip = without(read_clip(toy.table.path[0], n_frames=4), modality)
    with pytest.raises(MmferError, match=f"{clip.path}: {says}; .*--missing-ok"): plain()(clip)
    inputs = plain()(clip, missing_ok=True)
    assert modality not in inputs and inputs[f"{modality}_lengths"].tolist() == [0]
    with pytest.raises(MmferError, match=says): plain(modalities=(modality,))(clip, missing_ok=True)


def test_a_lost_or_broken_file_is_told(tmp_path):
    (tmp_path / "text.mp4").write_text("no film")
    with pytest.raises(MmferError, match="text.mp4 is not a media file"): plain()(tmp_path / "text.mp4")
    with pytest.raises(MmferError, match="gone.mp4 does not exist"): plain()(tmp_path / "gone.mp4")


# saved beside the model

@given(st.integers(1, 64), st.integers(1, 300), st.booleans())
def test_saved_and_loaded(n_frames, size, alone):
    import tempfile
    processor = plain(n_frames=n_frames, crop_size=size,
                      modalities=("audio",) if alone else ("audio", "video"))
    with tempfile.TemporaryDirectory() as folder:
        processor.save_pretrained(folder)
        assert Processor.from_pretrained(folder) == processor


def test_a_lost_a_broken_and_a_foreign_processor_are_told(tmp_path):
    file = tmp_path / "preprocessor_config.json"
    with pytest.raises(MmferError, match="preprocessor_config.json cannot be read"):
        Processor.from_pretrained(tmp_path)
    file.write_text("{")
    with pytest.raises(MmferError, match="preprocessor_config.json cannot be read"):
        Processor.from_pretrained(tmp_path)
    file.write_text(json.dumps(PLAIN | dict(colour="grey")))
    with pytest.raises(MmferError, match="colour cannot be 'grey'"): Processor.from_pretrained(tmp_path)


def test_the_processor_of_another_model_is_refused(toy):
    tiny = preset_config("tiny", toy.emotions)
    Processor.for_model(tiny).require_fit(tiny)
    with pytest.raises(MmferError,
                       match="makes pictures of 64 pixels and the model takes pictures of 224 pixels"):
        plain().require_fit(preset_config("full", toy.emotions))
    with pytest.raises(MmferError, match="makes 16 patches per side"): plain(grid=16).require_fit(tiny)


@pytest.mark.parametrize("changes, says",
                         [(dict(n_frames=0), "n_frames cannot be 0"), (dict(margin=-1.0), "margin cannot be"),
                                           (dict(image_size="64"), "image_size cannot be '64'")])
def test_impossible_settings(changes, says):
    with pytest.raises(MmferError, match=says): plain(**changes)


# datasets

def test_an_item_is_read_once_and_handed_out_fresh(toy, monkeypatch):
    dataset = ClipDataset(toy, plain())
    first = dataset[0]
    first.pop("audio")
    monkeypatch.setattr(Processor, "read", lambda *a: pytest.fail("read again"))
    assert set(dataset[0]) == {"audio", "video", "roi_mask", "label", "clip"}
    assert dataset[0]["video"].shape == (4, 3, 64, 64) and dataset[0]["video"].dtype == torch.uint8


def test_a_selection_shares_what_is_decoded(toy, monkeypatch):
    dataset = ClipDataset(toy, plain())
    third = dataset[2]
    monkeypatch.setattr(Processor, "read", lambda *a: pytest.fail("read again"))
    chosen = dataset.select(toy.where(toy.table["clip"] == third["clip"]))
    assert len(chosen) == 1 and chosen[0]["clip"] == third["clip"]
    assert torch.equal(chosen[0]["audio"], third["audio"])


def test_only_what_the_model_uses(toy):
    assert set(ClipDataset(toy, plain(modalities=("audio",)))[0]) == {"audio", "label", "clip"}
    seen = ClipDataset(toy, plain(modalities=("video",)), keep=False)[0]
    assert set(seen) == {"video", "roi_mask", "label", "clip"}


def test_a_clip_without_sound_stops_a_dataset(toy, monkeypatch):
    mute = plain().crop(without(read_clip(toy.table.path[0], n_frames=4), "audio"))
    monkeypatch.setattr(Processor, "read", lambda *a: mute)
    with pytest.raises(MmferError, match="no sound track"): ClipDataset(toy, plain())[0]


def test_labels_and_fingerprints_need_no_decoding(toy, monkeypatch):
    dataset = ClipDataset(toy, plain())
    monkeypatch.setattr(Processor, "read", lambda *a: pytest.fail("decoded"))
    assert dataset.labels == toy.table.label.tolist() and all(type(label) is int for label in dataset.labels)
    names = [dataset.fingerprint(i) for i in range(4)]
    assert len(set(names)) == 4 and all(n.startswith(c) for n, c in zip(names, toy.table["clip"]))


@pytest.mark.parametrize("changes",
                         [dict(n_frames=5), dict(image_size=32), dict(crop_size=65), dict(margin=0.3)])
def test_a_fingerprint_follows_the_settings(toy, changes):
    assert ClipDataset(toy, plain(**changes)).fingerprint(0) != ClipDataset(toy, plain()).fingerprint(0)


def test_a_fingerprint_follows_the_bytes_not_the_place_or_the_date(tmp_path):
    for folder, content in (("a", b"one"), ("b", b"one"), ("c", b"two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.mp4").write_bytes(content)
        os.utime(tmp_path / folder / "x.mp4", (ord(folder) if folder != "c" else ord("a"),) * 2)
    a, b, c = (file_fingerprint(tmp_path / folder / "x.mp4", 16) for folder in "abc")
    assert a == b != c and a != file_fingerprint(tmp_path / "a" / "x.mp4", 17)
    with pytest.raises(MmferError, match="gone.mp4 cannot be read"): file_fingerprint(tmp_path / "gone.mp4")


def test_without_video(toy):
    dataset = ClipDataset(toy, plain(), keep=False)
    rest = dataset.without_video()
    assert set(rest[1]) == {"audio", "roi_mask", "label", "clip"} and rest.labels == dataset.labels
    assert torch.equal(rest[1]["audio"], dataset[1]["audio"]) and "video" in dataset[1]


# batches

@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 5)), min_size=1, max_size=6))
def test_collate_keeps_every_value_and_length(sizes):
    items = [dict(label=i % 8, clip=str(i)) for i in range(len(sizes))]
    for item, (a, v) in zip(items, sizes):
        if a: item["audio"] = torch.rand(a)
        if v: item["video"] = torch.randint(256, (v, 3, 2, 2), dtype=torch.uint8)
    batch = collate(items)
    for key in ("audio", "video"):
        assert batch[f"{key}_lengths"].tolist() == [len(x.get(key, ())) for x in items]
        for i, x in enumerate(items):
            if key in x: assert torch.equal(batch[key][i, : len(x[key])], x[key])
        assert (batch[key] is None) == (not any(key in x for x in items))
    assert batch["labels"].tolist() == [x["label"] for x in items]
    assert batch["clip"] == [x["clip"] for x in items]


masks = st.lists(st.tuples(st.integers(0, 5), st.booleans()), min_size=1, max_size=5)


@settings(deadline=None)
@given(masks)
def test_masks_are_padded_and_false_where_there_is_none(sizes):
    items = [dict(label=0, clip=str(i)) for i in range(len(sizes))]
    for item, (n, mask) in zip(items, sizes):
        if n: item["video"] = torch.zeros(n, 3, 2, 2, dtype=torch.uint8)
        if n and mask: item["roi_mask"] = torch.ones(n, 4, dtype=torch.bool)
    batch = collate(items)
    if not any(n and mask for n, mask in sizes):
        assert "roi_mask" not in batch
        return
    assert batch["roi_mask"].shape == (*batch["video"].shape[:2], 4) and batch["roi_mask"].dtype == torch.bool
    for row, (n, mask) in zip(batch["roi_mask"], sizes):
        assert row[:n].all() == (mask or not n) and not row[n:].any() and (mask or not row.any())
    assert model_inputs(batch)["roi_mask"] is batch["roi_mask"]


def test_tokens_take_the_place_of_pictures():
    items = [dict(label=n, clip=str(n), video_tokens=torch.rand(n, 4, 2).half()) for n in (3, 5)]
    items.append(dict(label=2, clip="2"))
    batch = collate(items)
    assert batch["video"] is None
    assert batch["video_tokens"].shape == (3, 5, 4, 2) and batch["video_tokens"].dtype == torch.float16
    assert batch["video_lengths"].tolist() == [3, 5, 0]
    for i in (0, 1):
        tokens = items[i]["video_tokens"]
        assert torch.equal(batch["video_tokens"][i, : len(tokens)], tokens)
    assert set(model_inputs(batch)) == {"audio_lengths", "video_lengths", "video_tokens"}


def test_tokens_and_pictures_in_one_batch_are_refused():
    raw = dict(label=0, clip="a.mp4", video=torch.zeros(1, 3, 2, 2))
    items = [raw, dict(label=0, clip="b.mp4", video_tokens=torch.zeros(1, 4, 2))]
    with pytest.raises(MmferError, match="b.mp4 comes as tokens and a.mp4 as pictures"): collate(items)


# real recordings

def test_a_real_clip_is_cut_to_its_face(shared_data):
    faces = str(shared_data / "yunet" / "yunet_n_dynamic.onnx")
    processor = Processor(image_size=224, grid=14, n_frames=4, faces=faces)
    path, = Path(shared_data / "ravdess_original").rglob("01-01-03-01-01-02-05.mp4")
    clip = processor.read(path)
    assert isinstance(clip, FaceClip) and clip.frames.shape == (4, 224, 224, 3)
    mask = processor(clip)["roi_mask"]
    assert 0.2 < mask.float().mean() < 0.8
    centre = mask.view(4, 14, 14)[:, 5:9, 5:9]
    assert centre.all()


def test_a_clip_without_a_face_is_refused_by_name(shared_data, toy):
    processor = plain(faces=str(shared_data / "yunet" / "yunet_n_dynamic.onnx"))
    clip = read_clip(toy.table.path[0], n_frames=4)
    clip.frames[:] = 90
    with pytest.raises(MmferError, match=f"{clip.path}: no face was found"): processor(clip)


def test_the_silent_twin_is_refused(shared_data):
    silent = Corpus.from_folder(shared_data / "ravdess_original", modality="02")
    with pytest.raises(MmferError, match="02-01-03-01-01-02-05.mp4: silent sound track"):
        ClipDataset(silent, plain())[0]


def test_sound_only_recordings(shared_data):
    speech = Corpus.from_folder(shared_data / "ravdess_speech", modality="03")
    assert ClipDataset(speech, plain(modalities=("audio",)))[0]["audio"].dtype == torch.float32
    with pytest.raises(MmferError, match="no picture"): ClipDataset(speech, plain())[0]
