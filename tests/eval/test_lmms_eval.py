"""The model under lmms-eval: the real base class and registry where installed, else the little of it that is used."""

import importlib
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from PIL import Image
from tiny_run import write_dualvitok_run, write_mllm_run

from illume_lightning import Chat, Illume
from illume_lightning.data.text_tokenizer import TextTokenizer, train_tokenizer

MODULE = "illume_lightning.eval.lmms_eval"
IS_INSTALLED = find_spec("lmms_eval") is not None
QUESTION = "what is it?"
WORDS = "make a picture of a red circle on white, the lowest one; what is it? " * 4


class StandIn:
    """What lmms-eval 0.7.3's base class gives its models."""

    rank = 0

    def __init__(self) -> None:
        self.task_dict: dict[str, Any] = {}
        self.cache_hook = self

    def add_partial(self, name: str, request: Any, answer: Any) -> None:
        pass


class Request(NamedTuple):
    """An Instance of lmms-eval, as far as models read it."""

    args: tuple[Any, ...]


@pytest.fixture(scope="module")
def adapter() -> Iterator[Any]:
    """The module under test."""
    if IS_INSTALLED:
        yield importlib.import_module(MODULE)
        return
    names = "lmms_eval", "lmms_eval.api", "lmms_eval.api.model"
    sys.modules |= {name: ModuleType(name) for name in names}
    sys.modules[names[-1]].lmms = StandIn  # type: ignore[attr-defined]
    yield importlib.import_module(MODULE)
    for name in (*names, MODULE):
        del sys.modules[name]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    train_tokenizer([WORDS], folder / "text", 280)
    dualvitok = write_dualvitok_run(folder / "dualvitok")
    write_mllm_run(folder / "run", TextTokenizer(folder / "text"), dualvitok)
    return folder / "run"


def load(adapter: Any, run: Path, batch_size: int, **options: Any) -> Any:
    options = {"device": "cpu", "dtype": "float32", "context": 256, "max_new_tokens": 12} | options
    model = adapter.IllumeLmms(str(run), batch_size=batch_size, **options)
    pictures = [
        Image.new("RGB", (32 + 16 * number, 48), color) for number, color in enumerate(("red", "blue"))
    ]
    model.task_dict["task"] = {"val": [[], pictures[:1], pictures, [pictures[1]] * 2]}
    return model


def visuals(doc: list[Image.Image]) -> list[Image.Image]:
    return doc


def asked(text: str, doc: int = 0, **settings: Any) -> Request:
    return Request((text, settings, visuals, doc, "task", "val"))


def said(illume: Illume, *content: Any, limit: int = 12) -> str:
    """The answer, straight from the Python API."""
    items = [
        {"type": "text", "text": item} if isinstance(item, str) else {"type": "image", "image": item}
        for item in content
    ]
    reply = illume.chat([{"role": "user", "content": items}], max_tokens=limit)
    assert not reply.images
    return reply.text


def test_answers_of_a_batch_are_those_of_the_api_in_order(adapter: Any, run: Path) -> None:
    model = load(adapter, run, 3)
    docs = model.task_dict["task"]["val"]
    requests = [
        asked(QUESTION, 1, max_new_tokens=5),
        asked(QUESTION),
        asked("a circle", 2, until=["\n\n"]),
        asked(f"{adapter.IMAGE}\n{QUESTION}", 1),
        asked(f"of {adapter.IMAGE} and {adapter.IMAGE} one", 3),
        asked(f"{adapter.IMAGE} {QUESTION}", 2, temperature=0.0, do_sample=True),
    ]
    one, two, same = docs[1][0], docs[2], docs[3]
    expected = [
        said(model.illume, one, QUESTION, limit=5),
        said(model.illume, QUESTION),
        said(model.illume, *two, "a circle"),
        said(model.illume, one, QUESTION),
        said(model.illume, "of ", same[0], " and ", same[1], " one"),
        said(model.illume, *two, f" {QUESTION}"),
    ]
    answers = model.generate_until(requests)
    assert answers == expected
    assert len(set(answers)) > 3 and all(answers)
    assert load(adapter, run, 1).generate_until(requests) == answers


def test_pictures_never_come(adapter: Any, run: Path) -> None:
    model = load(adapter, run, 2)
    request = model.illume.prompts.ask(Chat([{"role": "user", "content": QUESTION}])).request
    assert request.sizes == () and not request.is_guided


