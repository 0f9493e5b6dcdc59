"""Settings that name neither a teacher nor data: where to compute, how big, how to train, round and measure.

``recipe.py`` puts them together with the rest. This file imports no torch.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, model_validator


class Settings(BaseModel):
    """Base of every table of a recipe: unknown keys refused, values frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)


Seed = Annotated[int, Field(ge=0, lt=2**31)]


class Compute(Settings):
    """Where and in which precision to compute."""

    device: str = Field(default="auto", description="auto (cuda, then mps, then cpu), or a torch device such as cuda:1")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="arithmetic of training and teacher: auto is bfloat16 where the processor has it"
    )
    threads: int = Field(default=0, ge=0, description="CPU threads; 0 is one per core")


class Shape(Settings):
    """Size of a Llama-architecture model made from nothing."""

    hidden: int = Field(ge=8)
    layers: int = Field(ge=1)
    heads: int = Field(ge=1)
    kv_heads: int | None = Field(default=None, ge=1, description="default: as many as heads")
    intermediate: int = Field(ge=8)
    tie_embeddings: bool = True

    @model_validator(mode="after")
    def _divides(self) -> Shape:
        if self.hidden % self.heads or (self.hidden // self.heads) % 2:
            raise ValueError(f"hidden={self.hidden} must be heads={self.heads} times an even head width")
        if self.heads % (self.kv_heads or self.heads):
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}")
        return self


class Lora(Settings):
    """Low-rank factors in place of all weights: A and B of each Linear of the blocks are trained, then merged."""

    rank: int = Field(default=16, ge=1)
    alpha: float | None = Field(default=None, gt=0, description="the factors' product counts alpha / rank; default: 2")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="of what the factors read")
    base: Literal["full", "int8", "int4", "nvfp4"] = Field(
        default="full", description="what the frozen Linears are kept in; below full it is QLoRA"
    )


class Schedule(Settings):
    """Optimizer and learning-rate schedule. One step is one batch of ``batch`` samples."""

    steps: int = Field(default=300, ge=1)
    batch: int = Field(default=32, ge=1, le=1_000_000, description="samples per step, over all micro-batches")
    micro_batch: int | None = Field(default=None, ge=1, description="rows per forward pass; default: the whole batch")
    pack: bool = Field(default=False, description="several samples in one row of `context` tokens, blind to each other")
    lr: float = Field(default=1e-3, gt=0)
    shape: Literal["cosine", "wsd"] = "cosine"
    warmup: float = Field(default=0.03, ge=0, lt=1, description="share of the steps")
    decay: float = Field(default=0.2, gt=0, le=1, description="wsd: share of the steps that decay, at the end")
    floor: float = Field(default=0.02, ge=0, le=1, description="last learning rate as a share of the highest")
    weight_decay: float = Field(default=0.05, ge=0)
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    clip: float = Field(default=1.0, gt=0, description="largest gradient norm")
    precision: Literal["full", "fp8", "fp8_v3", "fp8_tensor", "mxfp8", "nvfp4"] = Field(
        default="full", description="of Linears' products and kept inputs; full: compute.dtype"
    )
    moments: Literal["float32", "bfloat16", "fp8"] = Field(default="float32", description="the optimizer's, as stored")
    weights: Literal["float32", "bfloat16"] = Field(default="float32", description="bfloat16: rounded stochastically")
    lora: Lora | None = Field(default=None, description="train low-rank factors only; default: all weights")
    gradient_checkpointing: bool = Field(
        default=False, description="keep each block's input only, and compute the block again in the backward pass"
    )
    compile: bool = Field(default=False, description="torch.compile the blocks; takes a minute, and a C++ compiler")
    checkpoint_every: int = Field(default=100, ge=1, description="steps")

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        if self.lora and self.precision != "full":
            raise ValueError(
                f"lora trains in compute.dtype only; set precision=full, or leave lora out (precision={self.precision})"
            )
        return self


def plain(schedule: Schedule) -> Schedule:
    """A schedule of a teacher made from nothing, whose weights are all trained as they are; else ValueError."""
    if schedule.lora or schedule.gradient_checkpointing or schedule.compile:
        raise ValueError(
            "a teacher made from nothing is trained without lora, gradient_checkpointing and compile; leave them "
            "out of teacher.schedule"
        )
    return schedule


