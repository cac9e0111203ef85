"""The training loop, its hooks and lines, checkpoints, resuming, testing."""

from __future__ import annotations

import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from dassl_small import TinyNet, TinyTrainer, TinyZeroShot, standin_only, tiny_cfg, write_images


@pytest.fixture
def images(tmp_path):
    write_images(tmp_path / "images")
    return tmp_path / "images"


@pytest.fixture
def cfg(images, tmp_path):
    """Two epochs of two batches."""
    return tiny_cfg(images, tmp_path / "out")


def options(cfg, **changes):
    """A changed copy of a configuration."""
    return tiny_cfg(cfg.DATASET.ROOT, changes.pop("output", cfg.OUTPUT_DIR), **changes)


@pytest.fixture(autouse=True)
def _seed():
    from dassl.utils import set_random_seed

    set_random_seed(1)


# The loop


def test_printed_lines(cfg, capsys):
    TinyTrainer(cfg).train()
    printed = capsys.readouterr().out
    number, duration = r"\d+\.\d+ \(\d+\.\d+\)", r"\d+:\d\d:\d\d"
    rates = {(1, 1): "1.0000e-01", (1, 2): "5.0000e-02", (2, 1): "5.0000e-02", (2, 2): "0.0000e+00"}
    for (epoch, batch), rate in rates.items():
        line = (
            rf"^epoch \[{epoch}/2\] batch \[{batch}/2\] time {number} data {number} "
            rf"loss {number} acc {number} lr {re.escape(rate)} eta {duration}$"
        )
        assert len(re.findall(line, printed, re.MULTILINE)) == 1
    lines = printed.splitlines()
    order = [
        "No checkpoint found, train from scratch",
        f"Initialize tensorboard (log_dir={cfg.OUTPUT_DIR}/tensorboard)",
        f"Checkpoint saved to {cfg.OUTPUT_DIR}/tiny_net/model.pth.tar-2",
        "Finish training",
        "Deploy the last-epoch model",
        "Evaluate on the *test* set",
        "=> result",
        "* total: 6",
    ]
    places = [lines.index(line) for line in order]
    assert places == sorted(places)
    assert re.fullmatch(rf"Elapsed: {duration}", lines[-1])


def test_print_frequency(cfg, capsys):
    for frequency, shown in ((1, 4), (2, 2), (3, 4)):  # fewer batches than 3: each is shown
        TinyTrainer(options(cfg, TRAIN__PRINT_FREQ=frequency, output=f"{cfg.OUTPUT_DIR}{frequency}")).train()
        assert len(re.findall(r"^epoch \[", capsys.readouterr().out, re.MULTILINE)) == shown


def test_state_before_training(cfg):
    trainer = TinyTrainer(cfg)
    assert (trainer.start_epoch, trainer.epoch, trainer.max_epoch) == (0, 0, 2)
    assert trainer.output_dir == cfg.OUTPUT_DIR and trainer.device == torch.device("cpu")
    assert trainer.best_result == float("-inf")
    assert trainer.num_classes == 3 and trainer.lab2cname[0] == "red" and trainer.num_source_domains == 0
    assert trainer.train_loader_x is trainer.dm.train_loader_x and trainer.val_loader is trainer.dm.val_loader
    assert trainer.get_model_names() == ["tiny_net"] and trainer.get_current_lr() == 0.1
    assert trainer.evaluator._lab2cname == trainer.lab2cname


def test_order_of_construction_and_of_hooks(cfg):
    calls = []

    class Recorder(TinyTrainer):
        def check_cfg(self, cfg):
            assert not hasattr(self, "cfg")
            calls.append("check_cfg")

        def build_data_loader(self):
            assert self.cfg.TRAINER.NAME and str(self.device) == "cpu" and self.max_epoch == 2
            calls.append("build_data_loader")
            super().build_data_loader()

        def build_model(self):
            assert not hasattr(self, "evaluator")
            calls.append("build_model")
            super().build_model()

    for name in ("before_train", "before_epoch", "run_epoch", "after_epoch", "after_train"):

        def hook(self, name=name):
            calls.append(name)
            getattr(TinyTrainer, name)(self)

        setattr(Recorder, name, hook)

    Recorder(cfg).train()
    epoch = ["before_epoch", "run_epoch", "after_epoch"]
    assert calls == ["check_cfg", "build_data_loader", "build_model", "before_train", *epoch, *epoch, "after_train"]


