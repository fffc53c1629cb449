"""DualViTok's data flow: shapes, round trips, branches, noise, gradients."""

import pytest
import torch
from tiny import build_tiny

from illume_lightning.nn.dualvitok import DualCodes, DualViTok
from illume_lightning.nn.noise import TokenNoise
from illume_lightning.nn.pixel import Downsample, PixelDecoder, PixelEncoder, SpatialNorm, Upsample
from illume_lightning.nn.semantic import rotary_2d, rotate
from illume_lightning.resolution import grids


@pytest.mark.parametrize("size", [(64, 64), (112, 112), (64, 144), (384, 512)])
def test_grids_follow_the_size_table(tiny: DualViTok, size: tuple[int, int]) -> None:
    output = tiny.eval()(torch.rand(2, 3, *size) * 2 - 1)
    expected = grids(*size)
    codes = output.encoded.codes
    assert codes.semantic.shape == (2, *expected.semantic)
    assert codes.pixel.shape == (2, *expected.pixel)
    assert output.reconstruction.shape == (2, 3, *size)


def test_decoding_the_codes_equals_the_reconstruction(tiny: DualViTok) -> None:
    tiny.eval()
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    output = tiny(images)
    decoded = tiny.decode_codes(output.encoded.codes)
    torch.testing.assert_close(decoded, output.reconstruction.clamp(-1, 1), atol=1e-5, rtol=0)


