"""Where a training step of the MLLM spends its time, and what packing saves.

    python benchmarks/mllm_step.py [--data data/shapes] [--repeats 5]

Steps of 32 conversations of the shapes world (`make demo`), bf16, with the model of
experiments/shapes/mllm_stage2.yaml and with a trunk of about 100 M parameters in it. Packed: several conversations in
a row of up to 512 tokens, with a mask over each row. Documents: the same with attention document by document. Padded:
every conversation in a row of its own, as long as the longest. All see the same conversations and give the same loss.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import record
from illume_lightning.data.conversation_store import ConversationStore
from illume_lightning.data.packed_batch import ConversationData, PackedBatch, PackedConversations
from illume_lightning.data.packing import ConversationSource, MicroBatchItems, PackPlan
from illume_lightning.data.schedule import Phase
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.host_memory import keep_freed_memory
from illume_lightning.nn.linear_cross_entropy import linear_cross_entropy
from illume_lightning.nn.mllm import MLLM, Attention, build_trunk
from illume_lightning.nn.pixel import PixelEncoder
from illume_lightning.nn.semantic import QwenVisionTower
from illume_lightning.vocabulary import Vocabulary

TRUNKS = {
    "shapes": {"width": 256, "depth": 4, "num_heads": 4, "num_kv_heads": 4, "mlp_width": 768},
    "100M": {"width": 768, "depth": 12, "num_heads": 12, "num_kv_heads": 4, "mlp_width": 2432},
}
TASKS = {"text": 0.05, "captioning": 0.1, "understanding": 0.25, "generation": 0.4, "editing": 0.2}
ROW_TOKENS = 512


def build(trunk: dict[str, int], vocabulary: Vocabulary, attention: Attention = "sdpa") -> MLLM:
    """The model of experiments/shapes/mllm_stage2.yaml with another trunk; its towers are frozen."""
    torch.manual_seed(0)
    tower = QwenVisionTower(depth=4, width=128, num_heads=4, out_features=128).requires_grad_(False)
    pixel = PixelEncoder(
        16, [1, 1, 2, 4, 8], num_res_blocks=1, attention_levels=[], latent_channels=8, norm_groups=4
    )
    made = build_trunk(**trunk, attention=attention)  # type: ignore[arg-type]  # the others are numbers
    return MLLM(made, vocabulary, tower, pixel.requires_grad_(False), slot_grid=8)


def read_batches(folder: Path, vocabulary: Vocabulary, steps: int) -> dict[str, list[PackedBatch]]:
    """The same steps, packed and padded."""
    tokenizer = TextTokenizer(folder / "text_tokenizer")
    stores = [ConversationStore(folder / "conversations" / task / "train") for task in TASKS]
    sources = [
        ConversationSource(
            task,
            store.num_text,
            store.num_supervised,
            store.first_image,
            store.images,
            store.chunk_ids,
            weight,
        )
        for (task, weight), store in zip(TASKS.items(), stores, strict=True)
    ]
    phase = Phase(steps, "fixed", 112, 32, 32)
    plan = PackPlan([phase], sources, vocabulary, ROW_TOKENS)
    reader = PackedConversations(
        [ConversationData(store) for store in stores], [phase], vocabulary, tokenizer
    )
    batches: dict[str, list[PackedBatch]] = {"packed": [], "padded": []}
    for step in range(steps):
        items = plan.batch(step, 0, 0, 1)
        batches["packed"].append(reader.read(items))
        alone = [[item] for row in items.rows for item in row]
        batches["padded"].append(reader.read(MicroBatchItems(alone, items.num_supervised)))
    return batches


class Step:
    """One training step in its parts; each can be run alone on what the part before left."""

    def __init__(self, model: MLLM) -> None:
        self.model = model
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=True)

    def arguments(self, batch: PackedBatch) -> dict[str, Any]:
        """Of the model; images to generate have code 0 everywhere, which takes as long as any."""
        names = (
            "ids",
            "position_ids",
            "document_ids",
            "semantic_slots",
            "pixel_slots",
            "target_positions",
            "slot_ids",
        )
        given = {name: getattr(batch, name) for name in names}
        images = [pictures.float() / 127.5 - 1 for pictures in batch.images]
        return {**given, "images": images, "targets": batch.ids.flatten()[batch.target_positions + 1]}

    def whole(self, batch: PackedBatch) -> float:
        """Forward, backward and optimizer; the loss."""
        output = self.model(**self.arguments(batch))
        output.loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(output.loss)

    def parts(self, batch: PackedBatch, repeats: int) -> dict[str, float]:
        """Seconds of every part."""
        given = self.arguments(batch)
        model = self.model
        embeds = model.embed(
            *(given[n] for n in ("ids", "images", "semantic_slots", "pixel_slots", "slot_ids"))
        )
        embeds = embeds.detach().requires_grad_()
        places = given["position_ids"], given["document_ids"]
        hidden = model.hidden(embeds, *places).detach()
        chosen = hidden.flatten(0, 1)[given["target_positions"]].requires_grad_()

        def trunk() -> None:
            output: Tensor = model.hidden(embeds, *places)
            output.backward(torch.ones_like(output))

        def loss() -> None:
            linear_cross_entropy(chosen, model.head.tables, given["targets"]).loss.backward()

        return {
            "towers": fastest(lambda: model.features(given["images"]), repeats),
            "trunk": fastest(trunk, repeats),
            "loss": fastest(loss, repeats),
            "optimizer": fastest(self.optimizer.step, repeats),
        }


def fastest(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest of several runs, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def measure(
    trunk: str, batches: dict[str, list[PackedBatch]], vocabulary: Vocabulary, repeats: int
) -> dict[str, Any]:
    """Parts of the packed step, and both steps as wholes."""
    step = Step(build(TRUNKS[trunk], vocabulary))
    parts = step.parts(batches["packed"][0], repeats)
    seconds = {
        kind: sum(fastest(lambda b=batch: step.whole(b), max(1, repeats // 2)) for batch in given)
        for kind, given in batches.items()
    }
    other = Step(build(TRUNKS[trunk], vocabulary, "documents"))
    seconds["documents"] = sum(
        fastest(lambda b=batch: other.whole(b), max(1, repeats // 2)) for batch in batches["packed"]
    )
    tokens = sum(int((batch.document_ids >= 0).sum()) for batch in batches["packed"])
    parameters = sum(parameter.numel() for parameter in step.model.trunk.parameters())
    return {
        "trunk_parameters": parameters,
        "parts_s": {name: round(value, 4) for name, value in parts.items()},
        "tokens_per_s": {kind: round(tokens / value) for kind, value in seconds.items()},
        "packing_speed_up": round(seconds["padded"] / seconds["packed"], 2),
        "documents_speed_up": round(seconds["packed"] / seconds["documents"], 2),
    }


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, default=Path("data/shapes"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    started_on = record.hardware()
    keep_freed_memory()
    vocabulary = TextTokenizer(args.data / "text_tokenizer").vocabulary(256, 512, size_step=16)
    batches = read_batches(args.data, vocabulary, args.steps)
    padding = {
        kind: round(
            1 - sum(int((b.document_ids >= 0).sum()) for b in given) / sum(b.ids.numel() for b in given), 4
        )
        for kind, given in batches.items()
    }
    with torch.autocast("cpu", torch.bfloat16):
        results = {name: measure(name, batches, vocabulary, args.repeats) for name in TRUNKS}
    rows = [
        [
            "trunk",
            *next(iter(results.values()))["parts_s"],
            "packed tok/s",
            "padded tok/s",
            "documents tok/s",
            "speed-ups",
        ]
    ]
    for name, found in results.items():
        speeds = [str(value) for value in found["tokens_per_s"].values()]
        rows.append(
            [
                name,
                *(f"{s:.3f} s" for s in found["parts_s"].values()),
                *speeds,
                f"{found['packing_speed_up']}, {found['documents_speed_up']}",
            ]
        )
    print(record.table(rows))
    print(f"padding: {padding}")
    print(record.write("mllm_step", {"padding": padding, **results}, started_on))


if __name__ == "__main__":
    main()
