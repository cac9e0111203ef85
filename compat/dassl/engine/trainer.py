"""The training loop, and what surrounds it: models, checkpoints, resuming, testing."""

from __future__ import annotations

import datetime
import os.path as osp
import time
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .._left_out import left_out, refuse_names
from ..data import DataManager
from ..evaluation import build_evaluator
from ..utils import (
    AverageMeter,
    MetricMeter,
    load_checkpoint,
    mkdir_if_missing,
    resume_from_checkpoint,
    save_checkpoint,
    tolist_if_not,
)
from ..utils._rng import get_rng_state, set_rng_state
from ..utils.torchtools import latest_checkpoint

if TYPE_CHECKING:
    from yacs.config import CfgNode

__getattr__ = refuse_names(__name__, "SimpleNet")


class TrainerBase:
    """Models by name, each with an optimizer and a schedule or without, and the loop over epochs."""

    start_epoch: int
    max_epoch: int
    epoch: int

    def __init__(self) -> None:
        self._models: OrderedDict[str, nn.Module] = OrderedDict()
        self._optims: OrderedDict[str, torch.optim.Optimizer | None] = OrderedDict()
        self._scheds: OrderedDict[str, Any] = OrderedDict()
        self._writer: Any = None
        self._resumed_rng_state: dict[str, Any] | None = None

    # Models

    def register_model(
        self,
        name: str = "model",
        model: nn.Module | None = None,
        optim: torch.optim.Optimizer | None = None,
        sched: Any = None,
    ) -> None:
        """Put a model under the trainer's care: it is saved, loaded, switched between modes and updated."""
        if "_models" not in self.__dict__:
            raise AttributeError("Call super().__init__() before registering a model")
        assert name not in self._models, f"There is a model {name!r} already"
        self._models[name] = model  # type: ignore[assignment]
        self._optims[name] = optim
        self._scheds[name] = sched

    def get_model_names(self, names: str | list[str] | None = None) -> list[str]:
        """The names of all models, or `names` as a list, if there are such models."""
        if names is None:
            return list(self._models)
        names = tolist_if_not(names)
        for name in names:
            assert name in self._models, f"There is no model {name!r}, only {list(self._models)}"
        return names

    def set_model_mode(self, mode: str = "train", names: str | list[str] | None = None) -> None:
        """Switch models to "train", or to "eval" (or "test", which is the same)."""
        if mode not in ("train", "test", "eval"):
            raise KeyError(f"The mode must be train, test or eval, not {mode!r}")
        for name in self.get_model_names(names):
            self._models[name].train(mode == "train")

    # Checkpoints

    def save_model(
        self, epoch: int, directory: str, is_best: bool = False, val_result: float | None = None, model_name: str = ""
    ) -> None:
        """Save each model to its own folder of `directory`, with all that resuming needs.

        Args:
            epoch: the epoch just done, counted from 0.
            directory: the output directory.
            is_best: whether to save it as the best model, too.
            val_result: the accuracy on the validation data.
            model_name: the file's name; `model.pth.tar-<epoch + 1>` if empty.
        """
        for name in self.get_model_names():
            optim, sched = self._optims[name], self._scheds[name]
            state = {
                "state_dict": self._models[name].state_dict(),
                "epoch": epoch + 1,
                "optimizer": None if optim is None else optim.state_dict(),
                "scheduler": None if sched is None else sched.state_dict(),
                "val_result": None if val_result is None else float(val_result),
                "rng_state": get_rng_state(),
            }
            save_checkpoint(state, osp.join(directory, name), is_best=is_best, model_name=model_name)

    def resume_model_if_exist(self, directory: str) -> int:
        """Go back to the state that was saved last in `directory`, if there is one for each model.

        Returns:
            How many epochs were done.
        """
        folders = {name: osp.join(directory, name) for name in self.get_model_names()}
        if not folders or not all(osp.isfile(osp.join(folder, "checkpoint")) for folder in folders.values()):
            print("No checkpoint found, train from scratch")
            return 0

        print(f"Found checkpoint at {directory} (will resume training)")
        epochs = {
            name: resume_from_checkpoint(folder, self._models[name], self._optims[name], self._scheds[name])
            for name, folder in folders.items()
        }
        if len(set(epochs.values())) > 1:
            raise RuntimeError(
                f"The models in {directory} were saved after different epochs: {epochs}. The run was stopped "
                "between two files; put the same epoch's file name into the `checkpoint` file of each folder"
            )
        first = next(iter(folders))
        self._resumed_rng_state = load_checkpoint(latest_checkpoint(folders[first])).get("rng_state")
        return epochs[first]

    def load_model(self, directory: str, epoch: int | None = None) -> None:
        """Load each model's weights from its folder of `directory`: those of an epoch, or the best ones."""
        if not directory:
            print("load_model: no directory is given, so the weights stay as they are")
            return
        model_file = "model-best.pth.tar" if epoch is None else f"model.pth.tar-{epoch}"
        for name in self.get_model_names():
            model_path = osp.join(directory, name, model_file)
            if not osp.exists(model_path):
                raise FileNotFoundError(f"There is no {model_path} to load")
            checkpoint = load_checkpoint(model_path)
            val_result = checkpoint.get("val_result")
            shown = "None" if val_result is None else f"{val_result:.1f}"
            print(f"Load {model_path} to {name} (epoch={checkpoint['epoch']}, val_result={shown})")
            self._models[name].load_state_dict(checkpoint["state_dict"])

    # Tensorboard

    def init_writer(self, log_dir: str) -> None:
        """Open the tensorboard writer, if it is not open yet."""
        if self._writer is not None:
            return
        from torch.utils.tensorboard import SummaryWriter

        print(f"Initialize tensorboard (log_dir={log_dir})")
        self._writer = SummaryWriter(log_dir=log_dir)

    def close_writer(self) -> None:
        """Close the tensorboard writer, if it is open."""
        if self._writer is not None:
            self._writer.close()

    def write_scalar(self, tag: str, scalar_value: float, global_step: int | None = None) -> None:
        """Write a number to tensorboard; does nothing outside of training."""
        if self._writer is not None:
            self._writer.add_scalar(tag, scalar_value, global_step)

    # The loop and its hooks

    def train(self, start_epoch: int, max_epoch: int) -> None:
        """Train from one epoch to another (exclusive), and call the hooks before and after."""
        self.start_epoch = start_epoch
        self.max_epoch = max_epoch
        self.before_train()
        if self._resumed_rng_state is not None:
            # Not before this: before_train may use random numbers, as it did in the first run.
            set_rng_state(self._resumed_rng_state)
        if self._is_trainable():
            for epoch in range(self.start_epoch, self.max_epoch):
                self.epoch = epoch
                self.before_epoch()
                self.run_epoch()
                self.after_epoch()
        else:
            print("There is no model to train")
        self.after_train()

    def _is_trainable(self) -> bool:
        """Not so for a zero-shot classifier, which registers no model and has no forward_backward."""
        return bool(self._models) or type(self).forward_backward is not TrainerBase.forward_backward

    def before_train(self) -> None:
        """Called before the first epoch."""

    def after_train(self) -> None:
        """Called after the last epoch."""

    def before_epoch(self) -> None:
        """Called before each epoch."""

    def after_epoch(self) -> None:
        """Called after each epoch."""

    def run_epoch(self) -> None:
        """Train for one epoch."""
        raise NotImplementedError(f"{type(self).__name__}.run_epoch")

    def test(self) -> float:
        """Evaluate; returns the main result."""
        raise NotImplementedError(f"{type(self).__name__}.test")

    def parse_batch_train(self, batch: Any) -> Any:
        """What training needs of a batch, on the right device."""
        raise NotImplementedError(f"{type(self).__name__}.parse_batch_train")

    def parse_batch_test(self, batch: Any) -> Any:
        """What testing needs of a batch, on the right device."""
        raise NotImplementedError(f"{type(self).__name__}.parse_batch_test")

    def forward_backward(self, batch: Any) -> dict[str, Any] | None:
        """Train on a batch; returns what is to be reported, by name."""
        raise NotImplementedError(f"{type(self).__name__}.forward_backward")

    def model_inference(self, input: Any) -> Tensor:
        """Inputs -> (N, C) scores."""
        raise NotImplementedError(f"{type(self).__name__}.model_inference")

    # Steps of optimisation

    def update_lr(self, names: str | list[str] | None = None) -> None:
        """Move the models' schedules on by an epoch."""
        for name in self.get_model_names(names):
            if self._scheds[name] is not None:
                self._scheds[name].step()

    def detect_anomaly(self, loss: Tensor) -> None:
        """Refuse a loss that is not finite."""
        if not torch.isfinite(loss).all():
            raise FloatingPointError(f"The loss is not finite: {loss.detach().cpu()}")

    def model_zero_grad(self, names: str | list[str] | None = None) -> None:
        """Clear the gradients of the models that have an optimizer."""
        for name in self.get_model_names(names):
            optim = self._optims[name]
            if optim is not None:
                optim.zero_grad()

    def model_backward(self, loss: Tensor) -> None:
        """Compute gradients."""
        self.detect_anomaly(loss)
        loss.backward()

    def model_update(self, names: str | list[str] | None = None) -> None:
        """Let the models' optimizers take a step."""
        for name in self.get_model_names(names):
            optim = self._optims[name]
            if optim is not None:
                optim.step()

    def model_backward_and_update(self, loss: Tensor, names: str | list[str] | None = None) -> None:
        """Clear the gradients, compute them, and take a step."""
        self.model_zero_grad(names)
        self.model_backward(loss)
        self.model_update(names)


