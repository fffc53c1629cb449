"""How well tokens are predicted: losses and accuracies by segment, and answers that are right as a whole."""

import torch
from torch import Tensor
from torchmetrics import Metric

from illume_lightning.data.token_sequence import SEGMENTS, TEXT


class TokenMetrics(Metric):
    """Mean loss and accuracy of every segment, given all tokens before.

    An answer in words is right if all its tokens are: then greedy decoding gives exactly this answer. Counts are
    int64, and losses are summed in fp32, batch by batch: not every device has fp64.
    """

    full_state_update = False
    losses: Tensor
    correct: Tensor
    count: Tensor
    answers: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("losses", torch.zeros(len(SEGMENTS), dtype=torch.float32), dist_reduce_fx="sum")
        for name, size in (("correct", len(SEGMENTS)), ("count", len(SEGMENTS)), ("answers", 2)):
            self.add_state(name, torch.zeros(size, dtype=torch.long), dist_reduce_fx="sum")

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
        # A batch by itself: small terms would get lost in the sum of many.
        self.losses += torch.zeros_like(self.losses).index_add(0, segments, losses.float())
        self.correct += torch.zeros_like(self.correct).index_add(0, segments, is_correct.long())
        self.count += torch.zeros_like(self.count).index_add(0, segments, torch.ones_like(segments))
        number = answers - answers.min()
        none = number.new_zeros(int(number.max()) + 1)
        # An image to generate makes an answer none in words.
        other = none.index_add(0, number, (segments != TEXT).long())
        wrong = none.index_add(0, number, (~is_correct).long())
        counted = (none.index_add(0, number, torch.ones_like(number)) > 0) & (other == 0)
        self.answers += torch.stack([(counted & (wrong == 0)).sum(), counted.sum()])

    def compute(self) -> dict[str, Tensor]:
        """``<segment>_loss`` in nats and ``<segment>_accuracy`` of the segments that occurred; ``answer_accuracy``."""
        results = {}
        for number, name in enumerate(SEGMENTS):
            if self.count[number] > 0:
                results[f"{name}_loss"] = self.losses[number] / self.count[number]
                results[f"{name}_accuracy"] = self.correct[number].float() / self.count[number]
        if self.answers[1] > 0:
            results["answer_accuracy"] = self.answers[0].float() / self.answers[1]
        return results
