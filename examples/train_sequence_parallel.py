r"""Trains a small video diffusion transformer in one process and over ranks, and compares.

    python examples/train_sequence_parallel.py             # one process, then 2 ranks
    python examples/train_sequence_parallel.py --nproc 3   # one process, then 3 ranks
    python examples/train_sequence_parallel.py --fused --async --compile   # any of them
    python examples/train_sequence_parallel.py --fp8 stochastic --tolerance 0.2

The ranks are started by torchrun; gloo joins them on the CPU, NCCL where every rank has a GPU of
its own. The table shows whether both runs learn the same thing: the losses of both, step by step,
and their gradients. The exit status is 1 where they differ by more than the tolerance.

Over several nodes, once on each (or the same file under a torchrun of your own):

    python examples/train_sequence_parallel.py --nnodes 2 --node-rank 0 \
        --master-addr 10.0.0.1 --master-port 29500

There rank 0 runs the one process too, after the ranks, and prints the table.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import tempfile
from datetime import timedelta
from pathlib import Path
from time import perf_counter

# Before torch loads OpenMP, which reads it once: idle threads sleep. By default they spin, and on a
# machine whose cores others use as well, a step that takes 2 s takes 12 s and more.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import torch.distributed as dist
from clip import load_clip
from launch import (
    given_exchange_flags,
    parse_arguments,
    pick_device,
    share_cores,
    start_ranks,
    torchrun_flags,
)
from metered_communicator import MeteredCommunicator
from report import Comparison, Run, print_table, save_figure
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from video_transformer import Config, Exchanges, VideoTransformer, patchify, unpatchify

BATCH = 3  # noise levels that the clip is seen at in each step
LEARNING_RATE = 2e-3
# A rank whose peer is gone raises after this long; torchrun then ends the others. Compiling takes
# ranks that share busy cores unequally long.
TIMEOUT, COMPILE_TIMEOUT = timedelta(seconds=60), timedelta(seconds=300)


def backward(
    model: VideoTransformer,
    tokens: Tensor,
    text: Tensor,
    velocity: Tensor,
    times: Tensor,
    communicator: MeteredCommunicator | None,
) -> Tensor:
    """Returns the mean loss over all tokens of all ranks, and leaves its gradient in the model.

    `tokens` and `velocity` are `[B, S, patch_dim]` and `text` `[B, T, text_dim]`, whole on every
    rank.
    """
    num_elements = velocity.numel()
    if communicator is None:
        loss = (model(tokens, text, times) - velocity).square().sum() / num_elements
        loss.backward()
        return loss.detach()

    tokens, velocity = (communicator.slice(t, dim=1) for t in (tokens, velocity))
    # A sum over this rank's tokens; all_reduce makes it the mean over those of all ranks.
    loss = (model(tokens, text, times) - velocity).square().sum() / num_elements
    loss = communicator.all_reduce(loss)
    # Differentiated is the sum over ranks of what each calls backward on, and every rank holds the
    # same loss: each calls it on the P-th part, or the gradient would come out P times too large.
    (loss / communicator.world_size).backward()
    # Each rank has the gradient that came through its own tokens and heads.
    communicator.reduce_gradients(model.parameters())
    return loss.detach()


def config_of(options: argparse.Namespace) -> Config:
    """16 divides the width of a head that travels as fp8."""
    return Config(num_heads=2, head_dim=48) if options.fp8 else Config()


def train(
    name: str,
    options: argparse.Namespace,
    device: torch.device,
    communicator: MeteredCommunicator | None = None,
    config: Config | None = None,
) -> Run:
    """Trains a new model; with a communicator, on this rank's tokens of every clip.

    Parameters, noise and times come from the seed: the same on every rank and in every run.
    """
    config = config or config_of(options)
    torch.manual_seed(options.seed)
    with device:
        exchanges = Exchanges(options.fused, getattr(options, "async"), options.fp8)
        model = VideoTransformer(config, communicator, exchanges)
    if options.compile and communicator is not None:
        for block in model.blocks:
            block.compile(fullgraph=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE)
    clip = load_clip(config.frames, config.height, config.width)
    clean = patchify(clip[None], config)
    generator = torch.Generator().manual_seed(options.seed)  # on the CPU, whatever the device
    # As of a text encoder: the same on every rank, and of a length that the ranks do not divide.
    text = torch.randn(1, config.num_text_tokens, config.text_dim, generator=generator).to(device)

    def add_noise(times: Tensor) -> tuple[Tensor, Tensor]:
        """The clip on its way to noise at each time, and its velocity there."""
        noise = torch.randn(len(times), *clean.shape[1:], generator=generator)
        noisy = torch.lerp(clean.expand_as(noise), noise, times[:, None, None])
        return noisy.to(device), (noise - clean).to(device)

    run = Run(name, flags=given_exchange_flags(options) if communicator is not None else [])
    with progress_bar(hidden=communicator is not None and communicator.rank > 0) as progress:
        task = progress.add_task(name, total=options.steps, loss=float("nan"))
        for step in range(options.steps):
            # One time in each third of 0..1: a smoother loss than with free draws.
            times = (torch.arange(BATCH) + torch.rand(BATCH, generator=generator)) / BATCH
            noisy, velocity = add_noise(times)
            if communicator is not None:
                communicator.reset()
            started = perf_counter()
            optimizer.zero_grad()
            texts = text.expand(BATCH, -1, -1)
            loss = backward(model, noisy, texts, velocity, times.to(device), communicator)
            if step == 0:
                run.first_gradients = copy_gradients(model)
            if step == options.steps - 1:
                run.last_gradients = copy_gradients(model)
            optimizer.step()
            run.losses.append(loss.item())
            run.step_seconds.append(perf_counter() - started)
            if communicator is not None and not options.compile:  # nothing to see in a graph
                run.communication_seconds.append(communicator.seconds)
                run.sent_bytes = communicator.sent_bytes
            progress.update(task, advance=1, loss=run.losses[-1])

    time = torch.tensor([0.5])
    noisy, _ = add_noise(time)
    velocity = predict(model, noisy, text, time.to(device), communicator)
    run.pictures = {
        "the clip": clip,
        "half of it noise": unpatchify(noisy, config)[0].cpu(),
        f"denoised in one step, {name}": unpatchify(noisy - 0.5 * velocity, config)[0].cpu(),
    }
    return run


@torch.no_grad()
@torch.compiler.set_stance("force_eager")  # one call is not worth compiling for
def predict(
    model: VideoTransformer,
    tokens: Tensor,
    text: Tensor,
    time: Tensor,
    communicator: MeteredCommunicator | None,
) -> Tensor:
    """The velocity of all tokens, on every rank."""
    if communicator is None:
        return model(tokens, text, time)
    tokens = communicator.slice(tokens, dim=1)
    return communicator.all_gather(model(tokens, text, time), dim=1)


def copy_gradients(model: VideoTransformer) -> dict[str, Tensor]:
    return {name: parameter.grad.cpu().clone() for name, parameter in model.named_parameters()}


def progress_bar(*, hidden: bool) -> Progress:
    return Progress(
        TextColumn("{task.description:>11}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeElapsedColumn(),
        disable=hidden,
    )


def train_as_rank(options: argparse.Namespace) -> Run:
    """One rank of a sequence-parallel run; torchrun's environment says which."""
    device = pick_device(int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ["LOCAL_RANK"]))
    timeout = COMPILE_TIMEOUT if options.compile else TIMEOUT
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", timeout=timeout, device_id=device)
        cpu_group = dist.new_group(backend="gloo", timeout=timeout)
    else:
        dist.init_process_group("gloo", timeout=timeout)
        cpu_group = dist.group.WORLD
    config_of(options).check_num_ranks(dist.get_world_size())
    communicator = MeteredCommunicator(
        cpu_group, device=device, device_group=dist.group.WORLD, unique_name="sp"
    )
    run = train(f"{communicator.world_size} ranks", options, device, communicator)
    communicator.destroy()
    # torch ends a process with SIGABRT where a gloo group outlives the interpreter. The model, and
    # with it the communicator and its group, hangs in a reference cycle that nothing else collects.
    del communicator, cpu_group
    gc.collect()
    dist.destroy_process_group()
    return run


