"""The line, top to bottom: who reads this file has seen the product.

Each stage takes the line, reads artifacts, writes artifacts, and is recorded in the ledger; the work itself is done
in the rooms below. Models are opened only by stages that run, so a finished run is gone through in seconds.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from pennyweight.bench import Bench
from pennyweight.data.pack import packer
from pennyweight.data.prepare import Writer, both_sides, gather, problems_of, told
from pennyweight.data.render import dropped_thoughts, encode_all
from pennyweight.data.store import write_samples
from pennyweight.evaluate.held_out import text_overlap
from pennyweight.evaluate.suite import Sampling, examine
from pennyweight.ledger.hashing import content_hash
from pennyweight.line import Chain, Line
from pennyweight.methods import METHODS, check
from pennyweight.model.adapters import merge
from pennyweight.model.device import gpu_of, peak
from pennyweight.model.lineage import check_start, tuned_further
from pennyweight.model.load import fingerprint_of, identity_of, save, taught_by
from pennyweight.model.student import from_shape
from pennyweight.model.tokenizer import PAD_ID, train_tokenizer
from pennyweight.plan.published import published
from pennyweight.plan.reckon import within_budget
from pennyweight.plan.seen import peak_retold, retold, trial_of
from pennyweight.progress import counting, say, stoppable
from pennyweight.quant.export import export, formats_of
from pennyweight.quant.linear import compute_in
from pennyweight.quant.recovery import check_copies, low_bit
from pennyweight.quant.rounding import copies_of, recovery_of
from pennyweight.recipe import FileData, Recipe, TeacherSamples, TrainedTeacher
from pennyweight.records import ROUNDED, sha256_json
from pennyweight.report.draw import draw
from pennyweight.report.summary import shown_samples, summarise
from pennyweight.rolling import steps
from pennyweight.run_folder import Done, Made, open_run, read_json, write_json
from pennyweight.settings import SftMethod
from pennyweight.teacher import store
from pennyweight.teacher.local import LocalTeacher
from pennyweight.teacher.refusals import check_teacher
from pennyweight.teacher.several import cut_from, identities, seed_of, who_teaches
from pennyweight.train.checkpoint import Checkpoints
from pennyweight.train.group import ALONE
from pennyweight.train.loop import Outcome, train
from pennyweight.train.tripwire import UNWATCHED
from pennyweight.verifiers import check_golds, check_verifiers, judge, judge_sample
from pennyweight.verifiers.own import made_with
from pennyweight.version import __version__
from pennyweight.watching import lookout


def run_line(recipe: Recipe, out: Path, chain: Chain | None = None) -> dict[str, Any]:
    """The whole line: teacher -> data -> targets -> students -> copies -> evaluation -> report; gives summary.json."""
    check(recipe.method, frozenset({recipe.targets.kind}))
    check_teacher(recipe)
    check_verifiers(recipe)
    bench = Bench(recipe, out)
    device, foretold = bench.compute.device, within_budget(recipe, *bench.where, published, trial_of(recipe))
    opened = open_run(out, recipe, partial(peak, device), bench.group, gpu_of(device))
    with opened as run, Line(run, bench, foretold, (retold, peak_retold), chain) as line:
        teacher = the_teacher(line)
        starts = the_starts(line, teacher)
        data = the_data(line, teacher)
        targets = the_targets(line, teacher, data)
        arms = {
            arm: {seed: an_arm(line, arm, seed, starts[seed], teacher, data, targets) for seed in recipe.seeds}
            for arm in dict.fromkeys(["sft", recipe.method.kind] if recipe.control else [recipe.method.kind])
        }
        if not bench.group.first:
            return {}  # of several processes one does what is not shared
        student = the_student(line, arms)
        copies = {name: a_copy(line, name, student, data) for name in copies_of(recipe.quantize, recipe.train)}
        made = Finished(teacher, data, starts, targets, arms, student, copies)
        return the_report(line, made, the_evaluations(line, made))


@dataclass(frozen=True)
class Finished:
    """The stages before evaluation. ``starts`` and each arm are by seed, ``copies`` by name."""

    teacher: Done
    data: Done
    starts: dict[int, Done]
    targets: Done
    arms: dict[str, dict[int, Done]]
    student: Done
    copies: dict[str, Done]


def the_teacher(line: Line) -> Done:
    """A folder or a server as it is; or one trained from nothing on worked solutions, kept for the next run."""
    recipe = line.recipe
    if not isinstance(recipe.teacher, TrainedTeacher):
        depends = {"teacher": recipe.hash_of("teacher"), **identities(recipe.teacher, identity_of)}
        return line.run.stage("teacher", depends, lambda work: Made((line.bench.team or line.bench.answering).facts()))
    held_out = recipe.data.eval_fraction
    depends = {"teacher": recipe.hash_of("teacher"), "held_out": held_out, "compute": line.compute.name}
    key = sha256_json([depends, __version__])
    return line.run.stage("teacher", depends, lambda work: _trained_teacher(line, key, work))


def _trained_teacher(line: Line, key: str, work: Path) -> Made:
    t, place, held_out = line.recipe.teacher, line.folder / "teacher", line.recipe.data.eval_fraction
    assert isinstance(t, TrainedTeacher)
    problems = problems_of(t.tasks, t.seed, held_out)
    line.run.ledger.add_records(problems, "teacher-train", None)
    if store.adopt(store.place_of(key), place):
        say("teacher: trained by an earlier run, taken from the cache")
        return Made({**line.bench.teacher.facts(), "cached": True}, paths=["teacher"])
    tokenizer = train_tokenizer([m.content for s in problems for m in s.messages], t.vocabulary, t.context)
    model = from_shape(t.shape, tokenizer, t.context, t.seed)
    encoded = encode_all(problems, tokenizer, t.context, "refuse")
    batches = packer(encoded, t.schedule, t.seed, PAD_ID, t.context)
    next_batch = lambda step: [METHODS["sft"].apply(b, SftMethod(), None) for b in batches(step)]  # noqa: E731
    outcome = _fit(line, work, "teacher", t.seed, model, t.schedule, next_batch)
    save(model, tokenizer, place)
    store.keep(place, store.place_of(key))
    return Made({**line.bench.teacher.facts(), "cached": False}, outcome.tokens, ["teacher"], outcome.seconds)


def _fit(
    line: Line, work: Path, arm: str, seed: int, model: Any, schedule: Any, batches: Any, group=ALONE, watch=UNWATCHED
) -> Outcome:
    """The loop, with this run's checkpoints, ledger, journal and progress."""
    compute_in(model, schedule.precision, schedule.weights)
    counted = counting(f"{arm} (seed {seed})", schedule.steps, "steps")
    with line.within_budget(), group.together(), counted as c, stoppable() as should_stop:
        return train(
            model,
            batches,
            schedule=schedule,
            tripwires=line.recipe.tripwires,
            compute=line.compute,
            checkpoints=Checkpoints(work),
            seed=seed,
            admit=lambda ids: line.run.ledger.admit(i.partition(":")[0] for i in ids),
            log=lambda x: line.journal.write({"stage": "train", "arm": arm, "seed": seed, **x}),
            rewind=lambda step: line.journal.rewind({"arm": arm, "seed": seed}, step),
            progress=line.paced(f"{arm}-{seed}", schedule.steps, c.reach),
            should_stop=lambda: should_stop() or line.over(),
            group=group,
            watch=watch,
        )


