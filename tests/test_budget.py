"""A budget: refused at once, warned of, and kept to, whatever a run does and however often it is tried."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

import pennyweight
from pennyweight.errors import EndpointError, ModelError, Overspent, RecipeError
from pennyweight.meter.allowance import Allowance, Rates, check_forecast, spent
from pennyweight.meter.meter import METER, Meter
from pennyweight.meter.rates import asked_of, check_prices, rates_of
from pennyweight.meter.taken import Taken
from pennyweight.plan.hardware import catalogue
from pennyweight.plan.reckon import foretell, within_budget
from pennyweight.recipe import EndpointTeacher, FolderTeacher, SeveralTeachers
from pennyweight.recipe_file import load
from pennyweight.settings import Budget
from pennyweight.teacher.paid import Paid

RATES = Rates(2.0, 100.0, "an estimate")


def test_what_was_spent_is_counted_where_it_can_be_and_estimated_where_not():
    taken = Taken(seconds=1800, device_seconds=3600, joules={"gpu": 1.8e6}, uncounted=1800, stretches=1)
    found = spent(taken, RATES, 0.25)
    assert found["hours"] == 0.5 and found["device_hours"] == 1 and found["usd"] == 2.25
    assert found["kwh"] == pytest.approx(0.5 + 0.05) and found["estimated"] == pytest.approx(0.05 / 0.55)
    assert spent(taken, RATES, None)["usd"] is None  # a server of which nobody knows the price is not free
    assert spent(taken, Rates(None, 100.0, ""), 1.0)["usd"] is None


@pytest.mark.parametrize(
    ("limit", "total", "says"),
    [
        ({"hours": 1}, {"hours": {"low": 2, "middle": 3, "high": 4}}, "foretold to take 2 hours to 4 hours, more than"),
        ({"usd": 1}, {"money": {"low": 2, "middle": 3, "high": 4}}, "USD 2 to USD 4, more than budget.usd=1"),
        ({"kwh": 0.1}, {"kwh": {"low": 0.2, "middle": 3, "high": 4}}, "raise budget.kwh"),
    ],
)
def test_a_budget_below_the_low_end_is_refused_at_once(limit, total, says):
    with pytest.raises(RecipeError) as e:
        check_forecast(Budget(**limit), total)
    assert says in str(e.value) and "\n" not in str(e.value)


def test_a_budget_below_the_middle_is_warned_of_and_one_above_is_not():
    total = {"hours": {"low": 1.0, "middle": 3.0, "high": 9.0}}
    assert "may not do" in (check_forecast(Budget(hours=2), total) or "")
    assert check_forecast(Budget(hours=4), total) is None
    assert check_forecast(Budget(), None) is None


def test_a_budget_that_no_forecast_can_be_held_against_is_said_to_be_so():
    total = {"hours": {"low": 1.0, "middle": 3.0, "high": 9.0}}
    said = check_forecast(Budget(usd=1), total)
    assert said and "budget.usd=1 of the run is held against no forecast" in said and "price" in said
    said = check_forecast(Budget(hours=1, kwh=2), None, why="there is no model in it")
    assert said and "budget.hours=1, budget.kwh=2" in said and said.endswith("there is no model in it")


def test_ten_times_of_ten_it_stops_before_the_limit_and_not_long_before(tmp_path):
    for i in range(10):
        meter = Meter(tmp_path / f"{i}-{METER}", interval=60)
        limit = 1.0 + 0.3  # seconds: what ending takes, and a little work
        allowance, began = Allowance(Budget(hours=limit / 3600), meter.whole, RATES), time.monotonic()
        allowance.fresh()
        while allowance.over() is None:
            time.sleep(0.01)
        took = time.monotonic() - began
        assert took < limit, "it went on for too long"
        with pytest.raises(Overspent, match=r"budget\.hours=.* would be passed: .*raise budget\.hours"):
            allowance.check()
        meter.close()


def test_what_earlier_tries_have_spent_counts(tmp_path):
    first = Meter(tmp_path / METER, interval=60)
    time.sleep(0.2)
    first.close()
    meter = Meter(tmp_path / METER, interval=60)
    assert Allowance(Budget(hours=1), meter.whole, RATES).over() is None
    with pytest.raises(Overspent):
        Allowance(Budget(hours=(1.0 + 0.2) / 3600), meter.whole, RATES).check()
    meter.close()


def test_money_without_a_price_is_refused(tmp_path):
    meter = Meter(tmp_path / METER, interval=60)
    with pytest.raises(RecipeError, match="budget.usd needs prices"):
        Allowance(Budget(usd=1), meter.whole, Rates(None, 1.0, ""))
    with pytest.raises(RecipeError, match="teacher.usd_sent"):
        Allowance(Budget(usd=1), meter.whole, RATES, lambda: None)
    meter.close()


def test_overspending_ends_with_the_code_of_tripwires():
    assert Overspent("x").exit_code == 3


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3, cuda bfloat16", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L4", "l4"),
        ("NVIDIA L40", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA GeForce RTX 4090 D", None),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM-64GB", None),
        ("NVIDIA A100 80GB PCIe", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H20", "h20"),
        ("NVIDIA H800", "h800"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA B200", "b200"),
        ("cpu bfloat16", None),
    ],
)
def test_a_gpu_is_known_by_what_its_driver_calls_it(name, key):
    found = catalogue().called(name)
    assert (found.key if found else None) == key


class Worked:
    """A meter of which the time is set: so much was metered, all by the clock."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self) -> Taken:
        return Taken(seconds=self.seconds, device_seconds=self.seconds, uncounted=self.seconds)


