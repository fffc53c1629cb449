"""How well tokens are predicted: losses and accuracies by segment, and answers that are right as a whole."""

import torch
from torch import Tensor
from torchmetrics import Metric

from illume_lightning.data.token_sequence import SEGMENTS, TEXT


class TokenMetrics(Metric):
    """Mean loss and accuracy of every segment, given all tokens before.

    An answer in words is right if all its tokens are: then greedy decoding gives exactly this answer.
    """

    full_state_update = False
    losses: Tensor
    correct: Tensor
    count: Tensor
    answers: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("losses", "correct", "count"):
            self.add_state(name, torch.zeros(len(SEGMENTS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("answers", torch.zeros(2, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, losses: Tensor, is_correct: Tensor, segments: Tensor, answers: Tensor) -> None:
        """Count M tokens.

        Args:
            losses: (M,), cross entropy in nats.
            is_correct: (M,), whether the most likely token is right.
            segments: (M,), numbers in `SEGMENTS`.
            answers: (M,), rising numbers of the answers that the tokens belong to.
        """
        if not len(losses):
            return
        for state, values in (
            (self.losses, losses),
            (self.correct, is_correct),
            (self.count, torch.ones_like(losses)),
        ):
            state.index_add_(0, segments, values.to(state.dtype))
        in_words = segments == TEXT
        # An image to generate makes an answer none in words.
        number = answers - answers.min()
        wrong = torch.zeros(int(number.max()) + 1, device=losses.device)
        other = wrong.index_add(0, number, (~in_words).float())
        wrong = wrong.index_add(0, number, (~is_correct).float())
        seen = torch.zeros_like(wrong).index_add(0, number, torch.ones_like(losses)) > 0
        counted = seen & (other == 0)
        self.answers += torch.stack([(counted & (wrong == 0)).sum(), counted.sum()]).to(self.answers.dtype)

    def compute(self) -> dict[str, Tensor]:
        """``<segment>_loss`` in nats and ``<segment>_accuracy`` of the segments that occurred; ``answer_accuracy``."""
        results = {}
        for number, name in enumerate(SEGMENTS):
            if self.count[number] > 0:
                results[f"{name}_loss"] = (self.losses[number] / self.count[number]).float()
                results[f"{name}_accuracy"] = (self.correct[number] / self.count[number]).float()
        if self.answers[1] > 0:
            results["answer_accuracy"] = (self.answers[0] / self.answers[1]).float()
        return results
