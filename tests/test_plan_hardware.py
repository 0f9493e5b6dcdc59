"""Chips and prices: each figure with its source, the user's own on top, and what is wrong with a file said."""

from __future__ import annotations

from datetime import date

import pytest

from pennyweight.errors import RecipeError
from pennyweight.plan.hardware import Chip, Figure, catalogue, own_price, price_range

OWN = """
[sources]
L = {what = "a letter from the maker", date = "2026-11-01"}

[chip.h100]
bf16 = [900, "L"]

[chip.tpu]
name = "A chip of ours"
also = ["ours"]
source = "our own sheet"
date = "2026-11"
bf16 = 100
bandwidth = 1000

[[price]]
chip = "ours"
amount = 0.5
currency = "EUR"
tier = "contract"
provider = "we"
date = "2026-11-20"

[[price]]
chip = "h100"
amount = 9
currency = "USD"
tier = "on demand"
provider = "we"
date = "2026-11-20"
"""


def test_every_figure_has_a_source_a_date_and_a_unit_that_can_be():
    for chip in catalogue().chips.values():
        assert {"bf16", "memory", "bandwidth", "power"} <= set(chip.figures), chip.key
        for name, figure in chip.figures.items():
            assert figure.source and figure.date >= "2024", (chip.key, name)
        assert 50 < chip["bf16"] < 5000 and 10 < chip["memory"] < 1000 and 100 < chip["bandwidth"] < 20_000
        if "fp8" in chip.figures:
            assert 1.9 < chip["fp8"] / chip["bf16"] < 2.1  # dense, as bf16: a figure with sparsity would be four times


def test_every_price_names_a_known_chip_a_tier_a_provider_and_a_date():
    for price in catalogue().prices:
        assert price.chip in catalogue().chips and price.tier and price.provider and price.currency == "USD"
        assert price.date[:2] == "20" and 0.1 < price.amount < 20


@pytest.mark.parametrize(
    ("asked", "chip", "count"),
    [("h100", "h100", 1), ("H100x8", "h100", 8), ("rtx4090", "rtx4090", 1), ("4090x2", "rtx4090", 2),
     ("h100-sxmx16", "h100", 16), ("h800x2,048", "h800", 2048)],
)  # fmt: skip
def test_devices_are_a_chip_and_how_many(asked, chip, count):
    found, devices = catalogue().devices(asked)
    assert (found.key, devices) == (chip, count)


@pytest.mark.parametrize("asked", ["h1000", "h100x0", "x8", "", "h100x99999999999", "h100x-1"])
def test_other_devices_are_refused(asked):
    with pytest.raises(RecipeError):
        catalogue().devices(asked)


def test_a_precision_that_a_chip_has_not_is_computed_in_a_wider_one():
    a100, h100 = catalogue().chip("a100"), catalogue().chip("h100")
    assert a100.peak("fp8") == (312e12, "bf16")
    assert h100.peak("fp4") == (1978.9e12, "fp8")
    with pytest.raises(RecipeError, match="fp6"):
        h100.peak("fp6")
    with pytest.raises(RecipeError, match="interconnect of mi300x"):
        catalogue().chip("mi300x")["interconnect"]


def test_prices_are_a_range_and_stale_after_90_days():
    known = catalogue()
    found = price_range(known.prices_of(known.chip("h100")), date(2026, 11, 26))
    assert (found.low, found.middle, found.high, found.currency) == (1.25, 2.95, 4.90, "USD")
    assert found.stale and "Nebius" in found.reason and "AWS" in found.reason
    assert not price_range(known.prices_of(known.chip("h100")), date(2026, 6, 1)).stale
    only = next(p for p in known.prices if p.date == "2026-05-20")
    assert not only.stale(date(2026, 8, 18)) and only.stale(date(2026, 8, 19))
    assert own_price(2.5).low == own_price(2.5).high == 2.5
    with pytest.raises(RecipeError, match="no dated price of NVIDIA H20.*--price"):
        known.prices_of(known.chip("h20"))


def test_a_file_of_ones_own_goes_on_top(tmp_path):
    (tmp_path / "own.toml").write_text(OWN)
    known = catalogue(str(tmp_path / "own.toml"))
    h100, ours = known.chip("h100"), known.chip("ours")
    assert h100["bf16"] == 900 and h100.figures["bf16"].source == "a letter from the maker"
    assert h100["fp8"] == 1978.9 and h100.name == "NVIDIA H100 SXM"
    assert ours["bandwidth"] == 1000 and ours.figures["bf16"].date == "2026-11"
    assert [p.amount for p in known.prices_of(h100)] == [9]
    assert known.prices_of(ours)[0].currency == "EUR"
    assert catalogue().chip("h100")["bf16"] == 989.4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("chip = 3", "no tables"),
        ("[chips.h100]\nbf16 = 1", "chips"),
        ("[chip.h100]\nbf16 = 900", "no source"),
        ('[chip.h100]\nsource = "s"\ndate = "2026"\nbf16 = -1', "above 0"),
        ('[chip.h100]\nsource = "s"\ndate = "2026"\nbf16 = true', "above 0"),
        ('[chip.h100]\nsource = "s"\ndate = "2026"\nflops = 1', "flops of h100"),
        ('[[price]]\nchip = "h100"', "without amount"),
        (OWN.replace('"ours"\namount', '"theirs"\namount'), "no chip of the catalogue"),
        (OWN.replace("amount = 9", "amount = 0"), "above 0"),
        (OWN.replace("2026-11-20", "yesterday"), "yesterday"),
        (OWN.replace("2026-11-20", "2026-13"), "2026-13"),
        (OWN.replace('provider = "we"', 'provider = "we"\nregion = "eu"'), "region"),
        ("a = ", "not TOML"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, said):
    (tmp_path / "own.toml").write_text(text)
    with pytest.raises(RecipeError, match=said) as e:
        catalogue(str(tmp_path / "own.toml"))
    assert "own.toml" in str(e.value) and "\n" not in str(e.value)
    with pytest.raises(RecipeError, match="there is no"):
        catalogue(str(tmp_path / "none.toml"))


def test_a_chip_without_a_figure_says_which(tmp_path):
    chip = Chip("odd", "An odd one", {"bf16": Figure(1.0, "s", "2026")})
    with pytest.raises(RecipeError, match="power of odd"):
        chip["power"]
