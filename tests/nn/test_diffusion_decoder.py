"""Conditioning, loss and sampler of the diffusion decoder, on a UNet of SDXL's kind made small."""

import math

import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, UNet2DConditionModel
from tiny import build_tiny

from illume_lightning.nn.condition import ConditionNoise, check_codes, replace_codes
from illume_lightning.nn.diffusion_decoder import (
    DiffusionDecoder,
    build_unet,
    load_decoder,
    sampling_scheduler,
    save_decoder,
    sdxl_unet,
    widen_input,
)
from illume_lightning.nn.dualvitok import DualCodes
from illume_lightning.nn.latents import SpaceToDepth, VAELatents
from illume_lightning.resolution import DECODER_SIZES, decoder_size_index, grids, ratio_sizes

SMALL = {
    "channels": [8, 16],
    "transformer_layers": [0, 1],
    "head_dim": 8,
    "cross_attention_dim": 8,
    "pooled_dim": 4,
    "time_dim": 4,
    "norm_groups": 4,
}
SIZES = [(64, 64), (64, 128), (128, 64)]


def small_vae() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(
        block_out_channels=(8, 8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        norm_num_groups=4,
        latent_channels=4,
    )


def small_decoder(condition: int = 16, **options) -> DiffusionDecoder:
    torch.manual_seed(0)
    unet = build_unet(48, condition, **SMALL)
    scheduler = DDPMScheduler(prediction_type=options.pop("prediction_type", "epsilon"))
    return DiffusionDecoder(unet, SpaceToDepth(4), scheduler, sizes=SIZES, **options).eval()


def ddim(decoder):
    return sampling_scheduler("diffusers.DDIMScheduler", decoder.scheduler)


# -- sizes --


def test_published_sizes_count_as_in_the_pipeline():
    strings = ["(1024, 1024)", "(768, 1024)", "(1024, 768)", "(512, 2048)", "(2048, 512)", "(640, 1920)",
               "(1920, 640)", "(768, 1536)", "(1536, 768)", "(768, 1152)", "(1152, 768)", "(512, 512)"]  # fmt: skip
    for number, text in enumerate(strings):
        width, height = (int(part) for part in text.strip("()").split(","))
        assert decoder_size_index((height, width), DECODER_SIZES) == number
        if height != width:
            swapped = decoder_size_index((height, width), DECODER_SIZES, transposed=True)
            assert swapped == (number + 1 if number % 2 else number - 1)


@pytest.mark.parametrize("side", [512, 1024])
def test_every_ratio_of_both_stages_has_a_number(side):
    numbers = [decoder_size_index(size, DECODER_SIZES) for size in ratio_sizes(side, 32)]
    assert len(set(numbers)) == 11
    assert numbers[0] == (11 if side == 512 else 0)


def test_a_ratio_outside_the_list_is_refused():
    with pytest.raises(ValueError, match=r"320 x 64.*none of this aspect ratio"):
        decoder_size_index((320, 64), DECODER_SIZES)
    decoder = small_decoder()
    with pytest.raises(ValueError, match=r"96 x 64 \(height x width\)"):
        decoder.sample(torch.zeros(1, 16, 3, 2), ddim(decoder), 1)


# -- UNet --


def test_the_default_is_sdxl():
    with torch.device("meta"):
        unet = build_unet()
        published = UNet2DConditionModel(
            sample_size=128, in_channels=4, out_channels=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280), cross_attention_dim=2048, transformer_layers_per_block=[1, 2, 10],
            attention_head_dim=[5, 10, 20], use_linear_projection=True, addition_embed_type="text_time",
            addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        )  # fmt: skip
    ours = {name: tuple(value.shape) for name, value in unet.state_dict().items()}
    theirs = {name: tuple(value.shape) for name, value in published.state_dict().items()}
    assert ours.pop("conv_in.weight") == (320, 68, 3, 3)
    assert theirs.pop("conv_in.weight") == (320, 4, 3, 3)
    assert ours == theirs


def test_a_widened_unet_predicts_what_the_narrow_one_did(tmp_path):
    torch.manual_seed(0)
    narrow = build_unet(4, 0, **SMALL).eval()
    narrow.save_pretrained(tmp_path / "unet")
    wide = sdxl_unet(str(tmp_path), condition_channels=64).eval()
    assert wide.config.in_channels == 68
    x, features = torch.randn(2, 4, 16, 16), torch.randn(2, 64, 16, 16)
    arguments = {
        "encoder_hidden_states": torch.zeros(2, 77, 8),
        "added_cond_kwargs": {"text_embeds": torch.zeros(2, 4), "time_ids": torch.zeros(2, 6)},
    }
    with torch.no_grad():
        expected = narrow(x, torch.tensor([3, 700]), **arguments).sample
        got = wide(torch.cat([x, features], 1), torch.tensor([3, 700]), **arguments).sample
    assert torch.equal(got, expected)


