"""Asking a trained MLLM what held-out conversations ask, and scoring what it says and makes."""

import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from illume_lightning.data.packed_batch import PackedBatch
from illume_lightning.data.worlds.shapes_scores import score_edit, score_picture
from illume_lightning.evaluation.held_out import QUESTIONS_PER_CONVERSATION, HeldOut, Question, Wish
from illume_lightning.evaluation.pictures import tower_distances
from illume_lightning.evaluation.scores import SAMPLES_PER_TASK, Results, Score, Shown
from illume_lightning.evaluation.statistics import Estimate, mean, perplexity, share
from illume_lightning.lit.illume import Illume
from illume_lightning.lit.prompts import Chat, Edit, Generate, Task
from illume_lightning.lit.reply import Reply
from illume_lightning.nn.mllm import MLLM
from illume_lightning.nn.token_sampling import TokenSampling, drawing_seed
from illume_lightning.resolution import Size, nearest_ratio

log = logging.getLogger(__name__)

ALL = "all"
CHANCE = "chance"
WITHOUT_PICTURE = "without_picture"
UNCHANGED = "unchanged"

ROOM = 256
"""Tokens that a conversation may be longer than the longest row of training, for answers that go on too long."""

_GREEDY = TokenSampling(guidance=1)
_MORE_TOKENS = 8
"""An answer may be so much longer than the right one; beyond that it is wrong however it goes on."""

Facts = dict[str, bool]
"""What holds for one picture; only what applies to it."""


def score_task(illume: Illume, name: str, held_out: HeldOut, seed: int, blind: bool = True) -> Results:
    """Scores and samples of one task.

    Args:
        illume: the model; with a tokenizer if there are pictures to make.
        name: of the task.
        held_out: what it asks.
        seed: of the drawing of pictures; words are the most likely ones.
        blind: whether to ask about pictures without them too.
    """
    found = Results()
    if held_out.questions:
        found.add(_score_words(illume, name, held_out.questions, blind and held_out.is_about_pictures))
    if held_out.wishes:
        found.add(_score_pictures(illume, name, held_out.wishes, seed))
    return found


# -- words -----------------------------------------------------------------------------------------------------


