"""Packed conversations for the stages of the MLLM, read in the order of a plan."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, cast

from illume_lightning.data.conversation_store import ConversationStore
from illume_lightning.data.loader import BatchLoader
from illume_lightning.data.packed_batch import ConversationData, PackedConversations
from illume_lightning.data.packing import ConversationSource, PackPlan, evaluation_batches
from illume_lightning.data.remote import Remote
from illume_lightning.data.schedule import Phase, SizeMode
from illume_lightning.data.store import Store
from illume_lightning.data.text_tokenizer import TextTokenizer
from illume_lightning.data.token_cache import TokenCache, check_caches
from illume_lightning.lit.answers import AnswerFolder
from illume_lightning.lit.job_lines import Line, read_jobs
from illume_lightning.lit.mllm import MLLMStage
from illume_lightning.lit.planned_data import PlannedDataModule, open_store, replica
from illume_lightning.vocabulary import Vocabulary

log = logging.getLogger(__name__)


@dataclass
class Conversations:
    """A store of conversations."""

    path: str
    """Folder of the store, or its address, "s3://..." or "gs://..."."""

    weight: float = 1.0
    """Share of the training samples, relative to the other tasks' weights, whatever the stores' sizes."""

    tokens: list[str] = field(default_factory=list)
    """Folders that `illume prepare tokens` wrote for it, one for each size of the curriculum; without one for a
    phase, its target images are tokenised as they come."""


class JobBatch(NamedTuple):
    """All lines of a job that one device is to answer."""

    lines: list[Line]
    """Of this device."""

    images: Path
    """Folder that names of images are relative to."""

    folder: AnswerFolder
    """Where the answers go."""


class JobLoader:
    """Gives one batch; the device's share is the batch's affair, so this is no DataLoader."""

    def __init__(self, batch: JobBatch) -> None:
        self._batch = batch

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[JobBatch]:
        yield self._batch


class ConversationDataModule(PlannedDataModule):
    """Training batches in the order of a plan, and held-out conversations of every task.

    The phases of training (sizes, batch sizes) come from the `ResolutionCurriculum` callback; `batch_size` counts
    conversations.

    Args:
        text_tokenizer: folder with `tokenizer.json`.
        vocabulary: of the model; by default that of the module which the trainer runs.
        train: stores to train on by task, the name of which is logged.
        val: held-out stores by task.
        test: stores to test on, as `val`.
        predict: file of lines to answer, as for `illume generate`.
        row_tokens: most tokens of a packed row; longer conversations are left out and counted.
        condition_dropout: probability that a conversation with an image to generate loses its users' texts, for
            guidance (official release: 0.1).
        release_prompts: the official release's unconditional prompts instead of masked text (paper).
        val_side: side of evaluation images in pixels, as in a phase.
        val_mode: size mode of evaluation images, as in a phase.
        val_limit: most conversations of a task to evaluate; none takes all.
        val_rows: most packed rows in an evaluation batch, per device.
        num_workers: processes that read, per device; 0 reads in the training process.
        prefetch: batches that each worker reads ahead.
        pin_memory: page-locked batches, where there is an accelerator.
        shuffle_window: see `Plan`.
        seed: of the order and the condition's dropout.
        remote: how stores in s3:// and gs:// are read.
        max_bad_samples: damaged training records, per device, that others are read in place of, named and counted;
            with 0 the first one ends the run. Evaluation always ends.

    Raises:
        ValueError: if an argument is out of range.
    """

    def __init__(
        self,
        text_tokenizer: str,
        vocabulary: Vocabulary | None = None,
        train: dict[str, Conversations] | None = None,
        val: dict[str, Conversations] | None = None,
        test: dict[str, Conversations] | None = None,
        predict: str | None = None,
        row_tokens: int = 4096,
        condition_dropout: float = 0.1,
        release_prompts: bool = False,
        val_side: int = 256,
        val_mode: SizeMode = "fixed",
        val_limit: int | None = None,
        val_rows: int = 8,
        num_workers: int = 2,
        prefetch: int = 4,
        pin_memory: bool = True,
        shuffle_window: int = 4096,
        seed: int = 0,
        remote: Remote = Remote(),
        max_bad_samples: int = 0,
    ) -> None:
        super().__init__(num_workers, prefetch, pin_memory, shuffle_window, seed, remote, max_bad_samples)
        if not 0 <= condition_dropout <= 1:
            raise ValueError(f"condition_dropout {condition_dropout} is no probability; choose 0 to 1")
        for name, value in (("row_tokens", row_tokens), ("val_limit", val_limit), ("val_rows", val_rows)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value} is not positive")
        self.text_tokenizer, self._vocabulary = TextTokenizer(text_tokenizer), vocabulary
        self.tasks = {"fit": dict(train or {}), "validate": dict(val or {}), "test": dict(test or {})}
        self._job = predict
        self.lines: list[Line] = []
        """Of the job to predict."""
        self.row_tokens = row_tokens
        self.condition_dropout, self.release_prompts = condition_dropout, release_prompts
        self._val_phase = Phase(1, val_mode, val_side, 1, 1)
        self.val_limit, self.val_rows = val_limit, val_rows
        self._data: dict[str, ConversationData] = {}

    @property
    def vocabulary(self) -> Vocabulary:
        """Of the model."""
        if self._vocabulary is None:
            assert self.trainer is not None
            self._vocabulary = cast(MLLMStage, self.trainer.lightning_module).model.vocabulary
        return self._vocabulary

    @property
    def train_names(self) -> list[str]:
        """Tasks of training, in the order of their numbers in batches."""
        return list(self.tasks["fit"])

    def stores(self) -> list[Store]:
        """All stores that have been opened, each before the codes that were made of it."""
        return [store for data in self._data.values() for store in (data.store, *data.caches)]

    def _has_training_data(self) -> bool:
        return bool(self.tasks["fit"])

    def _make_plan(self, phases: Sequence[Phase]) -> PackPlan:
        sources = [_source(name, self._open(task), task.weight) for name, task in self.tasks["fit"].items()]
        return PackPlan(phases, sources, self.vocabulary, self.row_tokens, self.seed, self.shuffle_window)

    def setup(self, stage: str) -> None:
        """Open the stores, so that what is missing or does not fit is known at once.

        Raises:
            FileNotFoundError: if a store or the file to predict is missing; names it.
            ValueError: if a store or that file is empty, or a store made with another text tokenizer, or the
                vocabulary is not the text tokenizer's or the token caches'.
        """
        self._check_vocabulary()
        if stage == "predict":
            if self._job is None:
                raise ValueError("there is nothing to predict: set data.predict to a file of JSON Lines")
            self.lines, self._images = read_jobs(self._job)
            return
        import litdata  # noqa: F401  # takes seconds; workers inherit it, and start anew for every evaluation

        for task in self._of_stage(stage):
            self._open(task)
        log.debug("cached codes by tokenizer %s", self.tokenizer_fingerprint)  # refuses caches that don't fit

    @property
    def answers(self) -> AnswerFolder:
        """Folder of the predictions."""
        assert self.trainer is not None
        return AnswerFolder(Path(self.trainer.default_root_dir) / "predictions")

    @property
    def last_phase(self) -> Phase:
        """The last one of training, which decides the sizes of pictures that are made.

        Raises:
            ValueError: if there are no phases.
        """
        if self._phases is None:
            raise ValueError(
                "there are no phases to know the sizes of pictures by; add the ResolutionCurriculum callback"
            )
        return self._phases[-1]

    def predict_dataloader(self) -> JobLoader:  # type: ignore[override]
        """All of this device's lines in one batch, so that the next line begins when one is answered."""
        rank, world_size = replica(self.trainer)
        return JobLoader(JobBatch(self.lines[rank::world_size], self._images, self.answers))

    @property
    def tokenizer_fingerprint(self) -> str | None:
        """Of the tokenizer that made the cached codes; none where there are no caches.

        Raises:
            ValueError: if several tokenizers made them, or one with other codebooks than the vocabulary's.
        """
        caches = [cache for data in self._data.values() for cache in data.caches]
        codebooks = {"semantic": self.vocabulary.semantic_codes, "pixel": self.vocabulary.pixel_codes}
        return check_caches(caches, codebooks)

    def _training_reader(self) -> PackedConversations:
        assert self._phases is not None
        return PackedConversations(
            [self._open(task) for task in self.tasks["fit"].values()],
            self._phases,
            self.vocabulary,
            self.text_tokenizer,
            self.seed,
            self.condition_dropout,
            self.release_prompts,
            is_tolerant=self.max_bad_samples > 0,
        )

    def _evaluation_loaders(self, stage: str) -> list[BatchLoader]:
        loaders = []
        self.val_names = list(self.tasks[stage])
        for name, task in self.tasks[stage].items():
            data = self._open(task)
            batches = evaluation_batches(
                self._val_phase,
                _source(name, data, 1.0),
                self.vocabulary,
                self.row_tokens,
                self.val_rows,
                self.val_limit,
                *replica(self.trainer),
            )
            reader = PackedConversations([data], [self._val_phase], self.vocabulary, self.text_tokenizer)
            loaders.append(BatchLoader(reader, batches, 0, **self._options()))
        return loaders

    def _of_stage(self, stage: str) -> list[Conversations]:
        stages = ("fit", "validate") if stage == "fit" else (stage,)
        return [task for name in stages for task in self.tasks[name].values()]

    def _open(self, task: Conversations) -> ConversationData:
        if task.path not in self._data:
            store = open_store(ConversationStore, task.path, self.remote)
            if store.text_tokenizer != self.text_tokenizer.fingerprint:
                raise ValueError(
                    f"{task.path} was prepared with another text tokenizer ({store.text_tokenizer[:12]}) than "
                    f"{self.text_tokenizer.folder} ({self.text_tokenizer.fingerprint[:12]}): lengths would differ; "
                    "prepare it again with this one"
                )
            caches = [TokenCache(path, store, self.remote) for path in task.tokens]
            self._data[task.path] = ConversationData(store, caches)
        return self._data[task.path]

    def _check_vocabulary(self) -> None:
        given = self.vocabulary
        expected = self.text_tokenizer.vocabulary(
            given.semantic_codes, given.pixel_codes, given.size_step, given.num_sizes
        )
        if expected.num_text != given.num_text:
            raise ValueError(
                f"the vocabulary has {given.num_text:,} text tokens and {self.text_tokenizer.folder} has "
                f"{expected.num_text:,}: set vocabulary.num_text to that, or give the model's text tokenizer"
            )

    def _fingerprint(self) -> str:
        tasks = [
            (name, self._open(task).store.manifest.fingerprint, task.weight)
            for name, task in self.tasks["fit"].items()
        ]
        settings = [tasks, self.seed, self.shuffle_window, self.row_tokens, self.condition_dropout]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


def _source(name: str, data: ConversationData, weight: float) -> ConversationSource:
    store = data.store
    return ConversationSource(
        name,
        store.num_text,
        store.num_supervised,
        store.first_image,
        store.images,
        store.chunk_ids,
        weight,
    )
