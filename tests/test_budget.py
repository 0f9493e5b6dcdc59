"""A budget: refused at once, warned of, and kept to, whatever a run does and however often it is tried."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

import pennyweight
from pennyweight.errors import Overspent, RecipeError
from pennyweight.meter.allowance import Allowance, Rates, check_forecast, spent
from pennyweight.meter.meter import METER, Meter
from pennyweight.meter.taken import Taken
from pennyweight.plan.hardware import catalogue
from pennyweight.settings import Budget

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
    assert check_forecast(Budget(usd=1), total) is None  # nothing is foretold of money
    assert check_forecast(Budget(hours=1), None) is None


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
        self._limits = {"hours": 1e-9} if (tmp_path / "run" / "targets").exists() and len(asked) > 8 else {}
        return over(self)

    with monkeypatch.context() as patch:
        patch.setattr(Allowance, "over", spent_in_training)
        with pytest.raises(Overspent, match=r"(with a checkpoint: )?budget\.hours=.* raise budget\.hours"):
            pennyweight.run(TINY, settings, tmp_path / "run")
    pennyweight.run(TINY, settings, tmp_path / "run")
    assert hash_folder(tmp_path / "run" / "student") == hash_folder(tmp_path / "never" / "student")
