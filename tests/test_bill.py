"""The bill: what was foretold beside what was metered, adding up to the whole, with its scope said."""

from __future__ import annotations

import pytest

from pennyweight.meter.allowance import Rates
from pennyweight.meter.bill import bill, per_point
from pennyweight.meter.meter import BETWEEN
from pennyweight.meter.taken import Taken
from pennyweight.report.run_bill import bill as drawn
from pennyweight.report.run_bill import bill_in_words, scope
from pennyweight.report.view import view

ENDS = {"low": 1 / 3600, "middle": 3 / 3600, "high": 9 / 3600}
FORETOLD = {
    "stages": [
        {
            "stage": "kd-0",
            "does": "trains by kd",
            "hours": ENDS,
            "tokens": {"low": 1, "middle": 100, "high": 900},
            "flops": {"low": 10, "middle": 1000, "high": 9000},
            "flops_per_trained_token": 10.0,
        }
    ],
    "total": {"hours": ENDS, "kwh": ENDS},
    "reasons": {},
}
SPENT = {"hours": 10 / 3600, "device_hours": 10 / 3600, "kwh": 0.5, "usd": 3.0, "estimated": 0.25, "energy": "a guess"}


def stage(seconds: float, tokens: int = 0, stretches: int = 1) -> dict:
    return {"seconds": seconds, "tokens": tokens, "metered": {"seconds": seconds, "stretches": stretches}}


def made(**changed) -> dict:
    stages = {"start-0": stage(0.5), "kd-0": stage(4.0, 50, 3), "student": stage(0.5), "evaluate-kd-0": stage(2.0)}
    stages |= {"evaluate-int4-rounded": stage(1.0)}
    taken = {(name, "k"): Taken(seconds=s["seconds"]) for name, s in stages.items()}
    taken |= {(BETWEEN, ""): Taken(seconds=1.5), ("kd-0", "old"): Taken(seconds=0.5)}
    return bill(changed.get("foretold", FORETOLD), stages, taken, Taken(seconds=10.0), SPENT, BETWEEN)


def test_stages_what_is_between_and_earlier_ones_add_up_to_the_whole():
    found = made()
    rows = {r["stage"]: r for r in found["stages"]}
    assert list(rows) == ["opening and copying", "kd-0", "evaluate students"]
    assert rows["opening and copying"]["metered"] == 1.0 and rows["evaluate students"]["metered"] == 3.0
    parts = sum(r["metered"] for r in found["stages"]) + found["between"] + found["earlier"]
    assert parts == pytest.approx(found["whole"], rel=0.01)
    assert found["again"] == 2


def test_the_forecast_stands_beside_with_its_error_and_flops_are_by_the_tokens_there_were():
    row = next(r for r in made()["stages"] if r["stage"] == "kd-0")
    assert row["foretold"] == {"low": 1.0, "middle": 3.0, "high": 9.0} and row["error"] == -0.25
    assert row["flops"] == 500 and row["flops_per_second"] == 125
    assert all(r["foretold"] is None and r["error"] is None for r in made(foretold=None)["stages"])


def test_each_stage_has_its_energy_and_the_rent_of_its_devices():
    rates = Rates(usd_per_hour=3.0, watts=10.0, source="a guess")
    metered = {"seconds": 4.0, "device_seconds": 8.0, "joules": {"cpu": 20.0}, "uncounted": 4.0, "stretches": 1}
    stages = {"sft-0": {"seconds": 4.0, "tokens": 5, "metered": metered}, "sft-1": {"seconds": 1.0, "metered": metered}}
    found = bill(None, stages, {}, Taken(seconds=8.0), SPENT, BETWEEN, rates)
    row = found["stages"][0]
    assert row["kwh"] == pytest.approx((20 + 4 * 10) / 3.6e6) and row["usd"] == pytest.approx(8 / 3600 * 3)
    unpriced = bill(None, stages, {}, Taken(seconds=8.0), SPENT, BETWEEN, Rates(None, 10.0, ""))["stages"][0]
    assert unpriced["usd"] is None and unpriced["kwh"] == row["kwh"]


