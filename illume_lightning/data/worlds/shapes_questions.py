"""Questions about scenes of the shapes world, with short answers that are right or wrong as they stand."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np

from illume_lightning.data.worlds.shapes import PLACES, Scene, caption, pairs_of, split_of

Kind = Literal["caption", "count", "background", "existence", "content", "colour", "shape"]


class Question(NamedTuple):
    """What one can ask about a scene."""

    kind: Kind
    """The caption; the number of objects; the colour of the background; whether there is a certain thing; and what
    stands at a place, its colour or its shape."""

    text: str
    answer: str

    place: str | None = None
    """The place that is asked about, if only one is."""


def questions(scene: Scene, random: np.random.Generator) -> list[Question]:
    """All that is asked about a scene, in random order: about each place, and about the whole.

    Args:
        scene: asked about.
        random: decides the order and, for the questions of existence, the things.
    """
    asked = [
        Question("caption", "Describe the image.", caption(scene)),
        Question("count", "How many objects are there?", str(len(scene.objects))),
        Question("background", "What color is the background?", scene.background),
        *_existence(scene, random),
    ]
    at = {thing.place: thing for thing in scene.objects}
    for place in PLACES:
        text = f"What is at the {place}?"
        if place not in at:
            asked.append(Question("content", text, "nothing", place))
            continue
        thing = at[place]
        asked.append(Question("content", text, f"a {thing.size} {thing.colour} {thing.shape}", place))
        asked.append(Question("colour", f"What color is the object at the {place}?", thing.colour, place))
        asked.append(Question("shape", f"What shape is the object at the {place}?", thing.shape, place))
    return [asked[number] for number in random.permutation(len(asked))]


def informative(asked: Sequence[Question]) -> list[Question]:
    """Of questions, those that the answers before do not give away: the first about each place, and the caption last.

    Whoever is asked all of them has to look at the picture, or read the text, for each.
    """
    places = [question.place for question in asked]
    kept = [
        question
        for number, question in enumerate(asked)
        if question.kind != "caption" and (question.place is None or question.place not in places[:number])
    ]
    return kept + [question for question in asked if question.kind == "caption"]


def _existence(scene: Scene, random: np.random.Generator) -> list[Question]:
    """Whether there are certain things of some colour and shape, yes half the time; two, of a scene of one kind one.

    What is not there shares its colour or its shape with something that is, so that one look at the colours is
    not enough, and is something that scenes of this split can have.
    """
    there = sorted(scene.pairs)
    absent = [pair for pair in pairs_of(split_of(scene)) if pair not in there]
    near = [pair for pair in absent if any(pair[0] == colour or pair[1] == shape for colour, shape in there)]
    among = {
        is_there: [pairs[number] for number in random.permutation(len(pairs))]
        for is_there, pairs in ((True, there), (False, near or absent))
    }
    asked = []
    for number in range(1 if len(there) < 2 else 2):
        is_there = bool(there) and random.random() < 0.5
        colour, shape = among[is_there][number]
        article = "an" if colour[0] in "aeiou" else "a"
        asked.append(
            Question("existence", f"Is there {article} {colour} {shape}?", "yes" if is_there else "no")
        )
    return asked
