"""One run, one folder. A stage that is finished is skipped; one whose inputs changed runs again; both are recorded."""

from __future__ import annotations

import fcntl
import json
import shutil
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from pennyweight.atomic import write_whole
from pennyweight.errors import RunError
from pennyweight.ledger.hashing import artifact
from pennyweight.ledger.store import Ledger
from pennyweight.meter.meter import METER, metered
from pennyweight.meter.peak import peak_memory, start_peak
from pennyweight.progress import say
from pennyweight.recipe import Recipe
from pennyweight.records import CHAIN, sha256_json
from pennyweight.train.group import ALONE, Group
from pennyweight.version import __version__

_FORMAT = 2  # goes into every stage key: raise it when a stage's output changes meaning


@dataclass(frozen=True)
class Done:
    """A finished stage: what it found out (JSON), and the hashes of what it wrote."""

    name: str
    facts: dict[str, Any]
    outputs: dict[str, str]


@dataclass
class Made:
    """What a stage hands back: facts, tokens worked through, paths written (relative to the run), seconds if known."""

    facts: dict[str, Any] = field(default_factory=dict)
    tokens: int = 0
    paths: list[str] = field(default_factory=list)
    seconds: float | None = None


class Run:
    """A RUN folder held open by this process alone.

    Args:
        folder: made if it is not there.
        recipe: what the folder is, or becomes, a run of.
        device_peak: asked with True to start its count anew and with False for the most bytes in use on the device
            since; None where that is main memory.
        group: processes that go through the same line, and are told what becomes of each stage.
        gpu: UUID of the GPU that it works on, empty where that does not say; None on processors.

    Raises:
        RunError: the folder cannot be written, is in use, or belongs to another recipe.
    """

    def __init__(
        self,
        folder: Path,
        recipe: Recipe,
        device_peak: Callable[[bool], int | None] = lambda anew: None,
        group: Group = ALONE,
        gpu: str | None = None,
    ):
        self.folder, self.recipe, self._device_peak, self._group = folder, recipe, device_peak, group
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._refuse_foreign()
            self._lock = open(folder / ".lock", "w")  # noqa: SIM115 - held until close
        except FileExistsError:
            raise RunError(f"{folder} is a file; choose another --out") from None
        except OSError as e:
            raise RunError(f"cannot write the RUN folder {folder}: {e.strerror}; choose another with --out") from None
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(
                f"{folder} is in use by another pennyweight process; wait for it, or choose another --out"
            ) from None
        self._claim()
        self.ledger = Ledger.open(folder / "ledger.sqlite")
        self.meter = metered(folder / METER, gpu, group.size)
        self.ask: Callable[[str], None] = lambda stage: None  # raises where a stage may not be begun
        self._walked: list[str] = []
        group.tell({"open": str(folder)})

    def close(self) -> None:
        self.meter.close()
        self.ledger.close()
        self._lock.close()

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _refuse_foreign(self) -> None:
        """Leave a folder alone that holds something and is not ours."""
        if (self.folder / "recipe.json").exists():
            return
        if any(p.name != ".lock" and not p.name.startswith(".making-") for p in self.folder.iterdir()):
            raise RunError(f"{self.folder} is not empty and is not a RUN folder; choose another --out")

    def _claim(self) -> None:
        """Write recipe.json, unless the folder belongs to a recipe of another name."""
        file = self.folder / "recipe.json"
        if file.exists():
            try:
                owner = json.loads(file.read_text())["name"]
            except (OSError, ValueError, KeyError, TypeError):
                raise RunError(f"{file} is damaged; choose another --out, or remove that folder") from None
            if owner != self.recipe.name and self._has_results():
                raise RunError(
                    f"{self.folder} holds a run of the recipe {owner!r}, not {self.recipe.name!r}; "
                    "choose another --out, or remove that folder"
                )
        write_json(file, self.recipe.model_dump(mode="json"))

    def _has_results(self) -> bool:
        """Whether any stage has finished; a folder in which nothing has may be taken by another recipe."""
        file = self.folder / "ledger.sqlite"
        if not file.exists():
            return False
        with Ledger.open(file, create=False) as ledger:
            return bool(ledger.finished_stages())

    def stage(self, name: str, depends: dict[str, Any], make: Callable[[Path], Made], shared: bool = False) -> Done:
        """Run ``make`` unless it has been run on the same ``depends`` and what it wrote is still there, unharmed.

        ``make`` gets a folder for unfinished work, the same one whenever the stage is started on the same ``depends``,
        and removed once the stage is finished. ``shared``: the other processes run it, too.
        """
        done = self._stage(name, depends, make, shared)
        self._group.tell({"stage": name, "facts": done.facts, "outputs": done.outputs})
        return done

    def _stage(self, name: str, depends: dict[str, Any], make: Callable[[Path], Made], shared: bool) -> Done:
        self._walked.append(name)
        key = sha256_json({"stage": name, "format": _FORMAT, **depends})
        done = self.ledger.stage_finished(name)
        if done and done["key"] == key and self._intact(done["artifacts"]):
            say(f"{name}: finished before, skipped")
            return Done(name, done["facts"], {a["path"]: a["sha256"] for a in done["artifacts"]})
        self.ask(name)
        say(f"{name}: ...")
        self.meter.begin(name, key[:16])
        try:
            return self._made(name, key, make, shared)
        finally:
            self.meter.end()

    def _made(self, name: str, key: str, make: Callable[[Path], Made], shared: bool) -> Done:
        self.ledger.append("stage", {"name": name, "key": key, "status": "started"})
        start_peak()
        self._device_peak(True)
        began = time.monotonic()
        work = f"{name}-{key[:16]}"
        if shared:
            self._group.tell({"stage": name, "work": work})
        made = make(self.folder / "work" / work)
        artifacts = [artifact(self.folder, path).to_json() for path in made.paths]
        seconds = made.seconds if made.seconds is not None else time.monotonic() - began
        body = {
            "name": name,
            "key": key,
            "status": "finished",
            "seconds": round(seconds, 3),
            "tokens": made.tokens,
            "peak_memory_bytes": peak_memory(),
            "peak_device_memory_bytes": self._device_peak(False),
            "metered": self.meter.of(name, key[:16]).to_json(),
            "facts": made.facts,
            "artifacts": artifacts,
        }
        self.ledger.append("stage", body)
        for unfinished in (self.folder / "work").glob(f"{name}-{'[0-9a-f]' * 16}"):
            shutil.rmtree(unfinished)
        say(f"{name}: done in {seconds:,.1f} s" + (f", {made.tokens:,} tokens" if made.tokens else ""))
        return Done(name, made.facts, {a["path"]: a["sha256"] for a in artifacts})

    def stages(self) -> dict[str, dict[str, Any]]:
        """Seconds, tokens, peak memory and what was metered of every stage of this run, in the order of its line."""
        out = {}
        for name in self._walked:
            body = self.ledger.stage_finished(name) or {}
            told = ("seconds", "tokens", "peak_memory_bytes", "peak_device_memory_bytes", "metered")
            out[name] = {k: body.get(k) for k in told}
            now = self.meter.of(name, body.get("key", "")[:16])  # with what came after the entry was written
            out[name]["metered"] = now.to_json() if now.stretches else body.get("metered")
        return out

    def account(self) -> dict[str, Any]:
        """When, by which version and by which stages the run was finished, and what its ledger comes to."""
        seq, head = self.ledger.head
        at = datetime.now(UTC).isoformat(timespec="seconds")
        ledger = {**self.ledger.counts(), "seq": seq, "head": head}
        return {"version": __version__, "finished": at, "stages": self.stages(), "ledger": ledger}

    def _intact(self, artifacts: list[dict[str, Any]]) -> bool:
        try:
            return all(artifact(self.folder, a["path"]).sha256 == a["sha256"] for a in artifacts)
        except (OSError, RunError):
            return False


