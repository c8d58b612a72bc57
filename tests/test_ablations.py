"""Comparisons: no test speaker reaches training, a stopped one goes on, and the figures are what they say."""
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from mmfer import ablations, cache
from mmfer.ablations import (
    ClipExperiment, FeatureExperiment, Result, as_markdown, compare, comparison_table, paired_difference,
    plan_systems, plot_systems, read_results, side_by_side, summarise_metric, summarise_system,
    train_and_test)
from mmfer.core import MmferError, from_dict, pick_tier, to_dict
from mmfer.corpus import RAVDESS_EMOTIONS, Corpus
from mmfer.evaluate import BOOTSTRAPPED, bootstrap_interval, speaker_matrices
from mmfer.features import BASELINES, SYSTEM_KINDS, FeatureConfig, FeatureSet, toy_features
from mmfer.fusion import FusionConfig, Lfm2Backbone, lfm2_config
from mmfer.model import MultimodalFER
from mmfer.prepare import prepare
from mmfer.toy import make_toy
from mmfer.weights import PRETRAINED

ROOT = Path(__file__).resolve().parent.parent
QUICK = FeatureConfig(width=16, ffn=32, epochs=1, batch_size=64, members=1)
LEARN = FeatureConfig(width=32, ffn=64, members=1, average=0.9, epochs=15, batch_size=32, dropout=0.1,
                      audio_dropout=0.1, visual_dropout=0.1, mixup=0.2, weight_decay=0.01)
