"""What a million tokens cost to write: what is waited for, alone and with many rows, and money as a range."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pennyweight.plan.hardware import Chip, catalogue, own_price
from pennyweight.plan.models import model
from pennyweight.plan.serving import BANDWIDTH, LAYER, PLAIN, SERVED_IN, serving
from pennyweight.plan.shapes import Shapes
from pennyweight.plan.sizes import cache_bytes

ROOT = Path(__file__).resolve().parents[1]
SMALL, LARGE, MIXED = model("llama-3-8b"), model("llama-3-70b"), model("qwen3-30b-a3b")


def served(shapes: Shapes, chip: str = "h100", context: int = 1024, price: float | None = 2.0) -> dict:
    found = serving(shapes, SERVED_IN, catalogue().chip(chip), context, own_price(price) if price else None)
    assert found is not None
    return {row["format"]: row for row in found["formats"]}


def test_alone_a_row_waits_for_the_weights_and_the_cache():
    row, chip = served(SMALL)[PLAIN], catalogue().chip("h100")
    table = 128_256 * 4096  # looked up, not read
    read = 2 * (SMALL.parameters - table) + cache_bytes(SMALL, 1, 1024, 16)
    seconds = read / (BANDWIDTH[1] * 1e9 * chip["bandwidth"]) + 32 * LAYER[1]
    assert row["alone"]["tokens_per_second"]["middle"] == pytest.approx(1 / seconds)
    assert row["alone"]["bound"] == "bandwidth" and row["alone"]["rows"] == 1
    assert 80 < row["alone"]["tokens_per_second"]["middle"] < 160  # as engines of the day have it


def test_fewer_bits_are_faster_alone_and_many_rows_are_cheaper():
    found = served(SMALL)
    assert list(found) == [PLAIN, *SERVED_IN]
    speeds = [found[f]["alone"]["tokens_per_second"]["middle"] for f in (PLAIN, "int8", "int4")]
    assert speeds == sorted(speeds)
    for row in found.values():
        assert row["many"]["rows"] > 1 and row["many"]["money"]["middle"] < row["alone"]["money"]["middle"] / 4
        for who in ("alone", "many"):
            speeds, money = row[who]["tokens_per_second"], row[who]["money"]
            assert speeds["low"] < speeds["middle"] < speeds["high"] and money["low"] < money["middle"] < money["high"]
            assert money["middle"] == pytest.approx(2.0 * 1e6 / 3600 / speeds["middle"])


def test_short_rows_of_a_chip_with_few_products_wait_for_these():
    assert served(SMALL, "h20", context=64)["int4"]["many"]["bound"] == "products"


def test_as_many_devices_as_hold_it():
    assert served(LARGE)[PLAIN]["devices"] == 2 and served(LARGE)["int4"]["devices"] == 1
    assert "money" not in served(LARGE, price=None)[PLAIN]["alone"]
    assert served(model("llama-3.1-405b"), "l4", context=131_072)[PLAIN]["devices"] == 64


def test_of_a_mixture_those_experts_are_read_that_tokens_go_to():
    row = served(MIXED)[PLAIN]
    alone, dense = row["alone"]["tokens_per_second"]["middle"], served(SMALL)[PLAIN]["alone"]["tokens_per_second"]
    assert alone > dense["middle"]  # 3 of 30 B parameters are met
    assert row["many"]["tokens_per_second"]["middle"] < row["many"]["rows"] * alone / 2  # and together nearly all


def test_where_it_is_told(typed, tmp_path, monkeypatch):
    config = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 512, "vocab_size": 1024}))
    monkeypatch.setenv("COLUMNS", "80")
    for argv in (
        (tmp_path, "--tokens", "1B", "--on", "h100"),
        ("quickstart", "--on", "h100", "--out", tmp_path / "p.html"),
    ):
        code, out, _ = typed("plan", *argv)
        assert code == 0 and "to serve on NVIDIA H100 SXM" in out and "assumed" in out and "int4" in out
        assert max(map(len, out.splitlines())) <= 80
        found = json.loads(typed("plan", *argv, "--json")[1])["serving"]
        assert found["context"] and found["formats"][0]["format"] == PLAIN
    assert "What serving takes" in (tmp_path / "p.html").read_text()
    assert json.loads(typed("plan", "quickstart", "--json")[1])["serving"] is None


def test_of_a_machine_that_is_no_chip_of_the_catalogue_nothing_is_told():
    assert serving(SMALL, (), Chip("this", "here", catalogue().chip("h100").figures), 64, None) is None
