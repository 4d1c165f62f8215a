"""Prompts that ask a model for the corpus's kinds of text."""

from __future__ import annotations

from ..errors import ArgumentError
from .corpus import LONGEST, SHORTEST, banned_forms

STORY = (
    "Write one paragraph of {shortest} to {longest} words: a short story that has to do with {topic}, in which "
    "somebody is {emotion}. Let it show only in what happens, what the person thinks and does, and what their body "
    "does. {ban} Choose a voice, a place and a beginning that nobody else would choose. Give the story alone, without "
    "a title."
)
DIALOGUE = (
    "Write a conversation of {shortest} to {longest} words between two people that has to do with {topic}. One of them "
    "is {emotion}, and it shows only in how and what they say. {ban} Give the conversation alone, as one paragraph "
    "with the speech in quotation marks."
)
NEUTRAL = (
    "Write a conversation of {shortest} to {longest} words between two people that has to do with {topic}. They "
    "exchange practical information: times, places, numbers, steps. Nothing is felt, judged or at stake. Give the "
    "conversation alone, as one paragraph with the speech in quotation marks."
)
KINDS = {"story": STORY, "dialogue": DIALOGUE, "neutral": NEUTRAL}


def prompt(kind: str, topic: str, emotion: str) -> str:
    """The request for one text of a kind: "story", "dialogue" or "neutral" (which has no emotion).

    >>> "somebody is calm" in prompt("story", "a letter", "calm")
    True
    """
    if kind not in KINDS:
        raise ArgumentError("kind", expected=" or ".join(map(repr, KINDS)), got=repr(kind))
    forms = [form.rstrip("*") for form in banned_forms().get(emotion, ())]
    ban = f"Never write '{emotion}' or any word that begins with or means: {', '.join(forms)}." if forms else ""
    return KINDS[kind].format(topic=topic, emotion=emotion, ban=ban, shortest=SHORTEST, longest=LONGEST)