@pytest.fixture
def time_set(monkeypatch) -> Worked:
    worked = Worked()
    monkeypatch.setattr("pennyweight.meter.allowance.clock", lambda: worked.seconds)
    return worked


def test_a_later_try_looks_as_far_ahead_before_its_first_step_as_an_earlier_one_after_its_last(time_set):
    known: dict[str, float] = {}
    first = Allowance(Budget(hours=1), time_set, RATES, longest=known)
    first.begin("kd-0")
    first.fresh()
    for _ in range(4):
        time_set.seconds += 600
        if first.over():
            break
    assert time_set.seconds == 2400 and known["kd-0"] == 600  # two more of 600 seconds would be too much
    for limit, stops in ((1.0, True), (0.9, True), (1.5, False)):
        again = Allowance(Budget(hours=limit), time_set, RATES, longest=dict(known))
        assert (again.over() is not None) == stops
    killed = {k: v for k, v in known.items() if not k.startswith("stopped")}  # before it could be stopped
    another = Allowance(Budget(hours=1), time_set, RATES, longest=killed)
    assert another.over() is None
    with pytest.raises(Overspent, match="budget.hours=1 would be passed"):
        another.begin("kd-0")  # before its first step


def test_other_seeds_and_models_are_taken_to_last_as_long_as_those_that_were(time_set):
    known = {"kd-0": 600.0, "evaluate-base-0": 600.0, "teacher": 600.0}
    for stage, stops in (("kd-1", True), ("evaluate-kd-0", True), ("sft-0", False), ("targets", False)):
        allowance = Allowance(Budget(hours=0.3), time_set, RATES, longest=dict(known))
        try:
            allowance.begin(stage)
            assert not stops, stage
        except Overspent:
            assert stops, stage


def test_the_writing_of_a_checkpoint_is_part_of_what_is_spared(time_set):
    allowance = Allowance(Budget(hours=1), time_set, RATES)
    allowance.begin("kd-0")
    allowance.fresh()
    for _ in range(3):
        time_set.seconds += 10
        assert allowance.over() is None
        time_set.seconds += 600
        allowance.saved()
    time_set.seconds += 3600 - 3 * 610 - 2 * 610 - 590
    assert allowance.over() is not None  # two steps with what they write would fit, and the writing after them not


