"""Usual names of columns, by what they hold; the first one that a row has counts."""

from __future__ import annotations

MESSAGES = ("messages", "conversations", "conversation")
PROMPTS = ("prompt", "question", "instruction", "query", "problem", "Q")
SEVERAL = ("generations", "responses", "completions")
RESPONSES = ("response", "completion", "answer", "output", "solution", "A")
TEXTS = ("text",)
ANSWERS = ("answer", "gold", "ground_truth", "solution")