def taught(schedule: Schedule, student: str) -> None:
    """Raise ValueError for LoRA on a student whose weights nobody has trained."""
    if schedule.lora and student == "shape":
        raise ValueError(
            "train.lora leaves the student's weights as they are, and student.kind=shape makes them at random; leave "
            "train.lora out, or give a student that has been trained (student.kind=folder or cut)"
        )


Kind = Literal["forward_kl", "reverse_kl", "jsd", "skew_kl", "skew_reverse_kl", "tvd"]


class SftMethod(Settings):
    """Cross-entropy on the response tokens."""

    kind: Literal["sft"] = "sft"


class KdMethod(Settings):
    """Divergence to the teacher's distribution at every response token, with cross-entropy beside it if asked."""

    kind: Literal["kd"] = "kd"
    divergence: Kind = "forward_kl"
    beta: float = Field(default=0.5, gt=0, lt=1, description="jsd: weight of the teacher in the mixture")
    alpha: float = Field(default=0.1, gt=0, lt=1, description="skew: share of the first side mixed into the second")
    temperature: float = Field(default=1.0, gt=0, description="softens both sides; the loss is scaled by its square")
    cross_entropy: float = Field(default=0.0, ge=0, le=1, description="share of cross-entropy; the rest is divergence")
    hidden: float = Field(default=0.0, ge=0, description="weight of matching the teacher's last hidden states, besides")


class Reward(Settings):
    """What a response earns: the sum of its parts, each of which lies between 0 and 1, by these weights."""

    accuracy: float = Field(default=1.0, ge=0, description="its verifier accepts it")
    format: float = Field(
        default=0.0, ge=0, description="<think>…</think>, then an answer, each once and in this order"
    )
    language: float = Field(default=0.0, ge=0, description="share of its letters in the prompt's script")
    brevity: float = Field(default=0.0, ge=0, description="1 up to four fifths of max_tokens, from there down to 0")
    verifier: str | None = Field(
        default=None,
        description="row of VERIFIERS, or FILE.py:FUNCTION, that judges rollouts in training in place of the task's "
        "own; for cheap or partial checks",
    )

    @property
    def most(self) -> float:
        """What a response can earn at most."""
        return self.accuracy + self.format + self.language + self.brevity


class GrpoMethod(Settings):
    """Reinforcement with rewards that a rule can check: a response is worth what it earned above its group's mean.

    ``train.batch`` counts responses, so a step has ``batch / group`` prompts. The prompts are those of the training
    samples that have a task; their responses are left alone.
    """

    kind: Literal["grpo"] = "grpo"
    group: int = Field(default=8, ge=2, description="responses to each prompt")
    max_tokens: int = Field(default=256, ge=1, description="of a response")
    reward: Reward = Field(default_factory=Reward)
    updates: int = Field(default=1, ge=1, description="steps that share what is written at once")
    scaled: bool = Field(default=True, description="advantages in standard deviations of their group; Dr. GRPO: not")
    over: Literal["token", "response", "constant"] = Field(
        default="token", description="each term over all tokens (DAPO), its response's (GRPO) or a constant (Dr. GRPO)"
    )
    clip_low: float = Field(default=0.2, gt=0, lt=1, description="how far the ratio may fall below 1")
    clip_high: float = Field(default=0.28, gt=0, description="how far it may rise above 1 (DAPO's clip-higher)")
    level: Literal["token", "sequence"] = Field(
        default="token", description="whose ratio: each token's, or its response's (GSPO)"
    )
    kl: float = Field(default=0.0, ge=0, description="weight of the KL to the start")
    dynamic: float = Field(
        default=2.0,
        ge=1,
        description="most prompts asked, in times of a step's own: others are asked where a group is all alike",
    )
    cut_off: Literal["learnt", "left_out"] = Field(
        default="learnt", description="responses that filled max_tokens: as others, or without a gradient of their own"
    )