TRAINED = [name for name in SYSTEM_KINDS if name != "lfm2_full"]
quietly = dict(progress=False, jobs=1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return toy_features(tmp_path_factory.mktemp("features") / "toy.npz")


@pytest.fixture(scope="module")
def first(toy, tmp_path_factory):
    "A comparison of all systems with two seeds, by two workers."
    out = tmp_path_factory.mktemp("compare")
    return compare(toy, out, config=QUICK, seeds=2, progress=False, jobs=2), out


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips") / "toy"
    make_toy(folder, actors=3, clips_per_actor=8, progress=False)
    return folder


def rewrite(path, to, **changes):
    with np.load(path) as f: data = {k: f[k] for k in f.files} | changes
    np.savez(to, **{k: v for k, v in data.items() if v is not None})
    return to


def without_time(report):
    "A report but for the seconds."
    systems = {name: {k: v for k, v in s.items() if k != "seconds"} for name, s in report["systems"].items()}
    return report | dict(systems=systems)


# Nothing leaks


@pytest.mark.parametrize("system", ["logistic_regression", "attention"])
def test_test_labels_do_not_change_the_answers(toy, tmp_path, system):
    split = FeatureExperiment(toy).folds("hicmae")[0]
    with np.load(toy) as f: emotion, speaker = (f[k] for k in ("emotion", "speaker"))
    wrong = np.where(np.isin(speaker, split.test), "calm", emotion)
    other = rewrite(toy, tmp_path / "other.npz", emotion=wrong)
    answers = [FeatureExperiment(path, QUICK).run(system, split, 0)[0] for path in (toy, other)]
    assert answers[0].tolist() == answers[1].tolist()


def test_trainer_is_given_training_and_validation_clips_only(clips, tmp_path, monkeypatch):
    experiment = ClipExperiment(clips, tmp_path, progress=False)
    seen = {}

    class Stop(Exception): pass

    class Watch:
        def __init__(self, model, recipe, train, val, folder, cache=None): seen.update(train=train, val=val)
        def fit(self): raise Stop

    monkeypatch.setattr(ablations, "Trainer", Watch)
    split = experiment.folds("hicmae")[0]
    with pytest.raises(Stop): experiment.run("early", split, 0)
    for part in ("train", "val"): assert seen[part].corpus.speakers == getattr(split, part)


# Systems, schema


def test_compare_json_has_the_agreed_form(first):
    report, out = first
    assert json.loads((out / "compare.json").read_text()) == report
    assert list(report["systems"]) == [*TRAINED, *BASELINES]
    assert report["skipped"].keys() == {"lfm2_full"} and "weights" in report["skipped"]["lfm2_full"]
    assert report["emotions"] == list(RAVDESS_EMOTIONS)
    for s in report["systems"].values():
        assert s.keys() == {"war", "uar", "f1_macro", "parameters", "seconds"}
        for metric in BOOTSTRAPPED:
            assert s[metric].keys() == {"mean", "sd", "ci", "folds"} and len(s[metric]["folds"]) == 3
            assert s[metric]["mean"] == pytest.approx(np.mean(s[metric]["folds"]))
            assert s[metric]["ci"][0] <= s[metric]["ci"][1]
    assert (out / "compare.png").stat().st_size > 5000
    assert (out / "compare.md").read_text() == as_markdown(comparison_table(report))


def test_baselines_always_stand_beside():
    assert plan_systems(("late",)) == (["late", *BASELINES], {})


def test_unknown_names_are_refused(toy, tmp_path):
    with pytest.raises(MmferError, match="system 'middle' is unknown"): plan_systems(("early", "middle"))
    with pytest.raises(MmferError, match="scheme 'none' is unknown"): compare(toy, tmp_path, folds="none")
    with pytest.raises(MmferError, match="metric 'wer' is unknown"): plot_systems(dict(systems={}), "wer")


def save_lfm2(folder, **sizes):
    torch.manual_seed(0)
    config = FusionConfig(**dict(d_model=32, layers=6, heads=4, kv_heads=2, ffn=64) | sizes)
    Lfm2Backbone(lfm2_config(config)).save_pretrained(folder)
    return folder


def test_lfm2_full_runs_with_weights(toy, tmp_path):
    weights = save_lfm2(tmp_path / "lfm2")
    with pytest.warns(UserWarning, match="LFM Open License"):
        report = compare(toy, tmp_path / "out", ("lfm2_full",), "single", weights=dict(fusion=weights),
                         config=QUICK, **quietly)
    assert "lfm2_full" in report["systems"] and not report["skipped"]


class Built(Exception): "Stops an experiment at its model."


def asked_of(experiment, system, monkeypatch):
    "With what arguments an experiment builds the model of a system."
    def build(*args): raise Built(*args)
    monkeypatch.setattr(ablations.MultimodalFER, "from_preset", build)
    with pytest.raises(Built) as built: experiment.run(system, experiment.folds("single")[0], 0)
    return built.value.args


@pytest.mark.parametrize("system, weights", {
    "audio_only": dict(audio="a.nemo"), "visual_only": dict(vision="tower"),
    "early": dict(audio="a.nemo", vision="tower"),
    "lfm2_lightweight": dict(audio="a.nemo", vision="tower", fusion="none"),
    "lfm2_full": dict(audio="a.nemo", vision="tower", fusion="lfm2")}.items())
def test_systems_differ_in_their_weights_only_where_their_names_say_so(
        clips, tmp_path, monkeypatch, system, weights):
    experiment = ClipExperiment(clips, tmp_path, progress=False)
    experiment.sources = dict(audio="a.nemo", vision="tower", fusion="lfm2")
    kind = SYSTEM_KINDS[system]
    assert asked_of(experiment, system, monkeypatch) == ("tiny", experiment.emotions, kind, weights)


def test_only_lfm2_full_starts_from_lfm2s_weights(clips, tmp_path, monkeypatch):
    weights = save_lfm2(tmp_path / "lfm2", d_model=64, ffn=176)
    built = {}

    def untrained(model, *args):
        built[len(built)] = [origin.part for origin in model.config.origins]
        return model
    monkeypatch.setattr(ablations, "_best_epoch", untrained)
    with pytest.warns(UserWarning, match="LFM Open License"):
        compare(clips, tmp_path / "out", ("lfm2_lightweight", "lfm2_full"), "single",
                weights=dict(fusion=weights), faces="none", **quietly)
    assert built == {0: [], 1: ["fusion"]}


def test_weights_reach_the_experiment_as_the_preset_chooses_them(clips, tmp_path, monkeypatch):
    class Stop(Exception): pass

    def stop(data, **settings): raise Stop(settings["sources"])
    monkeypatch.setattr(ablations, "ClipExperiment", stop)
    asked = {}
    for weights in ("pretrained", "none"):
        with pytest.raises(Stop) as stopped: compare(clips, tmp_path, preset="lightweight", weights=weights)
        asked[weights] = stopped.value.args[0]
    assert asked == dict(pretrained=PRETRAINED["lightweight"], none={})


def test_the_test_clips_come_from_the_cache_of_the_training(clips, tmp_path, monkeypatch):
    experiment = ClipExperiment(clips, tmp_path, epochs=1, progress=False)
    frozen = MultimodalFER.from_preset("tiny", experiment.emotions, "early")
    frozen.visual.freeze()
    monkeypatch.setattr(ablations, "_best_epoch", lambda *args: frozen)
    split = experiment.folds("single")[0]
    first, _ = experiment.run("early", split, 0)
    assert len(list((tmp_path / "cache").glob("*/*.npy"))) == len(experiment.test_clips(split))
    frozen.visual.vision.register_forward_pre_hook(lambda *_: pytest.fail("the tower runs again"))
    again, _ = experiment.run("early", split, 0)
    assert again.tolist() == first.tolist()


def save_tower(folder):
    "A vision tower in the form of SigLIP2's, small, with as many patches as `lightweight` needs."
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    SiglipVisionModel(SiglipVisionConfig(**sizes, image_size=64, patch_size=4)).save_pretrained(folder)
    return folder


def test_a_comparison_from_loaded_parts_runs_the_tower_once_per_clip(clips, tmp_path, monkeypatch):
    weights = dict(audio="none", vision=save_tower(tmp_path / "tower"))
    encoded = []
    encode = cache.encode_clip

    def count(branch, item):
        encoded.append(item["clip"])
        return encode(branch, item)
    monkeypatch.setattr(cache, "encode_clip", count)
    report = compare(clips, tmp_path / "out", ("visual_only", "early"), "single", preset="lightweight",
                     epochs=1, weights=weights, faces="none", **quietly)
    assert report["weights"] == dict(vision=str(weights["vision"]))
    assert report["systems"].keys() == {"visual_only", "early", *BASELINES}
    assert len(encoded) == len(set(encoded)) == 3 * 8


def test_clips_are_trained_in_the_precision_of_this_machine(monkeypatch):
    monkeypatch.setattr(ablations, "this_machine", lambda: pick_tier("cuda", 14.6, 7))
    assert ablations._clip_recipe("lightweight", 3, 100, seed=2).precision == "fp16"
    monkeypatch.setattr(ablations, "this_machine", lambda: pick_tier("cpu"))
    recipe = ablations._clip_recipe("lightweight", 3, 100, seed=2)
    assert (recipe.precision, recipe.seed, recipe.epochs) == ("no", 2, 3)


def test_features_are_trained_on_this_machines_accelerator(toy, monkeypatch):
    monkeypatch.setattr(ablations, "this_machine", lambda: pick_tier("cuda", 14.6, 7))
    monkeypatch.setattr(FeatureSet, "to", lambda self, device: device)

    def train(system, clips, *args): raise Built(clips)
    monkeypatch.setattr(ablations, "train_ensemble", train)
    experiment = FeatureExperiment(toy, QUICK)
    with pytest.raises(Built, match="cuda"): experiment.run("late", experiment.folds("single")[0], 0)


# Jobs side by side


def test_parallel_equals_serial(first, toy, tmp_path):
    parallel, out = first
    serial = compare(toy, tmp_path, config=QUICK, seeds=2, **quietly)
    assert without_time(serial) == without_time(parallel)
    for name, results in read_results(tmp_path).items():
        assert [r.prediction for r in results] == [r.prediction for r in read_results(out)[name]]


def tell(number):
    "Of a job: its number, its process, its threads."
    return number, os.getpid(), torch.get_num_threads()


def test_workers_have_one_thread_each():
    told = sorted(side_by_side(tell, [(k,) for k in range(4)], workers=2))
    assert [number for number, _, _ in told] == [0, 1, 2, 3]
    assert os.getpid() not in {pid for _, pid, _ in told} and {threads for _, _, threads in told} == {1}


def test_one_worker_is_this_process_and_gives_its_threads_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert list(side_by_side(tell, [(7,)])) == [(7, os.getpid(), 1)]
        assert torch.get_num_threads() == 2
    finally: torch.set_num_threads(before)


def test_no_job_is_no_work():
    assert list(side_by_side(tell, [])) == []
    with pytest.raises(MmferError, match="0 jobs at a time"): side_by_side(tell, [(1,)], workers=0)


def fail(number): raise MmferError(f"job {number} is wrong: mend it")


def die(number): os.kill(os.getpid(), signal.SIGKILL)


def test_the_sentence_of_a_job_arrives_as_it_is():
    with pytest.raises(MmferError, match="^job 1 is wrong: mend it$"):
        list(side_by_side(fail, [(1,), (1,)], workers=2))


def test_a_dead_worker_is_told_in_a_sentence():
    with pytest.raises(MmferError, match="a worker process died.*what is finished is kept"):
        list(side_by_side(die, [(1,), (2,)], workers=2))


INTERRUPTED = """
import time
from pathlib import Path
from mmfer.ablations import side_by_side
def work(number):
    Path(f"{number}.begun").touch()
    time.sleep(60)
if __name__ == "__main__":
    print("begun", flush=True)
    try: list(side_by_side(work, [(k,) for k in range(4)], workers=2))
    except KeyboardInterrupt: print("stopped", flush=True)
"""


@pytest.mark.parametrize("at_work", [0, 2])  # while workers start, and while both work
def test_ctrl_c_ends_all_without_a_word_of_the_workers(tmp_path, at_work):
    (tmp_path / "jobs.py").write_text(INTERRUPTED)
    hear = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    here = os.environ | dict(PYTHONPATH=str(ROOT))
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "jobs.py"], cwd=tmp_path, env=here, start_new_session=True,
                          preexec_fn=hear, **pipes) as process:
        assert process.stdout.readline() == "begun\n"
        time.sleep(0.3)
        while len(list(tmp_path.glob("*.begun"))) < at_work: time.sleep(0.05)
        os.killpg(process.pid, signal.SIGINT)
        said, complaints = process.communicate(timeout=60)
    assert said == "stopped\n" and not complaints and process.returncode == 0


