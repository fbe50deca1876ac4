"""Trains the reference UNet as a DDPM on MNIST, in PyTorch, and saves what ermongroup/ddim's runner saves.

The defaults are the configuration of scripts/assets/mnist-ddpm: 21,634 steps of 64 images, Adam, EMA 0.999,
forward pass in bfloat16. That checkpoint records its last learning rate, 1e-6, but not the way there from
1e-3; here it is a cosine.

OUT receives ckpt.pth, the list [model with `module.` prefix, optimizer, epoch, step, EMA], and config.yml.
With --resume, options that are not given are taken from OUT/config.yml.

Examples:
  scripts/train --images train-images-idx3-ubyte.gz --out out/mnist
  scripts/train --images train-images-idx3-ubyte.gz --out out/mnist --resume --steps 40000

"""

# torch takes seconds to import: the functions that need it import it, so that --help and a mistyped option
# answer at once, and Ctrl-C during the import ends like Ctrl-C at any other time.
from __future__ import annotations

import argparse
import gzip
import io
import math
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import numpy as np

if TYPE_CHECKING:
    import torch

    from convert.reference.unet import ReferenceUNet

T, BETA_START, BETA_END = 1000, 1e-4, 0.02
IDX_IMAGES, IDX_LABELS = 0x00000803, 0x00000801


class Setting(NamedTuple):
    """Where config.yml keeps an option, and its value where nothing says otherwise."""

    section: str
    key: str
    default: Any


# ermongroup/ddim's config has names for all but norm_groups (a constant there), lr_final, seed and bf16.
MODEL_SETTINGS = {
    "ch": Setting("model", "ch", 32),
    "ch_mult": Setting("model", "ch_mult", [1, 2, 2]),
    "num_res_blocks": Setting("model", "num_res_blocks", 1),
    "attn_resolutions": Setting("model", "attn_resolutions", [7]),
    "norm_groups": Setting("model", "norm_groups", 32),
}
SETTINGS = MODEL_SETTINGS | {
    "steps": Setting("training", "n_iters", 21634),
    "batch_size": Setting("training", "batch_size", 64),
    "lr": Setting("optim", "lr", 1e-3),
    "lr_final": Setting("training", "lr_final", 1e-6),
    "ema_rate": Setting("model", "ema_rate", 0.999),
    "seed": Setting("training", "seed", 0),
    "bf16": Setting("training", "bf16", True),
    "save_every": Setting("training", "snapshot_freq", 1000),
}


class CannotTrainError(Exception):
    """Something given cannot be used, or training went wrong; the message is the whole report."""


class OneLineParser(argparse.ArgumentParser):
    """Reports a bad option in one line, without the usage above it."""

    def error(self, message: str) -> NoReturn:
        """Exits with status 2."""
        self.exit(2, f"{self.prog}: {message} (--help lists the options)\n")


