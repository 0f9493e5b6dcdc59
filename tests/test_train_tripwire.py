"""Tripwires: what trips, what does not, and that their memory goes through a checkpoint."""

from __future__ import annotations

import math

from pennyweight.train.tripwire import Tripwire

LIMITS = {"loss_spike": 3.0, "entropy_low": 0.02, "entropy_high": 50.0, "patience": 3}


def feed(wire, rows):
    """What the wire says, row after row of (loss, norm, cross-entropy, entropy)."""
    return [wire.check(*row) for row in rows]


def test_a_healthy_run_never_trips():
    assert not any(feed(Tripwire(**LIMITS), [(3 / (i + 1), 1.0, 2.0, 1.5) for i in range(200)]))


def test_no_number_trips_at_once():
    for bad in (math.nan, math.inf):
        assert Tripwire(**LIMITS).check(bad, 1.0, 1.0, 1.0)
        assert Tripwire(**LIMITS).check(1.0, bad, 1.0, 1.0)


def test_a_spike_must_last():
    steady = [(1.0, 1.0, None, None)] * 50
    once = feed(Tripwire(**LIMITS), [*steady, (9.0, 1.0, None, None), *steady])
    assert not any(once)
    lasting = feed(Tripwire(**LIMITS), [*steady, *[(50.0, 1.0, None, None)] * 3])
    assert lasting[-1] and "running mean" in lasting[-1] and not lasting[-2]


def test_entropy_is_watched_in_both_directions():
    for entropy, word in ((1e-4, "collapse"), (900.0, "explo")):
        found = feed(Tripwire(**LIMITS), [(2.0, 1.0, 2.0, entropy)] * 3)
        assert found[-1] and word in found[-1] and not any(found[:-1])


def test_its_memory_survives_a_checkpoint():
    first = Tripwire(**LIMITS)
    feed(first, [(1.0, 1.0, None, None)] * 50)
    again = Tripwire(**LIMITS, mean_loss=first.state()["mean_loss"])
    assert feed(again, [(50.0, 1.0, None, None)] * 3)[-1] == feed(first, [(50.0, 1.0, None, None)] * 3)[-1]