def the_data(line: Line, teacher: Done) -> Done:
    """Prompts and texts, split by content hash, answered by the teacher where they have no response."""
    source = line.recipe.data.source
    given = content_hash(source.path) if isinstance(source, FileData) else None
    depends = {"data": line.recipe.hash_of("data", "seed"), "teacher": teacher.facts["identity"], "given": given}
    depends |= made_with(source)
    depends |= {"own": [own.identity, line.recipe.method.kind]} if (own := line.bench.own_language) else {}
    return line.run.stage("data", depends, lambda work: _data(line, teacher, work))


def _data(line: Line, teacher: Done, work: Path) -> Made:
    recipe, d, folder = line.recipe, line.recipe.data, line.folder / "data"

    def writer(member: str | None, source: TeacherSamples | None = None) -> Writer:
        bench, seed = line.bench.of(member), seed_of(recipe.seed, member)
        speaker = bench.sampling(source) if source else bench.answering
        told_by = (speaker, speaker.tokenizer or line.bench.language.tokenizer, work / (member or ""))
        return Writer(*told_by, seed, line.counting, line.bench.asked_in, d.too_long, bench.recipe.teacher.licence)

    gathered = gather(d.source, partial(writer, source=d.source), recipe.teacher)
    sides, found = both_sides(gathered, d, writer, judge_sample, check_golds, line.bench.encode)
    for name, samples in sides.items():
        write_samples(folder / f"{name}.jsonl", samples)
        for known, taught in who_teaches(samples, teacher.facts):
            line.run.ledger.add_records(taught, name, known["fingerprint"], known["name"])
    found["thoughts_dropped"] = dropped_thoughts(sides["train"], line.bench.language.tokenizer)
    say(told(found))
    return Made(found | line.bench.asked(), found["train_tokens"], ["data/train.jsonl", "data/eval.jsonl"])


