"""The Python API: prompts equal those of training, and every task gives what it should."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_illume import SIZES, build_illume

from illume_lightning import Chat, Edit, Generate, Illume, SegmentSampling, TokenSampling
from illume_lightning.data.chat import EDIT, GENERATE, render, unconditional
from illume_lightning.data.conversation import IMAGE, Conversation, Turn
from illume_lightning.data.packing import SizedImage
from illume_lightning.data.token_sequence import TokenSequence, token_sequence
from illume_lightning.image_layout import image_layout
from illume_lightning.lit.prompts import MadeImage, to_tensor

CAPTION, INSTRUCTION = "a red circle {on} white", "remove the red circle"
GREEDY = TokenSampling(*(SegmentSampling(temperature=0),) * 3, guidance=1.0)


@pytest.fixture(scope="module")
def illume(tmp_path_factory: pytest.TempPathFactory) -> Illume:
    return build_illume(tmp_path_factory.mktemp("text"))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def trained(
    illume: Illume, conversation: Conversation, sizes: list[SizedImage], shown: tuple[int, ...]
) -> TokenSequence:
    """The sequence that training reads."""
    codes = {}
    for number, is_target in enumerate(conversation.is_target):
        layout = image_layout(sizes[shown[number]].size, illume.mllm.vocabulary)
        codes[shown[number]] = tuple(
            np.arange(len(slots)) % 7 for slots in (layout.semantic_slots, layout.pixel_slots)
        )
        if not is_target:
            del codes[shown[number]]
    return token_sequence(
        render(conversation, illume.text_tokenizer), sizes, illume.mllm.vocabulary, codes.get, shown
    )


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("task", ["generate", "edit"])
def test_a_prompt_is_the_beginning_of_what_training_reads(
    illume: Illume, task: str, size: tuple[int, int]
) -> None:
    if task == "generate":
        asked = illume.prompts.ask(Generate(CAPTION, size))
        text = GENERATE.replace("{caption}", CAPTION)
    else:
        asked = illume.prompts.ask(Edit(picture(*size), INSTRUCTION + "."))
        text = EDIT.replace("{instruction}", INSTRUCTION)
    conversation = Conversation((Turn("user", text), Turn("assistant", IMAGE)))
    sizes = [SizedImage(size, False)] * len(conversation.is_target)
    twin = unconditional(conversation, False)
    for prompt, version, shown in (
        (asked.request.prompt, conversation, tuple(range(len(sizes)))),
        (asked.request.unconditional, twin.conversation, twin.images),
    ):
        assert prompt is not None
        sequence = trained(illume, version, sizes, shown)
        length = len(prompt.ids)
        assert list(prompt.ids) == sequence.ids[:length].tolist()
        assert list(prompt.slot_ids) == sequence.slots[:length].tolist()
        assert sequence.ids[length] == illume.mllm.vocabulary.start_of_image
        assert list(prompt.semantic_slots) == [
            p for cells in sequence.inputs for p in cells.semantic.tolist()
        ]
        assert len(prompt.images) == len(sequence.inputs)


def test_a_conversation_with_made_pictures_is_what_training_reads(illume: Illume) -> None:
    layout = image_layout((32, 64), illume.mllm.vocabulary)
    codes = tuple(np.arange(len(slots)) % 7 for slots in (layout.semantic_slots, layout.pixel_slots))
    made = MadeImage(picture(32, 64), codes, (32, 64))
    first = [
        {"role": "user", "content": "make one"},
        {"role": "assistant", "content": [{"type": "image", "image": made}]},
    ]
    messages = [
        *first,
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(50, 50)}, {"type": "text", "text": "and this?"}],
        },
    ]
    prompt = illume.prompts.ask(Chat(messages)).request.prompt
    conversation = Conversation(
        (
            Turn("user", "make one"),
            Turn("assistant", IMAGE),
            Turn("user", f"{IMAGE}\nand this?"),
            Turn("assistant", "yes"),
        )
    )
    sizes = [SizedImage((32, 64), False), SizedImage((32, 32), False)]
    sequence = trained(illume, conversation, sizes, (0, 1))
    assert list(prompt.ids) == sequence.ids[: len(prompt.ids)].tolist()
    assert len(sequence.ids) - len(prompt.ids) >= 3  # the answer, the end of its turn, a line break


def test_discrete_input_reads_the_codes_of_pictures(tmp_path: Path) -> None:
    illume = build_illume(tmp_path, discrete_input=True)
    vocabulary = illume.mllm.vocabulary
    own = picture(32, 64)
    question = [
        {"role": "user", "content": [{"type": "image", "image": own}, {"type": "text", "text": "What?"}]}
    ]
    layout, codes = image_layout((32, 64), vocabulary), illume._codes(to_tensor(own))
    expected = layout.ids(*(branch.tolist() for branch in codes))
    for task in (Edit(own, INSTRUCTION), Chat(question)):
        request = illume.prompts.ask(task).request
        for prompt in (request.prompt, request.unconditional):
            start = list(prompt.ids).index(vocabulary.start_of_image)
            assert list(prompt.ids[start : start + layout.length]) == expected
            assert list(prompt.slot_ids[start : start + layout.length]) == list(layout.slot_ids)
            assert not prompt.images and not prompt.semantic_slots and not prompt.pixel_slots
    edited = [illume.edit(source, INSTRUCTION)[0].tobytes() for source in (own, own, picture(32, 64, 1))]
    assert edited[0] == edited[1] != edited[2]
    blind = Illume(illume.mllm, illume.text_tokenizer, sizes=SIZES, slots=4, context=2048)
    with pytest.raises(ValueError, match="pictures that enter as codes need a tokenizer"):
        blind.check(Chat(question))


def test_pictures_have_the_sizes_asked_for_and_follow_their_seeds(illume: Illume) -> None:
    together = illume.generate([CAPTION, CAPTION, "a star"], size=(32, 64), seeds=[3, 4, 3])
    assert [image.size for image in together] == [(64, 32)] * 3
    assert [np.array_equal(together[0], other) for other in together] == [True, False, False]
    assert np.array_equal(illume.generate("a star", size=(32, 64), seeds=[3])[0], together[2])
    assert illume.generate("a star")[0].size == (32, 32)


def test_an_edit_has_its_pictures_size(illume: Illume) -> None:
    pictures = [picture(51, 40), picture(20, 90), picture(32, 32)]
    edited = illume.edit(pictures, [INSTRUCTION] * 3)
    assert [image.size for image in edited] == [image.size for image in pictures]
    assert [image.size for image in illume.reconstruct(pictures)] == [image.size for image in pictures]


def test_tasks_of_all_kinds_side_by_side_equal_each_alone(illume: Illume) -> None:
    question = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(40, 70)}, {"type": "text", "text": "What?"}],
        }
    ]
    tasks = [
        Generate(CAPTION, (32, 64), seed=1),
        Edit(picture(40, 40), INSTRUCTION, seed=2),
        Chat(question, seed=3, max_tokens=12, sampling=TokenSampling(text=SegmentSampling(1.0))),
        Generate("a star", seed=4, sampling=GREEDY),
    ]
    together = {event.number: event.reply for event in illume.run(tasks) if event.reply}
    for number, task in enumerate(tasks):
        (alone,) = [event.reply for event in illume.run([task]) if event.reply]
        assert alone.text == together[number].text
        assert [np.asarray(image).tolist() for image in alone.images] == [
            np.asarray(image).tolist() for image in together[number].images
        ]


def test_streamed_words_are_the_reply(illume: Illume) -> None:
    chat = Chat(
        [{"role": "user", "content": "Hi"}], max_tokens=40, sampling=TokenSampling(text=SegmentSampling(1.0))
    )
    events = list(illume.run([chat]))
    assert len(events) > 5 and events[-1].reply is not None
    words = [part for part in events[-1].reply.parts if isinstance(part, str)]
    assert "".join(event.text for event in events) == "".join(words)


def test_a_conversation_goes_on_with_what_was_answered(illume: Illume) -> None:
    messages = [{"role": "user", "content": "Hi"}]
    reply = illume.chat(messages, max_tokens=6, sampling=TokenSampling(text=SegmentSampling(1.0)))
    longer = [*messages, reply.message, {"role": "user", "content": "And?"}]
    ids = illume.prompts.ask(Chat(longer)).request.prompt.ids
    assert reply.text in illume.text_tokenizer.decode(ids)
    assert reply.message["role"] == "assistant"


def test_signs_that_a_user_types_stay_words(illume: Illume) -> None:
    typed = "<image> {resolution_tag} <|im_end|> <start_of_image>"
    prompt = illume.prompts.ask(Chat([{"role": "user", "content": typed}])).request.prompt
    assert not prompt.images and max(prompt.ids) < illume.mllm.vocabulary.num_text
    assert (
        list(prompt.ids).count(illume.text_tokenizer.end_of_turn) == 2
    )  # of the system's turn and the user's


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Generate("  "), "the prompt is empty"),
        (Generate("a <image>"), "stands for a picture"),
        (Generate("a star", (40, 32)), "40 x 32"),
        (Generate("a star", (32, 1024)), "1024 has no token"),
        (Edit(Image.new("RGB", (8, 8)), ""), "the instruction is empty"),
        (Chat([]), "nothing to answer"),
        (Chat([{"role": "assistant", "content": "Hi"}]), "nothing to answer"),
        (Chat([{"role": "robot", "content": "Hi"}]), "role 'robot'"),
        (Chat([{"role": "user", "content": [{"type": "image", "image": "a.png"}]}]), "use text, or an image"),
        (Chat([{"role": "user", "content": "word " * 2000}]), "don't fit a context of 2,048"),
    ],
)
def test_what_cannot_be_worked_on_is_said_before_any_work(
    illume: Illume, task: Generate | Edit | Chat, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        illume.check(task)
    with pytest.raises(ValueError, match=message):
        list(illume.run([task]))
    assert illume.generate("a star")[0].size == (32, 32)  # the engine goes on working


def test_pictures_need_their_decoders(illume: Illume) -> None:
    with pytest.raises(ValueError, match="there is no diffusion decoder"):
        illume.generate("a star", decoder="diffusion")
    words_only = Illume(illume.mllm, illume.text_tokenizer, sizes=SIZES, slots=4, context=256)
    with pytest.raises(ValueError, match="need a tokenizer"):
        words_only.generate("a star")
    assert isinstance(words_only.chat([{"role": "user", "content": "Hi"}], max_tokens=4).text, str)


def test_a_cancelled_task_ends_and_leaves_the_others(illume: Illume) -> None:
    ended = {}
    for event in illume.run([Generate("a star", seed=1), Generate("a star", seed=2)]):
        if event.picture and not ended:
            illume.cancel(0)
        if event.reply is not None:
            ended[event.number] = event.reply
    assert not ended[0].images and len(ended[1].images) == 1


def test_the_guide_runs(illume: Illume, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    guide = (Path(__file__).parents[2] / "docs" / "generation.md").read_text()
    blocks = [
        block.removeprefix("python\n") for block in guide.split("```")[1::2] if block.startswith("python")
    ]
    picture(40, 60).save(tmp_path / "photo.jpg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Illume, "from_run", lambda *arguments, **options: illume)
    names: dict[str, object] = {}
    for block in blocks:
        exec(block.replace("(112, 112)", "(32, 32)"), names)
    assert isinstance(names["green"], Image.Image)
