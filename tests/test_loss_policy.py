"""Policy-gradient terms: against autograd of the plain formula in float64, and against TRL's loss on the same batch."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from truth import fresh

from pennyweight.loss.policy import Policy, k3, policy_terms

LENGTHS = (5, 1, 9, 3)
N = sum(LENGTHS)


def drawn(seed: int, level: str, kl: float, apart: float = 0.4) -> tuple[torch.Tensor, Policy]:
    """Log-probabilities, and a batch of four responses, in float64."""
    g = torch.Generator().manual_seed(seed)
    logp = -3 * torch.rand(N, generator=g, dtype=torch.float64)
    near = lambda: logp + apart * torch.randn(N, generator=g, dtype=torch.float64)  # noqa: E731
    row = torch.repeat_interleave(torch.arange(4), torch.tensor(LENGTHS))
    per_response = torch.randn(4, generator=g, dtype=torch.float64)[row], torch.rand(4, generator=g).double()[row]
    return logp, Policy(*per_response, row, near(), near() if kl else None, 0.2, 0.28, kl, level)  # type: ignore[arg-type]


def plain(logp: torch.Tensor, p: Policy) -> torch.Tensor:
    """The sum of the terms, as the papers write them."""
    total = torch.zeros((), dtype=logp.dtype)
    for i in range(4):
        at = p.row == i
        assert p.old is not None
        gap = logp[at] - p.old[at]
        ratio = torch.exp(gap.mean()).expand(int(at.sum())) if p.level == "sequence" else torch.exp(gap)
        a = p.advantage[at]
        terms = -torch.minimum(ratio * a, ratio.clamp(1 - p.low, 1 + p.high) * a)
        if p.reference is not None:
            back = p.reference[at] - logp[at]
            terms = terms + p.kl * (torch.exp(back) - back - 1)
        total = total + (p.weight[at] * terms).sum()
    return total


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kl", [0.0, 0.05])
@pytest.mark.parametrize("trial", range(3))
def test_value_and_gradient_are_those_of_the_plain_formula(level, kl, trial):
    seed = fresh()
    logp, p = drawn(seed, level, kl)
    logp.requires_grad_()
    want = plain(logp, p)
    want.backward()
    made = policy_terms(logp.detach(), p)
    assert float(made.value.sum()) == pytest.approx(float(want.detach()), abs=1e-12), f"seed {seed}"
    assert logp.grad is not None
    torch.testing.assert_close(-made.pull, logp.grad, rtol=1e-12, atol=1e-12, msg=f"seed {seed}")
    assert 0 < made.sums["clipped"] < N or level == "sequence"


def test_without_a_change_of_weights_the_pull_is_the_advantage():
    logp, p = drawn(fresh(), "token", 0.0)
    made = policy_terms(logp, replace(p, old=None))
    torch.testing.assert_close(made.pull, p.weight * p.advantage)
    assert made.sums == {"clipped": 0, "kl_old": 0}
    same = policy_terms(logp, replace(p, old=logp.clone()))
    torch.testing.assert_close(same.pull, made.pull)


def test_a_clipped_token_pulls_no_further_and_may_come_back():
    row, ones = torch.arange(4), torch.ones(4, dtype=torch.float64)
    old, advantage = torch.zeros(4, dtype=torch.float64), torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    logp = torch.log(torch.tensor([1.5, 1.5, 0.5, 0.5], dtype=torch.float64))
    pull = policy_terms(logp, Policy(advantage, ones, row, old, low=0.2, high=0.28)).pull
    torch.testing.assert_close(pull, torch.tensor([0.0, -1.5, 0.5, 0.0], dtype=torch.float64))


def test_k3_is_never_negative_and_its_mean_is_the_kl():
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    q, p = torch.softmax(torch.randn(2, 7, generator=g, dtype=torch.float64), -1)
    value, _ = k3((p / q).log())
    assert (value >= 0).all()
    assert float((q * value).sum()) == pytest.approx(float((q * (q / p).log()).sum()), rel=1e-12), f"seed {seed}"


def test_the_kl_to_what_wrote_is_the_exact_one_in_the_mean():
    """Over all tokens, each as often as the old weights write it: KL(old || new), not what comes of the other way."""
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    for _ in range(5):
        old, new = torch.log_softmax(1.5 * torch.randn(2, 6, generator=g, dtype=torch.float64), -1)
        zero, row = torch.zeros(1, dtype=torch.float64), torch.zeros(1, dtype=torch.int64)
        of_each = [
            policy_terms(new[i : i + 1], Policy(zero, zero, row, old[i : i + 1])).sums["kl_old"] for i in range(6)
        ]
        mean = float((old.exp() * torch.tensor(of_each, dtype=torch.float64)).sum())
        assert mean == pytest.approx(float((old.exp() * (old - new)).sum()), rel=1e-10), f"seed {seed}"


@pytest.mark.parametrize("kind", ["grpo", "dapo", "dr_grpo"])
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("kl", [0.0, 0.04])
def test_the_loss_is_trls(kind, level, kl):
    """TRL's own ``_compute_loss`` on logits that are given, beside ours with the weights of each normalisation."""
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", reason="TRL is not installed (pip install '.[peers]')")
    from pennyweight.methods.grpo import response_weights

    seed = fresh()
    logp, p = drawn(seed, level, kl)
    names = {"grpo": "response", "dapo": "token", "dr_grpo": "constant"}
    p = replace(p, weight=response_weights(LENGTHS, names[kind], 12).double()[p.row])
    made = policy_terms(logp, p)
    want, slope = trls(trainer, logp, p, kind)
    assert float(made.value.sum() / N) == pytest.approx(want, rel=1e-6), f"seed {seed}"
    torch.testing.assert_close(-made.pull / N, slope, rtol=1e-5, atol=1e-7, msg=f"seed {seed}")


def trls(trainer, logp, p, kind):
    """TRL's loss, and its gradient with respect to the log-probabilities."""
    width, mask = max(LENGTHS), torch.zeros(4, max(LENGTHS))
    for i, n in enumerate(LENGTHS):
        mask[i, :n] = 1
    laid = lambda x: torch.zeros(4, width, dtype=x.dtype).masked_scatter(mask.bool(), x)  # noqa: E731
    leaf = laid(logp).requires_grad_()
    same = lambda x, **kwargs: x  # noqa: E731
    settings = {
        "max_completion_length": 12,
        "loss_type": kind,
        "importance_sampling_level": p.level,
        "beta": p.kl,
        "epsilon_low": p.low,
        "epsilon_high": p.high,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "aux_loss_enabled": False,
        "use_vllm": False,
        "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": False,
        "args": SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(num_processes=1, gather=same, reduce=same),
        "_get_per_token_logps_and_entropies": lambda *a, **k: (leaf, torch.zeros(4, width), None),
    }

    class Quiet(dict):
        def __missing__(self, key):
            return self.setdefault(key, [])

    settings["_metrics"] = {"train": Quiet()}
    inputs = {
        "prompt_ids": torch.zeros(4, 1, dtype=torch.long),
        "prompt_mask": torch.ones(4, 1),
        "completion_ids": torch.zeros(4, width, dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.stack([p.advantage[p.row == i][0] for i in range(4)]),
        "old_per_token_logps": laid(p.old),
        "num_items_in_batch": mask.sum(),
    }
    if p.reference is not None:
        inputs["ref_per_token_logps"] = laid(p.reference)
    loss = trainer.GRPOTrainer._compute_loss(SimpleNamespace(**settings), None, inputs)
    loss.backward()
    assert leaf.grad is not None
    return float(loss.detach()), leaf.grad[mask.bool()]