def the_starts(line: Line, teacher: Done) -> dict[int, Done]:
    """The untouched students by seed: one and the same, unless they are made from nothing."""
    seeds = line.recipe.seeds
    if line.recipe.student.kind == "shape":
        return {seed: a_start(line, teacher, seed) for seed in seeds}
    return dict.fromkeys(seeds, a_start(line, teacher, seeds[0]))


def a_start(line: Line, teacher: Done, seed: int) -> Done:
    """One untouched student: given, cut from the teacher, or made from nothing by its seed."""
    s, place = line.recipe.student, f"arms/base-{seed}"
    own, room = line.bench.own_language, min(line.recipe.data.context, teacher.facts["context"] or 1 << 40)
    depends = {"student": [s.model_dump(mode="json"), seed, cut_from(line.recipe)], "context": room}
    depends |= {"teacher": teacher.facts["identity"], "own": [own.identity, line.recipe.data.context] if own else []}
    lineage = taught_by(s.path, s.trust_remote_code) if s.kind == "folder" else ()
    if s.kind == "folder":
        depends |= {"given": fingerprint_of(s.path, s.trust_remote_code), "taught_by": repr(lineage)}
    unsure = check_start(lineage, teacher.facts) if line.recipe.method.kind == "offline" else None
    depends |= {"unsure": unsure} if unsure else {}

    def make(work: Path) -> Made:
        student = line.bench.first_student(seed)
        save(student, line.bench.language.tokenizer, line.folder / place, line.bench.student_dtype, lineage)
        check_copies(line.bench.opened, line.recipe.quantize, line.folder / place, work)
        if unsure:
            say(f"start: {unsure}")
        return Made({**line.bench.opened(line.folder / place).facts(), "unsure": unsure}, paths=[place])

    return line.run.stage(f"start-{seed}", depends, make)


def the_targets(line: Line, teacher: Done, data: Done) -> Done:
    """The teacher's distribution over the training tokens, sampled and kept; or nothing, when it runs live."""
    recipe, compute = line.recipe, line.compute.name
    depends = {"targets": recipe.hash_of("targets"), "temperature": getattr(recipe.method, "temperature", None)}
    depends |= {"teacher": teacher.facts["identity"], "data": data.facts["train_stream"], "compute": compute}

    def make(work: Path) -> Made:
        (line.folder / "targets").mkdir(exist_ok=True)
        facts, damaged = line.bench.label()
        for name in damaged:
            say(f"targets: shard {name} was damaged and has been made again")
        return Made(facts, facts["tokens"] if facts["bytes"] else 0, ["targets"] if facts["bytes"] else [])

    return line.run.stage("targets", depends, make, shared=True)


