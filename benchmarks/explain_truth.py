"""Which method of explanation points at the true cue of a toy clip, and which also for a shuffled model?

    python benchmarks/explain_truth.py [--seeds 0 1 2] [--clips 40] [--runs DIR ...]

For each seed: train the system on a toy corpus as `mmfer train` does (or load the runs of `--runs`), take the
clips of speakers whom the model has not met, and put every method of `explain` through the tests of
chapter 18: the pointing game, the same with shuffled weights, deletion and insertion, agreement with
occlusion; and the control, which covers the cue. What is done lies in `--work`, and the same line goes on
where it stopped.
"""
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
from common import run, save
from tqdm import tqdm

from mmfer.cli import main as mmfer
from mmfer.core import atomic_write, require
from mmfer.evaluate import unseen_clips
from mmfer.explain import explain
from mmfer.prepare import corpus_of
from mmfer.runs import load_run
from mmfer.toy import make_toy
from mmfer.truth import (
    PARTS, agreement, answered_rightly, control, curve_areas, deletion_insertion, mean_scores,
    needs_cue, point, score_randomised)


@dataclass
class Settings:
    "What is trained, and on how many clips it is judged."
    seeds: tuple[int, ...] = (0, 1, 2)  # one training each, with other speakers to test on
    system: str = "lfm2"                # how the modalities are joined
    speakers: int = 10                  # of the toy corpus
    clips: int = 40                     # unseen clips that each model explains, at most
    shuffled: int = 20                  # of these, with shuffled weights
    drawn: int = 10                     # of these, with curves of deletion and insertion
    work: Path = Path("runs/explain_truth")  # where corpus, trainings and parts of the result are kept
    runs: tuple[Path, ...] = ()         # trained runs to judge, one per seed, in place of training


def trained(settings, seed, corpus):
    "The folder of a training, as `mmfer train` makes it."
    if settings.runs: return settings.runs[settings.seeds.index(seed)]
    folder = settings.work / f"{settings.system}-seed{seed}"
    options = ["--preset", "tiny", "--system", settings.system, "--seed", str(seed), "--resume"]
    if not (folder / "report").exists(): mmfer(["train", str(corpus), "--out", str(folder), *options])
    return folder


def unseen(model_split, corpus, processor, truths, n):
    "Clips of unseen speakers, evenly over the emotions and speakers, and the truth about each."
    judged, _ = unseen_clips(corpus_of(corpus), model_split)
    table = judged.table.sample(min(n, len(judged)), random_state=0)
    return [processor.read(path) for path in table.path], [truths[clip] for clip in table["clip"]]


def shown(table): return json.loads(table.to_json(orient="index"))


def where(need):
    "The columns of the parts on whose cue an answer hangs."
    return [name for part in PARTS if need[part] for name in (part, f"{part}_chance")]


def judge(model, processor, clips, truths, settings):
    "All tests of truth of one model."
    right = answered_rightly(model, processor, clips, truths)
    known = [(clip, truth) for clip, truth, ok in zip(clips, truths, right) if ok]
    needed = needs_cue(model, processor, *zip(*known)).to_dict("records")
    explained = [explain(model, processor, clip) for clip, _ in tqdm(known, "explain")]
    marks = [point(e, truth) for e, (_, truth) in zip(explained, known)]
    curves = [deletion_insertion(model, processor, clip, e, seed=i)
              for i, (e, (clip, _)) in enumerate(zip(tqdm(explained[:settings.drawn], "curves"), known))]
    areas = curve_areas(pd.concat(curves))
    some = settings.shuffled
    return dict(
        answered_rightly=float(right.mean()), clips=len(clips),
        pointing=shown(mean_scores(marks)),
        pointing_where_needed=shown(mean_scores([mark[where(need)] for mark, need in zip(marks, needed)])),
        needed=pd.DataFrame(needed).mean().to_dict(),
        agreement=shown(mean_scores([agreement(e) for e in explained])),
        randomised=shown(score_randomised(model, processor, clips[:some], truths[:some])),
        control=shown(control(model, processor, clips, truths)),
        areas={part: shown(areas.loc[part]) for part in areas.index.unique(0)})


def of_seed(settings, seed, corpus):
    "The tests of one seed, from the file that an earlier call left or anew."
    kept = settings.work / f"{settings.system}-seed{seed}.json"
    if kept.exists(): return json.loads(kept.read_text())
    model, processor, split = load_run(trained(settings, seed, corpus))
    truths = json.loads((corpus / "truth.json").read_text())
    result = judge(model, processor, *unseen(split, corpus, processor, truths, settings.clips), settings)
    with atomic_write(kept) as f: json.dump(result, f, indent=1)
    return result


def mean_of(results, test):
    "The mean over the seeds of a table; n is the number of all clips."
    tables = pd.concat([pd.DataFrame.from_dict(result[test], orient="index") for result in results])
    rows = tables.groupby(level=0, sort=False)
    return shown(rows.mean().assign(n=rows.n.sum()))


def markdown(table):
    "A table of figures as Markdown."
    head = [table.index.name or "method", *table.columns]
    lines = [head, ["---"] * len(head)]
    lines += [[name, *map("{:.2f}".format, row)] for name, row in zip(table.index, table.to_numpy())]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def frame(rows): return pd.DataFrame.from_dict(rows, orient="index")


def report(result):
    "The tables of chapter 18: pointing under its three conditions, areas under the curves, the control."
    conditions = {"": "pointing", ", needed": "pointing_where_needed", ", shuffled": "randomised"}
    pointing = {}
    for part in PARTS:
        for words, test in conditions.items():
            table = frame(result[test])
            pointing[part + words] = {**table[part], "*chance*": table[f"{part}_chance"].mean()}
    seeds = result["by_seed"]
    areas = {f"{part}, {test}": pd.concat([frame(seed["areas"][part])[test] for seed in seeds])
             for part in PARTS for test in ("deletion", "insertion")}
    controls = pd.concat([frame(seed["control"]) for seed in seeds]).rename_axis("covered")
    tables = (pd.DataFrame(pointing), pd.DataFrame({name: mean_by_name(a) for name, a in areas.items()}),
              mean_by_name(controls))
    return "\n\n".join(map(markdown, tables))


def mean_by_name(table): return table.groupby(level=0, sort=False).mean()


def main(settings):
    fits = len(settings.runs) in (0, len(settings.seeds))
    require(fits, f"{len(settings.runs)} runs for {len(settings.seeds)} seeds: name one per seed, or none")
    corpus = settings.work / "toy"
    if not (corpus / "truth.json").exists(): make_toy(corpus, settings.speakers, seed=0)
    results = [of_seed(settings, seed, corpus) for seed in settings.seeds]
    tables = {test: mean_of(results, test) for test in ("pointing", "pointing_where_needed", "randomised")}
    pointing = pd.DataFrame.from_dict(tables["pointing"], orient="index")
    best = {part: pointing[part].idxmax() for part in PARTS}
    told = [f"{part}: {method} {pointing.loc[method, part]:.2f}" for part, method in best.items()]
    save("explain_truth", f"hit rate of the best method: {'; '.join(told)}; mean of {len(results)} seeds",
         **asdict(settings) | dict(work=settings.work.name, runs=[run.name for run in settings.runs]),
         **tables, by_seed=results)


if __name__ == "__main__": run(main, Settings)
