"""Samples -> token ids and which of them are learnt, by the model's own chat template.

Forms:
    chat template, and a prompt: the template's rendering. Every assistant turn is learnt with its end-of-turn token,
        unless the template rewrites earlier turns when the conversation goes on (strips their reasoning, say); of
        such turns only what the template leaves as it was generated is learnt, and always the last turn. A response
        that the template would change (but for space around a thought and an answer) stands as it was written, since
        that is what is generated; a thought that the template opens in front of it is not opened twice.
    no chat template, and a prompt: the contents of the turns, each ending in a newline, then the response, then the
        end-of-text token. The response alone is learnt. A beginning-of-text token only if the tokenizer adds one.
    plain text: beginning-of-text token (else, for base models without one, the end-of-text token, which stands
        between texts), text, end-of-text token; all learnt but the first token, which nothing predicts.

A sample that is not complete gets no end token. Training and generation see the same prompt: ``prompt_ids`` always
begins ``encode(...).ids``; where a tokenizer would merge across that border, the two sides are tokenised apart.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from pennyweight.data.thought import CLOSE, OPEN, continued, opened_by, parted, same
from pennyweight.errors import DataError, ModelError
from pennyweight.model.spelling import is_byte_level, spelt
from pennyweight.records import Encoded, Message, Prompt, Sample

_MARK = "\u2063response\u2063"  # invisible separators: no template trims or writes them


def prompt_ids(sample: Sample, tokenizer: Any) -> list[int]:
    """Token ids to generate the response from.

    Raises:
        DataError: the template refuses the conversation, or a turn holds a control token.
    """
    if not sample.prompt:
        return _opening(tokenizer)
    if tokenizer.chat_template:
        return _ids(tokenizer, _rendered(tokenizer, sample.prompt, True))
    return _added(tokenizer) + _ids(tokenizer, _plain_prompt(sample), literal=True)


def prompt_of(sample: Sample, tokenizer: Any) -> Prompt:
    """What a teacher is asked, in each of its forms; raises as ``prompt_ids``."""
    if sample.prompt and tokenizer.chat_template:
        text = unopened(_rendered(tokenizer, sample.prompt, True), tokenizer)
    else:
        text = _plain_prompt(sample)
    return Prompt(sample.prompt, text, tuple(prompt_ids(sample, tokenizer)))


def unopened(text: str, tokenizer: Any) -> str:
    """``text`` without the beginning-of-text token that the tokenizer puts in front of every text by itself."""
    own = _added(tokenizer)
    return text.removeprefix(tokenizer.decode(own)) if own else text


def encode(sample: Sample, tokenizer: Any, context: int | None = None, too_long: str = "refuse") -> Encoded | None:
    """A sample as token ids and loss mask; None when it is longer than ``context`` and ``too_long`` is ``drop``.

    Args:
        tokenizer: of transformers.
        context: most tokens; None for any number.
        too_long: ``refuse``, ``drop``, or ``truncate``, which keeps the first ``context`` tokens.

    Raises:
        DataError: there is no response, the sample is too long, or it cannot be rendered.
        ModelError: the tokenizer cannot tell where earlier turns are.
    """
    if sample.response is None:
        raise DataError("a sample has no response yet; let the teacher write it (data.responses.by=auto)")
    whole = _encoded(sample, sample.response, tokenizer)
    if context is None or len(whole.ids) <= context:
        return whole
    if too_long == "drop":
        return None
    cut = Encoded(whole.id, whole.ids[:context], whole.mask[:context])
    if too_long == "truncate" and True in cut.mask:
        return cut
    raise DataError(f"a sample is {len(whole.ids)} tokens long, {_over(cut, context)}")


def encode_all(samples: Sequence[Sample], tokenizer: Any, context: int, too_long: str) -> list[Encoded]:
    """``encode`` of many samples, in order; those in which nothing is learnt are left out.

    A plain text is never too long: it becomes consecutive windows of ``context`` tokens, of which each but the first
    begins with the last token of the one before, not learnt again. Windows are called ``ID:0``, ``ID:1`` and so on
    after the sample; a text that fits keeps its id.

    Raises:
        DataError: as ``encode``, with the number of the first sample concerned and how many are; or none is left.
    """
    out: list[Encoded] = []
    refused: list[tuple[int, Encoded, int]] = []
    for number, sample in enumerate(samples):
        whole = _numbered(number, sample, tokenizer)
        cut = Encoded(whole.id, whole.ids[:context], whole.mask[:context])
        if len(whole.ids) <= context:
            out.append(whole)
        elif not sample.prompt:
            out += _windows(whole, context)
        elif too_long == "truncate" and True in cut.mask:
            out.append(cut)
        elif too_long != "drop":
            refused.append((number, cut, len(whole.ids)))
    if refused:
        number, cut, length = refused[0]
        raise DataError(
            f"{len(refused):,} of {len(samples):,} samples are too long; the first, {_begins(samples[number])}, has "
            f"{length} tokens: {_over(cut, context)}"
        )
    out = [e for e in out if e.loss_positions]
    if not out:
        raise DataError(
            f"nothing is left to learn of {len(samples):,} samples; give longer texts or a larger data.context"
        )
    return out


def learnt_bytes(encoded: Sequence[Encoded], tokenizer: Any) -> list[int]:
    """UTF-8 bytes that each sample's learnt tokens spell: what bits per byte divides by. Control tokens spell none.

    A token may be part of a character; it counts for the bytes it holds. A space that the tokenizer itself puts at
    the start of a text is not counted.
    """
    used, added = {i for e in encoded for i in e.ids}, tokenizer.added_tokens_decoder
    names, by_byte = {i: tokenizer.convert_ids_to_tokens(i) for i in used}, is_byte_level(tokenizer)
    of = {i: len(spelt(name, added.get(i), by_byte) or b"") for i, name in names.items()}
    control = {i for i, t in added.items() if t.special}
    prepends = tokenizer.convert_ids_to_tokens(_ids(tokenizer, "a"))[0].startswith("▁")
    out = []
    for e in encoded:
        total = sum(of[i] for i, m in zip(e.ids, e.mask, strict=True) if m)
        if prepends:
            pieces = tokenizer.convert_ids_to_tokens(list(e.ids))
            total -= sum(
                e.mask[t] and e.ids[t - 1] in control and pieces[t].startswith("▁") for t in range(1, len(e.ids))
            )
        out.append(total)
    return out


def _begins(sample: Sample) -> str:
    """A sample by its first words, which can be looked for in a file."""
    text = " ".join((sample.prompt[-1].content if sample.prompt else sample.response or "").split())
    return repr(text if len(text) <= 50 else text[:49] + "…")


def _numbered(number: int, sample: Sample, tokenizer: Any) -> Encoded:
    """``encode`` with the sample's number in front of what goes wrong."""
    try:
        whole = encode(sample, tokenizer)
    except DataError as e:
        raise DataError(f"sample {number}: {e}") from None
    assert whole is not None  # without a context nothing is dropped
    return whole


