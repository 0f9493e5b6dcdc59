"""The split goes by content alone, and its overlap check finds what is planted."""

from __future__ import annotations

import random

import pytest

from pennyweight.data.split import is_held_out, normalised, split
from pennyweight.errors import DataError
from pennyweight.records import Message, Sample, sha256_text


def ask(prompt, response="r"):
    return Sample((Message("user", prompt),), response, "s")


def prompts(count):
    words = [f"w{i}" for i in range(500)]
    rng = random.Random()
    return [ask(" ".join(rng.choices(words, k=20))) for _ in range(count)]


def on_side(held_out, make, fraction=0.3):
    """The first text of ``make(0), make(1), ...`` that falls on the side asked for."""
    return next(s for s in map(make, range(10_000)) if is_held_out(s.prompt_hash, fraction) == held_out)


def test_sides_depend_on_nothing_but_the_prompt():
    samples = prompts(400)
    whole = split(samples, 0.3, 500)
    shuffled = random.sample(samples, len(samples))
    again = split(shuffled[:300] + prompts(50), 0.3, 500)
    side = {s.prompt_hash: True for s in whole.evaluation} | {s.prompt_hash: False for s in whole.train}
    for s in again.train + again.evaluation:
        if s.prompt_hash in side:
            assert side[s.prompt_hash] == (s in again.evaluation)
    assert split(shuffled, 0.3, 500).evaluation == whole.evaluation
    assert whole.train == [s for s in samples if s in whole.train]
    for s in whole.evaluation:
        assert is_held_out(s.prompt_hash, 0.3)
        assert is_held_out(s.prompt_hash, 0.6)


def test_the_share_is_near_the_fraction():
    hashes = [sha256_text(str(random.random())) for _ in range(20_000)]
    for fraction in (0.05, 0.5, 0.9):
        assert abs(sum(is_held_out(h, fraction) for h in hashes) / 20_000 - fraction) < 0.02


def test_beyond_the_limit_is_left_out_not_trained_on():
    samples = prompts(300)
    whole, limited = split(samples, 0.4, 10_000), split(samples, 0.4, 7)
    assert limited.train == whole.train
    assert [s.prompt_hash for s in limited.evaluation] == sorted(s.prompt_hash for s in whole.evaluation)[:7]


def test_fewer_prompts_to_train_on_are_some_of_more_with_all_their_responses():
    samples = [ask(s.prompt[0].content, r) for s in prompts(200) for r in ("a", "b")]
    whole = split(samples, 0.3, 500)
    few, more = (split(samples, 0.3, 500, n).train for n in (20, 50))
    assert len(few) == 40 and len(more) == 100 and set(few) < set(more) < set(whole.train)
    assert few == [s for s in whole.train if s in few]
    assert split(random.sample(samples, len(samples)), 0.3, 500, 20).evaluation == whole.evaluation
    assert set(split(random.sample(samples, len(samples)), 0.3, 500, 20).train) == set(few)
    assert split(samples, 0.3, 500, 10_000).train == whole.train


def test_repeats_go_and_several_responses_stay_in_train_only():
    kept = on_side(False, lambda i: ask(f"prompt {i}"))
    held = on_side(True, lambda i: ask(f"prompt {i}"))
    more = [Sample(s.prompt, f"{s.response} {i}", "s") for s in (kept, held) for i in range(3)]
    found = split([kept, held, kept, *more, held], 0.3, 10)
    assert found.duplicates == 2
    assert len(found.train) == 4
    assert len(found.evaluation) == 1
    assert split([*reversed(more), held, kept], 0.3, 10).evaluation == found.evaluation


def test_planted_overlap_is_found():
    base = "one two three four five six seven eight nine ten eleven twelve thirteen"
    shared = on_side(True, lambda i: ask(f"{base} eval{i}"))
    copy = on_side(False, lambda i: ask(f"train{i} {base.upper()} and on"))
    loud = "Is It TRUE,  that... cats sleep"
    evened = on_side(True, lambda i: ask(f"{loud} {i}?"))
    number = evened.prompt[0].content.split()[-1].rstrip("?")
    variants = (
        ask(f"is it true that{dots} cats SLEEP {number}") for dots in ["", "!", "?", ".", "!!", "??", ";", "…"] * 40
    )
    spellings = (v for k, v in enumerate(variants) if not is_held_out(v.prompt_hash, 0.3) or k > 300)
    plain = on_side(True, lambda i: ask(f"nothing like it {i}"))
    found = split([shared, copy, evened, next(spellings), plain], 0.3, 10)
    assert found.overlap["eval"] == 3
    assert found.overlap["normalised"] == 1
    assert found.overlap["ngram"] == 2
    assert found.overlap["examples"][0].startswith("Is It TRUE, that")
    assert len(found.overlap["examples"]) == 2
    assert all(len(e) <= 80 for e in found.overlap["examples"])


def test_no_overlap_between_different_texts():
    found = split(prompts(200), 0.3, 100)
    assert found.overlap["normalised"] == found.overlap["ngram"] == 0
    assert found.overlap["examples"] == []


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("Hello,  World!", "hello world", True),
        ("12 - 5 =", "12 + 5 =", False),
        ("5.7", "57", False),
        ("½ ｃａｔ", "1⁄2 cat", True),
        ("안녕?", "안녕", True),
        ("😀", "😁", False),
    ],
)
def test_normalising(a, b, same):
    assert (normalised(a) == normalised(b)) is same


def test_plain_texts_split_by_their_text():
    texts = [Sample((), f"text number {i}", "s") for i in range(100)]
    found = split(texts, 0.3, 100)
    assert len(found.train) + len(found.evaluation) == 100
    assert {s.response for s in found.evaluation} == {s.response for s in texts if is_held_out(s.prompt_hash, 0.3)}


def test_an_empty_side_is_refused_with_the_cure():
    kept = on_side(False, lambda i: ask(f"p{i}"))
    held = on_side(True, lambda i: ask(f"p{i}"))
    with pytest.raises(DataError, match="none is left to evaluate on.*more data or a larger data.eval_fraction"):
        split([kept], 0.3, 10)
    with pytest.raises(DataError, match="none is left to train on.*a smaller data.eval_fraction"):
        split([held], 0.3, 10)
    with pytest.raises(DataError, match="of 0 distinct samples"):
        split([], 0.3, 10)