# Going on after a stop

SCRIPT = f"""
import sys
from mmfer.ablations import compare
from mmfer.core import from_dict
from mmfer.features import FeatureConfig
if __name__ == "__main__":
    config = from_dict(FeatureConfig, {to_dict(QUICK)})
    compare(sys.argv[1], sys.argv[2], config=config, seeds=2, jobs=2)
"""


def test_a_killed_comparison_goes_on(first, toy, tmp_path):
    report, done = first
    out = tmp_path / "killed"
    (tmp_path / "run.py").write_text(SCRIPT)
    process = subprocess.Popen([sys.executable, tmp_path / "run.py", toy, out], stderr=subprocess.DEVNULL)
    limit = time.monotonic() + 300
    while len(list(out.glob("jobs/*.json"))) < 5 and process.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    process.kill()
    process.wait()
    before = {p: p.stat().st_mtime_ns for p in out.glob("jobs/*.json")}
    assert 5 <= len(before) < len(list(done.glob("jobs/*.json"))) and not (out / "compare.json").exists()
    resumed = compare(toy, out, config=QUICK, seeds=2, **quietly)
    assert all(p.stat().st_mtime_ns == t for p, t in before.items())
    assert without_time(resumed) == without_time(report)


def test_more_seeds_reuse_the_first(toy, tmp_path, monkeypatch):
    compare(toy, tmp_path, ("late",), "single", config=QUICK, **quietly)
    ran = []

    def count(experiment, split, system, fold, seed):
        ran.append((system, seed))
        return train_and_test(experiment, split, system, fold, seed)

    monkeypatch.setattr(ablations, "train_and_test", count)
    report = compare(toy, tmp_path, ("late",), "single", seeds=2, config=QUICK, **quietly)
    assert ran == [(name, 1) for name in ("late", *BASELINES)]
    assert len(read_results(tmp_path)["late"]) == 2 and report["seeds"] == 2
    fewer = compare(toy, tmp_path, ("late",), "single", config=QUICK, **quietly)
    assert fewer["systems"]["late"]["war"]["sd"] is None  # of one training