def _over(cut: Encoded, context: int) -> str:
    """Why a sample cut to the context is refused, and the cure."""
    why = "" if True in cut.mask else " and its prompt alone leaves no room for a response"
    return f"the context is {context}{why}; set data.too_long=drop, or a larger data.context"


def _windows(whole: Encoded, context: int) -> list[Encoded]:
    out = []
    for k, start in enumerate(range(0, len(whole.ids) - 1, context - 1)):
        mask = (False, *whole.mask[start + 1 : start + context])
        out.append(Encoded(f"{whole.id}:{k}", whole.ids[start : start + context], mask))
    return out


def _encoded(sample: Sample, response: str, tokenizer: Any) -> Encoded:
    """The whole sample."""
    begin = prompt_ids(sample, tokenizer)
    mask = [False] * len(begin)
    end = [tokenizer.eos_token_id] if sample.complete and tokenizer.eos_token_id is not None else []
    if not sample.prompt:
        rest = _ids(tokenizer, response, literal=True) + end
    elif not tokenizer.chat_template:
        rest = _ids_after(tokenizer, _plain_prompt(sample), response, literal=True) + end
    else:
        prompt = _rendered(tokenizer, sample.prompt, True)
        mask = _earlier_turns(sample.prompt, prompt, tokenizer, len(begin))
        text, closed = _last_turn(sample, response, prompt, tokenizer)
        rest = _ids_after(tokenizer, prompt, text) + ([] if closed else end)
    learnt = [*mask, *[True] * len(rest)]
    return Encoded(sample.id, tuple(begin + rest), tuple(yes and t > 0 for t, yes in enumerate(learnt)))


def _plain_prompt(sample: Sample) -> str:
    return "".join(f"{m.content}\n" for m in sample.prompt)


def _last_turn(sample: Sample, response: str, prompt: str, tokenizer: Any) -> tuple[str, bool]:
    """What follows the prompt's rendering, and whether the template's own end-of-turn token closes it."""
    whole = _rendered(tokenizer, (*sample.prompt, Message("assistant", response)), False)
    tail = _tail(sample.prompt, tokenizer)
    body = whole[len(prompt) : len(whole) - len(tail)]
    opening = opened_by(prompt)
    if not (whole.startswith(prompt) and whole.endswith(tail) and same(opening + body, response)):
        body = continued(response, opening, sample.complete)
    end = _end_of_turn(tail, tokenizer)
    return body + (end if sample.complete else ""), bool(end)


