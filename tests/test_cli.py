"""The `mmfer` command as a user meets it: it works from end to end, and a mistake is one line and exit code 2."""
import json
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from scipy.io import wavfile

from mmfer.ablations import toy_features
from mmfer.cli import COMMANDS, main
from mmfer.core import EMOTIONS, seed_everything
from mmfer.media import read_clip, write_clip
from mmfer.model import MultimodalFER
from mmfer.toy import make_toy


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"), actors=3, clips_per_actor=16, progress=False)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    seed_everything(0)
    folder = tmp_path_factory.mktemp("model")
    MultimodalFER.from_preset("tiny").save_pretrained(folder)
    return folder


def mistake(capsys, *args):
    "The line that a user sees after a wrong command."
    with pytest.raises(SystemExit) as e: main([str(a) for a in args])
    said = capsys.readouterr().err
    assert e.value.code == 2 and "Traceback" not in said
    return said[said.index("mmfer: "):].strip()  # behind the progress bars


def test_a_mistake_is_one_line(model, tmp_path, capsys):
    for args in (["toys"], ["train", "x", "--preset", "huge", "--out", "y"], ["predict", model, tmp_path / "gone.mp4"], ["toy"]):
        assert "\n" not in mistake(capsys, *args)


def test_train_then_evaluate_then_predict(corpus, tmp_path, capsys):
    main(["train", str(corpus), "--out", str(tmp_path / "run"), "--preset", "tiny", "--epochs", "1"])
    trained = json.loads((tmp_path / "run/report/evaluation.json").read_text())
    main(["evaluate", str(tmp_path / "run/best"), str(corpus), "--out", str(tmp_path / "again")])
    again = json.loads((tmp_path / "again/evaluation.json").read_text())
    assert again == trained and again["n_clips"] == 16 and again["test_actors"] == [3]
    capsys.readouterr()
    clip = next(corpus.rglob("*.mp4"))
    main(["predict", str(tmp_path / "run"), str(clip)])
    said = capsys.readouterr().out
    shares = [float(line.split("%")[0].split()[-1]) for line in said.splitlines()[1:]]
    assert all(e in said for e in EMOTIONS) and shares == sorted(shares, reverse=True)
    assert abs(sum(shares) - 100) < 0.5