def test_a_damaged_result_is_named(toy, tmp_path):
    compare(toy, tmp_path, ("late",), "single", config=QUICK, **quietly)
    (tmp_path / "jobs" / "late-fold0-seed0.json").write_text("{")
    with pytest.raises(MmferError, match="late-fold0-seed0.json cannot be read.*delete it"):
        compare(toy, tmp_path, ("late",), "single", config=QUICK, **quietly)


@pytest.mark.parametrize("change, named", [(dict(epochs=2), "config"), (dict(folds="single"), "folds")])
def test_another_comparison_is_refused(first, toy, change, named):
    _, out = first
    with pytest.raises(MmferError, match=f"another {named}"):
        compare(toy, out, **dict(config=QUICK) | change, **quietly)


@pytest.mark.parametrize("name", ["audio", "speaker", "emotion"])
def test_other_features_are_refused(first, toy, tmp_path, name):
    with np.load(toy) as f: changed = f[name][::-1]
    other = rewrite(toy, tmp_path / "other.npz", **{name: changed})
    with pytest.raises(MmferError, match="another data"):
        compare(other, first[1], config=QUICK, **quietly)


def test_lfm2_weights_may_come_later_but_not_change(tmp_path):
    def settings(**weights): return dict(kind="clips", epochs=None, weights=dict(vision="tower") | weights)
    ablations._require_same(tmp_path, settings())
    ablations._require_same(tmp_path, settings(fusion="lfm2"))
    for other in (settings(fusion="another"), settings(), settings(fusion="lfm2", vision="another")):
        with pytest.raises(MmferError, match="another weights"): ablations._require_same(tmp_path, other)