def test_a_wide_unet_stays_and_a_wrong_one_is_refused():
    unet = build_unet(4, 64, **SMALL)
    before = unet.conv_in.weight.clone()
    assert torch.equal(widen_input(unet, 64).conv_in.weight, before)
    with pytest.raises(ValueError, match=r"takes 68 channels; expected 4 .* or 36"):
        widen_input(unet, 32)


# -- conditioning --


def test_input_is_latent_then_nearest_features_and_the_rest_is_zero(monkeypatch):
    decoder = small_decoder()
    seen = {}

    def record(sample, timestep, encoder_hidden_states, added_cond_kwargs):
        seen.update(sample=sample, text=encoder_hidden_states, **added_cond_kwargs)
        return type("Output", (), {"sample": sample[:, :48]})

    monkeypatch.setattr(decoder.unet, "forward", record)
    noisy, features = torch.randn(2, 48, 16, 32), torch.randn(2, 16, 2, 4)
    decoder.predict(noisy, torch.tensor([1, 2]), features)
    assert torch.equal(seen["sample"][:, :48], noisy)
    assert torch.equal(seen["sample"][:, 48:], features.repeat_interleave(8, 2).repeat_interleave(8, 3))
    assert not seen["text"].any()
    assert not seen["text_embeds"].any()
    assert seen["time_ids"].tolist() == [[0, 0, 0, 0, 0, 1]] * 2


def test_one_zero_text_token_equals_77():
    decoder = small_decoder()
    x, t, f = torch.randn(2, 48, 16, 16), torch.tensor([5, 50]), torch.randn(2, 16, 2, 2)
    with torch.no_grad():
        one = decoder.predict(x, t, f)
        decoder.num_text_tokens = 77
        assert torch.allclose(decoder.predict(x, t, f), one, atol=1e-6)


def within_binomial(hits: int, draws: int, probability: float) -> bool:
    return abs(hits - draws * probability) <= 5 * math.sqrt(draws * probability * (1 - probability))


def test_rates_of_wrong_tokens_and_dropped_branches():
    torch.manual_seed(0)
    tokenizer = build_tiny().eval()
    samples = 4000
    codes = DualCodes(
        torch.zeros(samples, 4, 4, dtype=torch.long), torch.zeros(samples, 7, 7, dtype=torch.long)
    )
    noise = ConditionNoise()
    replaced = noise.replace(codes, tokenizer)
    wrong = {"semantic": replaced.semantic.flatten(1) != 0, "pixel": replaced.pixel.flatten(1) != 0}
    # A sample of 49 + 16 codes that is perturbed has no wrong one with probability 0.9^65 = 0.1 %.
    perturbed = wrong["semantic"].any(1) | wrong["pixel"].any(1)
    assert within_binomial(int(perturbed.sum()), samples, 0.5)
    for name, size in (("semantic", 64), ("pixel", 96)):
        among = wrong[name][perturbed]
        assert within_binomial(int(among.sum()), among.numel(), 0.1 * (1 - 1 / size))
        drawn = getattr(replaced, name)[getattr(replaced, name) != 0]
        assert drawn.min() == 1
        assert drawn.max() == size - 1
    dropped = noise.drop(torch.ones(samples, 16, 2, 2), tokenizer)
    semantic, pixel = (dropped[:, :8].flatten(1) == 0).all(1), (dropped[:, 8:].flatten(1) == 0).all(1)
    assert set(dropped.unique().tolist()) == {0.0, 1.0}
    assert within_binomial(int(semantic.sum()), samples, 0.1)
    assert within_binomial(int(pixel.sum()), samples, 0.5)
    assert within_binomial(int((semantic & pixel).sum()), samples, 0.05)


