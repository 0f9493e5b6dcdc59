"""Every setting of a run.

Variants are tagged unions (``kind``), so a setting exists only where it means something, and each default is the
recommendation. ``recipe_file`` reads them from TOML. This file imports no torch.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, Union
from urllib.parse import urlsplit

from pydantic import AfterValidator, Discriminator, Field, field_validator, model_validator

from pennyweight.records import sha256_json
from pennyweight.settings import (
    Budget,
    Compute,
    Evaluate,
    KdMethod,
    MethodChoice,
    Quantize,
    Schedule,
    Seed,
    Settings,
    Shape,
    TaskSource,
    Tripwires,
    plain,
    taught,
)

DEFAULT_KINDS = {"source": "teacher_samples", "targets": "sampled", "method": "kd"}
"""The kind of a tagged table that was given without one."""


def _with_default_kind(table: Any, **kinds: str) -> Any:
    """A table in which tagged settings that were given without a ``kind`` get the default one."""
    if not isinstance(table, dict):
        return table
    return {k: {"kind": kinds[k], **v} if k in kinds and isinstance(v, dict) else v for k, v in table.items()}


class TeacherSamples(Settings):
    """The teacher's own samples: texts written from nothing (base models) by ancestral sampling."""

    kind: Literal["teacher_samples"] = "teacher_samples"
    count: int = Field(default=2000, ge=2)
    max_tokens: int = Field(default=256, ge=1)
    temperature: float = Field(default=1.0, gt=0)


class FileData(Settings):
    """JSONL, JSON, CSV, Parquet or plain-text files, a saved Hugging Face dataset folder, or a hub dataset name.

    Rows hold ``messages``, or a prompt and a response, or ``text``; columns are recognised by their usual names
    unless named here. Rows without a response are answered by the teacher.
    """

    kind: Literal["files"] = "files"
    path: str
    split: str = Field(default="train", description="split of a hub or saved dataset")
    prompt: str | None = Field(default=None, description="name of the prompt column")
    response: str | None = Field(default=None, description="name of the response column")
    text: str | None = Field(default=None, description="name of the text column")
    answer: str | None = Field(default=None, description="name of the gold-answer column, for a verifier")
    verifier: str | None = Field(
        default=None, description="who judges responses: a row of VERIFIERS, or FILE.py:FUNCTION"
    )
    licence: str = "undeclared"
    limit: int | None = Field(default=None, ge=1, description="read at most this many rows")


class TaskData(Settings):
    """Procedural, verifiable problems from reasoning-gym."""

    kind: Literal["tasks"] = "tasks"
    tasks: list[TaskSource] = Field(min_length=1)
    seed: Seed = 0


Source = Annotated[Union[TeacherSamples, FileData, TaskData], Discriminator("kind")]  # noqa: UP007


class Responses(Settings):
    """Who writes the responses, and which of them are kept."""

    by: Literal["auto", "given", "teacher"] = Field(
        default="auto",
        description="auto: the teacher where the row has none; given: rows must have one; teacher: always",
    )
    temperature: float = Field(default=1.0, ge=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=256, ge=1)
    keep: Literal["all", "verified"] = Field(
        default="all", description="verified: only whole ones, which their verifier accepts"
    )
    samples: int = Field(default=1, ge=1, description="responses that the teacher writes to each prompt, for training")
    most: int | None = Field(default=None, ge=1, description="of those kept of a prompt, the so many that differ most")
    language: float = Field(default=0.0, ge=0, le=1, description="least share of letters in the prompt's script")


class Data(Settings):
    """Where prompts and texts come from, and how they are split."""

    source: Source = Field(default_factory=TeacherSamples)
    responses: Responses = Field(default_factory=Responses)
    context: int = Field(default=512, ge=8, description="longest sample in tokens, prompt and response together")
    too_long: Literal["refuse", "drop", "truncate"] = "refuse"
    eval_fraction: float = Field(default=0.1, gt=0, lt=1, description="share of prompts held out, by content hash")
    eval_limit: int = Field(default=500, ge=1, description="held-out samples used at most")
    train_limit: int | None = Field(default=None, ge=1, description="prompts to train on at most, by content hash")

    @model_validator(mode="before")
    @classmethod
    def _kinds(cls, table: Any) -> Any:
        return _with_default_kind(table, source=DEFAULT_KINDS["source"])


class FolderTeacher(Settings):
    """A causal language model in a Hugging Face folder, or a hub id."""

    kind: Literal["folder"] = "folder"
    path: str
    trust_remote_code: bool = False
    licence: str = "undeclared"


