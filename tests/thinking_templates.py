"""Chat templates in the manner of models that think, written for tests after what each is known to do with a thought.

``opens``: the generation prompt ends inside an opened thought. ``drops``: earlier turns lose theirs. ``wants``: how a
last turn of thought "so" and answer "two" is learnt, behind the generation prompt.
"""

from __future__ import annotations

from dataclasses import dataclass

_TURN = "{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
_ASKED = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
_LAST_USER = (
    "{% set ns = namespace(last=-1) %}"
    "{% for m in messages %}{% if m['role'] == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}"
)
_APART = (
    "{% set c = m['content'] %}{% set r = '' %}{% if m['reasoning_content'] is string %}"
    "{% set r = m['reasoning_content'] %}{% elif '</think>' in c %}"
    "{% set r = c.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set c = c.split('</think>')[-1].lstrip('\n') %}{% endif %}"
)


@dataclass(frozen=True)
class Thinking:
    template: str
    wants: str
    opens: str = ""
    drops: bool = False


# Qwen3: the thought of the last turn is written out, an empty one where there is none; those before a question go.
_QWEN3 = (
    _LAST_USER
    + "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    + _APART
    + "{{ '<|im_start|>assistant\n' }}{% if loop.index0 > ns.last and (loop.last or r) %}"
    "{{ '<think>\n' + r.strip('\n') + '\n</think>\n\n' + c.lstrip('\n') }}{% else %}{{ c }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% else %}" + _TURN + "{% endif %}{% endfor %}" + _ASKED
)
# DeepSeek-R1: the prompt opens the thought, and the template has none in any turn.
_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|start_header_id|>' + m['content'].split('</think>')[-1] + '<|end|>' }}"
    "{% else %}{{ '<|end_header_id|>' + m['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|><think>\n' }}{% endif %}"
)
# One that takes a thought apart only, and would put an empty one before what stands in the content.
_APART_ONLY = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{{ '<|im_start|>assistant\n<think>' + (m.get('reasoning_content') or '') + '</think>' + m['content'] "
    "+ '<|im_end|>\n' }}{% else %}" + _TURN + "{% endif %}{% endfor %}" + _ASKED
)

TEMPLATES = {
    "chatml": Thinking(
        "{% for m in messages %}" + _TURN + "{% endfor %}" + _ASKED, "<think>\nso\n</think>\n\ntwo<|im_end|>"
    ),
    "qwen3": Thinking(_QWEN3, "<think>\nso\n</think>\n\ntwo<|im_end|>", drops=True),
    "qwen3-thinking": Thinking(
        _QWEN3.replace(_ASKED, _ASKED.replace("assistant\n'", "assistant\n<think>\n'")),
        "so\n</think>\n\ntwo<|im_end|>",
        opens="<think>\n",
        drops=True,
    ),
    "r1": Thinking(_R1, "so\n</think>\n\ntwo<|end|>", opens="<think>\n", drops=True),
    "apart only": Thinking(_APART_ONLY, "<think>so</think>two<|im_end|>"),
}
