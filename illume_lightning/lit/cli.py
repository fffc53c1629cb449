"""LightningCLI with this package's settings."""

import logging
import signal
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
from jsonargparse import set_parsing_settings
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

from illume_lightning.folder_lock import locked
from illume_lightning.host_memory import keep_freed_memory
from illume_lightning.lit.class_paths import restrict
from illume_lightning.lit.durable_checkpoints import go_on_from, make_durable, remove_leftovers
from illume_lightning.lit.npu_strategies import trainer_options
from illume_lightning.lit.run_record import RunRecord
from illume_lightning.lit.sentinel import as_often_as_asked
from illume_lightning.lit.strategy import check_config
from illume_lightning.nn.plain_file import load_plain
from illume_lightning.nn.sharded_checkpoint import require_file
from illume_lightning.nn.whole_checkpoint import LAST, require_whole
from illume_lightning.run_check import FIT_LOCK


class IllumeCLI(LightningCLI):
    """One YAML is one run; a run started again continues from its last checkpoint."""

    curriculum: type[L.Callback]
    words: list[str]

    @classmethod
    def run(cls, args: list[str], curriculum: type[L.Callback]) -> "IllumeCLI":
        """Parse, build and run.

        Args:
            args: subcommand and options, as on the command line.
            curriculum: the callback that owns the phases; it has a section of its own in every YAML, so
                that overlays and flags reach it (lists, such as the other callbacks, are replaced whole).

        Raises:
            ArgumentError: a key or value of the configuration is wrong.
            ValueError: parts contradict one another.
            FileNotFoundError: data or a checkpoint is missing.
            SystemExit: 143 if SIGTERM stopped it.
        """
        _quieten()
        restrict()
        # Under subcommands absolute ${} would be looked up at the parser's root, where it is not.
        set_parsing_settings(omegaconf_absolute_to_relative_paths=True)
        cls.curriculum, cls.words = curriculum, args
        try:
            start = partial(
                cls,
                L.LightningModule,
                L.LightningDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                seed_everything_default=0,
                # omegaconf+ resolves ${} after files and flags have merged, plain omegaconf before.
                parser_kwargs={"parser_mode": "omegaconf+", "exit_on_error": False},
                save_config_kwargs={"overwrite": True},
                args=args,
            )
            return as_often_as_asked(start)
        except SIGTERMException as error:
            # Lightning's own status is 0, as if the run were finished.
            raise SystemExit(128 + signal.SIGTERM) from error

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The curriculum's section, and one seed for weights, data order and noise."""
        parser.add_lightning_class_args(self.curriculum, "curriculum")
        parser.link_arguments("seed_everything", "data.init_args.seed")

    def instantiate_classes(self, *args: Any, **options: Any) -> None:
        """Build model, data and trainer; on a CPU also set its memory up."""
        check_config(self.config[str(self.subcommand)], str(self.subcommand))  # before anything is built
        super().instantiate_classes(*args, **options)
        make_durable(self.trainer.strategy)
        if self.trainer.strategy.root_device.type == "cpu":
            keep_freed_memory()

    def instantiate_trainer(self, **options: Any) -> L.Trainer:
        """The trainer, on NPUs where they are asked for; the saved configuration keeps what was asked."""
        given = self._get(self.config_init, "trainer")
        trainer = super().instantiate_trainer(**(options | trainer_options(given)))
        if not trainer.fast_dev_run:  # which leaves nothing behind
            trainer.callbacks.append(RunRecord(["illume", *self.words]))
        return trainer

    def before_fit(self) -> None:
        """Continue an interrupted run from its newest checkpoint that is whole."""
        if self._given_checkpoint() is None:
            last = go_on_from(self.trainer, self._checkpoints)
            if last is not None:
                self._check_kind(last)
                self.config_init["fit"]["ckpt_path"] = str(last)

    def before_validate(self) -> None:
        """Take the run's last checkpoint."""
        self._require_checkpoint("validate")

    def before_test(self) -> None:
        """Take the run's last checkpoint."""
        self._require_checkpoint("test")

    def before_predict(self) -> None:
        """Take the run's last checkpoint."""
        self._require_checkpoint("predict")
        # Pictures are written as they come; keeping them too would fill the memory.
        self.config_init["predict"]["return_predictions"] = False

    def _run_subcommand(self, subcommand: str) -> None:
        """Run it; a fit has its folder for itself."""
        trainer = self.trainer
        if subcommand != "fit" or trainer.fast_dev_run or not trainer.is_global_zero:
            super()._run_subcommand(subcommand)
            return
        with locked(Path(trainer.default_root_dir), FIT_LOCK) as is_held:
            if is_held:
                remove_leftovers(self._checkpoints)
            super()._run_subcommand(subcommand)

    def _parse_ckpt_path(self) -> None:
        """Lightning's reads arguments out of the checkpoint; the configuration is the YAML's and the flags' alone."""

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Checkpoints are never unpickled, whatever `weights_only` says."""
        return super()._prepare_subcommand_kwargs(subcommand) | {"weights_only": True}

    def _require_checkpoint(self, command: str) -> None:
        if self._given_checkpoint() is None:
            last = self._checkpoints / LAST
            if not last.exists():
                raise FileNotFoundError(
                    f"no checkpoint at {last}: run `illume fit` first, or give --ckpt_path."
                )
            require_whole(last)
            self._check_kind(last)
            self.config_init[command]["ckpt_path"] = str(last)

    def _given_checkpoint(self) -> str | None:
        given = self.config_init[str(self.subcommand)].get("ckpt_path")
        if given not in (None, "best", "last", "hpc"):
            if not Path(given).exists():
                raise FileNotFoundError(f"--ckpt_path: no file {given}.")
            require_whole(given)
            self._check_kind(given)
        return given

    def _check_kind(self, checkpoint: str | Path) -> None:
        """Of a folder that FSDP2's devices wrote only they can go on; of a file everyone, if it is plain."""
        if Path(checkpoint).is_file():
            content = load_plain(checkpoint)  # Lightning's own refusal would be a traceback
            if not isinstance(content, dict) or not content.keys() >= {
                "state_dict",
                "pytorch-lightning_version",
            }:
                raise ValueError(
                    f"{checkpoint} is no checkpoint of a run but other weights: start a run from them with the "
                    "callback WarmStart"
                )
        if not isinstance(self.trainer.strategy, ModelParallelStrategy):
            require_file(checkpoint, f"a run without FSDP2 ({type(self.trainer.strategy).__name__})")

    @property
    def _checkpoints(self) -> Path:
        return Path(self.trainer.default_root_dir) / "checkpoints"


def _quieten() -> None:
    """Mute adverts and hints about loaders and loggers that are meant to be as they are."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    for message in (
        ".*does not have many workers.*",
        ".*LightningCLI's args parameter.*",
        ".*Experiment logs directory.*",
        ".*exists and is not empty.*",
        "(?s).*Using ModelCheckpoint with manual optimization.*",
        ".*isinstance.*treespec, LeafSpec.*",
        ".*Consider setting `persistent_workers.*",
        ".*Couldn't infer the batch indices.*",  # nothing asks for them
        ".*WeightAveraging state cannot be restored.*",  # the averaged weights are the checkpoint's
        ".*in eval mode at the start of training.*",  # frozen parts are
        ".*using the WeightAveraging callback with a model that overrides.*",  # its hook shards, or does nothing
        ".*It is recommended to use `self.log.*sync_dist=True.*",  # metrics are synchronised by themselves
        ".*GradScaler is enabled, but CUDA is not available.*",  # an NPU gets its own
    ):
        warnings.filterwarnings("ignore", message)