class OnPolicyMethod(Settings):
    """The student writes, and at its own tokens it matches the teacher, who is asked as training goes on.

    ``train.batch`` counts responses, and samples of the data among them where ``given`` asks for some.
    """

    kind: Literal["on_policy"] = "on_policy"
    group: int = Field(default=1, ge=1, description="responses to each prompt")
    max_tokens: int = Field(default=256, ge=1, description="of a response")
    signal: Literal["whole", "token"] = Field(
        default="whole", description="the teacher's distribution, or its log-probability of the token that was written"
    )
    divergence: Kind = Field(default="reverse_kl", description="whole: to the teacher's distribution")
    beta: float = Field(default=0.5, gt=0, lt=1, description="jsd: weight of the teacher in the mixture")
    alpha: float = Field(default=0.1, gt=0, lt=1, description="skew: share of the first side mixed into the second")
    temperature: float = Field(default=1.0, gt=0, description="softens both sides; the loss is scaled by its square")
    first: float = Field(default=1.0, gt=0, le=1, description="share of a response that is learnt, from its beginning")
    given: float = Field(default=0.0, ge=0, lt=1, description="share of a step that are samples of the data")
    rewarded: float = Field(default=0.0, ge=0, description="weight of what a verifier says beside the teacher")
    reward: Reward = Field(default_factory=Reward)
    updates: int = Field(default=1, ge=1, description="steps that share what is written at once")
    clip_low: float = Field(default=0.2, gt=0, lt=1, description="token: how far the ratio may fall below 1")
    clip_high: float = Field(default=0.28, gt=0, description="token: how far it may rise above 1")

    @model_validator(mode="after")
    def _fits(self) -> OnPolicyMethod:
        if self.rewarded and self.group < 2:
            raise ValueError(f"rewarded={self.rewarded:g} compares responses to one prompt; set group=2 or more")
        if self.given and self.signal == "token":
            raise ValueError("given samples were not written by the student; set signal=whole, or given=0")
        return self


class OfflineMethod(Settings):
    """On-policy distillation with no teacher beside it: the start writes once, the teacher's targets are kept once."""

    kind: Literal["offline"] = "offline"
    rollouts: int = Field(default=2000, ge=1, description="responses that the start writes")
    group: int = Field(default=1, ge=1, description="responses to each prompt")
    max_tokens: int = Field(default=256, ge=1, description="of a response")
    divergence: Kind = "reverse_kl"
    beta: float = Field(default=0.5, gt=0, lt=1, description="jsd: weight of the teacher in the mixture")
    alpha: float = Field(default=0.1, gt=0, lt=1, description="skew: share of the first side mixed into the second")
    temperature: float = Field(default=1.0, gt=0, description="softens both sides; the loss is scaled by its square")
    first: float = Field(default=1.0, gt=0, le=1, description="share of a response that is learnt, from its beginning")
    reward: Reward = Field(default_factory=Reward)

    @property
    def hidden(self) -> float:
        """The weight of matching hidden states: none."""
        return 0.0


TEXT_ONLY = frozenset({"sft", "grpo", "on_policy", "offline"})  # methods with no targets at the training samples
_Methods = SftMethod | KdMethod | GrpoMethod | OnPolicyMethod | OfflineMethod
MethodChoice = Annotated[_Methods, Discriminator("kind")]


class RolloutTripwires(Settings):
    """What stops a run that learns from rollouts: each must hold for ``patience`` rounds in a row.

    The start is the mean of the first three rounds. Where a limit was passed at the start already, it is not watched.
    Rounds in which at least ``solved`` of all that can be earned was earned are never held against a run.
    """

    entropy_low: float = Field(default=0.02, ge=0, lt=1, description="entropy below this share of the start's")
    entropy_high: float = Field(default=5.0, gt=1, description="entropy above this many times the start's")
    length_low: float = Field(default=0.1, ge=0, lt=1, description="mean length below this share of the start's")
    length_high: float = Field(default=20.0, gt=1, description="mean length above this many times the start's")
    repeated: float = Field(default=0.8, gt=0, le=1, description="share of runs of 4 tokens that were there before")
    cut_off: float = Field(default=0.95, gt=0, le=1, description="share of responses that filled max_tokens")
    stuck: float = Field(
        default=0.98, gt=0, le=1, description="grpo: share of groups all alike, and not because all are right; 1: never"
    )
    reward_low: float = Field(
        default=0.5, ge=0, lt=1, description="running mean of the reward below this share of its best"
    )
    solved: float = Field(default=0.9, gt=0, le=1, description="share of what can be earned that speaks for itself")
    patience: int = Field(default=5, ge=1, description="rounds")
    hacking: float = Field(
        default=0.1,
        gt=0,
        description="reward up by more than this share of all that can be earned, and held-out accuracy is not",
    )
    held_out_every: int | None = Field(
        default=None, ge=0, description="rounds between held-out checks; default: a tenth of all; 0: never"
    )
    held_out_problems: int = Field(default=64, ge=1, description="of a held-out check, at most")


