"""What a teacher behind a server, or of other tokens, or several cannot do: said before anything is asked or paid."""

from __future__ import annotations

from pennyweight.errors import MethodError, RecipeError
from pennyweight.recipe import (
    CutStudent,
    EndpointTeacher,
    FileData,
    FolderTeacher,
    KdMethod,
    Recipe,
    SampledTargets,
    SeveralTeachers,
    ShapeStudent,
    TargetChoice,
    TeacherSamples,
    TopKTargets,
)


def check_teacher(recipe: Recipe) -> None:
    """Refuse a recipe that asks of an endpoint what no server gives, of several teachers what they cannot be, or of a
    student rollouts where there is nothing to write to.

    Raises:
        RecipeError, MethodError: with the reason and the cure.
    """
    t, kind = recipe.teacher, recipe.method.kind
    if kind in ("grpo", "on_policy", "offline") and isinstance(recipe.data.source, TeacherSamples):
        raise RecipeError(
            f"method {kind} has the student write to prompts, and data.source.kind=teacher_samples has none; give a "
            "file of prompts (--data FILE, data.source.kind=files) or problems (data.source.kind=tasks)"
        )
    if kind in ("on_policy", "offline") and isinstance(t, SeveralTeachers | EndpointTeacher):
        where = "behind a server, which tells" if isinstance(t, EndpointTeacher) else "several, of which each tells"
        raise MethodError(
            f"method {kind} asks the teacher about every token that the student writes, and it is {where} too little "
            "of them; use a teacher folder (teacher.kind=folder), or method.kind=sft on its answers"
        )
    if isinstance(t, SeveralTeachers):
        _check_several(recipe, t)
        for name, one in t.members.items():
            if isinstance(one, EndpointTeacher):
                _check_endpoint(recipe, one, f"teacher.members.{name}")
        return
    if getattr(recipe.student, "member", None):
        raise RecipeError(
            "student.member names one of several teachers, and this recipe has one; leave student.member out"
        )
    if not isinstance(t, EndpointTeacher):
        return
    if isinstance(recipe.student, CutStudent):
        raise RecipeError(
            "a student cannot be cut from an endpoint, whose weights nobody here has; give a student folder "
            "(--student FOLDER), or make one from nothing (student.kind=shape)"
        )
    if isinstance(recipe.student, ShapeStudent) and not (t.tokenizer or recipe.student.tokenizer):
        raise RecipeError(
            "a student made from nothing takes its teacher's tokenizer, and an endpoint hands over none; name a folder "
            "or hub id that holds one with teacher.tokenizer, or student.tokenizer for another"
        )
    _check_endpoint(recipe, t, "teacher")


def _check_endpoint(recipe: Recipe, t: EndpointTeacher, where: str) -> None:
    if isinstance(recipe.data.source, TeacherSamples) and t.api == "chat":
        raise RecipeError(
            "a chat endpoint writes nothing from nothing; give prompts with data.source.path (--data FILE), or set "
            f"{where}.api=completions"
        )
    if isinstance(recipe.method, KdMethod):
        _check_kd(recipe, recipe.method, t, where)


def _check_kd(recipe: Recipe, method: KdMethod, t: EndpointTeacher, where: str) -> None:
    text_only = "or set method.kind=sft, which learns from its answers alone"
    if not isinstance(recipe.targets, TopKTargets):
        raise MethodError(
            f"method kd with targets.kind={recipe.targets.kind} needs the teacher's whole distribution, and a server "
            f"tells its most probable tokens at best; set targets.kind=top_k where it does that, {text_only}"
        )
    if not t.tokenizer:
        raise MethodError(
            "method kd compares token by token, and an endpoint does not say what its tokens are; name a folder or hub "
            f"id with its tokenizer as {where}.tokenizer, {text_only}"
        )
    if method.temperature != 1.0:
        raise MethodError(
            f"method.temperature={method.temperature:g} cannot be had of a few log-probabilities, which a server gives "
            f"at temperature 1; set method.temperature=1, {text_only}"
        )
    if recipe.targets.precision != "auto":
        raise MethodError(
            f"targets.precision={recipe.targets.precision} is for a teacher in this process, and a server computes as "
            "it was started; set targets.precision=auto"
        )