def number(kind: Callable[[str], Any], says: str, allowed: Callable[[Any], bool]) -> Callable[[str], Any]:
    """An argparse type that refuses, in words, what is not a `kind` or not allowed."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not allowed(value):
            raise argparse.ArgumentTypeError(f"must be {says}, got {text!r}")
        return value

    return parse


def int_list(text: str) -> list[int]:
    return [int(part) for part in text.split(",")] if text else []


def make_parser() -> argparse.ArgumentParser:
    positive = number(int, "a whole number of 1 or more", lambda n: n >= 1)
    not_negative = number(int, "a whole number of 0 or more", lambda n: n >= 0)
    rate = number(float, "above 0 and at most 1", lambda x: 0 < x <= 1)
    decay = number(float, "0 or more and below 1", lambda x: 0 <= x < 1)
    some = number(int_list, "whole numbers of 1 or more, as 1,2,2", lambda v: bool(v) and min(v) >= 1)
    any_sizes = number(int_list, "sizes of 1 or more, as 14,7, or '' for none", lambda v: min(v, default=1) >= 1)
    on_off = argparse.BooleanOptionalAction
    raw = argparse.RawDescriptionHelpFormatter

    parser = OneLineParser(prog="train_mnist", description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--images", type=Path, required=True, help="MNIST's images: an IDX file, gzipped or plain")
    add("--out", type=Path, required=True, help="folder for ckpt.pth and config.yml")
    add("--overwrite", action="store_true", help="replace what is in OUT, once there is something new")
    add("--resume", action="store_true", help="go on from OUT/ckpt.pth and OUT/config.yml")
    # No defaults here: a value given must be told from a default when resuming.
    add("--steps", type=positive, help="steps in all, those resumed from included (21634)")
    add("--batch-size", type=positive, help="images a step (64)")
    add("--lr", type=rate, help="first learning rate (0.001)")
    add("--lr-final", type=rate, help="last learning rate, reached at --steps on a cosine (1e-6)")
    add("--ema-rate", type=decay, help="decay of the weights' moving average (0.999)")
    add("--seed", type=not_negative, help="of weights, order, timesteps and noise (0)")
    add("--bf16", action=on_off, help="forward pass in bfloat16 (on)")
    add("--save-every", type=positive, help="steps between saves (1000)")
    add("--log-every", type=not_negative, default=500, help="steps between lines of the log, 0: none (500)")
    add(
        "--keep-optimizer",
        action=on_off,
        default=True,
        help="save Adam's moments, 2x the file: exact resume (on)",
    )
    add("--ch", type=positive, help="base channels (32)")
    add("--ch-mult", type=some, metavar="M,M,...", help="channel multiplier of each level (1,2,2)")
    add("--num-res-blocks", type=positive, help="residual blocks a level (1)")
    add("--attn-resolutions", type=any_sizes, metavar="R,...", help="image sizes with attention (7)")
    add("--norm-groups", type=positive, help="groups of every GroupNorm (32)")
    return parser


def read_idx_images(path: Path) -> np.ndarray:
    """MNIST's images as `(n, h, h)` uint8, gzipped or plain by content. Raises CannotTrainError."""
    try:
        raw = path.read_bytes()
        if raw[:2] == b"\x1f\x8b":
            raw = gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CannotTrainError(f"{path}: the gzip data is damaged or cut short ({error})") from error
    except OSError as error:
        raise CannotTrainError(f"cannot read --images {path}: {error.strerror}") from error
    magic = int.from_bytes(raw[:4], "big")
    if magic == IDX_LABELS:
        raise CannotTrainError(f"{path} holds IDX labels: give the file of images (...images-idx3-ubyte)")
    if len(raw) < 16 or magic != IDX_IMAGES:
        raise CannotTrainError(f"{path} is no IDX file of images (those start with 00000803 in hexadecimal)")
    n, h, w = (int(size) for size in np.frombuffer(raw, ">u4", count=3, offset=4))
    if len(raw) - 16 != n * h * w:
        raise CannotTrainError(f"{path} announces {n} images of {h}x{w}, {n * h * w} bytes, but holds {len(raw) - 16}")
    if n == 0 or h != w:
        raise CannotTrainError(f"{path} holds {n} images of {h}x{w}: one or more square ones are needed")
    return np.frombuffer(raw, np.uint8, offset=16).reshape(n, h, w)


def read_resumed(out: Path) -> tuple[list[Any], dict[str, Any]]:
    """The states of OUT/ckpt.pth and the settings in OUT/config.yml. Raises CannotTrainError."""
    import torch
    import yaml

    ckpt, config = out / "ckpt.pth", out / "config.yml"
    for path in (ckpt, config):
        if not path.is_file():
            raise CannotTrainError(f"--resume: there is no {path}; leave out --resume to start from nothing")
    try:
        states = torch.load(ckpt, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen unrelated types for what it cannot read
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise CannotTrainError(f"--resume: cannot read {ckpt}: {reason}") from error
    layout = [dict, dict, int, int, dict]
    if not (isinstance(states, list) and list(map(type, states)) == layout):
        raise CannotTrainError(f"--resume: {ckpt} is not a list of model, optimizer, epoch, step and EMA")
    try:
        sections = yaml.safe_load(config.read_text())
        stored = {name: sections[s.section].get(s.key, s.default) for name, s in SETTINGS.items()}
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError, AttributeError) as error:
        raise CannotTrainError(f"--resume: {config} lacks sections model, optim and training") from error
    for name, setting in SETTINGS.items():
        value, wanted = stored[name], type(setting.default)
        if wanted is float and type(value) is int:
            value = stored[name] = float(value)
        if type(value) is not wanted or (wanted is list and any(type(item) is not int for item in value)):
            entry = f"{setting.section}.{setting.key}"
            raise CannotTrainError(f"--resume: {entry} in {config} must be like {setting.default}, got {value}")
    return states, stored


