"""The unified MLLM: continuous pictures and discrete tokens in, one vocabulary of text and codes out (paper 3.2).

Shapes: R rows of T tokens, D width of the language model, S semantic and P pixel cells of all input pictures,
C channels of the vision tower's merger, Z channels of the pixel encoder, M predicted tokens. Flat positions count
through the rows: row * T + place.
"""

from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Qwen2Config, Qwen2Model
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm
from transformers.utils import is_flash_attn_2_available
from transformers.vision_utils import get_vision_position_ids

from illume_lightning.nn.casting import KeepsBuffers
from illume_lightning.nn.document_attention import (
    DOCUMENTS,
    document_bounds,
    document_mask,
    document_starts,
)
from illume_lightning.nn.key_value_cache import KeyValueCache
from illume_lightning.nn.linear_cross_entropy import CrossEntropy, linear_cross_entropy
from illume_lightning.nn.pixel import PixelEncoder
from illume_lightning.nn.segmented import SegmentedEmbedding, SegmentedHead
from illume_lightning.nn.semantic import MERGE, QwenVisionTower, patchify
from illume_lightning.nn.slot_embedding import SlotEmbedding
from illume_lightning.vocabulary import Vocabulary

Attention = Literal["sdpa", "flash_attention_2", "documents", "auto"]

BLANK_SIDE = 32
"""Side in pixels of the blank picture that stands in where a batch has none."""


def build_trunk(
    width: int = 2048,
    depth: int = 36,
    num_heads: int = 16,
    num_kv_heads: int = 2,
    mlp_width: int = 11008,
    rope_base: float = 1e6,
    max_positions: int = 32768,
    norm_eps: float = 1e-6,
    attention: Attention = "sdpa",
    init_std: float = 0.02,
) -> Qwen2Model:
    """A Qwen2 decoder without token embedding: it is given embeddings. Defaults are Qwen2.5-3B's.

    Args:
        width: D.
        depth: number of blocks.
        num_heads: heads of the queries.
        num_kv_heads: heads of keys and values.
        mlp_width: inner width of the gated MLP.
        rope_base: of the rotary embedding.
        max_positions: longest sequence that it is meant for.
        norm_eps: of every RMSNorm.
        attention: ``auto`` takes FlashAttention 2 where it is installed and a CUDA device is there; ``documents``
            goes through packed documents one by one, which is fastest on a CPU where they are short.
        init_std: standard deviation of the initial weights.

    Raises:
        ValueError: the heads don't divide, or FlashAttention 2 is asked for and can't be used here.
    """
    if width % num_heads or num_heads % num_kv_heads:
        raise ValueError(
            f"width {width}, num_heads {num_heads}, num_kv_heads {num_kv_heads}: width must be a multiple of "
            "num_heads, and num_heads one of num_kv_heads."
        )
    if attention == "flash_attention_2" and not is_flash_attn_2_available():
        raise ValueError(
            "attention 'flash_attention_2' needs the package flash-attn and a CUDA device: install it, or use "
            "'sdpa' (or 'auto')."
        )
    if attention == "auto":
        attention = "flash_attention_2" if is_flash_attn_2_available() else "sdpa"
    config = Qwen2Config(
        vocab_size=1,
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        intermediate_size=mlp_width,
        rope_parameters={"rope_type": "default", "rope_theta": rope_base},
        max_position_embeddings=max_positions,
        rms_norm_eps=norm_eps,
        initializer_range=init_std,
        use_cache=False,
        attn_implementation=attention,  # type: ignore[call-arg]  # the base class takes it
    )
    trunk = Qwen2Model(config)
    trunk.set_input_embeddings(nn.Identity())
    return trunk


class Adapter(nn.Sequential):
    """Linear, GELU, linear: brings features of one branch to the language model's width (official release).

    Args:
        in_features: of the branch.
        width: of the language model.
        rms: where positive, an RMSNorm follows, whose gains start at this value.
    """

    def __init__(self, in_features: int, width: int, rms: float = 0.0) -> None:
        super().__init__(nn.Linear(in_features, width), nn.GELU(), nn.Linear(width, width))
        if rms:
            norm = Qwen2RMSNorm(width, eps=1e-6)
            nn.init.constant_(norm.weight, rms)
            self.append(norm)

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.parameters()).dtype


