"""Lightning callbacks: phases, exact resume, going back, alarms, hand-over between stages, pictures, scores, speed."""

from callbacks.checkpoint import Checkpoint
from callbacks.collapse_alarm import CodebookAlarm, GANAlarm
from callbacks.exact_resume import ExactResume
from callbacks.generation_scores import GenerationScores
from callbacks.phase_progress_bar import PhaseProgressBar
from callbacks.prediction_answers import PredictionAnswers
from callbacks.prediction_pictures import PredictionPictures
from callbacks.reconstruction_grid import ReconstructionGrid
from callbacks.resolution_curriculum import ResolutionCurriculum
from callbacks.result_table import ResultTable
from callbacks.rollback import Rollback
from callbacks.start_from_qwen import StartFromQwen
from callbacks.tf32 import TF32
from callbacks.throughput import Throughput
from callbacks.warm_start import WarmStart
from illume_lightning.lit.loss_spikes import LossSpikes

__all__ = [
    "TF32",
    "Checkpoint",
    "CodebookAlarm",
    "ExactResume",
    "GANAlarm",
    "GenerationScores",
    "LossSpikes",
    "PhaseProgressBar",
    "PredictionAnswers",
    "PredictionPictures",
    "ReconstructionGrid",
    "ResolutionCurriculum",
    "ResultTable",
    "Rollback",
    "StartFromQwen",
    "Throughput",
    "WarmStart",
]
