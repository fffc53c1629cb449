import pytest

from illume_lightning.vocabulary import MARKERS, Vocabulary


def test_ids_of_qwen_are_the_published_ones():
    vocabulary = Vocabulary()
    markers = ("start_of_image", "end_of_image", "end_of_line", "start_of_semantic", "end_of_semantic")
    assert [getattr(vocabulary, name) for name in markers] == [151665, 151666, 151667, 151668, 151669]
    assert (vocabulary.start_of_pixel, vocabulary.end_of_pixel) == (151670, 151671)
    assert (vocabulary.height_ids[0], vocabulary.height_ids[-1]) == (151672, 151687)
    assert (vocabulary.width_ids[0], vocabulary.width_ids[-1]) == (151688, 151703)
    assert (vocabulary.semantic_ids[0], vocabulary.semantic_ids[-1]) == (151704, 184471)
    assert (vocabulary.pixel_ids[0], vocabulary.pixel_ids[-1]) == (184472, 282775)
    assert vocabulary.size == 282_776 and vocabulary.num_vision == 131_111
    assert vocabulary.size_tokens((384, 512)) == (151677, 151695)
    # Embedding rows of Qwen2.5-3B and 7B: the original ones and 131,111 more.
    assert Vocabulary(num_unused=271).size == 151_936 + 131_111
    assert Vocabulary(num_unused=399).size == 152_064 + 131_111
    # The order within pictures is none of ids.
    assert Vocabulary(pixel_first=True).pixel_ids == vocabulary.pixel_ids


def test_strings_stand_at_their_ids():
    vocabulary = Vocabulary(num_text=10, semantic_codes=3, pixel_codes=2, size_step=16, num_sizes=2)
    tokens = dict(enumerate(vocabulary.tokens(), start=vocabulary.num_text))
    assert [tokens[10 + number] for number in range(7)] == list(MARKERS)
    assert tokens[vocabulary.size_tokens((32, 16))[0]] == "<height_32>"
    assert tokens[vocabulary.size_tokens((32, 16))[1]] == "<width_16>"
    assert tokens[vocabulary.semantic_ids[2]] == "<|image_level0_2|>"
    assert tokens[vocabulary.pixel_ids[1]] == "<|image_level1_1|>"
    assert len(tokens) == vocabulary.num_vision


@pytest.mark.parametrize("size", [(1088, 512), (512, 100), (0, 64)])
def test_sizes_without_a_token(size):
    with pytest.raises(
        ValueError, match="has no token; the vocabulary has multiples of 64 up to 1024 pixels"
    ):
        Vocabulary().size_tokens(size)


@pytest.mark.parametrize("name", ["num_text", "semantic_codes", "pixel_codes", "size_step", "num_sizes"])
def test_counts_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} is 0"):
        Vocabulary(**{name: 0})