def test_replacing_with_a_generator_repeats_itself():
    tokenizer = build_tiny()
    codes = DualCodes(torch.zeros(2, 4, 4, dtype=torch.long), torch.zeros(2, 7, 7, dtype=torch.long))
    a, b = (replace_codes(codes, tokenizer, 0.3, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(a.semantic, b.semantic)
    assert torch.equal(a.pixel, b.pixel)
    assert not replace_codes(codes, tokenizer, 0.0).pixel.any()


def test_probabilities_and_grids_are_checked():
    with pytest.raises(ValueError, match=r"pixel_drop is 1.5"):
        ConditionNoise(pixel_drop=1.5)
    codes = {"semantic": torch.zeros(1, 3, 4), "pixel": torch.zeros(1, 7, 7)}
    with pytest.raises(
        ValueError, match=r"semantic codes form a grid of 3 x 4; beside pixel codes of 7 x 7 it must be 4 x 4"
    ):
        check_codes(codes, grids(112, 112)._asdict())


# -- loss --


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_loss_is_zero_for_the_right_prediction(kind, monkeypatch):
    decoder = small_decoder(prediction_type=kind)
    latents = torch.randn(4, 48, 16, 16)

    def oracle(noisy, timesteps, features):
        kept = decoder.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
        noise = (noisy - kept.sqrt() * latents) / (1 - kept).sqrt()
        velocity = kept.sqrt() * noise - (1 - kept).sqrt() * latents
        return {"epsilon": noise, "v_prediction": velocity, "sample": latents}[kind]

    monkeypatch.setattr(decoder, "predict", oracle)
    assert decoder.loss(latents, torch.zeros(4, 16, 2, 2)).max() < 1e-4


def test_min_snr_weights():
    """Hang et al. 2023, equation for each prediction, at gamma 5."""
    for kind, formula in {
        "epsilon": lambda snr: min(snr, 5.0) / snr,
        "v_prediction": lambda snr: min(snr, 5.0) / (snr + 1),
        "sample": lambda snr: min(snr, 5.0),
    }.items():
        decoder = small_decoder(prediction_type=kind, min_snr_gamma=5.0)
        for step in (0, 300, 999):
            kept = decoder.scheduler.alphas_cumprod[step].item()
            expected = formula(kept / (1 - kept))
            assert decoder._weight(torch.tensor([step])).item() == pytest.approx(expected, rel=1e-4)


def test_gradients_reach_the_unet_only():
    decoder = small_decoder(16)
    vae = DiffusionDecoder(
        build_unet(4, 16, **SMALL), VAELatents(vae=small_vae()), DDPMScheduler(), sizes=SIZES
    )
    for model in (decoder, vae):
        model.train()
        with torch.no_grad():
            latents = model.latents.encode(torch.rand(2, 3, 64, 64) * 2 - 1)
        model.loss(latents, torch.randn(2, 16, 2, 2)).sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == name.startswith("unet."), name
        assert not any(module.training for module in model.latents.modules())


# -- sampling --


def test_guidance_one_is_no_guidance_and_guidance_is_one_forward(monkeypatch):
    decoder = small_decoder()
    features = torch.randn(2, 16, 2, 2)
    batches = []
    forward = decoder.unet.forward
    monkeypatch.setattr(
        decoder.unet, "forward", lambda x, *a, **k: (batches.append(len(x)), forward(x, *a, **k))[1]
    )
    plain = decoder.sample(features, ddim(decoder), 3, guidance=1.0)
    assert batches == [2, 2, 2]
    guided = decoder.sample(features, ddim(decoder), 3, guidance=3.0)
    assert batches[3:] == [4, 4, 4]
    assert not torch.equal(plain, guided)
    # Equal branches leave guidance nothing to do, whatever the scale.
    zeros = torch.zeros_like(features)
    assert torch.allclose(
        decoder.sample(zeros, ddim(decoder), 3, guidance=3.0), decoder.sample(zeros, ddim(decoder), 3, guidance=1.0),
        atol=1e-5,
    )  # fmt: skip


def test_a_picture_depends_on_its_own_seed_only():
    decoder = small_decoder()
    features = torch.randn(3, 16, 2, 2)
    together = decoder.sample(features, ddim(decoder), 2, seeds=[7, 8, 9])
    alone = decoder.sample(features[1:2], ddim(decoder), 2, seeds=[8])
    assert torch.allclose(together[1:2], alone, atol=1e-5)
    assert not torch.allclose(decoder.sample(features[1:2], ddim(decoder), 2, seeds=[9]), alone, atol=1e-2)
    assert together.shape == (3, 3, 64, 64)
    assert together.abs().max() <= 1


def test_sampling_with_the_right_predictions_returns_the_picture(monkeypatch):
    """A DDIM trajectory with the true noise ends at the latent it came from."""
    decoder = small_decoder(prediction_type="sample")
    picture = torch.rand(1, 3, 64, 64) * 2 - 1
    monkeypatch.setattr(
        decoder, "predict", lambda noisy, t, f: SpaceToDepth(4).encode(picture).expand(len(noisy), -1, -1, -1)
    )
    scheduler = sampling_scheduler(
        "diffusers.DDIMScheduler", decoder.scheduler, {"clip_sample": False, "set_alpha_to_one": True}
    )
    assert torch.allclose(decoder.sample(torch.zeros(1, 16, 2, 2), scheduler, 10), picture, atol=1e-5)


@pytest.mark.parametrize(
    "name",
    ["DDIMScheduler", "EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"],
)
def test_any_scheduler_of_diffusers(name):
    decoder = small_decoder()
    scheduler = sampling_scheduler(f"diffusers.{name}", decoder.scheduler)
    assert scheduler.config.prediction_type == "epsilon"
    assert decoder.sample(torch.zeros(1, 16, 2, 4), scheduler, 3).shape == (1, 3, 64, 128)


@pytest.mark.parametrize("path", ["diffusers.NoScheduler", "torch.nn.Linear", "DDIMScheduler"])
def test_what_is_no_scheduler(path):
    with pytest.raises(ValueError, match=r"none of diffusers' schedulers"):
        sampling_scheduler(path, DDPMScheduler())


def test_bad_sampling_arguments():
    decoder = small_decoder()
    with pytest.raises(ValueError, match=r"num_steps is 0"):
        decoder.sample(torch.zeros(1, 16, 2, 2), ddim(decoder), 0)
    with pytest.raises(ValueError, match=r"shape \(1, 8, 2, 2\).*\(B, 16, h2, w2\)"):
        decoder.sample(torch.zeros(1, 8, 2, 2), ddim(decoder), 1)
    with pytest.raises(FloatingPointError, match=r"pictures \[0\] of 1"):
        decoder.sample(torch.full((1, 16, 2, 2), float("nan")), ddim(decoder), 1)


def test_unet_and_latents_must_fit():
    with pytest.raises(ValueError, match=r"predicts 4 channels, the latents have 48"):
        DiffusionDecoder(build_unet(4, 16, **SMALL), SpaceToDepth(4), DDPMScheduler())


# -- latents and files --


def test_space_to_depth_loses_nothing():
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    latents = SpaceToDepth(4).encode(images)
    assert latents.shape == (2, 48, 8, 12)
    assert torch.equal(SpaceToDepth(4).decode(latents), images)


def test_vae_latents_are_diffusers_scaled_mode():
    vae = small_vae().eval()
    latents = VAELatents(vae=vae)
    images = torch.rand(2, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        expected = vae.encode(images).latent_dist.mode() * vae.config.scaling_factor
        assert torch.equal(latents.encode(images), expected)
        assert torch.equal(latents.decode(expected), vae.decode(expected / vae.config.scaling_factor).sample)
    assert (latents.channels, latents.factor) == (4, 8)
    with pytest.raises(ValueError, match="either pretrained or vae"):
        VAELatents()


def test_the_published_layout_round_trips(tmp_path):
    torch.manual_seed(0)
    unet = build_unet(4, 16, **SMALL)
    scheduler = DDPMScheduler(prediction_type="v_prediction", beta_schedule="scaled_linear")
    decoder = DiffusionDecoder(unet, VAELatents(vae=small_vae()), scheduler, sizes=SIZES).eval()
    save_decoder(decoder, tmp_path / "decoder")
    assert {path.name for path in (tmp_path / "decoder").iterdir()} == {"unet", "vae", "scheduler"}
    loaded = load_decoder(str(tmp_path / "decoder"), condition_channels=16, sizes=SIZES).eval()
    assert loaded.scheduler.config.prediction_type == "v_prediction"
    features = torch.randn(1, 16, 2, 2)
    scheduler = DDIMScheduler.from_config(decoder.scheduler.config)
    assert torch.equal(loaded.sample(features, scheduler, 2), decoder.sample(features, scheduler, 2))
    with pytest.raises(ValueError, match=r"takes 20 channels"):
        load_decoder(str(tmp_path / "decoder"), condition_channels=64)
    with pytest.raises(ValueError, match=r"SpaceToDepth.*published layout"):
        save_decoder(small_decoder(), tmp_path / "other")
    assert not (tmp_path / "other").exists()