def _earlier_turns(prompt: Sequence[Message], text: str, tokenizer: Any, count: int) -> list[bool]:
    """Mask of the prompt's ``count`` tokens: True on assistant turns that stand there as they were generated."""
    spans = []
    for i in (i for i, m in enumerate(prompt) if m.role == "assistant" and i):
        start = _rendered(tokenizer, prompt[:i], True)
        through = _rendered(tokenizer, prompt[: i + 1], False)
        tail = _tail(prompt[:i], tokenizer)
        through = through[: len(through) - len(tail)] + _end_of_turn(tail, tokenizer)
        if through.startswith(start) and text.startswith(through):
            spans.append((len(start), len(through)))
    if not spans:
        return [False] * count
    if not tokenizer.is_fast:
        raise ModelError(
            "this tokenizer does not say where its tokens stand in the text, so earlier assistant turns cannot be "
            "found; give conversations of one turn, or a model folder with a tokenizer.json"
        )
    coded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    return [any(a <= start and end <= b for a, b in spans) for start, end in coded["offset_mapping"]]


def _tail(before: Sequence[Message], tokenizer: Any) -> str:
    """What the template writes after an assistant turn that ends the conversation."""
    return _rendered(tokenizer, (*before, Message("assistant", _MARK)), False).rpartition(_MARK)[2]


def _end_of_turn(tail: str, tokenizer: Any) -> str:
    """``tail`` up to its first control token, which ends the turn; empty where there is none."""
    found = _control(tokenizer, len(tokenizer)).search(tail)
    return tail[: found.end()] if found else ""


def _rendered(tokenizer: Any, messages: Sequence[Message], to_answer: bool) -> str:
    """The chat template's text; ``to_answer`` opens the assistant's turn."""
    for message in messages:
        text = message.content
        if message.role == "assistant":  # who may think, also where the marks of it are control tokens
            text = text.replace(OPEN, "").replace(CLOSE, "")
        found = _control(tokenizer, len(tokenizer)).search(text)
        if found:
            raise DataError(
                f"the {message.role} turn holds the control token {found[0]!r}, which would break the conversation "
                "apart; remove it from the row"
            )
    apart = "reasoning_content" in str(tokenizer.chat_template)
    turns = [_turn(m, apart and m.role == "assistant") for m in messages]
    try:
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=to_answer)
    except Exception as e:
        roles = ", ".join(m.role for m in messages)
        raise DataError(
            f"the model's chat template refuses a conversation of {roles} ({e}); change its roles or their order"
        ) from None


def _turn(message: Message, apart: bool) -> dict[str, str]:
    """A turn as templates take it; its thought ``apart`` for those that know where to put one."""
    found = parted(message.content) if apart else None
    if found is None:
        return {"role": message.role, "content": message.content}
    return {"role": message.role, "reasoning_content": found[0], "content": found[1]}


def opening(messages: Sequence[Message], tokenizer: Any) -> str:
    """The opening of a thought that the chat template puts at the end of a prompt; mostly nothing."""
    return opened_by(_rendered(tokenizer, messages, True)) if messages and tokenizer.chat_template else ""


def dropped_thoughts(samples: Sequence[Sample], tokenizer: Any) -> int:
    """Earlier assistant turns whose thought the chat template leaves out, so that nothing of them is learnt."""
    count = 0
    for s in samples if tokenizer.chat_template else ():
        thoughts = [found[0] for m in s.prompt if m.role == "assistant" and (found := parted(m.content)) and found[0]]
        text = _rendered(tokenizer, s.prompt, True) if thoughts else ""
        count += sum(thought not in text for thought in thoughts)
    return count


def _ids(tokenizer: Any, text: str, literal: bool = False) -> list[int]:
    """Token ids of ``text`` and nothing else; ``literal`` reads control tokens in it as the characters they are."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=literal, verbose=False)["input_ids"]


def _ids_after(tokenizer: Any, before: str, text: str, literal: bool = False) -> list[int]:
    """Token ids of ``text`` where it follows ``before``, whose own ids stay what they are alone."""
    first = _ids(tokenizer, before, literal)
    both = _ids(tokenizer, before + text, literal)
    return both[len(first) :] if both[: len(first)] == first else _ids(tokenizer, text, literal)


def _added(tokenizer: Any) -> list[int]:
    """What the tokenizer puts before a text of its own accord."""
    bare = _ids(tokenizer, "a")
    full = tokenizer("a", verbose=False)["input_ids"]
    return full[: next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)]


def _opening(tokenizer: Any) -> list[int]:
    """What a plain text begins with."""
    added = _added(tokenizer)
    if added:
        return added
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None:
        return [bos]
    return [eos] if eos is not None and not tokenizer.chat_template else []


@lru_cache(maxsize=8)
def _control(tokenizer: Any, size: int) -> re.Pattern[str]:
    """The tokenizer's control tokens as a pattern, longest first; ``size`` renews it when tokens are added."""
    found = sorted((t.content for t in tokenizer.added_tokens_decoder.values() if t.special), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, found)) or r"(?!)")