def test_goodput_is_what_was_kept_and_stops_lose_the_rest_of_a_stage_that_was_begun_again():
    stages = {"kd-0": stage(4.0, 50, 3), "evaluate-kd-0": stage(2.0)}
    stages["kd-0"]["seconds"] = 3.0  # of steps that were kept
    found = bill(None, stages, {("kd-0", "old"): Taken(seconds=6.5)}, Taken(seconds=10.0), SPENT, BETWEEN)["goodput"]
    assert found == {"work": 3.0, "evaluation": 2.0, "lost": 1.5, "share": 0.3}


def test_a_point_of_accuracy_has_a_price_where_one_was_gained():
    found = per_point(SPENT, 0.5, 0.6)
    assert found is not None and found["points"] == pytest.approx(10) and found["usd"] == pytest.approx(0.3)
    assert found["seconds"] == pytest.approx(1.0)
    assert per_point(SPENT, 0.6, 0.5) is None and per_point(SPENT, None, 0.5) is None
    assert "usd" not in (per_point(SPENT | {"usd": None}, 0.5, 0.6) or {})


def test_in_words_and_on_the_page():
    found = made() | {"per_point": per_point(SPENT, 0.5, 0.6)}
    said = " ".join(bill_in_words(found))
    assert "10.0\u00a0s and 500 Wh" in said and "USD 3.00" in said and "points of accuracy" in said
    page = str(drawn(view({"bill": found, "arms": {}, "stages": {}})))
    assert "The bill" in page and "\u221225 %" in page and "25 % of it an estimate: a guess" in page
    free = bill_in_words(found | {"spent": SPENT | {"usd": None}, "per_point": None})
    assert "no price is known" in " ".join(free) and "USD 0" not in " ".join(free)
    assert drawn(view({})) is None


def test_the_scope_is_said_plainly():
    both = {"arms": {"base": {}, "sft": {}, "kd": {}}, "stages": {"teacher": {"tokens": 5}}}
    assert "its control arm" in scope(both) and "its teacher’s training in it" in scope(both)
    assert "control" not in scope({"arms": {"kd": {}}}) and "own training not counted" in scope({})


def test_the_bill_of_a_run_adds_up(tiny_run):
    _, summary = tiny_run
    found = summary["bill"]
    parts = sum(r["metered"] for r in found["stages"]) + found["between"] + found["earlier"]
    assert parts == pytest.approx(found["whole"], rel=0.01) and found["earlier"] < 0.01 * found["whole"] + 0.05
    assert found["spent"]["kwh"] > 0 and found["spent"]["estimated"] > 0 and found["spent"]["usd"] is None
    assert {"teacher", "sft-0", "kd-0"} <= {r["stage"] for r in found["stages"] if r["error"] is not None}


def test_the_bill_says_whose_price_it_is_and_how_old():
    price = {"low": 1.5, "middle": 2.0, "high": 3.0, "currency": "USD", "reason": "USD 1.50 to 3.00 (x, y, 2026-01)"}
    for stale in (True, False):
        found = made() | {"spent": SPENT | {"price": price | {"stale": stale}}, "per_point": None}
        said = " ".join(bill_in_words(found))
        assert "a device and hour at USD 2.00 (USD 1.50 to 3.00 (x, y, 2026-01)" in said
        assert ("more than 90 days old" in said) == stale
        page = str(drawn(view({"bill": found, "arms": {}, "stages": {}})))
        assert "price of a device and hour" in page and ("more than 90 days ago" in page) == stale


def test_the_bill_says_what_a_server_did_not_count():
    spent = SPENT | {"answers": {"answers": 12, "estimated": 5}}
    said = " ".join(bill_in_words(made() | {"spent": spent}))
    assert "Of 12\u00a0answers of a server 5 came without a count of tokens" in said
    assert "server" not in " ".join(bill_in_words(made() | {"spent": spent | {"answers": {"estimated": 0}}}))


@pytest.mark.parametrize(
    ("host", "says"),
    [
        (None, "energy is that of the devices only, without what a building takes besides;"),
        ({"kwh": 0.0, "whole": False}, "devices only: their host’s processors were not counted, nor what a building"),
        (
            {"kwh": 2.0, "whole": True},
            "devices only, without their host’s processors, which took 2.00\u00a0kWh besides",
        ),
    ],
)
def test_the_scope_says_whose_energy_it_is(host, says):
    assert says.replace("\u00a0", " ") in scope({"bill": {"spent": {"host": host}}}).replace("\u00a0", " ")