# Figures


def results(seeds=2, right=0.7):
    rng = np.random.default_rng(0)

    def one(fold, seed):
        speaker = np.repeat([f"{2 * fold}", f"{2 * fold + 1}"], 40).tolist()
        label = rng.integers(0, 8, 80)
        guess = np.where(rng.random(80) < right, label, rng.integers(0, 8, 80))
        clip = [f"{fold}-{i}" for i in range(80)]
        said = dict(label=label.tolist(), prediction=guess.tolist(), parameters=1, seconds=1.0)
        return Result("x", fold, seed, list(RAVDESS_EMOTIONS), clip, speaker, **said)
    return [one(fold, seed) for fold in range(3) for seed in range(seeds)]


def joined(runs):
    columns = [np.concatenate([getattr(r, k) for r in runs]) for k in ("label", "prediction", "speaker")]
    return speaker_matrices(*columns, 8)


def test_interval_is_that_of_the_evaluation_chapter():
    runs = results(seeds=1)
    for metric in BOOTSTRAPPED:
        expected = bootstrap_interval(joined(runs), metric)
        assert summarise_metric(runs, metric)["ci"] == pytest.approx(expected)


def test_mean_is_over_folds_and_deviation_over_trainings():
    runs = results()
    war = [np.mean(np.equal(r.label, r.prediction)) for r in runs]
    summary = summarise_metric(runs, "war")
    assert summary["folds"] == pytest.approx([np.mean(war[i:i + 2]) for i in (0, 2, 4)])
    assert summary["mean"] == pytest.approx(np.mean(war))
    assert summary["sd"] == pytest.approx(np.std(war, ddof=1))


def test_all_seeds_count_alike_in_the_interval():
    one = results(seeds=1)[0]
    always_right = dataclasses.replace(one, seed=0, prediction=one.label)
    never_right = dataclasses.replace(one, seed=1, prediction=[(label + 1) % 8 for label in one.label])
    assert summarise_metric([always_right, never_right], "war")["ci"] == [0.5, 0.5]


def test_one_training_has_no_deviation_and_one_speaker_no_interval():
    one = results(seeds=1)[0]
    assert summarise_metric([one], "war")["sd"] is None
    alone = dataclasses.replace(one, speaker=["1"] * 80)
    assert summarise_metric([alone], "war")["ci"] is None
    report = dict(systems=dict(x=summarise_system([alone])), emotions=RAVDESS_EMOTIONS)
    assert comparison_table(report).WAR["x"] == f"{summarise_metric([alone], 'war')['mean']:.3f}"
    assert plot_systems(report).axes


def test_a_system_does_not_differ_from_itself():
    assert paired_difference(results(), results(), "war") == (0.0, [0.0, 0.0])


def test_other_clips_are_no_pair():
    with pytest.raises(MmferError, match="same clips"): paired_difference(results(), results()[:-1], "war")


def test_paired_difference_sees_a_better_system():
    difference, (low, high) = paired_difference(results(right=0.9), results(right=0.4), "war")
    assert 0.2 < low < difference < high


def test_paired_difference_cancels_what_is_hard_for_both():
    "b misses one clip more per speaker than a: the difference is certain, though speakers differ widely."
    a = [Result("a", 0, 0, ["x", "y"], [f"{k}-{i}" for k in range(6) for i in range(10)],
                [str(k) for k in range(6) for _ in range(10)], [0] * 60,
                [int(i < k) for k in range(6) for i in range(10)], 1, 1.0)]
    b = [dataclasses.replace(a[0], system="b", prediction=[int(i <= k) for k in range(6) for i in range(10)])]
    difference, interval = paired_difference(a, b, "war")
    assert difference == pytest.approx(0.1) and interval == pytest.approx([0.1, 0.1])
    low, high = summarise_metric(a, "war")["ci"]
    assert high - low > 0.2


def test_fusions_pass_single_modalities(toy, tmp_path):
    names = ("audio_only", "visual_only", "early", "attention", "lfm2_lightweight")
    systems = compare(toy, tmp_path, names, "single", config=LEARN, **quietly)["systems"]
    single = max(systems[name]["uar"]["mean"] for name in names[:2])
    assert single <= 0.55  # what one modality can know
    for name in names[2:]: assert systems[name]["uar"]["mean"] >= single + 0.15, name