def report(reference: Run, run: Run, options: argparse.Namespace) -> int:
    """Shows both runs; returns the exit status: whether they agree."""
    comparison = Comparison.of(reference, run)
    print_table(reference, run, comparison)
    options.output.mkdir(parents=True, exist_ok=True)
    figure = options.output / "losses.png"
    save_figure(reference, run, options.tolerance, figure)
    print(f"Loss curves: {figure}")
    if comparison.within(options.tolerance):
        print(f"The runs agree within the tolerance of {options.tolerance:g}.")
        return 0
    print(f"The runs differ by more than the tolerance of {options.tolerance:g}.")
    return 1


def main() -> int:
    parser, options = parse_arguments(__doc__)
    if options.steps < 1 or options.nproc < 1:
        parser.error("--steps and --nproc must be at least 1")
    if "RANK" in os.environ:
        num_local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
        share_cores(num_local_ranks)
        run = train_as_rank(options)
        if os.environ["RANK"] != "0":
            return 0
        if options.results is not None:
            run.save(options.results)
            return 0
        share_cores(1)
        return report(train("one process", options, pick_device(num_local_ranks)), run, options)

    if torchrun_flags(options):
        return start_ranks(options, results=None)  # which node gets rank 0 is torchrun's to say

    try:
        config_of(options).check_num_ranks(options.nproc)
    except ValueError as error:
        parser.error(str(error))
    share_cores(1)
    reference = train("one process", options, pick_device(options.nproc))
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.output) as folder:
        results = Path(folder) / "run.pt"
        status = start_ranks(options, results)
        if status:
            print(f"The ranks failed (exit status {status}); see above.", file=sys.stderr)
            return status
        run = Run.load(results)
    return report(reference, run, options)


if __name__ == "__main__":
    sys.exit(main())