def test_scalars(cfg):
    written = []

    class Writer(TinyTrainer):
        def write_scalar(self, tag, scalar_value, global_step=None):
            written.append((tag, global_step))

    Writer(cfg).train()
    tags = ["train/loss", "train/acc", "train/lr"]
    assert written[:12] == [(tag, step) for step in range(4) for tag in tags]
    assert written[12:] == [("test/accuracy", 1), ("test/error_rate", 1), ("test/macro_f1", 1)]


def test_scalars_outside_of_training_go_nowhere(cfg):
    trainer = TinyTrainer(cfg)
    trainer.write_scalar("a", 1.0, 1)
    trainer.close_writer()
    assert not os.path.exists(cfg.OUTPUT_DIR)


def test_both_kinds_of_training_data(cfg):
    from dassl.engine import TrainerXU

    seen = []

    class Both(TrainerXU):
        build_model = TinyTrainer.build_model

        def forward_backward(self, batch_x, batch_u):
            images, labels, unlabelled = self.parse_batch_train(batch_x, batch_u)
            seen.append((len(images), len(labels), len(unlabelled)))

    for count_iter, batches in (("train_x", 2), ("train_u", 4), ("smaller_one", 2)):
        seen.clear()
        changes = {"OPTIM__MAX_EPOCH": 1, "TRAIN__COUNT_ITER": count_iter}
        changes |= {"DATALOADER__TRAIN_U__SAME_AS_X": False, "DATALOADER__TRAIN_U__BATCH_SIZE": 3}
        Both(options(cfg, **changes, output=cfg.OUTPUT_DIR + count_iter)).train()
        assert seen == [(5, 5, 3)] * batches


def test_both_loaders_are_started_before_the_first_batch(cfg):
    """The order in which random numbers are drawn, on which results for a seed depend."""
    from dassl.engine import TrainerXU

    events = []

    def fetch(batch):
        events.append(f"fetch {batch}")
        return batch

    class Loader(list):
        def __iter__(self):
            events.append(f"start {self[0]}")
            return map(fetch, super().__iter__())

    class Both(TrainerXU):
        build_model = TinyTrainer.build_model

        def forward_backward(self, batch_x, batch_u):
            pass

    trainer = Both(options(cfg, OPTIM__MAX_EPOCH=1, TEST__NO_TEST=True))
    trainer.train_loader_x, trainer.train_loader_u = Loader(["x", "y"]), Loader(["u"])
    trainer.train()
    assert events == ["start x", "start u", "fetch x", "fetch u", "fetch y", "start u", "fetch u"]


# Models


def test_models_are_updated_together_or_by_name(cfg):
    from dassl.engine import TrainerBase

    trainer = TrainerBase()
    models = {name: torch.nn.Linear(1, 1, bias=False) for name in ("a", "b", "frozen")}
    for name, model in models.items():
        optim = None if name == "frozen" else torch.optim.SGD(model.parameters(), lr=1.0)
        sched = torch.optim.lr_scheduler.StepLR(optim, 1) if name == "a" else None
        trainer.register_model(name, model, optim, sched)
    assert trainer.get_model_names() == ["a", "b", "frozen"] and trainer.get_model_names("b") == ["b"]

    def step(names):
        before = {name: model.weight.item() for name, model in models.items()}
        loss = sum(model.weight.sum() for model in models.values())
        trainer.model_backward_and_update(loss, names)
        return [name for name, model in models.items() if model.weight.item() != before[name]]

    assert step(["b"]) == ["b"]
    assert step(None) == ["a", "b"]
    trainer.update_lr()
    assert trainer._optims["a"].param_groups[0]["lr"] == pytest.approx(0.1)
    trainer.set_model_mode("eval")
    assert not any(model.training for model in models.values())
    trainer.set_model_mode("train", "a")
    assert [model.training for model in models.values()] == [True, False, False]
    with pytest.raises(KeyError):
        trainer.set_model_mode("sleep")
    with pytest.raises(AssertionError):
        trainer.get_model_names(["nobody"])
    with pytest.raises(AssertionError):
        trainer.register_model("a", models["a"])


