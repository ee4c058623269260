"""Train nano from nothing: `python -m training.nano.train`.

Everything random is a function of the settings and the step, so a run that was stopped
and resumed goes on exactly where it was.  Several single-threaded processes share each step
and average their gradients.  Writes to `runs/<name>/`: settings.json, the
tokenizer, log.jsonl and checkpoint.pt.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from torch import Tensor, nn
from torch.utils.data import DataLoader

from . import tokenizer as tokenizers
from .data import Batches, to_pixels
from .model import Nano
from .progress import Probe
from .settings import TextSettings, TrainSettings, VisionSettings

RUNS = Path(__file__).parent / "runs"


class Average:
    """Exponential average of weights and BatchNorm statistics: steadier than the last step's."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay = decay
        self.values = {k: v.detach().clone() for k, v in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        mine, theirs = [], []
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                mine.append(self.values[name])
                theirs.append(value)
            else:
                self.values[name].copy_(value)
        torch._foreach_lerp_(mine, theirs, 1 - decay)


def learning_rate(step: int, batches: Batches) -> float:
    """Cosine over all steps after a warm-up; a phase with a restart has both of its own."""
    s = batches.settings
    phase, done = batches.phase(step)
    peak, steps = phase.restart or s.learning_rate, phase.share * batches.steps
    if phase.restart is None:
        done, steps = step / batches.steps, batches.steps
    warm = min((done * steps + 1) / s.warm_up, 1)
    return peak * warm * (0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


def optimizer_for(model: nn.Module, s: TrainSettings) -> torch.optim.Optimizer:
    """Weight decay on matrices and kernels only, not on norms, biases and scales."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.ndim in (2, 4)], "weight_decay": s.weight_decay},
        {"params": [p for p in parameters if p.ndim not in (2, 4)], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, s.learning_rate, betas=(0.9, 0.98), fused=True)


def settle(model: Nano, average: Average) -> None:
    """Go on from the averaged weights, with BatchNorm as at inference and the first stages fixed.

    The rest then learns on the statistics and features that it will meet, at half the cost.
    """
    for value in average.values.values():
        dist.broadcast(value, 0)
    model.load_state_dict(average.values)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    tower = model.vision_tower
    for part in (tower.patch_embed, *tower.network[:5]):
        part.requires_grad_(False)


def save(path: Path, **parts: object) -> None:
    """Atomic: a stop in the middle of writing leaves the previous checkpoint."""
    partial = path.with_suffix(".partial")
    torch.save(parts, partial)
    partial.replace(path)


def load_model(run: Path) -> tuple[Nano, dict[str, dict[str, object]]]:
    """The averaged model of a run, ready for inference, and its settings."""
    settings = json.loads((run / "settings.json").read_text())
    model = Nano(VisionSettings(**settings["vision"]), TextSettings(**settings["text"]))
    model.load_state_dict(torch.load(run / "checkpoint.pt", weights_only=True)["average"])
    return model.eval(), settings


def prepare(run: Path, s: TrainSettings) -> tuple[VisionSettings, TextSettings]:
    """The tokenizer and settings.json of a run."""
    run.mkdir(parents=True, exist_ok=True)
    if not (run / "tokenizer" / "vocab.json").exists():
        tokenizers.save(tokenizers.train(), run / "tokenizer")
    vision = VisionSettings()
    text = TextSettings(vocab_size=tokenizers.load(run / "tokenizer").get_vocab_size())
    described = {"vision": vision, "text": text, "train": s}
    described = {name: dataclasses.asdict(value) for name, value in described.items()}
    (run / "settings.json").write_text(json.dumps(described, indent=2) + "\n")
    return vision, text


def train(
    rank: int,
    run: Path,
    s: TrainSettings,
    vision: VisionSettings,
    text: TextSettings,
    minutes: float,
) -> None:
    """One of the processes; the first also averages, measures, reports and saves."""
    torch.set_num_threads(1)
    meeting = f"file://{run.resolve()}/meeting.{os.getppid()}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=s.processes)
    torch.manual_seed(s.seed)
    model = Nano(vision, text).to(memory_format=torch.channels_last)
    optimizer = optimizer_for(model, s)
    average = Average(model, s.average)
    step, seconds = 0, 0.0
    checkpoint = run / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        average.values = saved["average"]
        step, seconds = saved["step"], saved["seconds"]
        print(f"resuming at step {step}", flush=True)

    batches = Batches(s, run / "tokenizer", rank)
    total = len(batches)
    loader = DataLoader(
        batches, None, sampler=range(step, total), num_workers=1, prefetch_factor=8
    )  # fmt: skip
    probe = Probe(run / "tokenizer", vision, text) if rank == 0 else None
    begun, saved_at = time.monotonic() - seconds, time.monotonic()
    losses: list[tuple[float, float]] = []
    settled = False
    for batch in loader:
        if batches.phase(step)[0].restart and not settled:
            settle(model, average)
            settled = True
        losses.append(take_step(model, optimizer, batch, step, batches))
        step += 1
        if step % 50 == 0 and stop_together(begun, minutes):
            total = step
        if probe is None:
            if step == total:
                break
            continue
        average.update(model, step)
        seconds = time.monotonic() - begun
        if step % 50 == 0 or step == total:
            record = {"step": step, "images": step * s.batch, "minutes": round(seconds / 60, 2)}
            record |= {"rate": round(step * s.batch / seconds, 1)}
            means = [sum(column) / len(losses) for column in zip(*losses, strict=True)]
            record |= {"loss": round(means[0], 4), "helpers": round(means[1], 4)}
            losses.clear()
            if step % 500 == 0 or step == total:
                record |= probe.measure(average.values)
            report(run / "log.jsonl", record)
        if step == total or time.monotonic() - saved_at > 180:
            save(
                checkpoint, model=model.state_dict(), optimizer=optimizer.state_dict(),
                average=average.values, step=step, seconds=seconds,
            )  # fmt: skip
            saved_at = time.monotonic()
        if step == total:
            break
    dist.destroy_process_group()


def stop_together(begun: float, minutes: float) -> bool:
    """The first process decides, so that all stop after the same step."""
    late = torch.tensor(float(time.monotonic() - begun > minutes * 60))
    dist.broadcast(late, 0)
    return bool(late)


def average_gradients(model: nn.Module) -> None:
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.reshape(-1) for g in gradients])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def take_step(
    model: Nano,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    step: int,
    batches: Batches,
) -> tuple[float, float]:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, batches)
    loss, helper_loss = model(to_pixels(batch["images"]), batch, batch)
    # The helpers start seeing and reading; what counts in the end is the language.
    (loss + 0.5 * helper_loss).backward()
    average_gradients(model)
    nn.utils.clip_grad_norm_(model.parameters(), batches.settings.clip)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item(), helper_loss.item()


def report(log: Path, record: dict[str, float]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(record) + "\n")
    print("  ".join(f"{k} {v}" for k, v in record.items()), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", default="nano", help="name of the folder under runs/")
    parser.add_argument("--images", type=int, default=TrainSettings.images)
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="stop (resumable) after this"
    )
    options = parser.parse_args()
    run, settings = RUNS / options.run, TrainSettings(images=options.images)
    vision, text = prepare(run, settings)
    arguments = (run, settings, vision, text, options.minutes)
    processes.spawn(train, arguments, nprocs=settings.processes)


if __name__ == "__main__":
    main()