def test_an_answer_ends_where_the_task_says(adapter: Any, run: Path) -> None:
    model = load(adapter, run, 2)
    whole = model.generate_until([asked(QUESTION)])[0]
    end = whole[4:6]
    cancelled = []
    model.illume.cancel = lambda number, cancel=model.illume.cancel: (
        cancelled.append(number),
        cancel(number),
    )
    assert model.generate_until([asked("a circle"), asked(QUESTION, until=end)])[1] == whole.partition(end)[0]
    assert set(cancelled) == {1}
    assert model.generate_until([asked(QUESTION, until=[whole[:1], ""])]) == [""]


def test_a_temperature_draws(adapter: Any, run: Path) -> None:
    drawn = adapter._sampling({"temperature": 0.5, "top_k": 4, "top_p": 0.9})
    assert (drawn.text.temperature, drawn.text.top_k, drawn.text.top_p, drawn.guidance) == (0.5, 4, 0.9, 1)
    for settings in ({}, {"temperature": 0}, {"temperature": 0.7, "do_sample": False}, {"temperature": None}):
        assert adapter._sampling(settings).text.temperature == 0
    with pytest.raises(ValueError, match="asks for 5 beams"):
        adapter._sampling({"num_beams": 5})


def test_log_probabilities_of_answers(adapter: Any, run: Path) -> None:
    model = load(adapter, run, 3)
    illume = model.illume
    mllm, text = illume.mllm, illume.text_tokenizer
    greedy = model.generate_until([asked(QUESTION, 1, max_new_tokens=4)])[0]
    choices = [greedy, " a red circle", "white", " the lowest one"]
    requests = [Request((QUESTION, choice, visuals, 1, "task", "val")) for choice in choices]
    requests.append(Request((QUESTION, lambda doc: f"a {len(doc)}", visuals, 2, "task", "val")))
    requests.append(Request((QUESTION, "white")))
    found = model.loglikelihood(requests)
    assert [pair[0] for pair in load(adapter, run, 1).loglikelihood(requests)] == pytest.approx(
        [pair[0] for pair in found], abs=1e-3
    )
    for request, (score, is_greedy) in zip(requests, found, strict=True):
        docs = model.task_dict["task"]["val"]
        pictures = docs[request.args[3]] if len(request.args) > 2 else []
        target = request.args[1] if isinstance(request.args[1], str) else request.args[1](pictures)
        content = [{"type": "image", "image": picture} for picture in pictures]
        content.append({"type": "text", "text": QUESTION})
        prompt = illume.prompts.ask(Chat([{"role": "user", "content": content}])).request.prompt
        ids, expected, likeliest = list(prompt.ids), 0.0, True
        for id in text.encode(target.lstrip()):
            slots = torch.tensor(prompt.semantic_slots), torch.tensor(prompt.pixel_slots)
            slots = tuple(places.long() for places in slots)
            embeds = mllm.embed(torch.tensor([ids]), prompt.images, *slots)
            last = mllm.hidden(embeds, torch.arange(len(ids))[None])[:, -1]
            scores = mllm.head.logits(last)[0].log_softmax(-1)
            expected += scores[id].item()
            likeliest &= scores.argmax().item() == id
            ids.append(id)
        assert score == pytest.approx(expected, abs=1e-3)
        assert is_greedy == likeliest


def test_what_it_cannot_do_is_named(adapter: Any, run: Path) -> None:
    model = load(adapter, run, 1)
    model.task_dict["task"]["val"].append(["film.mp4"])
    with pytest.raises(ValueError, match="holds str 'film.mp4': only pictures are read"):
        model.generate_until([asked(QUESTION, 4)])
    with pytest.raises(NotImplementedError, match="several rounds are not supported"):
        model.generate_until_multi_round([asked(QUESTION)])
    for options, message in (
        ({"batch_size": "auto"}, "batch_size is 'auto'"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": 1, "dtype": "int8"}, "dtype is 'int8'"),
    ):
        with pytest.raises(ValueError, match=message):
            adapter.IllumeLmms(str(run), **options)


def test_without_lmms_eval_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval.api.model", None)
    monkeypatch.delitem(sys.modules, MODULE, raising=False)
    with pytest.raises(ImportError, match=r"pip install 'illume-lightning\[eval\]'"):
        importlib.import_module(MODULE)


def test_the_entry_point_names_the_class(adapter: Any) -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["entry-points"]["lmms_eval.models"]["illume"].partition(":")
    manifest = getattr(importlib.import_module(module), name)
    if not IS_INSTALLED:
        pytest.skip("needs lmms-eval, for its registry")
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(manifest())
    assert registry.get_model_class("illume") is adapter.IllumeLmms
    assert registry.get_model_class("illume_lightning", force_simple=True) is adapter.IllumeLmms
