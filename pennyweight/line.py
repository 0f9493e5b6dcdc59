"""A run in progress: its folder and ledger, the bench its stages share, and where its measurements go."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pennyweight.data.lengths import lengths
from pennyweight.errors import Overspent, Stopped
from pennyweight.ledger.environment import environment
from pennyweight.meter.allowance import Allowance, Wider
from pennyweight.meter.bill import bill, per_point
from pennyweight.meter.meter import BETWEEN
from pennyweight.meter.peak import peak_memory
from pennyweight.meter.rates import allowance_of, servers_of, spent_in
from pennyweight.model.device import peak
from pennyweight.progress import Counter, counting, say
from pennyweight.report.trackers import trackers
from pennyweight.settings import Budget
from pennyweight.train.journal import Journal
from pennyweight.version import __version__

Chain = tuple[Budget, Sequence[tuple[Any, Path]]]
"""A budget of several runs together, and the recipes and folders of the others"""

_STEPS, _SHARE, _SECONDS = 20, 0.5, 60.0  # of a training, after which its length is foretold anew


class Line:
    """What the stages of a run are handed.

    Args:
        foretold: ``plan.reckon``'s, of this run, if that could be.
        retold: ``plan.seen``'s two, which tell the rest of it, and its memory, anew.
        chain: the budget of the chain that it is a part of, and the other parts: their recipes and folders.

    Raises:
        Overspent: the budget is spent already; nothing of this try is metered.
    """

    def __init__(self, run: Any, bench: Any, foretold: Any = None, retold: Any = None, chain: Chain | None = None):
        self.foretold, self._retold = foretold, retold
        self.run, self.recipe, self.folder = run, run.recipe, run.folder
        self.bench, self.compute = bench, bench.compute
        self.allowance = None  # the first process's business
        if meter := getattr(run, "meter", None):
            self.allowance = self._allowance(meter, chain)
            run.ask = self.allowance.begin
        settings = self.recipe.model_dump(mode="json")
        self.trackers = trackers(list(self.recipe.log), self.recipe.name, self.folder, settings)
        self.journal = Journal(self.folder / "metrics.jsonl", [self.trackers])
        bench.counting = self.counting
        reckoned = foretold and foretold.found["total"]
        run.ledger.append("run", {"recipe": settings, "version": __version__, "foretold": reckoned})
        run.ledger.append("environment", environment(self.compute.hardware, bench.threads))

    def _allowance(self, meter: Any, chain: Chain | None) -> Allowance:
        where = (self.compute.hardware, self.bench.threads, self.bench.group.size)
        wider = None
        if chain is not None:
            others = [spent_in(folder, recipe, *where) for recipe, folder in chain[1]]
            wider = Wider(chain[0], {k: sum(o[k] or 0.0 for o in others) for k in ("hours", "kwh", "usd")})
        allowance = allowance_of(self.recipe, meter, *where, self._usages, wider)
        try:
            allowance.check()
        except Overspent:
            meter.forget()
            raise
        return allowance

    def _usages(self) -> dict[str, dict[str, int]]:
        """What each server has counted, by its member's name."""
        benches = self.bench.team.benches if self.bench.team else {"": self.bench}
        return {name: benches[name].served.endpoint.paid.usage for name in servers_of(self.recipe.teacher)}

    def __enter__(self) -> Line:
        return self

    def __exit__(self, *exc: object) -> None:
        self.trackers.close()

    def account(self) -> dict[str, Any]:
        """Where and in which stages the run was made, and what its ledger comes to."""
        return {"environment": environment(self.compute.hardware, self.bench.threads), **self.run.account()}

    def bill(self, summary: Mapping[str, Any]) -> dict[str, Any]:
        """What the run took, beside what was foretold, and for what."""
        meter, spent = self.run.meter, self.allowance.spent() if self.allowance else {}
        usages = self._usages().values()
        spent |= {"answers": {k: sum(u[k] for u in usages) for k in ("answers", "estimated")}} if usages else {}
        reckoned, rates = self.foretold and self.foretold.found, self.allowance and self.allowance.rates
        found = bill(reckoned, summary["stages"], meter.by_stage(), meter.whole(), spent, BETWEEN, rates)
        arms = summary["arms"]
        gained = [arms.get(a, {}).get("metrics", {}).get("accuracy") for a in ("base", self.recipe.method.kind)]
        anew = [f for f in self.run.ledger.told("forecast") if "whole_seconds" in f]
        return found | {"per_point": per_point(spent, *(g and g["mean"] for g in gained)), "anew": anew}

    def over(self) -> bool:
        """Whether the budget lets the run go on no longer."""
        return self.allowance is not None and self.allowance.over() is not None

    def paced(self, stage: str, steps: int, reach: Callable[[int, str], None]) -> Callable[[int, str], None]:
        """``reach`` of a training, whose length is foretold anew from its first ``_STEPS`` steps, or minute; of a short
        one from half of them."""
        began: list[tuple[int, float]] = []
        each = getattr(self.recipe.method, "updates", 1)  # steps for what is written once
        enough = each * math.ceil(min(_STEPS, _SHARE * steps) / each)

        def reached(step: int, note: str) -> None:
            if self.allowance is not None:
                self.allowance.saved()
            reach(step, note)
            now = time.monotonic()
            if not began:
                began.append((step, now))  # the first step opens what others find open
            done, took = step - began[0][0], now - began[0][1]
            if len(began) > 1 or step >= steps or not done or (done < enough and took < _SECONDS):
                return
            began.append((step, now))
            left = (steps - step) * took / done
            say(f"{stage}: {took / done:,.3g} s a step, {left:,.0f} s to go")
            entry = {"stage": stage, "step": step, "seconds": round(left, 3), "step_seconds": round(took / done, 6)}
            self.run.ledger.append("forecast", entry | self._whole(stage, left, steps * took / done))

        return reached

    def _whole(self, stage: str, left: float, whole: float) -> dict[str, float]:
        """``whole_seconds`` of the run, told anew while a student trains: what was metered, what is left of its stage,
        and what then comes."""
        if self.foretold is None or not self.bench.group.first:
            return {}
        over = self.run.stages()
        if "targets" not in over:
            return {}  # a teacher from nothing trains, and how long rows are is not known
        rows = lengths(self.bench.encoded, self.recipe.train) | {"train": len(self.bench.encoded)}
        took = {n: s["metered"]["seconds"] for n, s in over.items() if s["metered"]}
        come = self._retold[0](*self.foretold.parts, rows, stage, whole, took)
        seconds = self.run.meter.whole().seconds + left + come
        say(f"the run: {seconds:,.0f} s in all, by what was seen of it; {left + come:,.0f} s to go")
        now, of = peak(self.compute.device, False), "peak_device_memory_bytes"
        if now is None:
            now, of = peak_memory(), "peak_memory_bytes"
        before = max(s.get(of) or 0 for s in over.values())
        most = self._retold[1](self.foretold.pace, stage, now, before)
        return {"whole_seconds": round(seconds, 3), "peak_memory_bytes": round(most)}

    @contextmanager
    def counting(self, label: str, total: int, unit: str) -> Iterator[Counter]:
        """``progress.counting`` of work that is stopped where the budget is spent: what it has finished is kept."""
        with counting(label, total, unit) as c:
            if self.allowance is not None:
                self.allowance.fresh()
                c.asked = self.allowance.check
            yield c

    @contextmanager
    def within_budget(self) -> Iterator[None]:
        """Training that ``over`` stopped ends with what the budget says; its checkpoint is written."""
        if self.allowance is not None:
            self.allowance.fresh()
        try:
            yield
        except Stopped as e:
            if self.allowance is not None:
                self.allowance.saved()
            if self.allowance is None or (reason := self.allowance.over()) is None:
                raise
            raise Overspent(f"stopped after step {e.step:,}, with a checkpoint: {reason}") from None