def test_models_cannot_be_registered_too_early():
    from dassl.engine import TrainerBase

    class TooEarly(TrainerBase):
        def __init__(self):
            self.register_model("model", torch.nn.Linear(1, 1))

    with pytest.raises(AttributeError, match="__init__"):
        TooEarly()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run(bad):
    from dassl.engine import TrainerBase

    with pytest.raises(FloatingPointError):
        TrainerBase().model_backward(torch.tensor(bad, requires_grad=True))


@standin_only
def test_upstreams_default_model_is_left_out(cfg):
    from dassl.engine import TrainerX

    with pytest.raises(NotImplementedError, match=r"build_model.*Dassl.pytorch"):
        TrainerX(options(cfg, MODEL__BACKBONE__NAME="resnet18"))


# Checkpoints


def test_checkpoint_contents_and_names(cfg):
    trainer = TinyTrainer(options(cfg, TRAIN__CHECKPOINT_FREQ=1))
    trainer.train()
    folder = os.path.join(cfg.OUTPUT_DIR, "tiny_net")
    assert sorted(os.listdir(folder)) == ["checkpoint", "model.pth.tar-1", "model.pth.tar-2"]
    assert Path(folder, "checkpoint").read_text() == "model.pth.tar-2\n"
    saved = torch.load(os.path.join(folder, "model.pth.tar-2"), weights_only=True)
    assert set(saved) >= {"state_dict", "epoch", "optimizer", "scheduler", "val_result"}
    assert saved["epoch"] == 2 and saved["val_result"] is None
    assert sorted(saved["state_dict"]) == ["classifier.bias", "classifier.weight"]
    assert torch.equal(saved["state_dict"]["classifier.weight"], trainer.model.classifier.weight)
    assert saved["scheduler"]["last_epoch"] == 2
    assert os.listdir(os.path.join(cfg.OUTPUT_DIR, "tensorboard"))


@standin_only  # upstream stores the number as it is, and safe loading refuses numpy's
def test_a_numpy_result_does_not_spoil_the_checkpoint(cfg):
    trainer = TinyTrainer(cfg)
    trainer.save_model(0, cfg.OUTPUT_DIR, val_result=np.float64(12.5))
    saved = torch.load(os.path.join(cfg.OUTPUT_DIR, "tiny_net", "model.pth.tar-1"), weights_only=True)
    assert saved["val_result"] == 12.5


@pytest.mark.parametrize(("frequency", "epochs"), [(0, [3]), (2, [2, 3]), (1, [1, 2, 3])])
def test_checkpoint_frequency(cfg, frequency, epochs):
    changes = {"OPTIM__MAX_EPOCH": 3, "TRAIN__CHECKPOINT_FREQ": frequency}
    TinyTrainer(options(cfg, **changes)).train()
    names = [f"model.pth.tar-{epoch}" for epoch in epochs]
    assert sorted(os.listdir(os.path.join(cfg.OUTPUT_DIR, "tiny_net"))) == ["checkpoint", *names]


@standin_only
def test_loading_a_model(cfg, capsys):
    trainer = TinyTrainer(cfg)
    trainer.train()
    weight = trainer.model.classifier.weight.clone()
    other = TinyTrainer(cfg)
    assert not torch.equal(other.model.classifier.weight, weight)
    other.load_model("")
    assert "no directory is given" in capsys.readouterr().out
    other.load_model(cfg.OUTPUT_DIR, epoch=2)
    assert torch.equal(other.model.classifier.weight, weight)
    assert "tiny_net (epoch=2, val_result=None)" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"model.pth.tar-9"):
        other.load_model(cfg.OUTPUT_DIR, epoch=9)
    with pytest.raises(FileNotFoundError, match=r"model-best.pth.tar"):
        other.load_model(cfg.OUTPUT_DIR)