def an_arm(line: Line, arm: str, seed: int, start: Done, teacher: Done, data: Done, targets: Done) -> Done:
    """One student, trained by one method from one seed: same start, same tokens, same steps in every arm."""
    recipe, method = line.recipe, SftMethod() if arm == "sft" else line.recipe.method
    depends: dict[str, Any] = {"train": recipe.hash_of("train"), "method": method.model_dump(mode="json"), "seed": seed}
    depends |= {"compute": line.compute.name, "start": start.outputs, "data": data.facts["train_stream"]}
    if METHODS[arm].asks or METHODS[arm].signals(method):
        kind = recipe.hash_of("targets") if METHODS[arm].asks else recipe.targets.kind
        depends |= {"targets": targets.outputs, "kind": kind, "teacher": teacher.facts["fingerprint"]}
    if METHODS[arm].rolls:  # what it writes to, in how many tokens, and is judged by
        depends |= {"samples": [data.outputs, recipe.data.context], **made_with(getattr(method, "reward", None))}

    def make(work: Path) -> Made:
        begin, place = line.bench.to_train(line.folder / next(iter(start.outputs)), seed), f"arms/{arm}-{seed}"
        who = (arm, seed, work, line.run.ledger, line.journal, judge, lookout)
        next_batch, watch = steps(line.bench, METHODS[arm], method, begin, *who)
        outcome = _fit(line, work, arm, seed, begin.model, recipe.train, next_batch, line.bench.group, watch)
        merge(begin.model)
        if line.bench.group.first:
            by = (teacher.facts, data.facts, recipe.name, recipe.teacher.kind == "endpoint")
            lineage = tuned_further(begin.taught_by, method, *by)
            save(begin.model, begin.tokenizer, line.folder / place, line.bench.student_dtype, lineage)
        return Made(outcome.facts, outcome.tokens, [place, *watch.shown()], outcome.seconds)

    return line.run.stage(f"{arm}-{seed}", depends, make, shared=True)


def the_student(line: Line, arms: dict[str, dict[int, Done]]) -> Done:
    """The method's student of the first seed: chosen before anything was measured, so not by luck."""
    chosen = arms[line.recipe.method.kind][line.recipe.seeds[0]]
    place = line.folder / "student"

    def make(work: Path) -> Made:
        for old in (place, *line.folder.glob("student-*")):  # low-bit copies of another student, too
            shutil.rmtree(old, ignore_errors=True)
        shutil.copytree(line.folder / next(iter(chosen.outputs)), place)
        return Made(line.bench.opened(place).facts(), paths=["student"])

    return line.run.stage("student", {"from": chosen.outputs}, make)


def a_copy(line: Line, name: str, student: Done, data: Done) -> Done:
    """A low-bit copy of the student, taught by it, or rounded only."""
    q, seed = line.recipe.quantize, line.recipe.seeds[0]
    recovery = recovery_of(name, q, line.recipe.train, seed)
    depends = {"student": student.outputs, "quantize": q.model_dump(mode="json", exclude={"formats"})}
    depends |= {"data": data.facts["train_stream"], "recovery": repr(recovery), "compute": line.compute.name}

    def make(work: Path) -> Made:
        parent, out, how = line.folder / "student", line.folder / f"student-{name}", []
        teacher, samples = LocalTeacher(line.bench.opened(parent), line.compute), line.bench.encoded
        fit = lambda model, schedule, batches: how.append(_fit(line, work, name, seed, model, schedule, batches))  # noqa: E731
        formats = formats_of(teacher.loaded.model, name.removesuffix(ROUNDED), q.group)
        codes = low_bit(teacher, formats, q.method, samples, recovery, work / "targets", fit, line.counting)
        made = export(teacher.loaded.model, codes, parent, out)
        size = {"bytes": made.bytes, "params": student.facts["params"], "per_row": made.per_row}
        return Made({**size, "recovered": sum(o.steps for o in how)}, sum(o.tokens for o in how), [out.name])

    return line.run.stage(name, depends, make)


