"""Templates that name the emotion: a control to hold story vectors against, and a short text per emotion for tests."""

from __future__ import annotations

TEMPLATES = (
    "I feel {word} today.",
    "She was {word}, and everyone in the room could see it.",
    "He had never been so {word} in his life.",
    "They looked {word} when they heard the news.",
    "Why do you sound so {word}?",
    "That morning I woke up {word}.",
    "The letter made him {word}.",
    "You could tell from her face that she was {word}.",
    "We were all {word} by the end of the day.",
    "My brother gets {word} in moments like this.",
    "Being {word} was all that was left to her.",
    "It is hard to describe how {word} I am.",
)


def template_texts(words: tuple[str, ...], count: int = 5) -> tuple[list[str], list[str]]:
    """(texts, labels): the first `count` templates filled with every word.

    >>> template_texts(("calm",), 1)
    (['I feel calm today.'], ['calm'])
    """
    pairs = [(template.format(word=word), word) for word in words for template in TEMPLATES[:count]]
    return [text for text, _ in pairs], [word for _, word in pairs]