def test_the_best_model_on_the_validation_data_is_deployed(cfg, capsys):
    class Scripted(TinyTrainer):
        """Validation accuracies as given; the weights tell the epoch."""

        def after_epoch(self):
            torch.nn.init.constant_(self.model.classifier.weight, self.epoch + 1.0)
            super().after_epoch()

        def test(self, split=None):
            return [10.0, 30.0, 20.0][self.epoch] if split == "val" else super().test(split)

    trainer = Scripted(options(cfg, OPTIM__MAX_EPOCH=3, TEST__FINAL_MODEL="best_val"))
    trainer.train()
    assert trainer.best_result == 30.0
    assert trainer.model.classifier.weight.unique().tolist() == [2.0]
    saved = torch.load(os.path.join(cfg.OUTPUT_DIR, "tiny_net", "model-best.pth.tar"), weights_only=True)
    assert (saved["epoch"], saved["val_result"]) == (2, 30.0)
    printed = capsys.readouterr().out
    assert "Deploy the model with the best val performance" in printed
    assert "tiny_net (epoch=2, val_result=30.0)" in printed


@standin_only
def test_the_test_data_never_select_the_model(cfg):
    bare = options(cfg, DATASET__NAME="TinyColoursBare", TEST__FINAL_MODEL="best_val")
    with pytest.raises(ValueError, match=r"best_val.*no validation data"):
        TinyTrainer(bare).train()
    with pytest.raises(ValueError, match="validation"):
        TinyTrainer(bare).test(split="val")


# Testing


def test_test_returns_the_accuracy(cfg, capsys):
    trainer = TinyTrainer(cfg)
    accuracy = trainer.test()
    assert not trainer.model.training
    printed = capsys.readouterr().out
    assert "Evaluate on the *test* set" in printed and f"* accuracy: {accuracy:.1f}%" in printed
    trainer.test(split="val")
    assert "Evaluate on the *val* set" in capsys.readouterr().out
    TinyTrainer(options(cfg, TEST__SPLIT="val")).test()
    assert "Evaluate on the *val* set" in capsys.readouterr().out


def test_no_test(cfg, capsys):
    TinyTrainer(options(cfg, TEST__NO_TEST=True)).train()
    assert "Evaluate" not in capsys.readouterr().out


def test_a_trainer_without_a_model_can_be_tested(cfg):
    assert TinyZeroShot(cfg).test() == 100.0


@standin_only
def test_training_it_is_just_a_test(cfg, capsys):
    TinyZeroShot(cfg).train()
    printed = capsys.readouterr().out
    assert printed.index("There is no model to train") < printed.index("Finish training")
    assert printed.index("Finish training") < printed.index("* accuracy: 100.0%")


# Resuming


class Stop(Exception):
    """The run is killed."""


def stopped_after(trainer_class, epochs, *, mid_epoch):
    """The class, with a run that is killed when so many epochs are done, or in the middle of the next."""

    class Stopped(trainer_class):
        def before_epoch(self):
            if self.epoch == epochs and not mid_epoch:
                raise Stop

        def forward_backward(self, batch):
            if self.epoch == epochs and self.batch_idx == 1:
                raise Stop
            return super().forward_backward(batch)

    return Stopped


def weights_and_state(trainer):
    state = trainer.optim.state_dict()["state"]
    momenta = [value for number in sorted(state) for value in state[number].values()]
    return [*trainer.model.state_dict().values(), *momenta, trainer.get_current_lr()]


RESUMED = {
    "constant warm-up": {"OPTIM__WARMUP_EPOCH": 2, "OPTIM__WARMUP_TYPE": "constant"},
    "linear warm-up": {"OPTIM__WARMUP_EPOCH": 3, "OPTIM__WARMUP_TYPE": "linear"},
    "adam": {"OPTIM__NAME": "adam"},
    "best_val": {"TEST__FINAL_MODEL": "best_val"},
    "best_val alone": {"TEST__FINAL_MODEL": "best_val", "TRAIN__CHECKPOINT_FREQ": 0},
}


