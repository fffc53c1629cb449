"""Scores of models that know everything, or nothing, about held-out conversations of the shapes world."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from illume_lightning.data.conversation_store import ConversationStore
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.data.worlds.shapes import render
from illume_lightning.data.worlds.shapes_conversations import (
    prepare_shapes_conversations,
    prepare_shapes_tokenizer,
)
from illume_lightning.evaluation.held_out import HeldOut, Question, Wish, read_held_out
from illume_lightning.evaluation.mllm import score_task
from illume_lightning.evaluation.scores import Score
from illume_lightning.lit.prompts import Chat, Edit, Generate, MadeImage, Task
from illume_lightning.lit.reply import Event, Reply

SIZE = (64, 64)
COUNT = 20


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    prepare_shapes_tokenizer(folder / "text_tokenizer")
    for task in ("understanding", "captioning", "generation", "editing", "text", "reconstruction"):
        prepare_shapes_conversations(
            folder / task, tokenizer=str(folder / "text_tokenizer"), task=task, count=COUNT, split="val", sizes=(SIZE,)
        )  # fmt: skip
    return folder


def held_out(world: Path, task: str, limit: int = COUNT) -> HeldOut:
    return read_held_out(ConversationStore(world / task), limit)


class Known:
    """A model that gives the answers that it is given, last ones first, as an engine may."""

    def __init__(self, world: Path, answers: list[str | Image.Image], too_long: tuple[int, ...] = ()) -> None:
        self.text_tokenizer = TextTokenizer(world / "text_tokenizer")
        self.prompts = SimpleNamespace(sizes=(SIZE, (32, 128)))
        self.tokenizer: Any = SimpleNamespace(semantic_encoder=None)
        self.answers, self.too_long = answers, too_long
        self.checked, self.asked = 0, list[Task]()

    def check(self, task: Task) -> None:
        self.checked += 1
        if self.checked - 1 in self.too_long:
            raise ValueError("a prompt of 9,999 tokens doesn't fit")

    def run(self, tasks: Iterable[Task]) -> Iterator[Event]:
        events = []
        for number, task in enumerate(tasks):
            self.asked.append(task)
            answer = self.answers[self.checked - 1]
            part = answer if isinstance(answer, str) else MadeImage(answer, (np.zeros(1), np.zeros(1)), SIZE)
            events.append(Event(number, "", 0.0, Reply((part,))))
        yield from reversed(events)


def by_name(scores: list[Score]) -> dict[str, Score]:
    return {score.name: score for score in scores}


# -- what is asked --


def test_questions_stand_alone_and_kinds_come_equally_often(world):
    questions = held_out(world, "understanding").questions
    assert len(questions) == 4 * COUNT
    for question in questions:
        assert not question.history
        (message,) = question.messages()
        assert [item["type"] for item in message["content"]] == ["image", "text"]
        (blind,) = question.messages(with_images=False)
        assert [item["type"] for item in blind["content"]] == ["text"]
        assert "<image>" not in question.text
    counts = Counter(question.kind for question in questions)
    assert set(counts) == {"caption", "count", "background", "existence", "content", "colour", "shape"}
    assert max(counts.values()) - min(counts.values()) <= 2
    store = ConversationStore(world / "understanding")
    asked = Counter(kind for index in range(COUNT) for kind in json.loads(store.read(index).meta)["kinds"])
    assert asked["content"] > 1.5 * asked["colour"]


def test_questions_about_a_caption_keep_it_and_what_was_answered(world):
    questions = held_out(world, "text").questions
    later = [question for question in questions if question.history]
    assert later
    for question in later:
        roles = [message["role"] for message in question.messages()]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert question.history[0]["content"].startswith("There is ")
        assert question.words.startswith("There is ")


def test_the_limit_takes_conversations_from_all_of_the_store(world):
    store = ConversationStore(world / "captioning")
    found = read_held_out(store, 4)
    assert found.num_conversations == len(found.questions) == 4
    answers = [store.read(index).conversation.turns[-1].text for index in (0, 5, 10, 15)]
    assert [question.answer for question in found.questions] == answers


def test_pictures_are_asked_for_as_a_user_would(world):
    (wish, *_), (edit, *_) = held_out(world, "generation").wishes, held_out(world, "editing").wishes
    assert wish.prompt.endswith("background")
    assert wish.source is None
    assert np.array_equal(np.array(wish.wanted), render(wish.scenes[0], *SIZE))
    assert edit.prompt.split()[0] in ("change", "remove", "add", "move")
    assert np.array_equal(np.array(edit.source), render(edit.scenes[0], *SIZE))
    assert np.array_equal(np.array(edit.wanted), render(edit.scenes[1], *SIZE))
    assert edit.kind in ("recolour", "remove", "add", "move")


def test_other_requests_for_pictures_are_left_out(world, caplog):
    found = held_out(world, "reconstruction")
    assert not found.wishes
    assert found.left_out == COUNT
    assert f"{COUNT} of {COUNT} conversations ask for pictures in other words" in caplog.text


# -- what is found --


def test_who_knows_all_is_right(world):
    task = held_out(world, "understanding")
    answers = [question.answer for question in task.questions]
    model = Known(world, answers + ["yes"] * len(answers))
    found = score_task(model, "understanding", task, 0)
    scores = by_name(found.scores)
    assert {score.value for score in found.scores} == {1.0}
    assert scores["all"].n == len(answers)
    yes = sum(answer == "yes" for answer in answers)
    assert scores["all"].baselines["without_picture"] == yes / len(answers)
    kinds = Counter(question.kind for question in task.questions)
    assert {name: score.n for name, score in scores.items() if name != "all"} == kinds
    # One answer for each kind.
    counts = Counter((question.kind, question.answer) for question in task.questions)
    most = {kind: max(count for (own, _), count in counts.items() if own == kind) for kind in kinds}
    assert scores["all"].baselines["chance"] == sum(most.values()) / len(answers)
    assert scores["count"].baselines["chance"] == most["count"] / kinds["count"]
    assert len(found.shown) == 8
    assert all(sample.right and sample.answer == sample.expected for sample in found.shown)
    assert len({sample.given[0].tobytes() for sample in found.shown}) == 8
    assert all(isinstance(asked, Chat) and asked.sampling.text.temperature == 0 for asked in model.asked)


def test_who_says_nothing_right_is_wrong(world):
    task = held_out(world, "text")
    found = score_task(Known(world, ["?"] * len(task.questions)), "text", task, 0)
    assert {score.value for score in found.scores} == {0.0}
    assert all("without_picture" not in score.baselines for score in found.scores)


def test_what_does_not_fit_is_left_out_and_said(world, caplog):
    task = held_out(world, "captioning", 3)
    answers = [question.answer for question in task.questions]
    found = score_task(Known(world, answers, too_long=(1,)), "captioning", task, 0, blind=False)
    assert by_name(found.scores)["all"].n == 2
    assert by_name(found.scores)["all"].value == 1
    assert "captioning: left out: a prompt of 9,999 tokens" in caplog.text


def test_right_pictures_are_right_and_those_of_other_prompts_are_not(world):
    task = held_out(world, "generation")
    model = Known(world, [wish.wanted for wish in task.wishes])
    found = score_task(model, "generation", task, 7)
    scores = by_name(found.scores)
    assert {score.value for score in found.scores} == {1.0}
    assert scores["scene"].n == COUNT
    assert scores["scene"].baselines["chance"] == 0
    assert scores["counting"].baselines["chance"] < 1
    assert {asked.size for asked in model.asked} == {SIZE}
    assert len({asked.seed for asked in model.asked}) == COUNT
    assert all(isinstance(asked, Generate) for asked in model.asked)
    assert all(sample.right and sample.wanted is not None for sample in found.shown)
    again = Known(world, model.answers)
    score_task(again, "generation", task, 8)
    assert not {asked.seed for asked in again.asked} & {asked.seed for asked in model.asked}


def test_edits_are_held_against_the_source(world):
    task = held_out(world, "editing")
    model = Known(world, [wish.wanted for wish in task.wishes])
    scores = by_name(score_task(model, "editing", task, 0).scores)
    assert all(isinstance(asked, Edit) for asked in model.asked)
    assert {score.value for score in scores.values()} == {1.0}
    assert scores["edit"].baselines == {"unchanged": 0.0}
    assert scores["untouched"].baselines == {"unchanged": 1.0}
    kinds = Counter(wish.kind for wish in task.wishes)
    assert {kind: scores[kind].n for kind in kinds} == kinds
    unchanged = Known(world, [wish.source for wish in task.wishes])
    assert by_name(score_task(unchanged, "editing", task, 0).scores)["edit"].value == 0


def test_pictures_of_other_worlds_have_no_content_scores(world):
    task = HeldOut(wishes=[Wish("a cat", None, Image.new("RGB", (64, 64)), (), "")])
    found = score_task(Known(world, [Image.new("RGB", (64, 64), "red")]), "generation", task, 0)
    assert found.scores == []
    assert found.shown[0].right is None


def test_questions_without_kinds_have_one_score(world):
    task = HeldOut(
        [Question("?", "a", "", (), ()), Question("?", "b", "", (), ()), Question("?", "b", "", (), ())]
    )
    (score,) = score_task(Known(world, ["a", "b", "c"]), "text", task, 0).scores
    assert (score.name, score.value, score.n) == ("all", 2 / 3, 3)
    assert score.baselines == {"chance": 2 / 3}
