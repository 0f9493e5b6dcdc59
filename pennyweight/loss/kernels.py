"""Triton kernels behind ``loss/fused.py``: one program works on one row of V logits, each read three times at most.

Normalisers first, then the sums over the row, then the gradient, over the student's logits. Sums are kept per lane
and added up at the end, so that a row of 150,000 terms loses no precision.

p is the teacher, q the student, d = log p - log q, r = |d|, hi and lo the larger and the smaller of p and q. Since
lo = hi e^-r, every term of a value (p d - (p - q) of the forward KL, say) is hi times a function of r, of second order
and never negative, which is taken from a series where r is small. So nothing cancels where p and q nearly agree.

A NaN stays one. Lanes past the end of a row hold minus infinity, which has no probability.
"""
# pyright: reportOperatorIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import triton  # type: ignore
import triton.language as tl  # type: ignore


@triton.jit
def one_more(top, mass, x, inv):
    """Each lane's maximum and its sum of e^((x - maximum) inv), with one more x."""
    e = tl.exp(-tl.abs(x - top) * inv)
    return tl.where(x > top, x, top), tl.where(x > top, mass * e + 1.0, mass + e)


@triton.jit
def whole(top, mass, inv):
    """The row's maximum and its sum of e^((x - maximum) inv), from each lane's."""
    highest = tl.max(top, 0)
    return highest, tl.sum(mass * tl.exp((top - highest) * inv), 0)


@triton.jit
def log1p_rest(z):
    """log(1 + z) - z for z from -1 to 0, exact in relative terms."""
    f = z / (2.0 + z)
    g = f * f
    series = 2 / 7 + g * (2 / 9 + g * (2 / 11 + g * (2 / 13)))
    half = 0.5 * z * z
    near = f * (half + g * (2 / 3 + g * (2 / 5 + g * series))) - half
    return tl.where(z > -0.5, near, tl.log(1.0 + z) - z)


@triton.jit
def terms(d, p, q, a, b, KIND: tl.constexpr):
    """Terms of the value, and k, through which the gradient is made (p - q itself for the forward KL).

    a is the share of p (jsd) or of the first side (skew) in the mixture m, b = 1 - a.
    """
    more = d > 0
    hi = tl.where(more, p, q)
    r = tl.abs(d)
    series = 1 / 120 - r * (1 / 720 - r * (1 / 5040 - r * (1 / 40320 - r * (1 / 362880))))
    h = r * r * (0.5 - r * (1 / 6 - r * (1 / 24 - r * series)))
    e = tl.exp(-r)
    near = tl.where(r < 0.7, h - r, e - 1.0)  # e^-r - 1
    h = tl.where(r < 0.7, h, r + near)  # r + e^-r - 1
    c = -tl.where(r < 0.7, h + r * near, near + r * e)  # 1 - (1 + r) e^-r
    if KIND == "forward_kl":
        value = hi * tl.where(more, h, c)
        k = hi * tl.where(more, -near, near)
    elif KIND == "reverse_kl":
        value = hi * tl.where(more, c, h)
        k = d
    elif KIND == "tvd":
        value = -0.5 * hi * near
        k = tl.where(more, 1.0, tl.where(d < 0, -1.0, d))
    elif KIND == "jsd":
        share = tl.where(more, b, a)  # of lo in m
        z = share * near  # m / hi - 1
        rest = log1p_rest(z)
        value = hi * (share * c - (z * z + (1.0 + z) * rest))
        k = z + rest + tl.where(more, r, 0.0)  # log(m / q)
    else:
        first = more if KIND == "skew_kl" else d < 0  # whether hi is the first side
        z = tl.where(first, b, a) * near
        m = tl.where(first, a + b * e, b + a * e)  # over hi, as 1 + z
        k = tl.where(first, -z, b * near) / m  # the first side / m - 1
        close = (k > -0.5) & (first == 0)  # the first side is lo, but near to m
        rest = log1p_rest(tl.where(close, k, z))
        w = tl.where(close, k, z) + rest
        lo_term = tl.where(close, m * (k * k + (1.0 + k) * rest), -e * (r + w) - b * near)
        value = hi * tl.where(first, -rest, lo_term)
        if KIND == "skew_reverse_kl":
            k = a * k + tl.where(close, -w, w + tl.where(more, r, 0.0))  # and log(m / q)
    return value, k


@triton.jit
def sides(t, s, top_p, top_q, per_p, per_q, shift, inv):
    """d, from the logits first and then normalised, infinite ones made 1e30 so that 0 * d is 0; p; q."""
    d = tl.where(t == s, 0.0, t - s) * inv + shift
    d = tl.where(d > 1e30, 1e30, tl.where(d < -1e30, -1e30, d))
    return d, tl.exp((t - top_p) * inv) * per_p, tl.exp((s - top_q) * inv) * per_q


@triton.jit
def normalisers(teacher, student, V, inv, WITH_CE: tl.constexpr, BLOCK: tl.constexpr):
    """Both rows' maximum and sum of exponentials, and the student's sum at temperature 1 where it is needed."""
    lane = tl.arange(0, BLOCK)
    top_p = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
    top_q, mass_p, mass_q, mass_1 = top_p, tl.zeros_like(top_p), tl.zeros_like(top_p), tl.zeros_like(top_p)
    for at in range(0, V, BLOCK):
        here = at + lane < V
        s = tl.load(student + at + lane, mask=here, other=float("-inf"))
        t = tl.load(teacher + at + lane, mask=here, other=float("-inf"))
        if WITH_CE:
            _, mass_1 = one_more(top_q, mass_1, s, 1.0)
        top_p, mass_p = one_more(top_p, mass_p, t, inv)
        top_q, mass_q = one_more(top_q, mass_q, s, inv)
    _, mass_1 = whole(top_q, mass_1, 1.0)
    top_p, mass_p = whole(top_p, mass_p, inv)
    top_q, mass_q = whole(top_q, mass_q, inv)
    return top_p, top_q, mass_p, mass_q, mass_1


