"""The MLLM's stages: what trains, at which rate (paper 3.4, Table 1); the step is the same for all."""

import logging
from abc import abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor, nn

from illume_lightning.data.packed_batch import PackedBatch
from illume_lightning.lit.dualvitok import to_float
from illume_lightning.lit.lora import LoRA
from illume_lightning.lit.planned_data import replica
from illume_lightning.lit.sharding import shard
from illume_lightning.lit.token_metrics import TokenMetrics
from illume_lightning.lit.tokenizer import check_cached_codes, check_maker, fingerprint, load_tokenizer
from illume_lightning.lit.training import TrainingModule
from illume_lightning.nn.dualvitok import DualViTok
from illume_lightning.nn.linear_cross_entropy import CrossEntropy
from illume_lightning.nn.mllm import MLLM

if TYPE_CHECKING:
    from illume_lightning.lit.answers import Answer
    from illume_lightning.lit.conversation_data import JobBatch

log = logging.getLogger(__name__)


def default_optimizer(groups: Any) -> torch.optim.Optimizer:
    """AdamW without weight decay (paper 4.1), betas of the official release."""
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)


class MLLMStage(TrainingModule):
    """What the stages share. A stage names its trained parts and their learning rates; all else is frozen.

    Args:
        mllm: the model.
        learning_rates: of trained parts by name; those that are not given are the stage's, of Table 1.
        optimizer: gets one group with its rate for every trained part.
        matrix_optimizer: takes the matrices of the trunk's blocks from it, at a rate of its own, such as
            ``torch.optim.Muon``; none leaves them with the others (paper).
        lr_scheduler: stepped once per training step; ``None`` is the paper's constant rate.
        gradient_clip: largest gradient norm; 0 turns clipping off (official release: 1.0).
        tokenizer: DualViTok run, checkpoint or published file that makes the codes of images to generate, where
            no cache has them, and with discrete input of images to look at.
        z_loss: weight of the squared log-sum-exp, which keeps logits small; 0 turns it off.
        checkpoint_activations: compute the trunk's activations again in the backward pass instead of keeping them.
        compile: compile the trunk.

    Raises:
        ValueError: if a learning rate is given for what this stage does not train.
    """

    rates: ClassVar[dict[str, float]] = {}
    """Trained parts and their learning rates."""

    def __init__(
        self,
        mllm: MLLM,
        learning_rates: dict[str, float] | None = None,
        optimizer: OptimizerCallable = default_optimizer,
        matrix_optimizer: OptimizerCallable | None = None,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_clip: float = 1.0,
        tokenizer: str | None = None,
        z_loss: float = 0.0,
        checkpoint_activations: bool = False,
        compile: bool = False,
    ) -> None:
        super().__init__(gradient_clip)
        unknown = set(learning_rates or {}) - set(self.rates)
        if unknown:
            raise ValueError(
                f"{type(self).__name__} does not train {', '.join(sorted(unknown))}; it trains {', '.join(self.rates)}"
            )
        self.model = mllm
        self.learning_rates = {**self.rates, **(learning_rates or {})}
        self._optimizer, self._matrix_optimizer = optimizer, matrix_optimizer
        self._lr_scheduler = lr_scheduler
        self.tokenizer_path, self.z_loss = tokenizer, z_loss
        self._freeze()
        if checkpoint_activations:
            mllm.checkpoint_activations()
        if compile:
            mllm.trunk.compile()
        self._metrics: dict[str, TokenMetrics] = {}
        self._training_metrics: dict[str, TokenMetrics] = {}
        self.tokenizer_fingerprint: str | None = None
        """Of the tokenizer that made the codes; none where there are no pictures to generate."""

    # -- what trains -----------------------------------------------------------------------------------------

    @abstractmethod
    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Parameters of every trained part; none stands in two."""

    def _freeze(self) -> None:
        self.model.requires_grad_(False)
        for parameters in self.parts().values():
            for parameter in parameters:
                parameter.requires_grad_(True)

    def configure_model(self) -> None:
        """Share the weights out over devices, where the strategy is FSDP2: every block of trunk and ViT by itself.

        Embedding, head, adapters and pixel encoder are not blocks: the loss needs the tables as a whole, and the
        pixel encoder runs once for each size of pictures, of which devices have different ones.
        """
        shard(self, self.model, [*self.model.trunk.layers, *self.model.semantic_encoder.blocks])

    def configure_optimizers(self) -> tuple[list[torch.optim.Optimizer], list[Any]]:
        """One optimizer with a group for every trained part, and the matrices' own where there is one.

        Raises:
            ValueError: if there is one, and the trunk does not train.
        """
        matrices = [] if self._matrix_optimizer is None else self._trained_matrices()
        apart = {id(parameter) for parameter in matrices}
        groups = [
            {
                "params": [p for p in parameters if id(p) not in apart],
                "lr": self.learning_rates[name],
                "name": name,
            }
            for name, parameters in self.parts().items()
        ]
        optimizers = [self._optimizer(groups)]
        if self._matrix_optimizer is not None:
            optimizers.append(self._matrix_optimizer([{"params": matrices, "name": "llm matrices"}]))
        if self._lr_scheduler is None:
            return optimizers, []
        return optimizers, [self._lr_scheduler(optimizer) for optimizer in optimizers]

    def _trained_matrices(self) -> list[nn.Parameter]:
        matrices = [p for p in self.model.trunk.parameters() if p.requires_grad and p.ndim == 2]
        if not matrices:
            raise ValueError(
                f"matrix_optimizer is for the trunk's matrices, which {type(self).__name__} does not train: leave it "
                "out"
            )
        return matrices

    def gradient_norm_name(self, optimizer: torch.optim.Optimizer) -> str:
        """Those of the matrices apart."""
        return "grad_norm" if optimizer is self.all_optimizers()[0].optimizer else "matrices_grad_norm"

    def describe(self) -> str:
        """Table of what trains at which rate, from the optimizers."""
        total = sum(parameter.numel() for parameter in self.model.parameters())
        lines = [f"{type(self).__name__}: {total:,} parameters"]
        trained = 0
        for group in (group for optimizer in self.all_optimizers() for group in optimizer.param_groups):
            count = sum(parameter.numel() for parameter in group["params"])
            trained += count
            lines.append(f"  {group['name']:<16} {count:>15,} parameters  lr {group['lr']:.1e}")
        lines.append(f"  {'frozen':<16} {total - trained:>15,} parameters")
        return "\n".join(lines)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Remember the stage, and whose codes it learned."""
        checkpoint["stage"] = type(self).__name__
        checkpoint["tokenizer_fingerprint"] = self.tokenizer_fingerprint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another stage or model.

        Raises:
            ValueError: says which.
        """
        found = checkpoint.get("stage", type(self).__name__)
        if found != type(self).__name__:
            raise ValueError(
                f"{self.trainer.ckpt_path} was written by {found} and can't be continued by {type(self).__name__}, "
                "which trains other parts: hand its weights over with the WarmStart callback instead of --ckpt_path"
            )
        super().on_load_checkpoint(checkpoint)

    # -- training --------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Load the tokenizer that makes codes.

        Raises:
            FileNotFoundError: if there is none at its path.
            ValueError: if its codebooks are not those of the vocabulary, or input is discrete and there is no path.
        """
        if "tokenizer" in self.fixed:
            return
        if self.tokenizer_path is None:
            if self.model.discrete_input:
                raise ValueError(
                    "discrete_input: pictures to look at enter as codes: set model.tokenizer to the DualViTok run that "
                    "makes them"
                )
            return
        tokenizer = load_tokenizer(self.tokenizer_path)
        vocabulary = self.model.vocabulary
        wanted = {"semantic": vocabulary.semantic_codes, "pixel": vocabulary.pixel_codes}
        found = {name: quantizer.codebook_size for name, quantizer in tokenizer.quantizers.items()}
        if found != wanted:
            raise ValueError(
                f"the tokenizer {self.tokenizer_path} has codebooks of {found} codes, the vocabulary has {wanted}: set "
                "the vocabulary's semantic_codes and pixel_codes to the tokenizer's"
            )
        self.fixed["tokenizer"] = tokenizer

    def on_fit_start(self) -> None:
        """Print what trains; refuse cached codes of another tokenizer.

        Raises:
            ValueError: if the codes in the cache come from another tokenizer than the one given.
        """
        super().on_fit_start()
        if self.trainer.is_global_zero:
            log.info(self.describe())
        maker = getattr(self.trainer.datamodule, "tokenizer_fingerprint", None)
        own = fingerprint(self.fixed["tokenizer"]) if "tokenizer" in self.fixed else None
        if maker is not None and own is not None:
            check_cached_codes(maker, own, self.tokenizer_path, "illume prepare tokens")
        self.tokenizer_fingerprint = maker or own

    def training_step(self, batch: PackedBatch, batch_idx: int) -> None:
        """One micro-batch; the loss of a training step is the mean over all its predicted tokens."""
        if self.leaves_out():
            return
        # The optimizer sees the sum over micro-batches and the mean over devices, each divided by their number.
        shares = self.accumulation * replica(self.trainer)[1]
        output = self._losses(batch, shares / batch.num_supervised)
        self.require_finite({"loss": output.loss}, batch)
        mean = output.token_losses.sum() * (shares / batch.num_supervised)
        self.log_means({"train/loss": mean}, on_bar=("train/loss",))
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # those that get a row
            self._log_tasks(output, batch)
        self.descend(output.loss)

    def _losses(self, batch: PackedBatch, weight: float) -> CrossEntropy:
        ids = self.tokenized(batch)
        return self.model(
            ids=ids,
            position_ids=batch.position_ids,
            document_ids=batch.document_ids,
            images=[to_float(images) for images in batch.images if not self.model.discrete_input],
            semantic_slots=batch.semantic_slots,
            pixel_slots=batch.pixel_slots,
            target_positions=batch.target_positions,
            targets=ids.flatten()[batch.target_positions + 1],
            weights=torch.full(batch.target_positions.shape, weight, dtype=torch.float32, device=ids.device),
            slot_ids=batch.slot_ids,
            z_loss=self.z_loss,
        )

    @torch.no_grad()
    def tokenized(self, batch: PackedBatch) -> Tensor:
        """Ids (R, T) with the codes of the images that came without; with discrete input of those looked at too.

        Raises:
            ValueError: if there are such images and no tokenizer.
        """
        images, slots = batch.target_images, (batch.target_semantic_slots, batch.target_pixel_slots)
        if self.model.discrete_input:
            images = [*images, *batch.images]
            slots = torch.cat([slots[0], batch.semantic_slots]), torch.cat([slots[1], batch.pixel_slots])
        if not images:
            return batch.ids
        if "tokenizer" not in self.fixed:
            raise ValueError(
                "there are images to generate without cached codes: set model.tokenizer, or prepare the codes with "
                "`illume prepare tokens` and name the folder in the task's tokens"
            )
        tokenizer: DualViTok = self.fixed["tokenizer"]  # type: ignore[assignment]
        vocabulary = self.model.vocabulary
        with torch.autocast(self.device.type, enabled=False):  # the same codes as a cache has
            codes = [tokenizer.encode(to_float(pictures)).codes for pictures in images]
        ids = batch.ids.flatten().clone()
        for places, name, start in (
            (slots[0], "semantic", vocabulary.semantic_ids.start),
            (slots[1], "pixel", vocabulary.pixel_ids.start),
        ):
            ids[places] = torch.cat([getattr(grid, name).flatten() for grid in codes]) + start
        return ids.view_as(batch.ids)

    def _log_tasks(self, output: CrossEntropy, batch: PackedBatch) -> None:
        names = self.trainer.datamodule.train_names
        if self.micro_batch == 0:
            self._training_metrics = {name: TokenMetrics().to(self.device) for name in names}
        tokens = (output.token_losses, output.is_correct, batch.segments, batch.answers)
        for number, name in enumerate(names):
            chosen = batch.tasks == number
            self._training_metrics[name].update(*(values[chosen] for values in tokens))
            if self.is_last_micro_batch:
                for key, value in self._training_metrics[name].compute().items():
                    self.log(f"train/{name}/{key}", value)

    # -- evaluation ------------------------------------------------------------------------------------------

    def on_validation_start(self) -> None:
        """New metrics."""
        super().on_validation_start()
        self._metrics = {name: TokenMetrics().to(self.device) for name in self.trainer.datamodule.val_names}

    def validation_step(self, batch: PackedBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Losses and accuracies of one task's batch."""
        output = self._losses(batch, 1 / batch.num_supervised)
        name = self.trainer.datamodule.val_names[dataloader_idx]
        self._metrics[name].update(output.token_losses, output.is_correct, batch.segments, batch.answers)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/<task>/<segment>_loss``, ``<segment>_accuracy`` and ``answer_accuracy``."""
        for name, metrics in self._metrics.items():
            for key, value in metrics.compute().items():
                self.log(f"val/{name}/{key}", value, rank_zero_only=False)

    on_test_start = on_validation_start
    test_step = validation_step
    on_test_epoch_end = on_validation_epoch_end

    # -- prediction ------------------------------------------------------------------------------------------

    def predict_step(self, batch: "JobBatch", batch_idx: int, dataloader_idx: int = 0) -> "Iterator[Answer]":
        """Answers to a job's lines, worked on as they are taken, which the PredictionAnswers callback does.

        Raises:
            ValueError: if the model was trained on codes of another tokenizer, or there are answers that were
                made with other settings.
        """
        # They import this module.
        from illume_lightning.lit.illume import Illume, sizes_of
        from illume_lightning.lit.worker import Settings, Worker

        tokenizer: Any = self.fixed.get("tokenizer")
        if tokenizer is not None and self.trainer.ckpt_path is not None:
            check_maker(Path(self.trainer.ckpt_path), tokenizer)
        data = self.trainer.datamodule
        given = {**sizes_of(data.last_phase), "release_prompts": data.release_prompts}
        illume = Illume(self.model, data.text_tokenizer, tokenizer, **given)
        worker = Worker(illume, Settings(seed=data.seed), batch.images)
        return worker.work(worker.unfinished(batch.lines, batch.folder.finished()))


class MLLMStage1(MLLMStage):
    """Visual embedding initialisation: adapters, vision embedding and the head's vision part (paper 3.4)."""

    rates = {"adapters": 1e-3, "vision_tables": 2e-4}

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Adapters, and the vision rows of embedding and head."""
        return {
            "adapters": self.model.adapter_parameters(),
            "vision_tables": self.model.vision_table_parameters(),
        }


class MLLMStage2(MLLMStage):
    """Unified image-text alignment: adapters and the whole LLM, at 256 and then at 512 pixels (paper 3.4)."""

    rates = {"adapters": 5e-5, "llm": 5e-5}

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Adapters; trunk, embedding and head."""
        return {"adapters": self.model.adapter_parameters(), "llm": self.model.llm_parameters()}


class MLLMStage3(MLLMStage):
    """Supervised fine-tuning at any resolution: the vision encoder trains too (paper 3.4).

    Args:
        vit_from_layer: first block of the ViT that trains, with everything behind it (official release: 16 of 32).
            The pixel encoder's downsampling levels stay frozen (official release).
        lora: train this instead of the LLM; needs peft. Weights are handed over to the plain layers beneath.
        arguments: of MLLMStage.
    """

    rates = {"adapters": 2e-5, "llm": 2e-5, "vision_tower": 2e-6}

    def __init__(
        self, mllm: MLLM, vit_from_layer: int = 16, lora: LoRA | None = None, **arguments: Any
    ) -> None:
        depth = len(mllm.semantic_encoder.blocks)
        if not 0 <= vit_from_layer <= depth:
            raise ValueError(
                f"vit_from_layer is {vit_from_layer}, the ViT has {depth} blocks: choose 0 to {depth}"
            )
        self.vit_from_layer, self.lora = vit_from_layer, lora
        super().__init__(mllm, **arguments)

    def configure_model(self) -> None:
        """Put the low-rank matrices in, after an earlier stage's weights are there and before a checkpoint's are.

        Raises:
            ImportError: if peft is missing.
        """
        if self.lora is not None and not LoRA.parameters(self.model.trunk):
            self.lora.put_into(self.model.trunk)
            self._freeze()
        super().configure_model()

    def parts(self) -> dict[str, list[nn.Parameter]]:
        """Adapters; trunk, embedding and head, or LoRA; the end of the ViT and of the pixel encoder."""
        return {
            "adapters": self.model.adapter_parameters(),
            "llm": self.model.llm_parameters() if self.lora is None else LoRA.parameters(self.model.trunk),
            "vision_tower": [] if self.model.discrete_input else [*self._vit(), *self._pixel_encoder()],
        }

    def _vit(self) -> Iterator[nn.Parameter]:
        vit = self.model.semantic_encoder
        for block in vit.blocks[self.vit_from_layer :]:
            yield from block.parameters()
        yield from vit.merger.parameters()

    def _pixel_encoder(self) -> Iterator[nn.Parameter]:
        for name, parameter in self.model.pixel_encoder.named_parameters():
            if not name.startswith("down."):
                yield parameter
