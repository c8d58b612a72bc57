"""The `mmfer` command as a user meets it: it works from end to end; a mistake is one line, exit code 2."""
import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.io import wavfile

from mmfer.cli import COMMANDS, main
from mmfer.core import seed_everything
from mmfer.corpus import RAVDESS_EMOTIONS, Corpus
from mmfer.features import toy_features
from mmfer.media import read_clip, write_clip
from mmfer.model import MultimodalFER
from mmfer.page import trust_line
from mmfer.processor import Processor
from mmfer.runs import load_run, save_run
from mmfer.toy import make_toy
from mmfer.visual import VisualConfig, build_siglip
from mmfer.weights import PRETRAINED

TINY = ["--preset", "tiny", "--epochs", "1"]
NAMES = {"01": "Anna", "02": "Ben", "03": "Chloe"}


@pytest.fixture(scope="module", autouse=True)
def one_core():
    "Clips are prepared in this process: others would take longer to start than the few clips take."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.cpu_count", lambda: 1)
        yield


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return make_toy(tmp_path_factory.mktemp("toy"), actors=3, clips_per_actor=16, progress=False)


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    "A run on the toy corpus: speaker 01 trains, 02 validates, 03 tests."
    out = tmp_path_factory.mktemp("run") / "run"
    main(["train", str(corpus), "--out", str(out), *TINY])
    return out


@pytest.fixture(scope="module")
def mine(corpus, tmp_path_factory):
    "Clips of our own in a CSV file: three emotions under other names, people with names, files numbered."
    folder = tmp_path_factory.mktemp("mine")
    (folder / "clips").mkdir()
    return invented(corpus, folder, {"happy": "joy", "sad": "grief", "angry": "rage"})


def invented(corpus, folder, emotions):
    table = Corpus.open(corpus).table
    rows = []
    for i, clip in enumerate(table[table.emotion.isin(list(emotions))].itertuples()):
        shutil.copy(clip.path, folder / f"clips/{i}.mp4")
        rows.append(dict(path=f"clips/{i}.mp4", emotion=emotions[clip.emotion], speaker=NAMES[clip.speaker]))
    pd.DataFrame(rows).to_csv(folder / "mine.csv", index=False)
    return folder / "mine.csv"


def evaluation(folder):
    return json.loads((folder / "evaluation.json").read_text())


def mistake(capsys, *args):
    "The line that a user sees after a wrong command."
    capsys.readouterr()
    with pytest.raises(SystemExit) as e: main([str(a) for a in args])
    said = capsys.readouterr().err
    assert e.value.code == 2 and "Traceback" not in said
    line = said[said.index("mmfer: "):].strip()  # behind the progress bars
    assert "\n" not in line
    return line


def shares(said):
    "The ranked table of one file: emotion -> percent."
    rows = [line.split() for line in said.splitlines() if line.startswith("  ")]
    return {emotion: float(percent.rstrip("%")) for emotion, percent, *_ in rows}


# From end to end


def test_train_says_what_it_found(corpus, tmp_path, capsys):
    main(["train", str(corpus), "--out", str(tmp_path / "run"), *TINY])
    said = capsys.readouterr().out
    assert "toy: 48 clips, 3 speakers, 8 emotions" in said
    counts = Corpus.open(corpus).table.emotion.value_counts()
    assert ", ".join(f"{e} {counts[e]}" for e in RAVDESS_EMOTIONS) in said
    for part, speaker in (("train", "01"), ("val", "02"), ("test", "03")):
        assert f"{part}: 16 clips of {speaker}" in said


def test_evaluate_gives_the_figures_of_the_training(corpus, trained, tmp_path, capsys):
    first = evaluation(trained / "report")
    main(["evaluate", str(trained), str(corpus), "--out", str(tmp_path / "again")])
    said = capsys.readouterr().out
    assert "32 clips of speakers that the model has seen are left out" in said
    assert evaluation(tmp_path / "again") == first
    assert first["n_clips"] == 16 and first["test_speakers"] == ["03"]
    assert "temperature" in first and "majority" in first
    before, after = (pd.read_csv(f / "predictions.csv") for f in (trained / "report", tmp_path / "again"))
    pd.testing.assert_frame_equal(before, after)