class TrainedTeacher(Settings):
    """A teacher trained by the recipe itself, from nothing, on worked solutions of procedural tasks."""

    kind: Literal["trained"] = "trained"
    tasks: list[TaskSource] = Field(min_length=1)
    shape: Shape
    schedule: Annotated[Schedule, AfterValidator(plain)] = Field(default_factory=Schedule)
    vocabulary: int = Field(default=256, ge=16, description="largest size of the byte-level BPE made from the tasks")
    context: int = Field(default=256, ge=8)
    seed: Seed = 0
    licence: str = "Apache-2.0"


class EndpointTeacher(Settings):
    """A model behind an OpenAI-compatible server: it writes, and it labels where the server tells log-probabilities."""

    kind: Literal["endpoint"] = "endpoint"
    url: str = Field(description="what paths like /chat/completions are put behind; mostly ends in /v1")
    model: str | None = Field(default=None, min_length=1, description="the server's name of it; default: the only one")
    api: Literal["auto", "chat", "completions"] = Field(default="auto", description="auto: chat, where there is one")
    key_env: str | None = Field(default=None, description="name of the environment variable that holds the key")
    concurrency: int = Field(default=8, ge=1, le=1024, description="requests at a time")
    timeout: float = Field(default=300.0, gt=0, description="seconds to wait for a whole answer")
    retries: int = Field(default=8, ge=0, description="tries of a request after its first")
    tokenizer: str | None = Field(default=None, description="folder or hub id that holds the model's tokenizer")
    usd_sent: float | None = Field(default=None, ge=0, description="US dollars for a million tokens of prompts")
    usd_got: float | None = Field(default=None, ge=0, description="US dollars for a million tokens of answers")
    licence: str = "undeclared"

    @field_validator("url")
    @classmethod
    def _an_address(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:  # a port that is none
            whole, parts = False, urlsplit("")
        if not whole:
            raise ValueError("must be an address like http://127.0.0.1:8000/v1")
        if parts.username is not None or parts.password is not None or parts.query or parts.fragment:
            raise ValueError("must hold no user name, password, query or key; name a variable with teacher.key_env")
        return url.rstrip("/")

    @field_validator("key_env")
    @classmethod
    def _a_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Z_][A-Z0-9_]*", name):
            raise ValueError("must be the name of an environment variable in capitals, never a key itself")
        return name


Member = Annotated[FolderTeacher | EndpointTeacher, Discriminator("kind")]
MemberName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=50)]
Share = Annotated[float, Field(ge=0)]


class SeveralTeachers(Settings):
    """More than one teacher, of one tokenizer: each record has one of them, or all are mixed at each position.

    One of ``route``, ``weights`` and ``mixture`` says which.
    """

    kind: Literal["several"] = "several"
    members: dict[MemberName, Member] = Field(min_length=1)
    route: str | None = Field(default=None, description="column of data.source whose value names the row's member")
    default: str | None = Field(default=None, description="route: the member of rows that name none")
    weights: dict[str, Share] | None = Field(default=None, description="shares of the records, by content hash")
    mixture: dict[str, Share] | None = Field(
        default=None, description="shares of each member's distribution in the target, and of the records it writes"
    )

    @model_validator(mode="after")
    def _says_which(self) -> SeveralTeachers:
        names = ", ".join(self.members)
        if sum(x is not None for x in (self.route, self.weights, self.mixture)) != 1:
            raise ValueError("set one of route, weights and mixture, which say whose a record is")
        for what in ("weights", "mixture"):
            given = getattr(self, what)
            if given is not None and set(given) != set(self.members):
                raise ValueError(f"{what} must name each member once ({names}), not {', '.join(given) or 'none'}")
            if given is not None and not sum(given.values()):
                raise ValueError(f"{what} are all 0; give at least one member a share")
        if self.default is not None and (self.route is None or self.default not in self.members):
            raise ValueError(f"default={self.default} must be a member ({names}), and goes with route only")
        return self

    @property
    def shares(self) -> dict[str, float] | None:
        """In which records are dealt out among members; None where a column says whose they are."""
        return self.weights or self.mixture

    @property
    def licence(self) -> str:
        return "; ".join(f"{name}: {m.licence}" for name, m in self.members.items())

    @property
    def trust_remote_code(self) -> bool:
        return any(getattr(m, "trust_remote_code", False) for m in self.members.values())


_Teachers = FolderTeacher | TrainedTeacher | EndpointTeacher | SeveralTeachers
TeacherChoice = Annotated[_Teachers, Discriminator("kind")]