class MLLM(KeepsBuffers):
    """One language model that reads text, continuous pictures and code tokens, and writes text and code tokens.

    Args:
        trunk: the decoder, of ``build_trunk`` or ``trunk_from``.
        vocabulary: all token ids.
        semantic_encoder: vision tower; its raw merger output is the semantic feature.
        pixel_encoder: its output, before the tokenizer's ``pixel_quant_conv``, is the pixel feature.
        tied: the head uses the embedding's rows (Qwen2.5-3B).
        slot_grid: where positive, the side of a ``SlotEmbedding``, which tells features and codes alike where in
            the picture they stand. It starts at zero, or as large as the features (``adapter_rms``). Neither the
            paper nor the official release has it.
        discrete_input: pictures are input as their codes, against the paper: ids have them, no images are given,
            and vision tower, pixel encoder and adapters have no part.
        init_std: standard deviation of the initial embedding and head.
        adapter_rms: where positive, features enter the language model with this root mean square, times learned gains;
            about that of its words' embeddings is right. Else they are as large as the adapters make them, and where
            these start from nothing that can be a hundred times more, so that little can be added to them, such as
            where they stand. Neither the paper nor the official release has it.
    """

    def __init__(
        self,
        trunk: Qwen2Model,
        vocabulary: Vocabulary,
        semantic_encoder: QwenVisionTower,
        pixel_encoder: PixelEncoder,
        tied: bool = False,
        slot_grid: int = 0,
        discrete_input: bool = False,
        init_std: float = 0.02,
        adapter_rms: float = 0.0,
    ) -> None:
        super().__init__()
        width = trunk.config.hidden_size
        self.vocabulary = vocabulary
        self.trunk = trunk
        self.embedding = SegmentedEmbedding(vocabulary.num_text, vocabulary.num_vision, width, init_std)
        self.head = SegmentedHead(self.embedding, tied, init_std)
        self.semantic_adapter = Adapter(semantic_encoder.out_features, width, adapter_rms)
        self.pixel_adapter = Adapter(pixel_encoder.latent_channels, width, adapter_rms)
        self.semantic_encoder = semantic_encoder
        self.pixel_encoder = pixel_encoder
        self.slot_embedding = SlotEmbedding(slot_grid, width, adapter_rms) if slot_grid else None
        self.discrete_input = discrete_input

    def adapter_parameters(self) -> list[nn.Parameter]:
        """Of both adapters unless input is discrete, and of the slot embedding where there is one."""
        adapters = [] if self.discrete_input else [self.semantic_adapter, self.pixel_adapter]
        modules = [*adapters, self.slot_embedding]
        return [parameter for module in modules if module is not None for parameter in module.parameters()]

    def vision_table_parameters(self) -> list[nn.Parameter]:
        """The vision rows of embedding and head."""
        return _distinct(table.tables[1] for table in (self.embedding, self.head))

    def llm_parameters(self) -> list[nn.Parameter]:
        """The trunk, and all rows of embedding and head."""
        tables = [rows for table in (self.embedding, self.head) for rows in table.tables]
        return [*self.trunk.parameters(), *_distinct(tables)]

    def checkpoint_activations(self) -> None:
        """Keep only the inputs of the trunk's blocks in training, and compute the rest again in the backward pass."""
        self.trunk.activation_checkpointing_enable({"use_reentrant": False})

    def features(self, images: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Continuous features of pictures; a frozen tower builds no graph.

        Without pictures the towers see a small blank one, whose features are dropped: so every trained parameter
        is part of the graph (DDP waits for all of them), and with sharded towers (FSDP2) every device gathers
        the same weights. The official release does the same.

        Args:
            images: (n, 3, H, W) in [-1, 1] each, one size each.

        Returns:
            Semantic (S, C) and pixel (P, Z) features: the pictures in order, the cells of each row by row.
        """
        if not images:
            blank = torch.zeros(1, 3, BLANK_SIDE, BLANK_SIDE, device=self.embedding.text.device)
            semantic, pixel = self.features([blank])
            return semantic[:0], pixel[:0]
        with torch.set_grad_enabled(_trains(self.semantic_encoder)):
            semantic = self._semantic_features(images)
        with torch.set_grad_enabled(_trains(self.pixel_encoder)):
            dtype = self.pixel_encoder.conv_in.weight.dtype
            grids = [self.pixel_encoder(batch.to(dtype)) for batch in images]
        return semantic, torch.cat([grid.permute(0, 2, 3, 1).flatten(0, 2) for grid in grids])

    def _semantic_features(self, images: Sequence[Tensor]) -> Tensor:
        """(S, C) of all sizes in one pass of the tower."""
        cut = [patchify(batch) for batch in images]
        sizes = [(1, *size) for batch, (_, size) in zip(images, cut, strict=True) for _ in batch]
        # The grid stays on the CPU, where the tower reads it once per block.
        grid = torch.tensor(sizes, device="cpu")
        patches = torch.cat([patches for patches, _ in cut])
        positions = get_vision_position_ids(grid, MERGE).to(patches.device)
        return self.semantic_encoder(patches, grid_thw=grid, position_ids=positions).pooler_output

    def embed(
        self,
        ids: Tensor,
        images: Sequence[Tensor],
        semantic_slots: Tensor,
        pixel_slots: Tensor,
        slot_ids: Tensor | None = None,
    ) -> Tensor:
        """Input embeddings: of tokens, and of picture features in their slots.

        Args:
            ids: (R, T); any id in the slots of features, codes where input is discrete.
            images: as ``features``.
            semantic_slots: (S,) flat positions of the semantic features.
            pixel_slots: (P,) flat positions of the pixel features.
            slot_ids: (R, T) as ``ImageLayout.slot_ids``, 0 outside of pictures; only a slot embedding uses them.

        Returns:
            (R, T, D).

        Raises:
            ValueError: features and slots are not equally many, a slot embedding has no slot ids, or there are images
                and input is discrete.
        """
        if self.discrete_input:
            if images:
                raise ValueError(
                    "this MLLM has discrete input: put the pictures' codes into ids, not images."
                )
            return self.embed_tokens(ids, slot_ids)
        embeds = self.embedding(ids)
        flat = embeds.flatten(0, 1)
        parts = zip(
            ("semantic", "pixel"),
            self.features(images),
            (self.semantic_adapter, self.pixel_adapter),
            (semantic_slots, pixel_slots),
            strict=True,
        )
        for name, features, adapter, slots in parts:
            if len(features) != len(slots):
                raise ValueError(
                    f"the pictures have {len(features)} {name} cells, {name}_slots names {len(slots)} places."
                )
            adapted = adapter(features.to(adapter.dtype))
            flat = flat.index_copy(0, slots, adapted.to(flat.dtype))
        return self._placed(flat.view_as(embeds), slot_ids)

    def embed_tokens(self, ids: Tensor, slot_ids: Tensor | None = None) -> Tensor:
        """Input embeddings where no picture is input, such as in generation; as ``embed``."""
        return self._placed(self.embedding(ids), slot_ids)

    def _placed(self, embeds: Tensor, slot_ids: Tensor | None) -> Tensor:
        if self.slot_embedding is None:
            return embeds
        if slot_ids is None:
            raise ValueError("this MLLM has a slot embedding: give slot_ids.")
        return embeds + self.slot_embedding(slot_ids)

    def hidden(
        self,
        inputs_embeds: Tensor,
        position_ids: Tensor,
        document_ids: Tensor | None = None,
        cache: KeyValueCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        """The trunk's output; a token attends to itself and to what stands before it in its own document.

        Args:
            inputs_embeds: (R, T, D).
            position_ids: (R, T), from 0 in every document.
            document_ids: (R, T), equal within a document, which stands in one piece in one row; -1 is padding,
                which attends to padding. Without them every row is one document.
            cache: takes the keys and values, and gives those that the tokens attend to.
            mask: (R, 1, T, L) instead of documents, true where a token attends to one of the cache.

        Returns:
            (R, T, D) after the last norm.
        """
        attention: dict[str, Any] = {"attention_mask": {"full_attention": mask}}
        kind = self.trunk.config._attn_implementation
        if document_ids is not None and kind == "flash_attention_2":
            attention |= document_bounds(document_ids)
        elif document_ids is not None and kind == DOCUMENTS:
            attention["document_lengths"] = document_starts(document_ids).diff().tolist()
        elif document_ids is not None:
            attention["attention_mask"]["full_attention"] = document_mask(document_ids)
        output = self.trunk(
            inputs_embeds=inputs_embeds,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=False,
            **attention,
        )
        return output.last_hidden_state

    def forward(
        self,
        ids: Tensor,
        position_ids: Tensor,
        document_ids: Tensor | None,
        images: Sequence[Tensor],
        semantic_slots: Tensor,
        pixel_slots: Tensor,
        target_positions: Tensor,
        targets: Tensor,
        weights: Tensor | None = None,
        slot_ids: Tensor | None = None,
        z_loss: float = 0.0,
    ) -> CrossEntropy:
        """Loss of predicting tokens; all of the model runs here, where the hooks of DDP and FSDP2 see it.

        Args:
            ids: as ``embed``, like images, semantic_slots, pixel_slots and slot_ids.
            position_ids: as ``hidden``, like document_ids.
            document_ids: see position_ids.
            images: see ids.
            semantic_slots: see ids.
            pixel_slots: see ids.
            target_positions: (M,) flat positions from which the next token is predicted.
            targets: (M,) the ids that stand there.
            weights: (M,) of the tokens in the loss; as ``linear_cross_entropy``.
            slot_ids: see ids.
            z_loss: as ``linear_cross_entropy``.

        Raises:
            ValueError: as ``embed``.
        """
        inputs_embeds = self.embed(ids, images, semantic_slots, pixel_slots, slot_ids)
        hidden = self.hidden(inputs_embeds, position_ids, document_ids).flatten(0, 1)
        chosen = hidden.index_select(0, target_positions)
        return linear_cross_entropy(chosen, self.head.tables, targets, weights, z_loss=z_loss)


def _distinct(parameters: Iterable[Any]) -> list[nn.Parameter]:
    """Each once: tied tables share theirs."""
    return list({id(parameter): parameter for parameter in parameters}.values())


def _trains(module: nn.Module) -> bool:
    return torch.is_grad_enabled() and any(parameter.requires_grad for parameter in module.parameters())