def test_predict_ranks_the_emotions(corpus, trained, capsys):
    capsys.readouterr()
    main(["predict", str(trained), str(next(corpus.rglob("*.mp4")))])
    found = shares(capsys.readouterr().out)
    assert {*found} == {*RAVDESS_EMOTIONS}
    assert [*found.values()] == sorted(found.values(), reverse=True)
    assert abs(sum(found.values()) - 100) < 0.5


def test_predict_says_what_the_report_says(corpus, trained, capsys):
    row = pd.read_csv(trained / "report/predictions.csv").iloc[0]
    capsys.readouterr()
    main(["predict", str(trained), str(next(corpus.rglob(f"{row['clip']}.mp4")))])
    found = shares(capsys.readouterr().out)
    told = {e: 100 * row[f"p_{e}"] for e in RAVDESS_EMOTIONS}
    assert all(abs(found[e] - told[e]) < 2 for e in told), "prepared pictures are JPEG, a little apart"


def test_clips_of_ones_own(mine, tmp_path, capsys):
    run = str(tmp_path / "run")
    main(["train", str(mine), "--out", run, "--faces", "none", *TINY])
    said = capsys.readouterr().out
    assert "csv: 18 clips, 3 speakers, 3 emotions" in said
    assert "clips per emotion: grief 6, joy 6, rage 6" in said
    _, processor, split = load_run(run)
    assert processor.faces == "none" and split == dict(corpus="csv", train=["Anna"], val=["Ben"])
    main(["evaluate", run, str(mine), "--out", str(tmp_path / "again")])
    assert evaluation(tmp_path / "again") == evaluation(tmp_path / "run/report")
    assert {*evaluation(tmp_path / "again")["per_class"]} == {"joy", "grief", "rage"}
    capsys.readouterr()
    main(["predict", run, str(mine.parent / "clips/0.mp4")])
    assert {*shares(capsys.readouterr().out)} == {"joy", "grief", "rage"}