def _check_several(recipe: Recipe, t: SeveralTeachers) -> None:
    folders = [name for name, one in t.members.items() if isinstance(one, FolderTeacher)]
    served = [name for name in t.members if name not in folders]
    if t.route and not isinstance(recipe.data.source, FileData):
        raise RecipeError(
            f"teacher.route={t.route} goes by a column of files, and data.source.kind={recipe.data.source.kind} has "
            "none; give files with data.source.path, or deal records out with teacher.weights"
        )
    if t.mixture and served:
        raise RecipeError(
            f"teacher.mixture needs each member's whole distribution, and a server ({', '.join(served)}) tells its "
            "most probable tokens at best; deal records out with teacher.weights, or mix folders only"
        )
    _check_student(recipe, t, folders)
    if isinstance(recipe.method, KdMethod):
        _check_kept(recipe, recipe.method, t)


def _check_student(recipe: Recipe, t: SeveralTeachers, folders: list[str]) -> None:
    s = recipe.student
    named = getattr(s, "member", None)
    if isinstance(s, CutStudent) and (not folders or (named and named not in folders)):
        raise RecipeError(
            f"a student cannot be cut from {named or 'an endpoint'}; its member must be a folder "
            f"({', '.join(folders) or 'here is none'}): name one with student.member, or give a student folder or shape"
        )
    if (
        isinstance(s, ShapeStudent)
        and not folders
        and not any(getattr(x, "tokenizer", None) for x in (s, *t.members.values()))
    ):
        raise RecipeError(
            "a student made from nothing takes its teachers' tokenizer, and endpoints hand over none; name a folder or "
            "hub id that holds one as tokenizer of a member, or as student.tokenizer"
        )


def _check_kept(recipe: Recipe, method: KdMethod, t: SeveralTeachers) -> None:
    kind, mixed = recipe.targets.kind, bool(t.mixture)
    if method.hidden:
        raise MethodError(
            f"method.hidden={method.hidden:g} matches one teacher's hidden states, and there are {len(t.members)}; set "
            "method.hidden=0"
        )
    if kind in ("sampled", "top_k") or (mixed and kind == "dense"):
        return
    why = "hidden states belong to one head" if mixed else "a batch's records have different teachers and heads"
    raise MethodError(
        f"targets.kind={kind} cannot be kept of several teachers by {'mixture' if mixed else 'record'}: {why}; set "
        f"targets.kind to sampled or top_k{' or dense' if mixed else ', or mix them with teacher.mixture'}"
    )


def check_targets(method: KdMethod, targets: TargetChoice, vocabulary: int, across: bool) -> None:
    """Refuse targets that do not suit a vocabulary of so many entries; and those that cannot be carried ``across``
    to a student whose tokenizer is not its teacher's (docs/across.md).

    Raises:
        RecipeError, MethodError: with the reason and the cure.
    """
    if across:
        _check_across(method, targets)
    if isinstance(targets, TopKTargets) and targets.k > vocabulary:
        raise RecipeError(f"targets.k={targets.k} is more than the teacher's vocabulary of {vocabulary:,}")


def _check_across(method: KdMethod, targets: TargetChoice) -> None:
    here = "the student's tokenizer is not its teacher's"
    if not isinstance(targets, SampledTargets):
        raise MethodError(
            f"targets.kind={targets.kind}, but {here}: what is carried over is a sum over sets of tokens, which is "
            "sampled; set targets.kind=sampled, or use a student with the teacher's tokenizer"
        )
    if method.divergence != "forward_kl":
        raise MethodError(
            f"method.divergence={method.divergence}, but {here}: only forward KL is linear in what the teacher tells; "
            "set method.divergence=forward_kl, or use a student with the teacher's tokenizer"
        )
    if method.temperature != 1.0:
        raise MethodError(
            f"method.temperature={method.temperature:g}, but {here}: tempered probabilities of pieces do not multiply "
            "to those of a token; set method.temperature=1, or use a student with the teacher's tokenizer"
        )
    if method.hidden:
        raise MethodError(
            f"method.hidden={method.hidden:g}, but {here}: their hidden states stand at other places of the text; set "
            "method.hidden=0, or use a student with the teacher's tokenizer"
        )