def test_a_picture_does_not_depend_on_its_neighbours(tiny: DualViTok) -> None:
    tiny.eval()
    images = torch.rand(3, 3, 64, 64) * 2 - 1
    together = tiny(images).reconstruction
    alone = torch.cat([tiny(image[None]).reconstruction for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)


def test_gradients_reach_everything_but_the_tower_and_the_frozen_codebooks(tiny: DualViTok) -> None:
    output = tiny.train()(torch.rand(2, 3, 64, 64) * 2 - 1)
    loss = output.reconstruction.pow(2).mean() + output.semantic_reconstruction[:, 0].mean()
    (loss + output.encoded.semantic.loss + output.encoded.pixel.loss).backward()
    without = {name for name, parameter in tiny.named_parameters() if parameter.grad is None}
    assert without == {name for name, _ in tiny.named_parameters() if ".model." in name}
    assert not any("frozen_codebook" in name for name, _ in tiny.named_parameters())


@pytest.mark.parametrize(("semantic", "pixel"), [(True, False), (False, True)])
def test_single_branches_of_table_6(semantic: bool, pixel: bool) -> None:
    torch.manual_seed(0)
    model = build_tiny(semantic, pixel).eval()
    images = torch.rand(1, 3, 64, 64) * 2 - 1
    output = model(images)
    codes = output.encoded.codes
    assert (codes.semantic is not None, codes.pixel is not None) == (semantic, pixel)
    assert (output.semantic_reconstruction is not None) == semantic
    decoded = model.decode_codes(codes, grid=(4, 4))
    torch.testing.assert_close(decoded, output.reconstruction.clamp(-1, 1), atol=1e-5, rtol=0)


def test_noise_only_in_training_and_only_on_pixel_features() -> None:
    torch.manual_seed(0)
    model = build_tiny(noise=TokenNoise("random", 1.0, 1.0))
    images = torch.rand(2, 3, 64, 64) * 2 - 1
    encoded = model.eval().encode(images)
    semantic, pixel = encoded.semantic.features, encoded.pixel.features
    clean = model.merge(semantic, pixel, encoded.grid)
    noisy = model.train().merge(semantic, pixel, encoded.grid)
    assert torch.equal(clean[:, :8], noisy[:, :8])
    assert (clean[:, 8:] != noisy[:, 8:]).any(dim=1).float().mean() > 0.9


def test_warm_up_leaves_the_quantisers_out(tiny: DualViTok) -> None:
    encoded = tiny.encode(torch.rand(1, 3, 64, 64) * 2 - 1, latent_noise=0.0)
    latents, _ = tiny.latents(torch.rand(1, 3, 64, 64))
    assert encoded.pixel.loss == 0
    assert encoded.pixel.features.shape == latents["pixel"].shape
    assert encoded.pixel.features.requires_grad


@pytest.mark.parametrize("missing", ["semantic_quantizer", "semantic_decoder", "pixel_quantizer"])
def test_half_a_branch_is_refused(missing: str, tiny: DualViTok) -> None:
    parts = {
        name: getattr(tiny, name)
        for name in (
            "semantic_encoder",
            "semantic_quantizer",
            "semantic_decoder",
            "pixel_encoder",
            "pixel_quantizer",
        )
    }
    parts[missing] = None
    with pytest.raises(ValueError, match="branch is"):
        DualViTok(tiny.pixel_decoder, **parts)


def test_channels_that_do_not_fit_are_named(tiny: DualViTok) -> None:
    with pytest.raises(ValueError, match="give 16 channels, pixel_decoder.latent_channels is 8"):
        DualViTok(
            PixelDecoder(8, num_res_blocks=1, attention_levels=(), latent_channels=8, norm_groups=4),
            tiny.semantic_encoder,
            tiny.semantic_quantizer,
            tiny.semantic_decoder,
            tiny.pixel_encoder,
            tiny.pixel_quantizer,
        )
    with pytest.raises(ValueError, match="the codes have no pixel ids"):
        tiny.decode_codes(DualCodes(torch.zeros(1, 2, 2, dtype=torch.long), None))
    with pytest.raises(ValueError, match="10 channels can't be split into 4 norm groups"):
        PixelEncoder(10, norm_groups=4)


def test_dc_blocks_start_as_averages_and_repeats() -> None:
    x = torch.randn(1, 8, 4, 6)
    down, up = Downsample(8, "dc"), Upsample(8, "dc")
    for block in (down, up):
        torch.nn.init.zeros_(block.conv.weight)
        torch.nn.init.zeros_(block.conv.bias)
    # The released shortcuts, written out: space-to-channel and group mean; channel repeat and channel-to-space.
    unshuffled = torch.nn.functional.pixel_unshuffle(x, 2)
    torch.testing.assert_close(down(x), unshuffled.view(1, 8, 4, 2, 3).mean(2))
    shuffled = torch.nn.functional.pixel_shuffle(x.repeat_interleave(4, 1), 2)
    torch.testing.assert_close(up(x), shuffled)


@pytest.mark.parametrize("resampling", ["dc", "origin"])
def test_both_resamplings_keep_the_factor(resampling: str) -> None:
    encoder = PixelEncoder(8, num_res_blocks=1, latent_channels=8, norm_groups=4, resampling=resampling)
    decoder = PixelDecoder(
        8, num_res_blocks=1, attention_levels=(), latent_channels=8, norm_groups=4, resampling=resampling
    )
    z = encoder(torch.randn(1, 3, 32, 48))
    assert z.shape == (1, 8, 2, 3)
    assert decoder(z, z).shape == (1, 3, 32, 48)


def test_spatial_norm_equals_convolving_the_repeated_features() -> None:
    torch.manual_seed(0)
    norm = SpatialNorm(8, 6, 4)
    x, condition = torch.randn(2, 8, 8, 12), torch.randn(2, 6, 2, 3)
    repeated = torch.nn.functional.interpolate(condition, (8, 12))
    expected = norm.norm_layer(x) * norm.conv_y(repeated) + norm.conv_b(repeated)
    torch.testing.assert_close(norm(x, condition), expected, atol=1e-6, rtol=1e-5)


def test_rotary_scores_depend_on_relative_positions_only() -> None:
    torch.manual_seed(0)
    rows, cols, dim = 5, 6, 16
    rotary = rotary_2d(rows, cols, dim, torch.device("cpu"))
    q, k = torch.randn(dim), torch.randn(dim)
    every = torch.ones(1, 1, rows * cols, 1)
    scores = rotate(every * q, *rotary)[0, 0] @ rotate(every * k, *rotary)[0, 0].T
    at = lambda r, c: r * cols + c  # noqa: E731
    torch.testing.assert_close(scores[at(0, 0), at(2, 1)], scores[at(1, 3), at(3, 4)], atol=1e-5, rtol=0)
    assert (scores[at(0, 0), at(2, 1)] - scores[at(0, 0), at(1, 2)]).abs() > 1e-3