class FolderStudent(Settings):
    """A given student. Where its tokenizer is not the teacher's, the teacher's distribution is carried over."""

    kind: Literal["folder"] = "folder"
    path: str
    trust_remote_code: bool = False


class ShapeStudent(Settings):
    """A student made from nothing, with the teacher's tokenizer or another."""

    kind: Literal["shape"] = "shape"
    shape: Shape
    tokenizer: str | None = Field(default=None, description="folder or hub id that holds it; default: the teacher's")


class CutStudent(Settings):
    """A student cut from the teacher: layers chosen, widths narrowed, everything else copied."""

    kind: Literal["cut"] = "cut"
    member: str | None = Field(default=None, description="of several teachers, which; default: the first folder")
    layers: int | list[int] | None = Field(default=None, description="how many (spread evenly), or which, from 0")
    hidden: int | None = Field(default=None, ge=8)
    intermediate: int | None = Field(default=None, ge=8)


StudentChoice = Annotated[Union[FolderStudent, ShapeStudent, CutStudent], Discriminator("kind")]  # noqa: UP007


Precision = Annotated[
    Literal["auto", "float32", "bfloat16", "int8", "fp8"],
    Field(description="of the teacher's forward pass that labels; auto: as the run computes"),
]


class DenseTargets(Settings):
    """The teacher runs beside the student; its whole distribution is used and nothing is stored."""

    kind: Literal["dense"] = "dense"


class SampledTargets(Settings):
    """An unbiased sparse sample of the teacher's distribution, labelled once and kept on disk."""

    kind: Literal["sampled"] = "sampled"
    threshold: float = Field(default=0.025, gt=0, lt=1, description="probabilities from here up kept, others sampled")
    budget: float = Field(
        default=48.0, ge=4, description="bytes a token, on average, at most: a diffuse teacher's threshold rises to it"
    )
    shard: int = Field(default=256, ge=1, description="samples per shard")
    precision: Precision = "auto"


class TopKTargets(Settings):
    """The k most probable tokens, and all the others together as one outcome; labelled once and kept on disk."""

    kind: Literal["top_k"] = "top_k"
    k: int = Field(default=32, ge=1, le=65_535)
    shard: int = Field(default=256, ge=1, description="samples per shard")
    precision: Precision = "auto"


class HiddenTargets(Settings):
    """The teacher's last hidden states, labelled once and kept on disk: its whole distribution, made by its head."""

    kind: Literal["hidden"] = "hidden"
    shard: int = Field(default=256, ge=1, description="samples per shard")
    precision: Precision = "auto"


_Targets = DenseTargets | SampledTargets | TopKTargets | HiddenTargets
TargetChoice = Annotated[_Targets, Discriminator("kind")]


class Recipe(Settings):
    """One run, from teacher to report."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)
    seed: Seed = Field(default=0, description="every random draw comes from this and the arm seeds")
    seeds: list[Seed] = Field(default_factory=lambda: [0], min_length=1, description="one student of each arm per seed")
    compute: Compute = Field(default_factory=Compute)
    teacher: TeacherChoice
    data: Data = Field(default_factory=Data)
    targets: TargetChoice = Field(default_factory=SampledTargets)
    student: StudentChoice
    method: MethodChoice = Field(default_factory=KdMethod)
    control: bool = Field(default=True, description="train the sft control arm beside the method")
    train: Schedule = Field(default_factory=Schedule)
    tripwires: Tripwires = Field(default_factory=Tripwires)
    budget: Budget = Field(default_factory=Budget)
    quantize: Quantize = Field(default_factory=Quantize)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    log: list[Literal["tensorboard", "wandb", "trackio"]] = Field(default_factory=list)

    @model_validator(mode="before")
    @classmethod
    def _kinds(cls, table: Any) -> Any:
        return _with_default_kind(table, targets=DEFAULT_KINDS["targets"], method=DEFAULT_KINDS["method"])

    @model_validator(mode="after")
    def _agrees(self) -> Recipe:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds {self.seeds} name one seed twice")
        taught(self.train, self.student.kind)
        return self

    def hash_of(self, *sections: str) -> str:
        """SHA-256 of the named parts, as a stage depends on them; how often it saves, with what patience a server is
        asked and what that costs changes no result."""
        ways = ("key_env", "concurrency", "timeout", "retries", "usd_sent", "usd_got")
        patience: dict[str, Any] = dict.fromkeys(ways, True)
        patience["members"] = {"__all__": patience.copy()}
        whole = self.model_dump(mode="json", exclude={"train": {"checkpoint_every"}, "teacher": patience})
        return sha256_json({s: whole[s] for s in sections})
