"""One model for several users: what jobs give, how they are stopped, and that they wait for one another."""

import threading
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from illume_lightning.app.history import History
from illume_lightning.app.studio import Studio, read_picture
from illume_lightning.lit.illume import Illume
from illume_lightning.lit.prompts import MadeImage
from illume_lightning.nn.token_sampling import SegmentSampling, TokenSampling

WORDS = TokenSampling(text=SegmentSampling(temperature=1.0))


def same(a: Image.Image, b: Image.Image) -> bool:
    return a.size == b.size and bool((np.asarray(a) == np.asarray(b)).all())


def test_pictures_are_those_of_the_model_for_one_seed_after_the_other(studio: Studio, illume: Illume) -> None:
    news = list(studio.generate("a red circle", (32, 64), 3, 5, TokenSampling()))
    assert news[0] == ([], 0.0), "the first news comes before any work"
    shares = [pictures.share for pictures in news]
    assert shares == sorted(shares)
    assert 0 < shares[1] < 1
    assert shares[-1] == 1
    expected = illume.generate(["a red circle"] * 3, (32, 64), [5, 6, 7], TokenSampling())
    assert [seed for seed, _ in news[-1].made] == [5, 6, 7]
    assert all(same(image, other) for (_, image), other in zip(news[-1].made, expected, strict=True))


def test_an_edit_has_the_size_of_its_picture(studio: Studio, picture: Image.Image) -> None:
    *_, last = studio.edit(picture, "remove the red circle", 0, TokenSampling(guidance=1.25))
    assert [image.size for _, image in last.made] == [picture.size]


def test_a_reconstruction_is_the_models(studio: Studio, illume: Illume, picture: Image.Image) -> None:
    first, last = studio.reconstruct(picture)
    assert first == {}
    assert list(last) == ["dualvitok"]
    assert same(last["dualvitok"], illume.reconstruct([picture])[0])


def test_an_answer_grows_in_the_history_and_ends_as_the_models(
    studio: Studio, illume: Illume, picture: Image.Image
) -> None:
    history = History()
    history.ask("What is this?", [picture])
    grown = []
    for _ in studio.answer(history, 3, WORDS, 24):
        grown.append(history.exchanges[-1].answer)
    assert grown[0] == ()
    assert len(set(map(str, grown))) > 3, "it comes in pieces"
    expected = illume.chat(history.messages[:1], 3, WORDS, 24)
    assert grown[-1] == expected.parts
    before = grown[-1]
    history.ask_again()
    list(studio.answer(history, 3, WORDS, 24))
    assert history.exchanges[-1].answer != before, "another attempt has another seed"
    assert history.exchanges[-1].answer == illume.chat(history.messages[:1], 4, WORDS, 24).parts


def test_pictures_of_an_answer_go_on_with_their_codes(studio: Studio, illume: Illume) -> None:
    (image,) = illume.generate("a red circle", (32, 32))
    made = MadeImage(image, (np.array([5]), np.array([1, 2, 3, 4])), (32, 32))
    history = History()
    history.ask("Show a circle")
    history.exchanges[-1].answer = ("here: ", made)
    history.ask("Thanks")
    assert history.messages[1]["content"][1] == {"type": "image", "image": made}
    list(studio.answer(history, 0, WORDS, 4))
    assert history.exchanges[-1].answer


def test_a_stopped_job_leaves_the_model_as_it_was(studio: Studio, illume: Illume) -> None:
    expected = illume.generate("a red circle", (32, 32), [0])[0]
    job = studio.generate("a blue square", (64, 32), 3, 0, TokenSampling())
    assert [pictures.share > 0 for pictures in islice(job, 3)] == [False, True, True]
    job.close()
    *_, last = studio.generate("a red circle", (32, 32), 1, 0, TokenSampling())
    assert same(last.made[0][1], expected)


def test_words_of_a_stopped_answer_stay(studio: Studio) -> None:
    history = History()
    history.ask("Go on")
    job = studio.answer(history, 3, WORDS, 200)
    for _ in job:
        if len(str(history.exchanges[-1].answer)) > 12:
            break
    for ask in (partial(history.ask, "And now?"), history.ask_again):
        with pytest.raises(ValueError, match="being written"):
            ask()
    job.close()
    assert isinstance(history.exchanges[-1].answer[0], str)
    history.ask("And now?")
    assert len(history.messages) == 3


def test_a_crash_leaves_the_model_free(
    studio: Studio, illume: Illume, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(illume, "_pictures", fail)
        with pytest.raises(RuntimeError):
            list(studio.generate("a red circle", (32, 32), 2, 0, TokenSampling()))
    *_, last = studio.generate("a red circle", (32, 32), 1, 0, TokenSampling())
    assert len(last.made) == 1


def test_jobs_wait_for_one_another(studio: Studio) -> None:
    def work(job: Iterator[object]) -> None:
        list(job)
        done.append(True)

    done: list[bool] = []
    first = studio.generate("a red circle", (32, 32), 2, 0, TokenSampling())
    list(islice(first, 2))
    second = threading.Thread(target=work, args=(studio.generate("x", (32, 32), 1, 0, TokenSampling()),))
    second.start()
    second.join(0.3)
    assert not done
    first.close()
    second.join(30)
    assert done


@pytest.mark.parametrize("prompt", ["", "show {resolution_tag}", "word " * 800])
def test_what_cannot_be_done_is_refused_before_any_work(studio: Studio, prompt: str) -> None:
    job = studio.generate(prompt, (32, 32), 1, 0, TokenSampling())
    next(job)
    with pytest.raises(ValueError, match=r"empty|holds|context"):
        next(job)


def test_uploads(picture: Image.Image, picture_path: Path, tmp_path: Path) -> None:
    assert same(read_picture(picture_path), picture)
    (tmp_path / "secret.png").write_bytes(b"no picture")
    Image.new("1", (10_000, 6_000)).save(tmp_path / "bomb.png")
    for name, reason in (("secret.png", "unreadable"), ("bomb.png", "too many pixels")):
        with pytest.raises(ValueError, match=reason) as caught:
            read_picture(tmp_path / name)
        assert str(tmp_path) not in str(caught.value)