def test_a_prepared_set_trains_as_the_raw_folder_does(corpus, tmp_path):
    main(["prepare", str(corpus), "--out", str(tmp_path / "set"), "--size", "64", "--faces", "none"])
    for data in (corpus, tmp_path / "set"):
        main(["train", str(data), "--out", str(tmp_path / f"run-{data.name}"), "--preset", "tiny", "--epochs", "1"])
    a, b = (load_file(tmp_path / f"run-{data.name}/best/model.safetensors") for data in (corpus, tmp_path / "set"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert MultimodalFER.from_pretrained(tmp_path / "run-set/best").config.faces == "none"


def test_prepare_lists_bad_clips_and_exits_with_2(corpus, tmp_path, capsys):
    clips = tmp_path / "clips"
    shutil.copytree(corpus, clips)
    bad = sorted(clips.rglob("*.mp4"))[3]
    bad.write_bytes(bad.read_bytes()[:2000])
    with pytest.raises(SystemExit) as e: main(["prepare", str(clips), "--out", str(tmp_path / "set"), "--size", "64", "--faces", "none"])
    said = capsys.readouterr()
    assert e.value.code == 2 and "1 clips are bad" in said.err and bad.name in said.err and "47 clips" in said.out


def test_a_run_is_not_overwritten_but_resumed(corpus, tmp_path, capsys):
    line = ["train", str(corpus), "--out", str(tmp_path / "run"), "--preset", "tiny", "--epochs", "1"]
    main(line)
    first = (tmp_path / "run/best/model.safetensors").read_bytes()
    assert "resume" in mistake(capsys, *line)
    main([*line, "--resume"])
    assert (tmp_path / "run/best/model.safetensors").read_bytes() == first
    assert "epochs" in mistake(capsys, *line[:-1], "2", "--resume")


def test_three_stages_and_a_recipe_file(corpus, tmp_path, capsys):
    main(["train", str(corpus), "--out", str(tmp_path / "run"), "--preset", "tiny", "--recipe", "three", "--epochs", "3"])
    assert {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()} >= {"1_branches", "2_fusion", "3_end_to_end", "best", "report"}
    main(["train", str(corpus), "--out", str(tmp_path / "again"), "--preset", "tiny", "--recipe", str(tmp_path / "run/recipe.json")])
    a, b = (load_file(tmp_path / run / "best/model.safetensors") for run in ("run", "again"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert "nothing.json" in mistake(capsys, "train", corpus, "--out", tmp_path / "x", "--preset", "tiny", "--recipe", tmp_path / "nothing.json")


def test_cv_judges_every_actor_once(corpus, tmp_path, capsys):
    line = ["cv", str(corpus), "--out", str(tmp_path / "cv"), "--preset", "tiny", "--epochs", "1", "--system", "audio_only"]
    main(line)
    table = pd.read_csv(tmp_path / "cv/cv.csv", index_col="fold")
    assert table.loc[["1", "2", "3"], "test actors"].astype(float).tolist() == [1, 2, 3]
    assert table.loc["mean ± sd", "UAR"].split(" ± ")[0] == f"{table.loc[['1', '2', '3'], 'UAR'].astype(float).mean():.3f}"
    report = json.loads((tmp_path / "cv/report/evaluation.json").read_text())
    assert report["n_clips"] == 48 and report["test_actors"] == [1, 2, 3]
    before = (tmp_path / "cv/cv.csv").read_text()
    main([*line, "--resume"])
    assert (tmp_path / "cv/cv.csv").read_text() == before


def test_sound_alone_is_trained_from_sound_files(corpus, tmp_path):
    for clip in corpus.rglob("*.mp4"):
        sound = tmp_path / "sound" / clip.parent.name / f"03{clip.stem[2:]}.wav"
        sound.parent.mkdir(parents=True, exist_ok=True)
        wavfile.write(sound, 16_000, read_clip(clip).audio)
    main(["train", str(tmp_path / "sound"), "--out", str(tmp_path / "run"), "--preset", "tiny", "--epochs", "1", "--system", "audio_only"])
    assert json.loads((tmp_path / "run/report/evaluation.json").read_text())["n_clips"] == 16


def test_compare_from_features(tmp_path, capsys):
    toy_features(tmp_path / "toy.npz")
    main(["compare", str(tmp_path / "toy.npz"), "--out", str(tmp_path / "out"), "--systems", "late", "--folds", "single", "--epochs", "1"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("late", "logistic_regression", "majority"))
    assert "middle" in mistake(capsys, "compare", tmp_path / "toy.npz", "--out", tmp_path / "x", "--systems", "middle")


def test_a_frozen_tower_is_not_random_by_accident(corpus, tmp_path, capsys):
    said = mistake(capsys, "train", corpus, "--out", tmp_path / "run", "--preset", "lightweight", "--vision-weights", tmp_path / "nothing")
    assert "nothing" in said


def test_one_actor_is_called_out(tmp_path, capsys):
    make_toy(tmp_path / "one", actors=1, clips_per_actor=60, progress=False)
    main(["train", str(tmp_path / "one"), "--out", str(tmp_path / "run"), "--preset", "tiny", "--epochs", "1"])
    assert "NOT an unseen-actor result" in capsys.readouterr().err


def test_help_names_every_command():
    said = subprocess.run([sys.executable, "-c", "from mmfer.cli import main; main()", "--help"], capture_output=True, text=True)
    assert said.returncode == 0
    assert all(name in said.stdout for name in COMMANDS)


def test_mistakes_are_one_line(corpus, model, tmp_path, capsys):
    (tmp_path / "notes.mp4").write_text("not a film")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/holiday.mp4").write_bytes(b"")
    clip = next(corpus.rglob("*.mp4"))
    run = ["--out", tmp_path / "run", "--preset", "tiny"]
    assert "toys" in mistake(capsys, "toys")
    assert "--epochs 0" in mistake(capsys, "train", corpus, *run, "--epochs", "0")
    assert "huge" in mistake(capsys, "train", corpus, "--out", "x", "--preset", "huge")
    assert "nowhere is not a folder" in mistake(capsys, "train", tmp_path / "nowhere", *run)
    assert "empty" in mistake(capsys, "train", tmp_path / "empty", *run)
    assert "holiday.mp4" in mistake(capsys, "train", tmp_path / "foreign", *run)
    assert "config.json" in mistake(capsys, "predict", tmp_path / "empty", clip)
    assert "gone.mp4" in mistake(capsys, "predict", model, tmp_path / "gone.mp4")
    assert "no file" in mistake(capsys, "predict", model)
    assert "notes.mp4" in mistake(capsys, "predict", model, tmp_path / "notes.mp4")
    assert "nowhere" in mistake(capsys, "info", tmp_path / "nowhere")
    assert "actors" in mistake(capsys, "toy", tmp_path / "t", "--actors", "0")


def test_a_foreign_checkpoint_is_refused(model, tmp_path, capsys):
    config = json.loads((model / "config.json").read_text())
    config["audio"]["layers"] = 5
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    assert "layers.4" in mistake(capsys, "predict", tmp_path, "clip.mp4")


def test_silent_clip_is_named_and_the_others_go_on(corpus, model, tmp_path, capsys):
    silent = tmp_path / "silent.mp4"
    write_clip(silent, np.zeros((16, 64, 64, 3), np.uint8), 16, np.zeros(32_000, np.float32))
    clip = next(corpus.rglob("*.mp4"))
    with pytest.raises(SystemExit) as e: main(["predict", str(model), str(silent), str(clip)])
    said = capsys.readouterr()
    assert e.value.code == 2 and "silent.mp4" in said.err and "silent" in said.err
    assert str(clip) in said.out and "happy" in said.out
    main(["predict", str(model), str(silent), "--missing-ok"])
    assert "happy" in capsys.readouterr().out


def test_real_clips(shared_data, model, capsys):
    files = sorted((shared_data / "ravdess_original/Actor_05").glob("*.mp4"))
    with pytest.raises(SystemExit): main(["predict", str(model), *map(str, files)])
    said = capsys.readouterr()
    assert said.out.count("surprised") == 6
    assert "02-01-03-01-01-02-05.mp4" in said.err and "1 of 7" in said.err