class SimpleTrainer(TrainerBase):
    """A trainer made from a configuration, with data, an evaluator, checkpoints and tests."""

    num_batches: int
    batch_idx: int
    model: Any

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        self.check_cfg(cfg)
        self.device = torch.device("cuda" if torch.cuda.is_available() and cfg.USE_CUDA else "cpu")
        self.start_epoch = self.epoch = 0
        self.max_epoch = cfg.OPTIM.MAX_EPOCH
        self.output_dir = cfg.OUTPUT_DIR
        self.cfg = cfg

        self.build_data_loader()
        self.build_model()
        self.evaluator = build_evaluator(cfg, lab2cname=self.lab2cname)
        self.best_result = float("-inf")

    def check_cfg(self, cfg: CfgNode) -> None:
        """Refuse a configuration that the trainer cannot work with."""

    def build_data_loader(self) -> None:
        """Set the loaders, num_classes, num_source_domains and lab2cname, and dm, where they come from."""
        self.dm = DataManager(self.cfg)
        self.train_loader_x = self.dm.train_loader_x
        self.train_loader_u = self.dm.train_loader_u
        self.val_loader = self.dm.val_loader
        self.test_loader = self.dm.test_loader
        self.num_classes = self.dm.num_classes
        self.num_source_domains = self.dm.num_source_domains
        self.lab2cname = self.dm.lab2cname

    def build_model(self) -> None:
        """Build and register models; upstream's default of a CNN with a linear classifier is left out."""
        raise NotImplementedError(
            f"{type(self).__name__} does not override build_model, and "
            + left_out(f"SimpleTrainer.build_model (MODEL.BACKBONE.NAME = {self.cfg.MODEL.BACKBONE.NAME!r})")
        )

    def train(self) -> None:  # type: ignore[override]
        """Train for OPTIM.MAX_EPOCH epochs, from where an earlier run in the output directory stopped."""
        if self._selects_by_validation() and self.val_loader is None:
            raise ValueError(
                "TEST.FINAL_MODEL is best_val, but the data set has no validation data; use last_step "
                "(the test data must not select the model)"
            )
        super().train(self.start_epoch, self.max_epoch)

    def before_train(self) -> None:
        """Resume if there is something to resume, open tensorboard, start the clock."""
        self.start_epoch = self.resume_model_if_exist(self.cfg.RESUME or self.output_dir)
        self._restore_best_result()
        writer_dir = osp.join(self.output_dir, "tensorboard")
        mkdir_if_missing(writer_dir)
        self.init_writer(writer_dir)
        self.time_start = time.time()

    def _restore_best_result(self) -> None:
        """Otherwise the first epoch of a resumed run would replace a better model."""
        for name in self.get_model_names()[:1]:
            best = osp.join(self.output_dir, name, "model-best.pth.tar")
            if self.start_epoch > 0 and self._selects_by_validation() and osp.isfile(best):
                val_result = load_checkpoint(best).get("val_result")
                self.best_result = self.best_result if val_result is None else val_result

    def after_train(self) -> None:
        """Test the last model or the best one, and print how long it took."""
        print("Finish training")
        if not self.cfg.TEST.NO_TEST:
            if self._selects_by_validation():
                print("Deploy the model with the best val performance")
                self.load_model(self.output_dir)
            else:
                print("Deploy the last-epoch model")
            self.test()
        print(f"Elapsed: {datetime.timedelta(seconds=round(time.time() - self.time_start))}")
        self.close_writer()

    def after_epoch(self) -> None:
        """Save the model if it is the best so far, if it is time to, and after the last epoch."""
        if self._selects_by_validation():
            self._save_if_best()
        frequency = self.cfg.TRAIN.CHECKPOINT_FREQ
        is_last = self.epoch + 1 == self.max_epoch
        if is_last or (frequency > 0 and (self.epoch + 1) % frequency == 0):
            self.save_model(self.epoch, self.output_dir)

    def _selects_by_validation(self) -> bool:
        return self.cfg.TEST.FINAL_MODEL == "best_val" and not self.cfg.TEST.NO_TEST

    def _save_if_best(self) -> None:
        result = self.test(split="val")
        if result > self.best_result:
            self.best_result = result
            self.save_model(self.epoch, self.output_dir, val_result=result, model_name="model-best.pth.tar")

    @torch.no_grad()
    def test(self, split: str | None = None) -> float:
        """Evaluate on the "val" or "test" data (by default: cfg.TEST.SPLIT), and print the results.

        Returns:
            The evaluator's first result: the accuracy in percent.
        """
        split = split or self.cfg.TEST.SPLIT
        if split == "val" and self.val_loader is None:
            raise ValueError("A test on the validation data was asked for, but the data set has none")
        split = "val" if split == "val" else "test"
        self.set_model_mode("eval")
        self.evaluator.reset()

        print(f"Evaluate on the *{split}* set")
        for batch in tqdm(self.val_loader if split == "val" else self.test_loader):
            input, label = self.parse_batch_test(batch)
            self.evaluator.process(self.model_inference(input), label)

        results = self.evaluator.evaluate()
        for name, value in results.items():
            self.write_scalar(f"{split}/{name}", value, self.epoch)
        return next(iter(results.values()))

    def model_inference(self, input: Any) -> Tensor:
        """Inputs -> (N, C) scores."""
        return self.model(input)

    def parse_batch_test(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Images and labels."""
        return batch["img"].to(self.device), batch["label"].to(self.device)

    def get_current_lr(self, names: str | list[str] | None = None) -> float:
        """The learning rate of the first model's first parameter group."""
        name = self.get_model_names(names)[0]
        optim = self._optims[name]
        assert optim is not None, f"The model {name!r} has no optimizer, so there is no learning rate"
        return optim.param_groups[0]["lr"]

    def _run_batches(self, batches: Iterable[tuple[Any, ...]]) -> None:
        """Train for one epoch, on batches that are the arguments of forward_backward; num_batches is set."""
        losses, batch_time, data_time = MetricMeter(), AverageMeter(), AverageMeter()
        end = time.time()
        for self.batch_idx, batch in enumerate(batches):
            data_time.update(time.time() - end)
            summary = self.forward_backward(*batch)
            batch_time.update(time.time() - end)
            losses.update(summary)

            is_time = (self.batch_idx + 1) % self.cfg.TRAIN.PRINT_FREQ == 0
            if is_time or self.num_batches < self.cfg.TRAIN.PRINT_FREQ:
                self._print_progress(losses, batch_time, data_time)
            self._write_progress(losses)
            end = time.time()

    def _print_progress(self, losses: MetricMeter, batch_time: AverageMeter, data_time: AverageMeter) -> None:
        batches_left = self.num_batches * (self.max_epoch - self.epoch) - self.batch_idx - 1
        print(
            f"epoch [{self.epoch + 1}/{self.max_epoch}] "
            f"batch [{self.batch_idx + 1}/{self.num_batches}] "
            f"time {batch_time.val:.3f} ({batch_time.avg:.3f}) "
            f"data {data_time.val:.3f} ({data_time.avg:.3f}) "
            f"{losses} "
            f"lr {self.get_current_lr():.4e} "
            f"eta {datetime.timedelta(seconds=int(batch_time.avg * batches_left))}"
        )

    def _write_progress(self, losses: MetricMeter) -> None:
        step = self.epoch * self.num_batches + self.batch_idx
        for name, meter in losses.meters.items():
            self.write_scalar(f"train/{name}", meter.avg, step)
        self.write_scalar("train/lr", self.get_current_lr(), step)


class TrainerX(SimpleTrainer):
    """Trains on labelled data alone."""

    def run_epoch(self) -> None:
        """Train on each batch of train_loader_x."""
        self.set_model_mode("train")
        self.num_batches = len(self.train_loader_x)
        self._run_batches((batch,) for batch in self.train_loader_x)

    def parse_batch_train(self, batch: dict[str, Any]) -> Any:
        """Images, labels and domains."""
        return tuple(batch[key].to(self.device) for key in ("img", "label", "domain"))


class TrainerXU(SimpleTrainer):
    """Trains on labelled and unlabelled data at once: forward_backward(batch_x, batch_u)."""

    def run_epoch(self) -> None:
        """Train on as many pairs of batches as TRAIN.COUNT_ITER says; the shorter loader begins anew."""
        if self.train_loader_u is None:
            raise ValueError(f"{type(self).__name__} needs unlabelled data (train_u), and there is none")
        self.set_model_mode("train")
        len_x, len_u = len(self.train_loader_x), len(self.train_loader_u)
        counts = {"train_x": len_x, "train_u": len_u, "smaller_one": min(len_x, len_u)}
        count_iter = self.cfg.TRAIN.COUNT_ITER
        if count_iter not in counts:
            raise ValueError(f"TRAIN.COUNT_ITER must be one of {list(counts)}, not {count_iter!r}")
        self.num_batches = counts[count_iter]
        batches_x, batches_u = _endless(self.train_loader_x), _endless(self.train_loader_u)
        self._run_batches((next(batches_x), next(batches_u)) for _ in range(self.num_batches))

    def parse_batch_train(self, batch_x: Any, batch_u: Any) -> Any:  # type: ignore[override]
        """Labelled images, their labels, unlabelled images."""
        return tuple(value.to(self.device) for value in (batch_x["img"], batch_x["label"], batch_u["img"]))


def _endless(loader: Iterable[Any]) -> Iterator[Any]:
    """The loader's batches, over and over; the first pass begins at once, to keep the order of random numbers."""
    first_pass = iter(loader)

    def batches() -> Iterator[Any]:
        yield from first_pass
        while True:
            yield from loader

    return batches()
