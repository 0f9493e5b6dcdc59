"""Published claims: what adds up, what cannot be, and what a wrong file is told; and the command around them."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from copy import deepcopy
from pathlib import Path

import pytest

from pennyweight import cli
from pennyweight.errors import RecipeError
from pennyweight.plan.claim import check
from pennyweight.plan.claim_file import MONEY, SCOPE, claim_of, read_claim, shipped
from pennyweight.plan.hardware import catalogue
from pennyweight.plan.published import published
from pennyweight.settings import Budget

SAID = {
    "name": "Ours",
    "statement": "cheap",
    "covers": ["final run"],
    "total": {"device_hours": 30_000, "money": 60_000},
    "part": [
        {"name": "a", "model": "llama-3-8b", "tokens": 0.3e12, "length": 8192, "chip": "h100", "devices": 64,
         "hours": 391, "device_hours": 25_000, "price": 2.0, "money": 50_000, "source": "us"},
        {"name": "b", "kind": "other", "device_hours": 5_000, "price": 2.0, "money": 10_000},
    ],
}  # fmt: skip


def checked(said=SAID, **changes):
    """Findings about a claim; ``changes`` are of its first part."""
    said = deepcopy(said)
    said["part"][0].update(changes)
    said["part"][0] = {k: v for k, v in said["part"][0].items() if v is not None}
    return check(claim_of(said, "ours.toml"), catalogue(), published())


def shipped_claim(name):
    return check(read_claim(name), catalogue(), published())


def verdicts(found, which):
    return {f["of"]: f["verdict"] for f in found["findings"] if f["check"] == which}


def text_of(found, of, which):
    return next(f["text"] for f in found["findings"] if (f["of"], f["check"]) == (of, which))


def test_every_shipped_claim_can_be_checked_and_has_sources():
    wrong = {"deepseek-r1-648", "deepseek-v2-epoch"}
    for name in shipped():
        found = shipped_claim(name)
        assert found["adds_up"] == (name not in wrong), name
        assert found["sources"] and found["covers"] and all(p.source for p in read_claim(name).parts), name
        assert set(found["covers"] + found["leaves_out"] + found["not_said"]) == set(SCOPE)


def test_deepseek_v3_to_the_dollar():
    found = shipped_claim("deepseek-v3")
    claim = read_claim("deepseek-v3")
    money = [p.device_hours * p.price for p in claim.parts]
    assert money == [5_328_000, 238_000, 10_000] and sum(money) == 5_576_000 == claim.totals["money"]
    assert set(verdicts(found, "hours x price").values()) == {"holds"} and verdicts(found, "money") == {
        "total": "holds"
    }
    assert "5,328,000 + 238,000 + 10,000 = USD 5,576,000" in text_of(found, "total", "money")
    assert any(f["verdict"] == "note" and "no meter's" in f["text"] for f in found["findings"])
    shares = {k: round(100 * v, 1) for k, v in found["parts"][0]["shares"]["bf16"].items()}
    assert (shares["none"], shares["half"], shares["full"]) == (35.8, 40.7, 45.5)
    assert {"trials", "data"} == set(found["leaves_out"]) and "salaries" in found["not_said"]


def test_deepseek_r1_has_512_devices_and_not_648():
    found, retold = shipped_claim("deepseek-r1"), shipped_claim("deepseek-r1-648")
    assert found["totals"]["money"] == 294_000 and verdicts(found, "money") == {"total": "holds"}
    assert verdicts(found, "devices x hours") == {"R1-Zero": "holds", "R1": "holds"}
    assert verdicts(retold, "devices x hours") == {"R1-Zero": "fails", "R1": "fails"}
    assert "128,304, and not 101,000" in text_of(retold, "R1-Zero", "devices x hours")


def test_a_rate_that_was_taken_for_a_total_is_found_out():
    found = shipped_claim("deepseek-v2-epoch")
    said = text_of(found, "pre-training", "within the peak")
    assert said.startswith("166 % of the bf16 peak") and "as hours a trillion tokens it would be 20.5 %" in said


def test_the_70b_has_not_labelled_all_tokens():
    found = shipped_claim("llama-3.2")
    assert found["adds_up"] and found["excused"] == ["logits, if the 70B labelled all 9 T tokens"]
    said = text_of(found, found["excused"][0], "within the peak")
    assert said.startswith("408 % of the bf16 peak") and "1.10 T of 9 T tokens" in said
    assert "50.4 %" in text_of(found, "logits, if the 8B labelled all 9 T tokens", "within the peak")
    assert text_of(found, "total", "device-hours") == "370,000 + 460,000 + 86,000 = 916,000"


def test_sums_are_held_to_how_they_were_rounded():
    assert checked()["adds_up"]
    assert not checked(hours=380)["adds_up"]
    assert verdicts(checked(hours=380), "devices x hours") == {"a": "fails"}
    assert verdicts(checked(money=53_000), "hours x price")["a"] == "fails"
    assert verdicts(checked(device_hours=25_001, hours=391), "devices x hours") == {"a": "holds"}  # 391 may be 390.6
    assert verdicts(checked(device_hours=27_000), "device-hours") == {"total": "fails"}
    assert verdicts(checked(money=None), "money") == {"total": "holds"}  # 25,000 hours at 2.00
    assert verdicts(checked(money=None, price=None), "money") == {}


def of_parts(*parts, **total):
    said = {"name": "Ours", "statement": "cheap", "total": total, "part": [{"kind": "other", **p} for p in parts]}
    return check(claim_of(said, "ours.toml"), catalogue(), published())


def test_what_a_part_does_not_say_is_made_of_what_it_says():
    a, b = ({"name": n, "devices": 10, "hours": 10} for n in "ab")
    wrong = of_parts(a, b, device_hours=1_000_000)
    assert wrong["adds_up"] is False and "100 + 100 = 200, and not 1,000,000" in text_of(wrong, "total", "device-hours")
    assert of_parts(a, b, device_hours=200)["adds_up"] is True
    priced = [{**p, "price": 2.5} for p in (a, b)]
    assert of_parts(*priced, money=500)["adds_up"] is True and of_parts(*priced, money=900)["adds_up"] is False
    assert [p["money"] for p in of_parts(*priced, money=500)["parts"]] == [250, 250]
    rate = {"name": "c", "kind": "training", "hours_per_trillion": 180_000, "tokens": 2e12}
    assert of_parts(rate, device_hours=360_000)["adds_up"] is True
    assert of_parts(rate, device_hours=500_000)["adds_up"] is False


def test_a_single_part_is_held_against_the_total_and_some_of_the_parts_are_no_more_than_it():
    one = {"name": "a", "device_hours": 100}
    assert of_parts(one, device_hours=100)["adds_up"] is True and of_parts(one, device_hours=70)["adds_up"] is False
    silent = {"name": "b"}
    assert of_parts(one, silent, device_hours=70)["adds_up"] is False
    assert of_parts(one, silent, device_hours=700)["adds_up"] is None


def test_what_cannot_be_checked_does_not_add_up_and_is_no_failure(capsys, monkeypatch, tmp_path):
    found = of_parts({"name": "a", "money": 5.0})
    assert found["adds_up"] is None and found["findings"] == []
    (tmp_path / "c.toml").write_text('name = "x"\nstatement = "cheap"\n[[part]]\nname = "a"\nkind = "other"\nmoney = 5')
    code, out, _ = ran(capsys, monkeypatch, "--claim", tmp_path / "c.toml")
    assert code == 0 and "It cannot be checked" in out and "adds up" not in out


def test_hours_that_cannot_hold_the_work_fail_and_high_shares_are_noted():
    assert verdicts(checked(tokens=3e12), "within the peak") == {"a": "fails"}
    assert verdicts(checked(tokens=1.4e12), "within the peak") == {"a": "note"}
    assert verdicts(checked(), "within the peak") == {"a": "holds"}
    assert verdicts(checked(tokens=None), "within the peak") == {}


def test_shares_and_energy_and_ratios_that_are_said_are_checked():
    share = next(p["shares"]["bf16"]["half"] for p in checked()["parts"])
    assert verdicts(checked(share=round(share, 2)), "share of the peak") == {"a": "holds"}
    assert verdicts(checked(share=0.9), "share of the peak") == {"a": "fails"}
    for mwh, verdict in ((15, "holds"), (20, "note"), (40, "fails")):
        assert verdicts(checked(mwh=mwh), "energy") == {"a": verdict}
    for says, verdict in ((5, "holds"), (7, "fails")):
        assert verdicts(checked({**SAID, "ratio": [{"of": "a", "to": "b", "says": says}]}), "ratio") == {
            "a / b": verdict
        }


def test_all_readings_that_fail_are_no_excuse():
    said = deepcopy(SAID)
    said["part"].append({**said["part"][0], "reading": "twice", "tokens": 9e12})
    said["part"][0] |= {"reading": "once", "tokens": 8e12}
    found = check(claim_of(said, "ours.toml"), catalogue(), published())
    assert not found["adds_up"] and found["excused"] == []
    said["part"][0]["tokens"] = 0.3e12
    assert check(claim_of(said, "ours.toml"), catalogue(), published())["adds_up"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"chip": "h1000"}, "h1000"),
        ({"model": "llama-9"}, "llama-9"),
        ({"length": None}, "no length"),
        ({"length": 81.5}, "whole number"),
        ({"tokens": "15T"}, "15T"),
        ({"tokens": -1}, "above 0"),
        ({"tokens": True}, "above 0"),
        ({"kind": "magic"}, "magic"),
        ({"active": 8e9}, "more than once"),
        ({"days": 3}, "days"),
        ({"name": ""}, "no name"),
        ({"config": 3, "model": None}, "config.json"),
        ({"precision": "fp7"}, "fp7"),
    ],
)
def test_what_is_wrong_with_a_part_is_said(changes, said):
    with pytest.raises(RecipeError, match=said) as e:
        checked(**changes)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"covers": ["all of it"]}, "all of it.*final run"),
        ({"money_is": "cheap"}, "rental value"),
        ({"part": []}, r"no \[\[part\]\]"),
        ({"part": [3]}, "no table"),
        ({"statement": None}, "statement"),
        ({"ratio": [{"of": "a", "to": "z", "says": 2}]}, "names of parts: a, b"),
        ({"cost": 3}, "cost"),
    ],
)
def test_what_is_wrong_with_a_claim_is_said(change, said):
    with pytest.raises(RecipeError, match=said):
        claim_of({k: v for k, v in {**SAID, **change}.items() if v is not None}, "ours.toml")


def ran(capsys, monkeypatch, *arguments):
    """Exit code and output of the command."""
    monkeypatch.setattr(sys, "argv", ["pennyweight", "plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    told = capsys.readouterr()
    return end.value.code, told.out, told.err


@pytest.mark.parametrize("width", [80, 120])
def test_what_is_printed_fits_the_terminal(capsys, monkeypatch, tmp_path, width):
    monkeypatch.setenv("COLUMNS", str(width))
    config = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 512, "vocab_size": 1024}))
    whole = [("--claim", name) for name in shipped()] + [("--claims",), ("--chips",)]
    whole += [(tmp_path, "--tokens", "1B", "--on", on) for on in ("h100x8", "h20", "gb300x2048")]
    for arguments in whole:
        code, out, err = ran(capsys, monkeypatch, *arguments)
        assert err == "" and code in (0, 1)
        assert max(map(len, out.splitlines())) <= width, arguments


def test_the_command_ends_with_1_where_a_claim_does_not_add_up(capsys, monkeypatch):
    assert ran(capsys, monkeypatch, "--claim", "deepseek-v3")[0] == 0
    code, out, _ = ran(capsys, monkeypatch, "--claim", "deepseek-r1-648")
    assert code == 1 and "It does not add up: 2 checks fail." in out.replace("\u00a0", " ")
    code, out, _ = ran(capsys, monkeypatch, "--claim", "deepseek-v2-epoch", "--json")
    assert code == 1 and json.loads(out)["adds_up"] is False


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "one thing at a time"),
        (("--claim", "deepseek-v3", "--chips"), "one thing at a time"),
        (("--claim", "nothing"), "no claim nothing"),
        (("./nowhere", "--tokens", "1B"), "there is no nowhere; give a Hugging Face model folder"),
        (("./nowhere",), "--tokens is missing"),
        (("./nowhere", "--tokens", "many"), "--tokens many"),
        (("./nowhere", "--tokens", "1B", "--on", "abacus"), "abacus"),
        (("--chips", "--catalogue", "nowhere.toml"), "there is no nowhere.toml"),
    ],
)
def test_bad_input_is_told_in_a_sentence(capsys, monkeypatch, arguments, said):
    code, out, err = ran(capsys, monkeypatch, *arguments)
    assert code == 2 and out == "" and said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments", [["--claims"], ["--claim", "deepseek-v3"], ["--chips"], ["MODEL", "--tokens", "1B"]]
)
def test_the_arithmetic_imports_no_torch(tmp_path, arguments):
    config = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 512, "vocab_size": 1024}))
    code = (
        "import sys; sys.argv = ['pennyweight', 'plan', *sys.argv[1:]]\n"
        "from pennyweight.cli import main\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'transformers', 'numpy', 'matplotlib') if m in sys.modules])"
    )
    words = [str(tmp_path) if a == "MODEL" else a for a in arguments]
    run = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.rstrip().endswith("[]"), run.stdout[-200:] + run.stderr[-300:]


def test_what_the_manual_shows_is_understood(tmp_path):
    manual = (Path(__file__).resolve().parents[1] / "docs" / "bill.md").read_text()
    budget, own, claim = (block.partition("```")[0] for block in manual.split("```toml\n")[1:])
    assert Budget(**tomllib.loads(budget)["budget"]).usd_per_hour == 0.40
    (tmp_path / "own.toml").write_text(own)
    known = catalogue(str(tmp_path / "own.toml"))
    assert known.chip("ours")["bf16"] == 400 and known.chip("h100")["bf16"] == 750
    (tmp_path / "claim.toml").write_text(claim)
    assert check(read_claim(str(tmp_path / "claim.toml")), known, published())["adds_up"]
    assert all(word in manual.replace("\n", " ") for word in (*SCOPE, *MONEY))


@pytest.mark.parametrize(
    ("tokens", "on", "said"),
    [("1B", "h20", "no price is known"), ("300T", "h100", "days"), ("1M", "h100", "seconds"), ("1B", "h100", "USD")],
)
def test_an_outlook_is_told_in_units_that_suit(capsys, monkeypatch, tmp_path, tokens, on, said):
    config = {"model_type": "llama", "hidden_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 512, "vocab_size": 1024}))
    code, out, _ = ran(capsys, monkeypatch, tmp_path, "--tokens", tokens, "--on", on)
    assert code == 0 and said in out and "published runs" in " ".join(out.split())