def test_what_a_run_without_a_budget_took_is_known_to_one_that_has_one(time_set):
    known: dict[str, float] = {}
    free = Allowance(Budget(), time_set, RATES, longest=known)
    free.begin("kd-0")
    free.fresh()
    for _ in range(5):
        time_set.seconds += 100
        assert free.over() is None
        free.saved()
    assert known["kd-0"] == 100 and "kd-0, saving" not in known
    assert Allowance(Budget(hours=1), time_set, RATES, longest=known).over() is None


def test_a_price_that_is_missing_is_named_from_the_recipe_alone():
    served = EndpointTeacher(url="http://127.0.0.1:1/v1", usd_sent=1.0)
    several = SeveralTeachers(members={"far": served}, weights={"far": 1.0})
    with pytest.raises(RecipeError, match=r"set budget.usd_per_hour .*, teacher.usd_got \(of a million tokens\), or"):
        check_prices(Budget(usd=1), served, "cpu float32")
    with pytest.raises(RecipeError, match=r"set teacher.members.far.usd_got"):
        check_prices(Budget(usd=1, usd_per_hour=0.1), several, "cpu float32")
    check_prices(Budget(hours=1), served, "cpu float32")
    check_prices(Budget(usd=1), None, "NVIDIA H100 80GB HBM3")


def test_a_server_that_is_priced_has_a_price_at_any_time_and_one_that_is_not_never_has():
    served = EndpointTeacher(url="http://127.0.0.1:1/v1", usd_sent=1.0, usd_got=2.0)
    used = {"answers": 3, "prompt_tokens": 1_000_000, "completion_tokens": 2_000_000}
    assert asked_of(served, {}) == 0.0 and asked_of(served, {"": dict.fromkeys(used, 0) | {"answers": 1}}) == 0.0
    assert asked_of(served, {"": used}) == 5.0
    free = served.model_copy(update={"usd_got": None})
    assert asked_of(free, {}) is None and asked_of(free, {"": used}) is None
    near = FolderTeacher(path="x")
    several = SeveralTeachers(
        members={"far": served, "near": near, "other": served}, weights=dict.fromkeys(("far", "near", "other"), 1)
    )
    assert asked_of(several, {"far": used, "other": used}) == 10.0 and asked_of(near, {}) == 0.0


def test_threads_of_all_processes_take_power():
    alone, four = (rates_of(Budget(), "cpu float32", False, 8, n) for n in (1, 4))
    assert four.watts == 4 * alone.watts and "of 4 processes" in four.source and "processes" not in alone.source


def test_where_a_price_is_from_is_kept():
    own = rates_of(Budget(usd_per_hour=0.4), "cpu float32", False, 1).price
    known = rates_of(Budget(), "NVIDIA H100 80GB HBM3", True, 1).price
    assert own and own["reason"] == "USD 0.40, as given" and own["stale"] is False
    assert known and known["low"] <= known["middle"] <= known["high"] and "(" in known["reason"]
    assert spent(Taken(), rates_of(Budget(), "cpu float32", False, 1), 0.0)["price"] is None