class Tripwires(Settings):
    """What stops a run: each must hold for ``patience`` measurements in a row; entropy counts after the warm-up."""

    loss_spike: float = Field(default=3.0, gt=1, description="loss above this many times its running mean")
    entropy_low: float = Field(default=0.02, ge=0, description="entropy below this share of the cross-entropy")
    entropy_high: float = Field(default=50.0, gt=1, description="entropy above this many times the cross-entropy")
    kl_old: float = Field(
        default=0.5, gt=0, description="nats a token that a policy may be from the weights that wrote its rollouts"
    )
    kl_reference: float = Field(
        default=5.0, gt=0, description="nats a token that a policy may be from its start, where a KL term measures it"
    )
    patience: int = Field(default=5, ge=1)
    rollouts: RolloutTripwires = Field(default_factory=RolloutTripwires)


class Budget(Settings):
    """What a run may take, all tries together; it is refused, or stopped with a checkpoint, before it takes more."""

    hours: float | None = Field(default=None, gt=0, description="by the clock")
    kwh: float | None = Field(default=None, gt=0, description="by counters where there are any, else estimated")
    usd: float | None = Field(default=None, gt=0, description="rented devices, and what a server asks for")
    usd_per_hour: float | None = Field(default=None, ge=0, description="of a device; default: the catalogue's price")

    @property
    def limits(self) -> dict[str, float]:
        """What has a limit."""
        return {name: limit for name in ("hours", "kwh", "usd") if (limit := getattr(self, name)) is not None}


LowBit = Literal["int8", "int4", "int3", "ternary", "fp8_block", "fp8_row", "mxfp8", "mxfp4", "nvfp4"]


class Quantize(Settings):
    """Low-bit copies of the student."""

    formats: list[LowBit] = Field(default_factory=lambda: ["int8", "int4"])
    group: int = Field(default=32, ge=8, description="weights that share a scale, where a format leaves that open")
    method: Literal["absmax", "nearest", "awq", "gptq"] = Field(
        default="gptq", description="gptq makes up for each rounding by the next"
    )
    recover: float = Field(default=0.1, ge=0, le=1, description="share of train.steps that copies below 8 bits learn")
    lr: float | None = Field(default=None, gt=0, description="of the recovery; default: by the step of the codes")


class TaskSource(Settings):
    """Problems of a reasoning-gym task, with a worked solution where Pennyweight has a generator for it."""

    name: str
    size: int = Field(default=1000, ge=1, description="how many problems to draw before removing repeats")
    config: dict[str, Any] = Field(default_factory=dict, description="reasoning-gym's own settings of the task")
    worked: float = Field(default=1, ge=0, le=1, description="share of solutions that are worked; others: bare answers")
    think: bool = Field(default=False, description="put the work into <think></think>")


class Evaluate(Settings):
    """What is measured on held-out samples."""

    problems: int = Field(default=300, ge=1, description="held-out problems with a verifier, at most")
    samples: int = Field(default=4, ge=0, description="samples per problem for pass@k; 0 leaves pass@k out")
    temperature: float = Field(default=1.0, gt=0, description="of the pass@k samples")
    max_tokens: int = Field(default=256, ge=1)
    text: str | None = Field(default=None, description="a text file for bits per byte; default: the held-out samples")
    harder: list[TaskSource] = Field(
        default_factory=list, description="harder or longer problems that nothing is trained on, measured besides"
    )
    shown: int = Field(default=4, ge=0, description="sample outputs shown side by side in the report")