def the_evaluations(line: Line, made: Finished) -> dict[str, dict[str, Any]]:
    """Every model on the same held-out samples and problems; by name: teacher, base-0, sft-0, kd-0, int8, ..."""
    teacher = made.teacher.facts["identity"]
    models: dict[str, tuple[str | Path, Any]] = {"teacher": ("", teacher)} if line.bench.measurable else {}
    for name, done in {d.name: d for d in made.starts.values()}.items():
        models[name.replace("start", "base")] = (line.folder / next(iter(done.outputs)), done.outputs)
    for by_seed in made.arms.values():
        models |= {d.name: (line.folder / "arms" / d.name, d.outputs) for d in by_seed.values()}
    models |= {fmt: (line.folder / f"student-{fmt}", d.outputs) for fmt, d in made.copies.items()}
    text = content_hash(t) if (t := line.recipe.evaluate.text) else None
    shared = {"evaluate": line.recipe.hash_of("evaluate", "seed"), "text": text, "teacher": teacher}
    shared |= {"data": [made.data.outputs, made.data.facts["eval_stream"], line.recipe.data.context]}
    parents = dict.fromkeys(made.copies, made.student.outputs)
    depends = {n: {**shared, "model": outputs, "parent": parents.get(n)} for n, (_, outputs) in models.items()}
    return {name: an_evaluation(line, name, path, depends[name]) for name, (path, _) in models.items()}


def an_evaluation(line: Line, name: str, path: str | Path, depends: dict[str, Any]) -> dict[str, Any]:
    """One model measured on what was held out."""
    e, file = line.recipe.evaluate, f"evaluation/{name}.json"
    samples = 0 if name.endswith(ROUNDED) else e.samples  # which is only there to be looked at beside the other

    def make(work: Path) -> Made:
        model = line.bench.reference or line.bench.teacher if name == "teacher" else line.bench.opened(path)
        parent = line.bench.opened(line.folder / "student") if depends["parent"] else None
        sampling = Sampling(e.max_tokens, samples, e.temperature, line.recipe.seed)
        held_out = line.bench.teachers_held_out if name == "teacher" else line.bench.held_out
        references = None if name == "teacher" else line.bench.reference, parent
        with line.counting(f"evaluating {name}", held_out.passes(samples, 2 if parent else 1), "samples") as c:
            found = examine(model, held_out, judge, sampling, line.compute.measuring, *references, progress=c.advance)
        write_json(line.folder / file, found.to_json())
        return Made({}, found.tokens, [file])

    line.run.stage(f"evaluate-{name}", depends, make)
    return read_json(line.folder / file)


def the_report(line: Line, made: Finished, evaluations: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """summary.json, and report.html drawn from it; made anew every time, since it costs next to nothing."""
    recipe = line.recipe
    summary = summarise(
        recipe=recipe.model_dump(mode="json"),
        teacher={**made.teacher.facts, "path": line.bench.teacher_path, "licence": recipe.teacher.licence},
        start=made.starts[recipe.seeds[0]].facts,
        trained={arm: by_seed[recipe.seeds[0]].facts for arm, by_seed in made.arms.items()},
        evaluations={
            "teacher": evaluations.get("teacher"),
            "base": {seed: evaluations[d.name.replace("start", "base")] for seed, d in made.starts.items()},
            **{arm: {seed: evaluations[d.name] for seed, d in by_seed.items()} for arm, by_seed in made.arms.items()},
        },
        copies={fmt: {**d.facts, "evaluation": evaluations[fmt]} for fmt, d in made.copies.items()},
    )
    overlap = text_overlap(recipe.evaluate.text, line.folder / "data" / "train.jsonl")
    summary |= {"targets": made.targets.facts, "data": {**made.data.facts, **overlap}}
    summary |= line.account()
    summary["bill"] = line.bill(summary)
    write_json(line.folder / "evaluation" / "shown.json", shown_samples(evaluations, recipe.evaluate.shown))
    write_json(line.folder / "summary.json", summary)
    draw(line.folder)
    return summary
