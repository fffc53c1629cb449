"""Questions about scenes of the shapes world, with short answers that are right or wrong as they stand."""

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


def questions(scene: Scene, random: np.random.Generator) -> list[Question]:
    """All that is asked about a scene, in random order: 8 questions, and 2 more for each object.

    Args:
        scene: asked about.
        random: decides the order and, for the question of existence, the thing.
    """
    asked = [
        Question("caption", "Describe the image.", caption(scene)),
        Question("count", "How many objects are there?", str(len(scene.objects))),
        Question("background", "What color is the background?", scene.background),
        _existence(scene, random),
    ]
    at = {thing.place: thing for thing in scene.objects}
    for place in PLACES:
        text = f"What is at the {place}?"
        if place not in at:
            asked.append(Question("content", text, "nothing"))
            continue
        thing = at[place]
        asked.append(Question("content", text, f"a {thing.size} {thing.colour} {thing.shape}"))
        asked.append(Question("colour", f"What color is the object at the {place}?", thing.colour))
        asked.append(Question("shape", f"What shape is the object at the {place}?", thing.shape))
    return [asked[number] for number in random.permutation(len(asked))]


def _existence(scene: Scene, random: np.random.Generator) -> Question:
    """Whether there is a thing of some colour and shape: yes half the time.

    What is not there shares its colour or its shape with something that is, so that one look at the colours is
    not enough, and is something that scenes of this split can have.
    """
    there = sorted(scene.pairs)
    absent = [pair for pair in pairs_of(split_of(scene)) if pair not in there]
    near = [pair for pair in absent if any(pair[0] == colour or pair[1] == shape for colour, shape in there)]
    is_there = bool(there) and random.random() < 0.5
    among = there if is_there else near or absent
    colour, shape = among[random.integers(len(among))]
    article = "an" if colour[0] in "aeiou" else "a"
    return Question("existence", f"Is there {article} {colour} {shape}?", "yes" if is_there else "no")
