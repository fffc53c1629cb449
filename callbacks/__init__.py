"""Lightning callbacks: phases, exact resume, hand-over between stages, pictures, scores, speed and results."""

from callbacks.checkpoint import Checkpoint
from callbacks.exact_resume import ExactResume
from callbacks.generation_scores import GenerationScores
from callbacks.phase_progress_bar import PhaseProgressBar
from callbacks.prediction_answers import PredictionAnswers
from callbacks.prediction_pictures import PredictionPictures
from callbacks.reconstruction_grid import ReconstructionGrid
from callbacks.resolution_curriculum import ResolutionCurriculum
from callbacks.result_table import ResultTable
from callbacks.start_from_qwen import StartFromQwen
from callbacks.tf32 import TF32
from callbacks.throughput import Throughput
from callbacks.warm_start import WarmStart

__all__ = [
    "TF32",
    "Checkpoint",
    "ExactResume",
    "GenerationScores",
    "PhaseProgressBar",
    "PredictionAnswers",
    "PredictionPictures",
    "ReconstructionGrid",
    "ResolutionCurriculum",
    "ResultTable",
    "StartFromQwen",
    "Throughput",
    "WarmStart",
]
