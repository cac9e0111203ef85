"""Accuracy, error rate, macro F1, and the same by class."""

from __future__ import annotations

import os.path as osp
from collections import OrderedDict, defaultdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..utils import mkdir_if_missing
from .build import EVALUATOR_REGISTRY

if TYPE_CHECKING:
    from yacs.config import CfgNode


class EvaluatorBase:
    """What a trainer asks of an evaluator."""

    def __init__(self, cfg: CfgNode) -> None:
        self.cfg = cfg

    def reset(self) -> None:
        """Forget everything."""
        raise NotImplementedError

    def process(self, mo: Tensor, gt: Tensor) -> None:
        """Take in a batch: the model's output (N, C) and the true classes (N,)."""
        raise NotImplementedError

    def evaluate(self) -> OrderedDict[str, float]:
        """Print the results and return them by name; a trainer's `test` returns the first."""
        raise NotImplementedError


@EVALUATOR_REGISTRY.register()
class Classification(EvaluatorBase):
    """Results in percent; the lines it prints are what people's scripts look for."""

    def __init__(self, cfg: CfgNode, lab2cname: dict[int, str] | None = None, **kwargs: Any) -> None:
        super().__init__(cfg)
        if cfg.TEST.PER_CLASS_RESULT and lab2cname is None:
            raise ValueError("TEST.PER_CLASS_RESULT needs the classes' names (lab2cname)")
        self._lab2cname = lab2cname
        self.reset()

    def reset(self) -> None:
        self._correct = 0
        self._total = 0
        self._y_true: list[int] = []
        self._y_pred: list[int] = []
        self._per_class_res: defaultdict[int, list[int]] | None = (
            defaultdict(list) if self.cfg.TEST.PER_CLASS_RESULT else None
        )

    def process(self, mo: Tensor, gt: Tensor) -> None:
        pred = mo.max(1)[1]
        labels, hits = gt.tolist(), pred.eq(gt).int().tolist()
        self._correct += sum(hits)
        self._total += len(labels)
        self._y_true.extend(labels)
        self._y_pred.extend(pred.tolist())
        if self._per_class_res is not None:
            for label, hit in zip(labels, hits, strict=True):
                self._per_class_res[label].append(hit)

    def evaluate(self) -> OrderedDict[str, float]:
        if not self._total:
            raise ValueError("There is nothing to evaluate: no batch was processed")
        accuracy = 100.0 * self._correct / self._total
        results = OrderedDict(
            accuracy=accuracy, error_rate=100.0 - accuracy, macro_f1=100.0 * macro_f1(self._y_true, self._y_pred)
        )
        print(
            "=> result\n"
            f"* total: {self._total:,}\n"
            f"* correct: {self._correct:,}\n"
            f"* accuracy: {accuracy:.1f}%\n"
            f"* error: {results['error_rate']:.1f}%\n"
            f"* macro_f1: {results['macro_f1']:.1f}%"
        )
        if self._per_class_res is not None:
            results["perclass_accuracy"] = self._print_classes()
        if self.cfg.TEST.COMPUTE_CMAT:
            self._save_confusion_matrix()
        return results

    def _print_classes(self) -> float:
        """Print a line for each class; returns the mean of the classes' accuracies."""
        assert self._per_class_res is not None and self._lab2cname is not None
        print("=> per-class result")
        accuracies = []
        for label, hits in sorted(self._per_class_res.items()):
            accuracies.append(100.0 * sum(hits) / len(hits))
            print(
                f"* class: {label} ({self._lab2cname[label]})\t"
                f"total: {len(hits):,}\t"
                f"correct: {sum(hits):,}\t"
                f"acc: {accuracies[-1]:.1f}%"
            )
        average = sum(accuracies) / len(accuracies)
        print(f"* average: {average:.1f}%")
        return average

    def _save_confusion_matrix(self) -> None:
        path = osp.join(self.cfg.OUTPUT_DIR, "cmat.pt")
        mkdir_if_missing(self.cfg.OUTPUT_DIR)
        torch.save(torch.from_numpy(confusion_matrix(self._y_true, self._y_pred)), path)
        print(f"Confusion matrix is saved to {path}")


def macro_f1(y_true: list[int], y_pred: list[int]) -> float:
    """Mean F1 of the classes that occur in y_true, in [0, 1]."""
    true, pred = np.array(y_true), np.array(y_pred)
    # F1 = 2 TP / (2 TP + FP + FN), and the denominator is the number of times the class is true + predicted.
    scores = [
        2 * np.sum((true == label) & (pred == label)) / (np.sum(true == label) + np.sum(pred == label))
        for label in np.unique(true)
    ]
    return float(np.mean(scores))


def confusion_matrix(y_true: list[int], y_pred: list[int]) -> np.ndarray:
    """Share of each true class (row) that was predicted as each class (column).

    Returns:
        (K, K) float64 over the K classes that occur in either list, ascending; rows sum to 1, or to 0 for a
        class that is never true.
    """
    labels = np.unique([*y_true, *y_pred])
    counts = np.zeros((len(labels), len(labels)))
    np.add.at(counts, (np.searchsorted(labels, y_true), np.searchsorted(labels, y_pred)), 1)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)