def test_a_prepared_set_trains_as_the_raw_folder_does(corpus, trained, tmp_path):
    main(["prepare", str(corpus), "--out", str(tmp_path / "set"), "--crop-size", "64"])
    main(["train", str(tmp_path / "set"), "--out", str(tmp_path / "run"), *TINY])
    a, b = (load_file(run / "best/model.safetensors") for run in (trained, tmp_path / "run"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert load_run(tmp_path / "run")[1:] == load_run(trained)[1:]


def test_three_stages_and_a_file_of_stages(corpus, tmp_path, capsys):
    line = ["train", str(corpus), "--preset", "tiny"]
    main([*line, "--stages", "three", "--epochs", "3", "--out", str(tmp_path / "run")])
    folders = {p.name for p in (tmp_path / "run").iterdir() if p.is_dir()}
    assert folders >= {"1_branches", "2_fusion", "3_end_to_end", "best", "report"}
    plan = tmp_path / "run/stages.json"
    main([*line, "--stages", str(plan), "--out", str(tmp_path / "again")])
    a, b = (load_file(tmp_path / run / "best/model.safetensors") for run in ("run", "again"))
    assert all(torch.equal(a[k], b[k]) for k in a)
    line += ["--out", tmp_path / "x", "--stages"]
    assert "nothing.json" in mistake(capsys, *line, tmp_path / "nothing.json")
    assert "has its own epochs" in mistake(capsys, *line, plan, "--epochs", 3)


def test_a_run_is_not_overwritten_but_resumed(corpus, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    line = ["train", str(corpus), "--out", str(tmp_path / "run"), "--preset", "tiny", "--epochs"]
    first = (tmp_path / "run/best/model.safetensors").read_bytes()
    assert "--resume" in mistake(capsys, *line, "1")
    main([*line, "1", "--resume"])
    assert (tmp_path / "run/best/model.safetensors").read_bytes() == first
    assert "epochs" in mistake(capsys, *line, "2", "--resume")


def test_cv_judges_every_speaker_once(corpus, tmp_path, capsys):
    line = ["cv", str(corpus), "--out", str(tmp_path / "cv"), "--system", "audio_only", *TINY]
    main(line)
    table = pd.read_csv(tmp_path / "cv/cv.csv", index_col="fold")
    assert table.loc[["1", "2", "3"], "test speakers"].astype(float).tolist() == [1, 2, 3]
    mean = table.loc[["1", "2", "3"], "UAR"].astype(float).mean()
    assert table.loc["mean ± sd", "UAR"].split(" ± ")[0] == f"{mean:.3f}"
    report = evaluation(tmp_path / "cv/report")
    assert report["n_clips"] == 48 and report["test_speakers"] == ["01", "02", "03"]
    for k, tested in enumerate(("01", "02", "03"), 1):
        split = load_run(tmp_path / f"cv/fold_{k}")[2]
        assert tested not in split["train"] + split["val"]
    before = (tmp_path / "cv/cv.csv").read_text()
    assert "--resume" in mistake(capsys, *line)
    main([*line, "--resume"])
    assert (tmp_path / "cv/cv.csv").read_text() == before


def test_sound_alone_is_trained_from_sound_files(corpus, tmp_path):
    for clip in corpus.rglob("*.mp4"):
        sound = tmp_path / "sound" / clip.parent.name / f"03{clip.stem[2:]}.wav"
        sound.parent.mkdir(parents=True, exist_ok=True)
        wavfile.write(sound, 16_000, read_clip(clip).audio)
    line = ["train", str(tmp_path / "sound"), "--out", str(tmp_path / "run"), *TINY]
    main([*line, "--system", "audio_only"])
    assert evaluation(tmp_path / "run/report")["n_clips"] == 16


def test_compare_from_features(tmp_path, capsys):
    data = toy_features(tmp_path / "toy.npz")
    line = ["compare", str(data), "--folds", "single", "--epochs", "1"]
    main([*line, "--out", str(tmp_path / "out"), "--systems", "late"])
    said = capsys.readouterr().out
    assert all(name in said for name in ("late", "logistic_regression", "majority"))
    assert "middle" in mistake(capsys, *line, "--out", tmp_path / "x", "--systems", "middle")


def test_prepare_lists_bad_clips_and_exits_with_2(corpus, tmp_path, capsys):
    clips = tmp_path / "clips"
    shutil.copytree(corpus, clips)
    bad = sorted(clips.rglob("*.mp4"))[3]
    bad.write_bytes(bad.read_bytes()[:2000])
    with pytest.raises(SystemExit) as e:
        main(["prepare", str(clips), "--out", str(tmp_path / "set"), "--crop-size", "64"])
    said = capsys.readouterr()
    assert e.value.code == 2 and "47 clips" in said.out
    assert "1 clips are bad" in said.err and bad.name in said.err


def test_info_tells_of_machine_model_and_run(trained, capsys):
    main(["info"])
    main(["info", str(trained)])
    said = capsys.readouterr().out
    assert "preset" in said and "classifier" in said and "trained on toy: 01; validated on 02" in said
    assert f"UAR {evaluation(trained / 'report')['uar']:.3f}" in said


# People whom the model knows


def only(corpus, path, speakers):
    "A CSV file with the clips of some speakers of a corpus."
    table = Corpus.open(corpus).table
    table = table[table.speaker.isin(speakers)].drop(columns=["label", "clip"])
    table.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def named(corpus, tmp_path_factory):
    "A run on a CSV file, and the folder with that file."
    folder = tmp_path_factory.mktemp("named")
    data = only(corpus, folder / "all.csv", NAMES)
    main(["train", str(data), "--out", str(folder / "run"), "--faces", "none", *TINY])
    return folder


def test_people_whom_the_model_knows_are_refused(corpus, named, tmp_path, capsys):
    known = only(corpus, tmp_path / "known.csv", ["01", "02"])
    line = ["evaluate", named / "run", known, "--out", tmp_path / "out"]
    said = mistake(capsys, *line)
    assert "every speaker" in said and "--seen-ok" in said
    assert not (tmp_path / "out").exists()
    main([*map(str, line), "--seen-ok"])
    said = capsys.readouterr()
    assert "\033[1;31m" in said.err and "NOT a result on unseen speakers" in said.err
    report = evaluation(tmp_path / "out")
    assert report["n_clips"] == 32 and "temperature" not in report


def test_only_unseen_people_are_judged_without_a_warning(corpus, named, tmp_path, capsys):
    capsys.readouterr()
    new = only(corpus, tmp_path / "new.csv", ["02", "03"])
    main(["evaluate", str(named / "run"), str(new), "--out", str(tmp_path / "out")])
    said = capsys.readouterr()
    assert "16 clips of speakers" in said.out and "NOT" not in said.err
    report = evaluation(tmp_path / "out")
    assert report["test_speakers"] == ["03"]
    assert "temperature" in report, "02 validates"
    assert "majority" not in report, "nobody who trained is here"


def test_without_validation_speakers_there_is_no_temperature(corpus, named, tmp_path):
    new = only(corpus, tmp_path / "new.csv", ["03"])
    main(["evaluate", str(named / "run"), str(new), "--out", str(tmp_path / "out")])
    assert "temperature" not in evaluation(tmp_path / "out")


def test_a_model_that_does_not_say_whom_it_knows(corpus, trained, tmp_path, capsys):
    model, processor, _ = load_run(trained)
    save_run(tmp_path / "model", model, processor)
    line = ["evaluate", tmp_path / "model", corpus, "--out", tmp_path / "out"]
    assert "does not say whom it was trained on" in mistake(capsys, *line)
    main([*map(str, line), "--seen-ok"])
    assert "NOT a result on unseen speakers" in capsys.readouterr().err
    assert evaluation(tmp_path / "out")["n_clips"] == 48


def test_one_speaker_is_called_out(tmp_path, capsys):
    make_toy(tmp_path / "one", actors=1, clips_per_actor=60, progress=False)
    main(["train", str(tmp_path / "one"), "--out", str(tmp_path / "run"), *TINY])
    assert "NOT a result on unseen speakers" in capsys.readouterr().err
    line = ["evaluate", tmp_path / "run", tmp_path / "one", "--out", tmp_path / "out"]
    assert "every speaker" in mistake(capsys, *line)


# Mistakes


def test_words_that_are_no_command(corpus, trained, capsys):
    assert "toys" in mistake(capsys, "toys")
    assert "toy" in mistake(capsys)
    assert "FOLDER" in mistake(capsys, "toy")
    assert "mmfer train --help" in mistake(capsys, "train", corpus, "--out", "x", "--nonsense")
    said = mistake(capsys, "train", corpus, "--preset", "huge", "--out", "x")
    assert "huge" in said and "lightweight" in said and "None" not in said
    assert "many" in mistake(capsys, "toy", "x", "--actors", "many")
    assert "no file" in mistake(capsys, "predict", trained)


def test_wrong_folders_and_files(corpus, trained, tmp_path, capsys):
    (tmp_path / "notes.mp4").write_text("not a film")
    (tmp_path / "empty").mkdir()
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign/holiday.mp4").write_bytes(b"")
    clip = next(corpus.rglob("*.mp4"))
    run = ["--out", tmp_path / "run", "--preset", "tiny"]
    assert "--epochs 0" in mistake(capsys, "train", corpus, *run, "--epochs", "0")
    assert "nowhere is not a folder" in mistake(capsys, "train", tmp_path / "nowhere", *run)
    assert "empty" in mistake(capsys, "train", tmp_path / "empty", *run)
    assert "holiday.mp4" in mistake(capsys, "train", tmp_path / "foreign", *run)
    assert "nothing" in mistake(capsys, "train", corpus, *run, "--vision-weights", tmp_path / "nothing")
    line = ["train", corpus, *run, "--audio-weights", tmp_path / "nothing.nemo"]
    assert "nothing.nemo" in mistake(capsys, *line)
    assert "no place for the audio weights" in mistake(capsys, *line, "--system", "visual_only")
    assert not (tmp_path / "run").exists()
    assert "config.json" in mistake(capsys, "predict", tmp_path / "empty", clip)
    assert "gone.mp4" in mistake(capsys, "predict", trained, tmp_path / "gone.mp4")
    assert "notes.mp4" in mistake(capsys, "predict", trained, tmp_path / "notes.mp4")
    assert "nowhere" in mistake(capsys, "info", tmp_path / "nowhere")
    assert "actors" in mistake(capsys, "toy", tmp_path / "t", "--actors", "0")


# Weights by name: what there is to load is in test_weights, how a model takes it in test_model


@pytest.fixture
def no_network(monkeypatch):
    "No network, and nothing fetched before."
    def gone(repo, **_): raise OSError(f"no road to {repo}")
    monkeypatch.setattr("mmfer.weights.snapshot_download", gone)


@pytest.mark.parametrize("command", ["train", "cv"])
def test_all_weights_are_here_before_anything_is_prepared(corpus, tmp_path, capsys, no_network, command):
    said = mistake(capsys, command, corpus, "--out", tmp_path / "run", "--preset", "lightweight")
    assert "parakeet" in said and "not on this machine" in said and "mmfer weights" in said
    assert not (tmp_path / "run" / "prepared").exists()


def test_weights_tells_what_is_missing(capsys, no_network):
    main(["weights", "full"])
    said = capsys.readouterr().out
    for part, source in PRETRAINED["full"].items():
        assert f"{part}: {source} is not on this machine" in said and f"--{part}-weights" in said
    told = mistake(capsys, "weights", "full", "--fetch")
    assert "not all weights could be fetched" in told


def test_weights_says_that_nobody_published_a_narrow_lfm2(capsys, no_network):
    main(["weights", "lightweight"])
    assert "--fusion-weights LiquidAI/LFM2-350M" in capsys.readouterr().out
    main(["weights", "tiny"])
    assert "LFM2-350M" not in capsys.readouterr().out


@pytest.fixture(scope="module")
def tower(tmp_path_factory):
    "A small vision tower as a checkpoint folder."
    folder = tmp_path_factory.mktemp("tower") / "my_tower"
    config = VisualConfig(d_model=48, layers=1, heads=4, ffn=96, image_size=64, patch_size=16)
    build_siglip(config).save_pretrained(folder)
    return folder


def test_a_run_keeps_where_its_weights_came_from(corpus, tower, tmp_path, capsys):
    line = ["train", corpus, "--out", tmp_path / "run", "--system", "visual_only", "--faces", "none", *TINY]
    main([*map(str, line), "--vision-weights", str(tower), "--stages", "one"])
    said = capsys.readouterr().out
    assert "my_tower" in said and "1 of 1" in said
    rows = json.loads((tmp_path / "run" / "weights.json").read_text())
    assert any(row["source"] == "my_tower" and row["state"] == "trained" for row in rows)
    main(["info", str(tmp_path / "run")])
    assert "my_tower" in capsys.readouterr().out
    origin, = load_run(tmp_path / "run")[0].config.origins
    assert origin.source == "my_tower" and origin.revision.startswith("sha256:")


def test_other_weights_are_another_run(corpus, tower, tmp_path, capsys):
    line = ["train", corpus, "--out", tmp_path / "run", "--system", "visual_only", "--faces", "none", *TINY,
            "--stages", "one"]
    main([*map(str, line), "--vision-weights", str(tower)])
    other = tmp_path / "my_tower"  # of the same name
    shutil.copytree(tower, other)
    weights = load_file(other / "model.safetensors")
    weights[min(weights)] += 1
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    said = mistake(capsys, *line, "--vision-weights", other, "--resume")
    assert "begun with other weights (vision is from my_tower" in said and "go on as it began" in said


@pytest.mark.parametrize("command", ["train", "prepare", "cv", "compare"])
@pytest.mark.parametrize("column", ["path", "emotion", "speaker"])
def test_a_csv_without_a_column(mine, tmp_path, capsys, command, column):
    data = tmp_path / "half.csv"
    pd.read_csv(mine).drop(columns=column).to_csv(data, index=False)
    said = mistake(capsys, command, data, "--out", tmp_path / "out")
    assert f"{data} has no column '{column}'" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["train", "prepare", "cv", "compare"])
def test_a_csv_that_lists_a_lost_file(mine, tmp_path, capsys, command):
    table = pd.read_csv(mine)
    table["path"] = [str(mine.parent / path) for path in table.path]
    table.loc[4, "path"] = "gone.mp4"
    table.to_csv(tmp_path / "lost.csv", index=False)
    said = mistake(capsys, command, tmp_path / "lost.csv", "--out", tmp_path / "out")
    assert "lost.csv" in said and "gone.mp4" in said
    assert not (tmp_path / "out").exists()


def test_a_speaker_in_two_parts(mine, tmp_path, capsys):
    table = pd.read_csv(mine)
    table["path"] = [str(mine.parent / path) for path in table.path]
    part = table.speaker.map({"Anna": "train", "Ben": "val", "Chloe": "test"})
    part[table.index[table.speaker == "Anna"][0]] = "test"
    table.assign(split=part).to_csv(tmp_path / "both.csv", index=False)
    said = mistake(capsys, "train", tmp_path / "both.csv", "--out", tmp_path / "out", *TINY)
    assert "speaker Anna is in train and in test" in said
    assert not (tmp_path / "out").exists()


def test_an_emotion_that_the_model_does_not_know(mine, corpus, trained, tmp_path, capsys):
    said = mistake(capsys, "evaluate", trained, mine, "--out", tmp_path / "out")
    assert "0.mp4" in said and "happy" in said
    assert not (tmp_path / "out").exists()


def test_resuming_with_other_emotions(corpus, mine, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    before = (tmp_path / "run/best/model.safetensors").read_bytes()
    line = ["train", mine, "--out", tmp_path / "run", "--faces", "none", "--resume", *TINY]
    assert "another" in mistake(capsys, *line)
    assert (tmp_path / "run/best/model.safetensors").read_bytes() == before


def test_the_processor_of_another_model(corpus, trained, tmp_path, capsys):
    shutil.copytree(trained, tmp_path / "run")
    other = replace(Processor.from_pretrained(trained / "best"), image_size=224, grid=14)
    other.save_pretrained(tmp_path / "run/best")
    clip = next(corpus.rglob("*.mp4"))
    run = tmp_path / "run"
    for line in (["predict", run, clip], ["evaluate", run, corpus, "--out", tmp_path / "out"]):
        assert "use the processor that was saved beside this model" in mistake(capsys, *line)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_processor(corpus, tmp_path, capsys):
    seed_everything(0)
    MultimodalFER.from_preset("tiny", RAVDESS_EMOTIONS).save_pretrained(tmp_path / "model")
    clip = next(corpus.rglob("*.mp4"))
    assert "preprocessor_config.json" in mistake(capsys, "predict", tmp_path / "model", clip)


def test_a_foreign_checkpoint_is_refused(trained, tmp_path, capsys):
    shutil.copytree(trained / "best", tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    config["audio"]["layers"] = 5
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    assert "layers.4" in mistake(capsys, "predict", tmp_path / "model", "clip.mp4")


def test_a_silent_clip_is_named_and_the_others_go_on(corpus, trained, tmp_path, capsys):
    silent = tmp_path / "silent.mp4"
    write_clip(silent, np.zeros((16, 64, 64, 3), np.uint8), 16, np.zeros(32_000, np.float32))
    clip = next(corpus.rglob("*.mp4"))
    with pytest.raises(SystemExit) as e: main(["predict", str(trained), str(silent), str(clip)])
    said = capsys.readouterr()
    assert e.value.code == 2 and "1 of 2 files" in said.err and "silent.mp4" in said.err
    assert str(clip) in said.out and "happy" in said.out
    main(["predict", str(trained), str(silent), "--missing-ok"])
    said = capsys.readouterr().out
    assert "happy" in said and "silent.mp4 (" in said


def test_a_face_detector_can_be_chosen(corpus, trained, tmp_path, capsys):
    clip = next(corpus.rglob("*.mp4"))
    said = mistake(capsys, "predict", trained, clip, "--faces", tmp_path / "none.onnx")
    assert "none.onnx" in said


# Explain


def test_explain_writes_the_page_and_says_what_it_shows(corpus, trained, tmp_path, capsys):
    clip = next(corpus.rglob("*.mp4"))
    main(["predict", str(trained), str(clip)])
    ranked = shares(capsys.readouterr().out)
    main(["explain", str(trained), str(clip), "--out", str(tmp_path / "page.html"), "--method", "attention"])
    answer, *told = capsys.readouterr().out.splitlines()
    best = max(ranked, key=ranked.get)
    assert answer == f"{clip}: {best} ({ranked[best]:.1f}%)"
    assert any("nats" in line for line in told) and trust_line("attention") in told
    text = (tmp_path / "page.html").read_text()
    assert f"{clip.stem}: the model says {best}" in text
    assert re.findall("<option>(.*?)</option>", text)[0] == "attention"


def test_explain_tells_in_one_sentence_what_it_cannot(corpus, trained, tmp_path, capsys):
    out = tmp_path / "page.html"
    clip = next(corpus.rglob("*.mp4"))
    (tmp_path / "notes.mp4").write_text("no clip")
    (tmp_path / "empty").mkdir()
    assert "gone.mp4" in mistake(capsys, "explain", trained, tmp_path / "gone.mp4", "--out", out)
    assert "notes.mp4" in mistake(capsys, "explain", trained, tmp_path / "notes.mp4", "--out", out)
    assert "config.json" in mistake(capsys, "explain", tmp_path / "empty", clip, "--out", out)
    assert "none.onnx" in mistake(capsys, "explain", trained, clip, "--out", out, "--faces", "none.onnx")
    assert not out.exists()


# Help


def run_terminal(*words):
    command = [sys.executable, "-c", "from mmfer.cli import main; main()", *words]
    return subprocess.run(command, capture_output=True, text=True)


def test_help_names_every_command():
    said = run_terminal("--help")
    assert said.returncode == 0
    assert all(name in said.stdout for name in COMMANDS)
    names = "toy prepare download weights train evaluate predict explain cv compare info"
    assert sorted(COMMANDS) == sorted(names.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_plain(command, capsys):
    with pytest.raises(SystemExit) as e: main([command, "--help"])
    said = capsys.readouterr().out
    assert e.value.code == 0 and f"usage: mmfer {command}" in said
    assert not [word for word in ("{None}", "[[", "|STR", "None|", "[STR [STR") if word in said]


def test_real_clips(shared_data, trained, capsys):
    files = sorted((shared_data / "ravdess_original/Actor_05").glob("*.mp4"))
    capsys.readouterr()
    with pytest.raises(SystemExit): main(["predict", str(trained), *map(str, files)])
    said = capsys.readouterr()
    assert said.out.count("surprised") == 6
    assert "02-01-03-01-01-02-05.mp4" in said.err and "1 of 7" in said.err


def test_ctrl_c_is_told_in_one_sentence(tmp_path, monkeypatch, capsys):
    def stop(*_): raise KeyboardInterrupt
    monkeypatch.setattr(COMMANDS["toy"], "run", stop)
    with pytest.raises(SystemExit) as end: main(["toy", str(tmp_path)])
    said = capsys.readouterr().err
    assert end.value.code == 130 and said.startswith("mmfer: stopped") and said.count("\n") == 1