def test_a_priced_server_that_is_not_there_is_said_to_be_missing_whenever_it_is_tried(tmp_path, stories):
    """The first try leaves what was found out about the server, which costs nothing and needs no price."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"p{i}"}) + "\n" for i in range(20)))
    server = ["teacher.kind=endpoint", "teacher.url=http://127.0.0.1:9/v1", "teacher.model=m", "teacher.retries=0"]
    data = ["data.source.kind=files", f"data.source.path={rows}", "student.kind=folder", f"student.path={stories}"]
    settings = [*server, *data, "method.kind=sft", "control=false", "budget.usd=100"]
    with pytest.raises(RecipeError, match=r"budget.usd_per_hour .*teacher.usd_sent .*teacher.usd_got"):
        pennyweight.run(TINY, settings, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    priced = [*settings, "budget.usd_per_hour=1", "teacher.usd_sent=1", "teacher.usd_got=2"]
    for _ in range(2):
        with pytest.raises(EndpointError):
            pennyweight.run(TINY, priced, tmp_path / "run")
        Paid(tmp_path / "run" / "answers.jsonl").keep("k", {"model": "m", "listed": {}})


TINY = Path(__file__).with_name("tiny.toml")


def test_a_run_is_refused_before_anything_is_written_where_its_low_end_is_above_the_budget(tmp_path):
    with pytest.raises(RecipeError, match="raise budget.hours"):
        pennyweight.run(TINY, ["budget.hours=0.0000001"], tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_of_a_gpu_that_nobody_knows_nothing_is_foretold_and_no_budget_refuses_it(capsys):
    from pennyweight.plan.published import published
    from pennyweight.plan.reckon import within_budget
    from pennyweight.recipe_file import load

    recipe = load(TINY, ["budget.hours=0.0000001"])
    for hardware in ("NVIDIA GeForce RTX 3060, cuda bfloat16", "mps float32", "NVIDIA H100 80GB HBM3, cuda float32"):
        assert within_budget(recipe, hardware, 1, 1, "bfloat16" in hardware, published) is None
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and "nothing is foretold" in said and hardware.partition(",")[0] in said
    with pytest.raises(RecipeError, match="raise budget.hours"):
        within_budget(recipe, "NVIDIA H100 80GB HBM3, cuda bfloat16", 1, 1, True, published)
    with pytest.raises(RecipeError, match="raise budget.hours"):
        within_budget(recipe, "cpu float32", 1, 1, False, published)


def test_a_run_that_training_takes_over_its_budget_keeps_a_checkpoint_and_goes_on(tmp_path, no_charts, monkeypatch):
    """Stopped with code 3, resumed under a larger budget, it ends in the student of a run that was never stopped."""
    from pennyweight.ledger.hashing import hash_folder
    from pennyweight.meter.allowance import Allowance

    settings = ["seeds=[0]", "quantize.formats=[]", "evaluate.problems=2", "evaluate.samples=0", "control=false"]
    pennyweight.run(TINY, settings, tmp_path / "never")
    asked, over = [], Allowance.over

    def spent_in_training(self):
        asked.append(1)
        spent = (tmp_path / "run" / "targets").exists() and len(asked) > 8
        self._limits = [("budget.hours", "hours", 1e-9, 0.0)] if spent else []
        return over(self)

    with monkeypatch.context() as patch:
        patch.setattr(Allowance, "over", spent_in_training)
        with pytest.raises(Overspent, match=r"(with a checkpoint: )?budget\.hours=.* raise budget\.hours"):
            pennyweight.run(TINY, settings, tmp_path / "run")
    pennyweight.run(TINY, settings, tmp_path / "run")
    assert hash_folder(tmp_path / "run" / "student") == hash_folder(tmp_path / "never" / "student")


def test_processes_that_share_a_processor_are_foretold_with_all_their_threads():
    found = [foretell(load(TINY), "cpu float32", n, 1, False, tuple).found for n in (1, 4)]
    assert [f["threads"] for f in found] == [1, 4]
    per_hour = [f["total"]["kwh"]["middle"] / f["total"]["hours"]["middle"] for f in found]
    assert per_hour[1] == pytest.approx(4 * per_hour[0])


def test_where_nothing_can_be_foretold_it_is_said_once_that_the_budget_is_held_against_nothing(monkeypatch, capsys):
    def unknown(*where):
        raise ModelError("there is no ./m; download it first")

    monkeypatch.setattr("pennyweight.plan.reckon.foretell", unknown)
    assert within_budget(load(TINY, ["budget.hours=1"]), "cpu float32") is None
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "budget.hours=1 of the run is held against no forecast" in told
    assert told.endswith("nothing can be foretold, since there is no ./m; download it first\n")
    assert within_budget(load(TINY), "cpu float32") is None and capsys.readouterr().err == ""