class Follower:
    """The same RUN folder in another process of the run: it works on what is shared, and waits for all else.

    It writes nothing but what a shared stage shares. Its ledger can only be asked.
    """

    def __init__(self, folder: Path, recipe: Recipe, group: Group):
        self.folder, self._group = folder, group
        self.recipe = recipe.model_copy(update={"log": []})  # the first process logs
        group.hear()  # that the folder is open
        self.ledger = _Witness(folder / "ledger.sqlite")

    def __enter__(self) -> Follower:
        return self

    def __exit__(self, *exc: object) -> None:
        self.ledger.close()

    def stage(self, name: str, depends: dict[str, Any], make: Callable[[Path], Made], shared: bool = False) -> Done:
        """What the first process made of the stage; where it is made now and ``shared``, ``make`` is run along.

        ``depends`` is the first process's business.
        """
        while True:
            word = self._group.hear()
            assert word["stage"] == name, f"this process is at {name}, the first one at {word['stage']}"
            if "work" not in word:
                return Done(name, word["facts"], word["outputs"])
            make(self.folder / "work" / word["work"])


class _Witness:
    """A ledger that is only asked whether it knows records; what is to be written into it, the first process writes."""

    def __init__(self, path: Path):
        self._path = path
        self._ledger: Ledger | None = None

    def append(self, kind: str, body: dict[str, Any]) -> None:
        pass

    def admit(self, ids: Iterable[str]) -> None:
        self._ledger = self._ledger or Ledger.open(self._path, create=False)
        self._ledger.admit(ids)

    def close(self) -> None:
        if self._ledger:
            self._ledger.close()


def open_run(
    folder: Path, recipe: Recipe, device_peak: Callable[[bool], int | None], group: Group, gpu: str | None = None
) -> Any:
    """The RUN folder for this process of ``group``: to own, or to follow."""
    return Run(folder, recipe, device_peak, group, gpu) if group.first else Follower(folder, recipe, group)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that the file is either the old one or the new one, whole."""
    write_whole(path, json.dumps(value, indent=2, ensure_ascii=False))


def read_json(path: Path) -> Any:
    """The JSON of a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def read_object(file: Path) -> dict[str, Any]:
    """A JSON object that a run wrote.

    Raises:
        RunError: it is damaged.
    """
    try:
        value = read_json(file)
        assert isinstance(value, dict)
    except (ValueError, AssertionError):
        raise RunError(f"{file} is damaged; run the recipe again on that folder, which writes it anew") from None
    return value


def a_run(folder: str) -> Path:
    """The RUN folder at ``folder``.

    Raises:
        RunError: it is none.
    """
    root = Path(folder)
    if (root / CHAIN).exists():
        raise RunError(f"{root} holds a chain of runs; give the folder of one of them, {root}/STAGE")
    if not (root / "recipe.json").exists():
        raise RunError(f"{root} is not a RUN folder (it has no recipe.json); give the folder that pennyweight run made")
    return root


def recipe_of(root: Path) -> Recipe:
    """The recipe that a RUN folder was made by.

    Raises:
        RunError: it cannot be read.
    """
    try:
        return Recipe.model_validate(read_object(root / "recipe.json"))
    except ValidationError:
        raise RunError(
            f"{root / 'recipe.json'} is no recipe of this version of Pennyweight; run the recipe again on that folder"
        ) from None