def make_model(settings: argparse.Namespace, image_size: int) -> ReferenceUNet:
    """The UNet for square images of image_size. Raises CannotTrainError when the settings do not fit."""
    from convert.reference.unet import ReferenceUNet

    levels = len(settings.ch_mult)
    factor = 2 ** (levels - 1)
    if image_size % factor:
        raise CannotTrainError(
            f"{levels} levels (--ch-mult) need an image size divisible by {factor}, got {image_size}"
        )
    sizes = [image_size // 2**level for level in range(levels)]
    absent = sorted(set(settings.attn_resolutions) - set(sizes))
    if absent:
        raise CannotTrainError(
            f"--attn-resolutions {absent}: the levels of {image_size}x{image_size} images are {sizes}"
        )
    try:
        return ReferenceUNet(
            ch=settings.ch,
            ch_mult=settings.ch_mult,
            num_res_blocks=settings.num_res_blocks,
            attn_levels=[level for level, size in enumerate(sizes) if size in settings.attn_resolutions],
            in_channels=1,
            out_ch=1,
            norm_groups=settings.norm_groups,
        )
    except ValueError as error:
        raise CannotTrainError(str(error)) from error


def write_atomically(path: Path, data: bytes) -> None:
    """Path is the old file or the whole new one, whenever the machine stops."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def config_sections(settings: argparse.Namespace, image_size: int, epochs: int) -> dict[str, dict[str, Any]]:
    """The configuration in ermongroup/ddim's layout."""
    sections: dict[str, dict[str, Any]] = {
        "data": {
            "channels": 1,
            "dataset": "MNIST",
            "gaussian_dequantization": False,
            "image_size": image_size,
            "logit_transform": False,
            "num_workers": 0,
            "random_flip": False,
            "rescaled": True,
            "uniform_dequantization": False,
        },
        "diffusion": {
            "beta_end": BETA_END,
            "beta_schedule": "linear",
            "beta_start": BETA_START,
            "num_diffusion_timesteps": T,
        },
        "model": {
            "dropout": 0.0,
            "ema": True,
            "in_channels": 1,
            "out_ch": 1,
            "resamp_with_conv": True,
            "type": "simple",
            "var_type": "fixedlarge",
        },
        "optim": {
            "amsgrad": False,
            "beta1": 0.9,
            "eps": 1e-8,
            "grad_clip": 1.0,
            "optimizer": "Adam",
            "weight_decay": 0.0,
        },
        "sampling": {"batch_size": 64, "last_only": True},
        "training": {"n_epochs": epochs, "validation_freq": 2000},
    }
    for name, setting in SETTINGS.items():
        sections[setting.section][setting.key] = getattr(settings, name)
    if settings.norm_groups == MODEL_SETTINGS["norm_groups"].default:
        del sections["model"]["norm_groups"]  # the source's constant: its config has no entry for it
    return sections


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several numbers, so that neighbouring seeds and steps share no stream."""
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Trainer:
    """Model, optimizer and EMA, one step at a time. Step n draws from (seed, n) alone: resuming is exact."""

    def __init__(self, settings: argparse.Namespace, model: ReferenceUNet, images: np.ndarray):
        import torch

        self.settings = settings
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device)
        self.images = torch.tensor(images)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=settings.lr, betas=(0.9, 0.999), eps=1e-8)
        self.ema = {name: param.detach().clone() for name, param in model.named_parameters()}
        alphas_cumprod = np.cumprod(1 - np.linspace(BETA_START, BETA_END, T))
        self.alphas_cumprod = torch.tensor(alphas_cumprod, dtype=torch.float32, device=self.device)
        self.step = 0
        self.steps_per_epoch = math.ceil(len(images) / settings.batch_size)
        self._order: tuple[int, torch.Tensor] | None = None

    def restore(self, states: list[Any]) -> None:
        """Takes up the states of a ckpt.pth. Raises CannotTrainError when they are another model's."""
        weights, optimizer, _, step, ema = states
        try:
            self.model.load_state_dict({name.removeprefix("module."): w for name, w in weights.items()})
            if set(ema) != set(self.ema):
                raise ValueError("the EMA does not have the model's parameters")
            for name, value in ema.items():
                self.ema[name].copy_(value)
            self.optimizer.load_state_dict(optimizer)
        except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise CannotTrainError(f"--resume: ckpt.pth does not fit config.yml: {reason}") from error
        if not optimizer["state"]:
            print("ckpt.pth was saved without Adam's moments: they start at zero.", flush=True)
        self.step = step

    def batch(self) -> torch.Tensor:
        """The current step's images, `(b, 1, h, h)` in [-1, 1]. Every epoch takes all, in a new order."""
        import torch

        epoch, position = divmod(self.step, self.steps_per_epoch)
        if self._order is None or self._order[0] != epoch:
            generator = torch.Generator().manual_seed(mixed_seed(self.settings.seed, 1, epoch))
            self._order = epoch, torch.randperm(len(self.images), generator=generator)
        start = position * self.settings.batch_size
        picked = self.images[self._order[1][start : start + self.settings.batch_size]]
        return (picked.to(self.device, torch.float32) / 127.5 - 1)[:, None]

    def train_step(self) -> float:
        """One update. Returns the squared error of the predicted noise, mean over images and pixels.

        Raises CannotTrainError when the loss or its gradient is not finite; the weights are then still good.
        """
        import torch

        x_0 = self.batch()
        generator = torch.Generator().manual_seed(mixed_seed(self.settings.seed, 2, self.step))
        t = torch.randint(T, (len(x_0),), generator=generator).to(self.device)
        eps = torch.randn(x_0.shape, generator=generator).to(self.device)
        alpha_bar_t = self.alphas_cumprod[t][:, None, None, None]
        x_t = alpha_bar_t.sqrt() * x_0 + (1 - alpha_bar_t).sqrt() * eps

        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.bf16):
            predicted = self.model(x_t, t)
        # Eq. 14 of arXiv:2006.11239, summed over pixels as the source does: the gradient's norm is clipped to
        # 1, so the sum's scale is part of the recipe.
        loss = (eps - predicted.float()).square().sum(dim=(1, 2, 3)).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm.item())):
            raise CannotTrainError(
                f"step {self.step + 1}: the loss is {value}, its gradient's norm {norm.item()}; "
                f"try an --lr below {self.settings.lr}"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.step()
        with torch.no_grad():
            for name, param in self.model.named_parameters():
                self.ema[name].lerp_(param, 1 - self.settings.ema_rate)
        self.step += 1
        return value / x_0[0].numel()

    def learning_rate(self) -> float:
        """From lr at the first step to lr_final at the last, on a cosine."""
        first, last = self.settings.lr, self.settings.lr_final
        done = self.step / max(self.settings.steps - 1, 1)
        return last + (first - last) * (1 + math.cos(math.pi * done)) / 2

    def checkpoint(self, *, keep_optimizer: bool) -> bytes:
        """ckpt.pth: [model with `module.`, optimizer, epoch, step, EMA without it]."""
        import torch

        optimizer = self.optimizer.state_dict()
        if not keep_optimizer:
            optimizer = optimizer | {"state": {}}
        states = [
            {f"module.{name}": value.cpu() for name, value in self.model.state_dict().items()},
            optimizer,
            (self.step - 1) // self.steps_per_epoch,
            self.step,
            {name: value.cpu() for name, value in self.ema.items()},
        ]
        # Through memory: torch's own writer reports a full disk as an internal error.
        buffer = io.BytesIO()
        torch.save(states, buffer)
        return buffer.getvalue()


def run_training(trainer: Trainer, *, log_every: int, save: Callable[[], None]) -> bool:
    """Trains to the last step, saving on the way and at the end. Returns False when Ctrl-C came first."""
    from tqdm import tqdm

    interrupted = False

    def on_interrupt(signum: int, frame: FrameType | None) -> None:
        # Only a flag: an exception could fall between a weight's update and its average's.
        nonlocal interrupted
        interrupted = True

    steps, first, started = trainer.settings.steps, trainer.step, time.monotonic()
    saved, total, weight = first, 0.0, 0.0
    previous = signal.signal(signal.SIGINT, on_interrupt)
    # disable=None: no bar where stderr is no terminal. The log's lines on stdout are there in any case.
    bar = tqdm(total=steps, initial=first, unit=" steps", disable=None, dynamic_ncols=True)
    try:
        while trainer.step < steps and not interrupted:
            loss = trainer.train_step()
            total, weight = 0.99 * total + 0.01 * loss, 0.99 * weight + 0.01
            smoothed = total / weight
            bar.set_postfix_str(f"smoothed loss {smoothed:.4f}", refresh=False)
            bar.update()
            done = trainer.step
            if log_every and (done % log_every == 0 or done == steps):
                rate = (done - first) / (time.monotonic() - started)
                left = (steps - done) / rate / 60
                tqdm.write(
                    f"step {done}/{steps}  smoothed loss {smoothed:.4f}  {rate:.1f} steps/s  {left:.1f} min left"
                )
                sys.stdout.flush()
            if done % trainer.settings.save_every == 0 or done == steps:
                save()
                saved = done
        if trainer.step > saved:
            save()
    except CannotTrainError as error:
        what = f"the last step saved is {saved}" if saved else "nothing has been saved"
        raise CannotTrainError(f"{error}; {what}") from error
    finally:
        bar.close()
        signal.signal(signal.SIGINT, previous)
    return trainer.step == steps


def train(args: argparse.Namespace) -> int:
    """Checks all that was given, then trains. Returns the exit status."""
    out: Path = args.out
    if args.resume and args.overwrite:
        raise CannotTrainError("--resume goes on with what --overwrite would replace: give one of them")
    if out.exists() and not out.is_dir():
        raise CannotTrainError(f"--out {out} is a file: give a folder")
    if out.is_dir() and any(out.iterdir()) and not (args.resume or args.overwrite):
        raise CannotTrainError(f"--out {out} is not empty: give --resume, --overwrite or another folder")
    images = read_idx_images(args.images)

    import torch
    import yaml

    states, stored = read_resumed(out) if args.resume else (None, {})
    settings = argparse.Namespace()
    for name, setting in SETTINGS.items():
        given = getattr(args, name)
        if given is not None and name in MODEL_SETTINGS and given != stored.get(name, given):
            option = f"--{name.replace('_', '-')}"
            raise CannotTrainError(f"{option} {given} contradicts the {stored[name]} of {out / 'config.yml'}")
        setattr(settings, name, stored.get(name, setting.default) if given is None else given)

    image_size = images.shape[1]
    torch.manual_seed(settings.seed)
    trainer = Trainer(settings, make_model(settings, image_size), images)
    if states is not None:
        trainer.restore(states)
        if trainer.step >= settings.steps:
            raise CannotTrainError(f"--resume: {out} has {trainer.step} steps: give --steps above that")

    epochs = math.ceil(settings.steps / trainer.steps_per_epoch)
    config = yaml.safe_dump(config_sections(settings, image_size, epochs)).encode()

    def save() -> None:
        write_atomically(out / "ckpt.pth", trainer.checkpoint(keep_optimizer=args.keep_optimizer))
        write_atomically(out / "config.yml", config)

    created = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    try:
        # A folder that cannot be written should say so now, not after the first thousand steps.
        probe = out / f".probe.{os.getpid()}.part"
        write_atomically(probe, b"")
        probe.unlink()
        count = sum(param.numel() for param in trainer.model.parameters())
        print(
            f"Training {count:,} parameters on {len(images):,} images of {image_size}x{image_size} "
            f"({trainer.device.type}), from step {trainer.step} to {settings.steps}.",
            flush=True,
        )
        finished = run_training(trainer, log_every=args.log_every, save=save)
    finally:
        if created and not any(out.iterdir()):
            out.rmdir()
    if finished:
        print(f"Saved {out / 'ckpt.pth'} and {out / 'config.yml'}.")
        return 0
    after = f"step {trainer.step} is saved in {out}; the same command with --resume goes on"
    print(f"Interrupted: {after if trainer.step else 'nothing was trained yet'}.", file=sys.stderr)
    return 130


def main(argv: list[str] | None = None) -> int:
    parser = make_parser()
    args = parser.parse_args(argv)
    try:
        return train(args)
    except CannotTrainError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        print(f"{parser.prog}: {error}: run scripts/train, or install 'jddim[convert]'", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"{parser.prog}: {error.filename or args.out}: {error.strerror or error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