def _score_words(illume: Illume, name: str, questions: Sequence[Question], blind: bool) -> Results:
    """Answers that are exactly right, of every kind and of all."""
    lengths = [len(illume.text_tokenizer.encode(question.answer)) for question in questions]
    asked = [
        Chat(question.messages(with_images), 0, _GREEDY, length + _MORE_TOKENS)
        for with_images in ((True, False) if blind else (True,))
        for question, length in zip(questions, lengths, strict=True)
    ]
    replies = _answers(illume, name, asked)
    seen, unseen = replies[: len(questions)], replies[len(questions) :] or [None] * len(questions)
    answered = [
        (question, reply.text, None if other is None else other.text == question.answer)
        for question, reply, other in zip(questions, seen, unseen, strict=True)
        if reply is not None
    ]
    if not answered:
        return Results()
    results = Results(_word_scores(name, answered))
    # Of different conversations, where there are enough.
    step = max(1, min(QUESTIONS_PER_CONVERSATION, len(answered) // SAMPLES_PER_TASK))
    results.shown = [
        Shown(name, question.words, question.images, (), None, text, question.answer, text == question.answer)
        for question, text, _ in answered[: step * SAMPLES_PER_TASK : step]
    ]
    return results


def _word_scores(name: str, answered: Sequence[tuple[Question, str, bool | None]]) -> list[Score]:
    """One score for all, and one for each kind.

    Chance is the most frequent right answer of each kind, given to all questions of that kind.
    """
    kinds = sorted({question.kind for question, _, _ in answered} - {""})
    scores = []
    for kind in (ALL, *kinds):
        chosen = [entry for entry in answered if kind in (ALL, entry[0].kind)]
        baselines = {CHANCE: _most_frequent([question for question, _, _ in chosen]) / len(chosen)}
        blind = [right for _, _, right in chosen if right is not None]
        if blind:
            baselines[WITHOUT_PICTURE] = sum(blind) / len(blind)
        estimate = share([text == question.answer for question, text, _ in chosen])
        scores.append(Score.of(name, kind, estimate, "share", baselines))
    return scores


def _most_frequent(questions: Sequence[Question]) -> int:
    """Questions that the most frequent answer of their kind is right for."""
    counts = Counter((question.kind, question.answer) for question in questions)
    kinds = {question.kind for question in questions}
    return sum(max(count for (own, _), count in counts.items() if own == kind) for kind in kinds)


@torch.no_grad()
def score_text(mllm: MLLM, name: str, batches: Iterable[PackedBatch]) -> Score:
    """Perplexity of the answers of conversations in words, each token given all right ones before it.

    Args:
        mllm: the model, on its device.
        name: of the task.
        batches: without pictures.
    """
    device = mllm.embedding.text.device
    nats: list[float] = []
    tokens: list[int] = []
    for batch in batches:
        moved = {key: value.to(device) for key, value in batch._asdict().items() if isinstance(value, Tensor)}
        output = mllm(
            ids=moved["ids"],
            position_ids=moved["position_ids"],
            document_ids=moved["document_ids"],
            images=[],
            semantic_slots=moved["semantic_slots"],
            pixel_slots=moved["pixel_slots"],
            target_positions=moved["target_positions"],
            targets=moved["ids"].flatten()[moved["target_positions"] + 1],
            slot_ids=moved["slot_ids"],
        )
        answers = batch.answers.numpy()
        nats += np.bincount(answers, output.token_losses.cpu().double().numpy()).tolist()
        tokens += np.bincount(answers).tolist()
    return Score.of(name, "perplexity", perplexity(nats, tokens), "perplexity")


# -- pictures --------------------------------------------------------------------------------------------------


def _score_pictures(illume: Illume, name: str, wishes: Sequence[Wish], seed: int) -> Results:
    """What pictures show, where that is known, and how far they are from the true ones."""
    tasks = [_task(illume, name, number, wish, seed) for number, wish in enumerate(wishes)]
    pairs = [
        (wish, reply.images[0])
        for wish, reply in zip(wishes, _answers(illume, name, tasks), strict=True)
        if reply is not None
    ]
    if not pairs:
        return Results()
    wished, made = [wish for wish, _ in pairs], [image for _, image in pairs]
    results = Results(_content_scores(name, wished, made))
    results.scores += _distance_scores(illume, name, wished, made)
    for wish, image in pairs[:SAMPLES_PER_TASK]:
        right = next(iter(_facts(wish, image).values()), None)
        given = () if wish.source is None else (wish.source,)
        results.shown.append(Shown(name, wish.prompt, given, (image,), wish.wanted, right=right))
    return results


def _task(illume: Illume, name: str, number: int, wish: Wish, seed: int) -> Task:
    own = drawing_seed(seed, name, number)
    if wish.source is not None:
        return Edit(wish.source, wish.prompt, own)
    return Generate(wish.prompt, _size(illume, wish), own)


def _size(illume: Illume, wish: Wish) -> Size:
    """The wanted picture's size among those that the model makes."""
    return nearest_ratio(wish.wanted.height, wish.wanted.width, illume.prompts.sizes).size


def _content_scores(name: str, wishes: Sequence[Wish], made: Sequence[Image.Image]) -> list[Score]:
    """Shares of pictures of which something holds."""
    known = [(wish, image) for wish, image in zip(wishes, made, strict=True) if wish.scenes]
    facts = [_facts(wish, image) for wish, image in known]
    no_answer = _no_answer([wish for wish, _ in known], [image for _, image in known])
    baselines = {
        other: [_facts(wish, image) for (wish, _), image in zip(known, images, strict=True)]
        for other, images in no_answer.items()
    }
    return [
        Score.of(
            name,
            fact,
            share(_column(facts, fact)),
            "share",
            {other: share(_column(found, fact)).value for other, found in baselines.items()},
        )
        for fact in dict.fromkeys(fact for own in facts for fact in own)
    ]


def _no_answer(wishes: Sequence[Wish], made: Sequence[Image.Image]) -> dict[str, Sequence[Image.Image]]:
    """Pictures to compare answers with: the sources of edits, of words what was made of others."""
    sources = [wish.source for wish in wishes if wish.source is not None]
    if sources and len(sources) == len(wishes):
        return {UNCHANGED: sources}
    others = [_made_of_another(wishes, made, number) for number in range(len(made))]
    known = [image for image in others if image is not None]
    return {CHANCE: known} if known and len(known) == len(made) else {}


def _made_of_another(wishes: Sequence[Wish], made: Sequence[Image.Image], number: int) -> Image.Image | None:
    """What was made of the next other prompt; small worlds have some twice."""
    order = [*range(number + 1, len(made)), *range(number)]
    return next((made[other] for other in order if wishes[other].prompt != wishes[number].prompt), None)


def _column(facts: Sequence[Facts], name: str) -> list[bool]:
    return [own[name] for own in facts if name in own]


def _facts(wish: Wish, image: Image.Image) -> Facts:
    """What holds for a picture: the first says whether it is right as a whole; of edits, also under their kind."""
    pixels = np.asarray(image.convert("RGB"))
    if not wish.scenes:
        return {}
    if wish.source is None:
        return score_picture(wish.scenes[0], pixels)
    facts = score_edit(wish.scenes[0], wish.scenes[1], pixels)
    return facts | ({wish.kind: facts["edit"]} if wish.kind else {})


def _distance_scores(
    illume: Illume, name: str, wishes: Sequence[Wish], made: Sequence[Image.Image]
) -> list[Score]:
    """Distance from the true pictures, where the tokenizer has a tower."""
    encoder = illume.tokenizer.semantic_encoder if illume.tokenizer is not None else None
    if encoder is None:
        return []
    sizes = [_size(illume, wish) for wish in wishes]
    wanted = [wish.wanted for wish in wishes]

    def distance(pictures: Sequence[Image.Image]) -> Estimate:
        return mean(tower_distances(encoder, list(zip(pictures, wanted, strict=True)), sizes))

    baselines = {other: distance(images).value for other, images in _no_answer(wishes, made).items()}
    return [Score.of(name, "tower_distance", distance(made), "distance", baselines)]


# -- the model -------------------------------------------------------------------------------------------------


def _answers(illume: Illume, name: str, tasks: Sequence[Task]) -> list[Reply | None]:
    """Replies side by side, in the tasks' order; none for what does not fit the model's context."""
    numbers: list[int] = []
    replies: list[Reply | None] = [None] * len(tasks)

    def fitting() -> Iterator[Task]:
        for number, task in enumerate(tasks):
            try:
                illume.check(task)
            except ValueError as error:
                log.warning("%s: left out: %s", name, error)
                continue
            numbers.append(number)
            yield task

    for event in illume.run(fitting()):
        if event.reply is not None:
            replies[numbers[event.number]] = event.reply
    return replies
