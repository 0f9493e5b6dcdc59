"""Of a recipe, before anything runs: the shapes of its teacher and its student. No weights, no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from pennyweight.errors import ModelError
from pennyweight.plan.architectures import read_shapes, shapes_of
from pennyweight.plan.passes import Subjects
from pennyweight.plan.shapes import Shapes, Tensor
from pennyweight.recipe import CutStudent, EndpointTeacher, FolderTeacher, Recipe, SeveralTeachers, TrainedTeacher
from pennyweight.settings import Shape

Known = Mapping[str, Shapes]
"""Shapes of folders that are not there yet, by path: what earlier stages of a chain will make"""

Read = Callable[[str], tuple[Shapes, str | None]]
"""A folder -> its model's shapes, and what was assumed of them"""


@dataclass
class _Folders:
    """What is known of folders, read or foretold, and what is to be said of them."""

    read: Read
    known: Known
    notes: list[str]
    vocabulary: int | None = None


def only_known(path: str) -> tuple[Shapes, str | None]:
    """The shapes of an architecture that is known."""
    return read_shapes(path), None


def subjects_of(
    recipe: Recipe, known: Known | None = None, read: Read = only_known, vocabulary: int | None = None
) -> Subjects:
    """The shapes of a recipe's models. ``vocabulary`` is that of a teacher from nothing, where it was seen.

    Raises:
        ModelError: a folder's config.json cannot be read, or says too little; or nothing is known of a student's
            vocabulary.
    """
    folders = _Folders(read, known or {}, [], vocabulary)
    teacher = _teacher(recipe.teacher, folders)
    s = recipe.student
    if s.kind == "folder":
        return Subjects(teacher, _folder(s.path, folders), tuple(folders.notes))
    if s.kind == "shape":
        vocabulary = teacher.vocabulary if teacher else None
        if s.tokenizer is not None:
            vocabulary = _folder(s.tokenizer, folders).vocabulary
        if vocabulary is None:
            raise ModelError(
                "a student of a teacher behind a server needs a vocabulary; name a folder with student.tokenizer"
            )
        return Subjects(teacher, _made(s.shape, vocabulary, recipe.data.context), tuple(folders.notes))
    source = _member(recipe, s, folders) or teacher
    if source is None:
        raise ModelError("student.kind=cut cuts a teacher that is behind a server; give a student's folder")
    return Subjects(teacher, _cut(source, s), tuple(folders.notes))


def _teacher(t: object, folders: _Folders) -> Shapes | None:
    if isinstance(t, EndpointTeacher):
        return None
    if isinstance(t, TrainedTeacher):
        if folders.vocabulary is None:
            folders.notes.append(f"the teacher's vocabulary is taken to be {t.vocabulary:,}, the most that it may be")
        return _made(t.shape, folders.vocabulary or t.vocabulary, t.context)
    if isinstance(t, SeveralTeachers):
        each = [s for m in t.members.values() if (s := _teacher(m, folders)) is not None]
        if each:
            folders.notes.append("of several teachers each sample is taken to be the largest one's")
        return max(each, key=lambda s: s.parameters, default=None)
    assert isinstance(t, FolderTeacher)
    return _folder(t.path, folders)


def _member(recipe: Recipe, s: CutStudent, folders: _Folders) -> Shapes | None:
    """Of several teachers, the one that the student is cut from."""
    t = recipe.teacher
    if not isinstance(t, SeveralTeachers):
        return None
    given = {name: m for name, m in t.members.items() if isinstance(m, FolderTeacher)}
    chosen = given.get(s.member or "") or next(iter(given.values()), None)
    return _folder(chosen.path, folders) if chosen else None


def _folder(path: str, folders: _Folders) -> Shapes:
    place = str(Path(path))
    if place in folders.known:
        return folders.known[place]
    if not Path(path).expanduser().exists():
        raise ModelError(
            f"there is no {path}, and a plan takes config.json from a folder; download it first (huggingface-cli "
            "download), or give the folder's path"
        )
    shapes, assumed = folders.read(path)
    folders.notes.extend([f"{path}: {assumed}"] if assumed else [])
    return shapes


def _made(shape: Shape, vocabulary: int, context: int) -> Shapes:
    """A Llama made from nothing, as ``model.student.from_shape`` makes it."""
    return shapes_of(
        {
            "model_type": "llama",
            "vocab_size": vocabulary,
            "hidden_size": shape.hidden,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads or shape.heads,
            "intermediate_size": shape.intermediate,
            "max_position_embeddings": context,
            "tie_word_embeddings": shape.tie_embeddings,
        }
    )


def _cut(teacher: Shapes, s: CutStudent) -> Shapes:
    """Some of its blocks; where widths are narrowed, every matrix in proportion."""
    depth = len(teacher.blocks)
    if isinstance(s.layers, list):
        chosen = [i for i in s.layers if 0 <= i < depth]
    else:
        count = min(s.layers or depth, depth)
        chosen = [round(i * (depth - 1) / max(1, count - 1)) for i in range(count)]
    cut = replace(teacher, blocks=tuple(teacher.blocks[i] for i in chosen))
    return _narrow(cut, s.hidden or teacher.hidden, s.intermediate) if s.hidden or s.intermediate else cut


def _narrow(shapes: Shapes, hidden: int, intermediate: int | None) -> Shapes:
    def narrowed(size: int, inner: int) -> int:
        if size == shapes.hidden:
            return hidden
        return intermediate if intermediate and inner and size == inner else size

    def of(tensors: tuple[Tensor, ...], inner: int = 0) -> tuple[Tensor, ...]:
        return tuple(replace(t, shape=_narrowed(t.shape, shapes.hidden, hidden, inner, intermediate)) for t in tensors)

    blocks = []
    for b in shapes.blocks:
        inner = b.gated or b.plain
        blocks.append(
            replace(
                b,
                tensors=of(b.tensors, inner),
                inputs=tuple((narrowed(w, inner), *others) for w, *others in b.inputs),
                gated=narrowed(b.gated, inner) if b.gated else 0,
                plain=narrowed(b.plain, inner) if b.plain else 0,
            )
        )
    return replace(shapes, hidden=hidden, tensors=of(shapes.tensors), blocks=tuple(blocks))


def _narrowed(shape: tuple[int, ...], old: int, new: int, inner: int, to: int | None) -> tuple[int, ...]:
    """A tensor's shape. Heads keep their width, so that of a square matrix one side is narrowed: what it reads, or what
    it writes."""
    if shape == (old, old):
        return old, new
    return tuple(new if n == old else to if to and inner and n == inner else n for n in shape)