def test_missing_data_is_refused(tmp_path):
    with pytest.raises(MmferError, match="nothing.npz does not exist"):
        compare(tmp_path / "nothing.npz", tmp_path)


# Any corpus


def test_three_emotions_and_text_speakers_from_a_features_file(toy, tmp_path):
    own = rewrite(toy, tmp_path / "own.npz", emotion=np.resize(["shy", "bored", "proud"], 360), emotions=None,
                  speaker=np.repeat(["Ann", "Bob", "Cem", "Dee"], 90))
    report = compare(own, tmp_path / "out", ("early", "late"), "hicmae", config=QUICK, **quietly)
    assert report["emotions"] == ["bored", "proud", "shy"]
    assert sorted(sum(report["folds"], [])) == ["Ann", "Bob", "Cem", "Dee"]
    assert report["systems"]["majority"]["uar"]["mean"] == pytest.approx(1 / 3)
    tested = read_results(tmp_path / "out")["early"]
    assert {p for r in tested for p in r.prediction} <= {0, 1, 2}


def own_csv(clips, path):
    "The toy's clips under other names: three emotions, speakers as words."
    table = Corpus.from_folder(clips).table
    table = table[table.emotion.isin(["happy", "sad", "angry"])]
    emotion = table.emotion.map(dict(happy="proud", sad="shy", angry="bored"))
    names = dict(zip(sorted(table.speaker.unique()), ("Ann", "Bob", "Cem")))
    clip = [f"take {k}" for k in range(len(table))]
    speaker = table.speaker.map(names)
    pd.DataFrame(dict(path=table.path, emotion=emotion, speaker=speaker, clip=clip)).to_csv(path)
    return path


def test_three_emotions_and_text_speakers_from_a_csv(clips, tmp_path):
    data = own_csv(clips, tmp_path / "own.csv")
    report = compare(data, tmp_path / "out", ("early",), "single", epochs=1, faces="none", **quietly)
    assert report["kind"] == "clips" and report["emotions"] == ["bored", "proud", "shy"]
    assert report["folds"] == [["Cem"]] and list(report["systems"]) == ["early", *BASELINES]
    [result] = read_results(tmp_path / "out")["early"]
    assert result.speaker == ["Cem"] * 3 and sorted(result.label) == [0, 1, 2]


def test_a_folder_and_its_prepared_set_give_the_same(clips, tmp_path):
    prepare(clips, tmp_path / "set", crop_size=64, faces="none", progress=False)
    settings = dict(systems=("early",), folds="single", epochs=1, **quietly)
    raw = compare(clips, tmp_path / "raw", **settings)
    prepared = compare(tmp_path / "set", tmp_path / "prepared", **settings)
    assert [len(r.clip) for r in read_results(tmp_path / "raw")["early"]] == [8]
    assert without_time(raw) == without_time(prepared)


# Kept results


def kept(name):
    folder = ROOT / "benchmarks" / "results" / f"compare_{name}"
    return json.loads((folder / "compare.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", ["toy", "ravdess"])
def test_chapter_shows_the_kept_results(name):
    chapter = json.loads((ROOT / "nbs" / "27_ablations.ipynb").read_text(encoding="utf-8"))
    prose = "\n".join("".join(c["source"]) for c in chapter["cells"] if c["cell_type"] == "markdown")
    assert as_markdown(comparison_table(kept(name))).strip() in prose


def test_kept_toy_results_reach_the_goal():
    systems = kept("toy")["systems"]
    single = max(systems[name]["uar"]["mean"] for name in ("audio_only", "visual_only"))
    for name in ("early", "late", "attention", "lfm2_lightweight"):
        assert systems[name]["uar"]["mean"] >= single + 0.2, name


def test_kept_results_are_those_of_the_features(shared_data):
    experiment = FeatureExperiment(shared_data / "ravdess_features" / "ravdess_actors01-20.npz")
    before = kept("ravdess")
    assert {k: before[k] for k in experiment.settings()} == experiment.settings()
    assert from_dict(FeatureConfig, before["config"]) == FeatureConfig()
    splits = experiment.folds("hicmae")
    assert before["folds"] == [s.test for s in splits]
    done = [train_and_test(experiment, s, "logistic_regression", k, 0) for k, s in enumerate(splits)]
    war = before["systems"]["logistic_regression"]["war"]["folds"]
    assert summarise_metric(done, "war")["folds"] == pytest.approx(war, abs=0.005)