@triton.jit
def shift_of(top_p, top_q, mass_p, mass_q, inv):
    """The difference of the log-normalisers, taken in float64."""
    tops = (top_q.to(tl.float64) - top_p.to(tl.float64)) * inv
    return (tl.log(mass_q.to(tl.float64)) - tl.log(mass_p.to(tl.float64)) + tops).to(tl.float32)


@triton.jit
def plain(s, top, per_1):
    """The student's probabilities at temperature 1, and the terms of their entropy below the log-normaliser."""
    q = tl.exp(s - top) * per_1
    return q, tl.where(q > 0, q * (s - top), 0.0)


@triton.jit
def dense_kernel(
    teacher, student, kd_weight, ce_weight, value, log_mass, entropy, V, teacher_stride, student_stride,
    inv, a, b, factor, slope, cap,
    KIND: tl.constexpr, CAPPED: tl.constexpr, WITH_CE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: the divergence, and the weighted gradient over the student's logits.

    ``factor`` and ``slope`` are what the gradients of divergence and cross-entropy are to be multiplied by besides
    their weights, and a capped head's (cap - s) (cap + s).
    """
    row = tl.program_id(0).to(tl.int64)
    teacher += row * teacher_stride
    student += row * student_stride
    lane = tl.arange(0, BLOCK)
    top_p, top_q, mass_p, mass_q, mass_1 = normalisers(teacher, student, V, inv, WITH_CE, BLOCK)
    per_p, per_q, per_1 = 1.0 / mass_p, 1.0 / mass_q, 1.0 / mass_1
    shift = shift_of(top_p, top_q, mass_p, mass_q, inv)
    values = tl.zeros([BLOCK], tl.float32)
    sums, ones, below = tl.zeros_like(values), tl.zeros_like(values), tl.zeros_like(values)
    for at in range(0, V, BLOCK):
        here = at + lane < V
        s = tl.load(student + at + lane, mask=here, other=float("-inf"))
        t = tl.load(teacher + at + lane, mask=here, other=float("-inf"))
        d, p, q = sides(t, s, top_p, top_q, per_p, per_q, shift, inv)
        term, k = terms(d, p, q, a, b, KIND)
        values += term
        # p - q sums to zero; what it sums to here is the rounding of d's normaliser, which q carries.
        sums += k if KIND == "forward_kl" else q * k
        ones += q
        if WITH_CE:
            below += plain(s, top_q, per_1)[1]
    tl.store(value + row, tl.sum(values, 0))
    total = tl.sum(sums, 0) / tl.sum(ones, 0)
    kd = tl.load(kd_weight + row) * factor
    ce = 0.0
    if WITH_CE:
        ce = tl.load(ce_weight + row) * slope
        tl.store(log_mass + row, (tl.log(mass_1.to(tl.float64)) + top_q).to(tl.float32))
        tl.store(entropy + row, tl.log(mass_1.to(tl.float64)).to(tl.float32) - tl.sum(below, 0))
    for at in range(0, V, BLOCK):
        here = at + lane < V
        s = tl.load(student + at + lane, mask=here, other=float("-inf"))
        t = tl.load(teacher + at + lane, mask=here, other=float("-inf"))
        d, p, q = sides(t, s, top_p, top_q, per_p, per_q, shift, inv)
        _, k = terms(d, p, q, a, b, KIND)
        g = kd * (k - q * total if KIND == "forward_kl" else q * (k - total))
        if WITH_CE:
            g += ce * plain(s, top_q, per_1)[0]
        if CAPPED:
            g *= (cap - s) * (cap + s)
        tl.store(student + at + lane, g, mask=here)


@triton.jit
def softmax_kernel(
    logits, out, weight, log_mass, entropy, V, logits_stride, out_stride, inv, slope, cap,
    CAPPED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row of softmax(logits inv) times weight and slope, in ``out``, which may be ``logits``; two reads, one write.

    The entropy is that of this softmax.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * logits_stride
    out += row * out_stride
    lane = tl.arange(0, BLOCK)
    top = tl.full([BLOCK], -3.4028234663852886e38, tl.float32)
    mass, below = tl.zeros_like(top), tl.zeros_like(top)
    for at in range(0, V, BLOCK):
        top, mass = one_more(top, mass, tl.load(logits + at + lane, mask=at + lane < V, other=float("-inf")), inv)
    top, mass = whole(top, mass, inv)
    per = tl.load(weight + row) * slope
    for at in range(0, V, BLOCK):
        s = tl.load(logits + at + lane, mask=at + lane < V, other=float("-inf"))
        x = (s - top) * inv
        q = tl.exp(x) * (1.0 / mass)
        below += tl.where(q > 0, q * x, 0.0)
        g = q * per
        if CAPPED:
            g *= (cap - s) * (cap + s)
        tl.store(out + at + lane, g, mask=at + lane < V)
    log = tl.log(mass.to(tl.float64))
    tl.store(log_mass + row, (log + top.to(tl.float64) * inv).to(tl.float32))
    tl.store(entropy + row, log.to(tl.float32) - tl.sum(below, 0))


COMPILED = isinstance(softmax_kernel, triton.runtime.JITFunction)
"""False under Triton's interpreter: TRITON_INTERPRET was set when it was imported."""
