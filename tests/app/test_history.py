"""A conversation as the page keeps it."""

import pytest
from PIL import Image

from illume_lightning.app.history import History


def test_the_model_is_told_every_exchange() -> None:
    image = Image.new("RGB", (32, 32))
    history = History()
    history.ask("  What is this? ", [image])
    history.exchanges[-1].answer = ("a square",)
    history.ask("Sure?")
    assert history.messages == [
        {
            "role": "user",
            "content": [{"type": "image", "image": image}, {"type": "text", "text": "What is this?"}],
        },
        {"role": "assistant", "content": [{"type": "text", "text": "a square"}]},
        {"role": "user", "content": [{"type": "text", "text": "Sure?"}]},
    ]


def test_a_question_without_an_answer_gives_way_to_the_next() -> None:
    history = History()
    history.ask("one")
    history.ask("two")
    assert [exchange.text for exchange in history.exchanges] == ["two"]


def test_answering_again_drops_the_answer_and_counts() -> None:
    history = History()
    with pytest.raises(ValueError, match="no question yet"):
        history.ask_again()
    history.ask("one")
    history.ask_again()
    assert history.exchanges[-1].attempts == 0, "there was no answer to throw away"
    history.exchanges[-1].answer = ("yes",)
    history.ask_again()
    assert (history.exchanges[-1].answer, history.exchanges[-1].attempts) == ((), 1)


def test_an_empty_message_is_refused() -> None:
    with pytest.raises(ValueError, match="empty"):
        History().ask(" ")