@standin_only
@pytest.mark.parametrize("mid_epoch", [False, True])
@pytest.mark.parametrize("name", RESUMED)
def test_a_resumed_run_ends_bit_identical(cfg, name, mid_epoch, capsys):
    from dassl.utils import set_random_seed

    changes = {"OPTIM__MAX_EPOCH": 4, "TRAIN__CHECKPOINT_FREQ": 1, **RESUMED[name]}
    whole = TinyTrainer(options(cfg, **changes, output=cfg.OUTPUT_DIR + "-whole"))
    whole.train()

    set_random_seed(1)
    with pytest.raises(Stop):
        stopped_after(TinyTrainer, 2, mid_epoch=mid_epoch)(options(cfg, **changes)).train()
    capsys.readouterr()
    set_random_seed(99)  # the second run's own seed plays no part
    resumed = TinyTrainer(options(cfg, **changes))
    resumed.train()

    assert resumed.start_epoch >= 1 and "will resume training" in capsys.readouterr().out
    assert resumed.best_result == whole.best_result
    for ours, theirs in zip(weights_and_state(resumed), weights_and_state(whole), strict=True):
        assert torch.equal(torch.as_tensor(ours), torch.as_tensor(theirs))


@standin_only
def test_a_worse_epoch_of_a_resumed_run_is_not_the_best(cfg):
    class Scripted(TinyTrainer):
        def test(self, split=None):
            return [50.0, 40.0, 30.0][self.epoch] if split == "val" else super().test(split)

    changes = {"OPTIM__MAX_EPOCH": 3, "TRAIN__CHECKPOINT_FREQ": 1, "TEST__FINAL_MODEL": "best_val"}
    with pytest.raises(Stop):
        stopped_after(Scripted, 2, mid_epoch=False)(options(cfg, **changes)).train()
    resumed = Scripted(options(cfg, **changes))
    resumed.train()
    assert (resumed.start_epoch, resumed.best_result) == (2, 50.0)
    saved = torch.load(os.path.join(cfg.OUTPUT_DIR, "tiny_net", "model-best.pth.tar"), weights_only=True)
    assert (saved["epoch"], saved["val_result"]) == (1, 50.0)


def test_a_finished_run_is_only_tested_again(cfg, capsys):
    TinyTrainer(cfg).train()
    capsys.readouterr()
    again = TinyTrainer(cfg)
    again.train()
    printed = capsys.readouterr().out
    assert again.start_epoch == 2 and "Previous epoch: 2" in printed
    assert "epoch [" not in printed and "* accuracy:" in printed


def test_resuming_from_another_directory(cfg, capsys):
    TinyTrainer(cfg).train()
    elsewhere = options(cfg, RESUME=cfg.OUTPUT_DIR, OPTIM__MAX_EPOCH=3, output=cfg.OUTPUT_DIR + "-2")
    trainer = TinyTrainer(elsewhere)
    trainer.train()
    assert trainer.start_epoch == 2
    assert os.listdir(os.path.join(elsewhere.OUTPUT_DIR, "tiny_net"))


@standin_only
def test_a_damaged_checkpoint_stops_the_second_run(cfg):
    TinyTrainer(cfg).train()
    path = os.path.join(cfg.OUTPUT_DIR, "tiny_net", "model.pth.tar-2")
    os.truncate(path, 200)
    with pytest.raises(RuntimeError, match=re.escape(path)):
        TinyTrainer(cfg).train()


@standin_only
def test_a_folder_without_a_checkpoint_is_no_run(cfg, capsys):
    """A run that was killed before its first checkpoint was complete."""
    os.makedirs(os.path.join(cfg.OUTPUT_DIR, "tiny_net"))
    trainer = TinyTrainer(cfg)
    trainer.train()
    assert trainer.start_epoch == 0 and "train from scratch" in capsys.readouterr().out


@standin_only
def test_models_of_different_epochs_are_not_mixed(cfg):
    class Two(TinyTrainer):
        def build_model(self):
            super().build_model()
            self.register_model("second", TinyNet(3))

    Two(options(cfg, TRAIN__CHECKPOINT_FREQ=1)).train()
    with open(os.path.join(cfg.OUTPUT_DIR, "second", "checkpoint"), "w") as file:
        file.write("model.pth.tar-1\n")
    with pytest.raises(RuntimeError, match=r"different epochs.*'tiny_net': 2.*'second': 1"):
        Two(cfg).train()
