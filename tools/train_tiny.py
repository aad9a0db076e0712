"""Train a small Llama from local text, on a CPU or a GPU: `python -m tools.train_tiny --output-dir tiny`.

Tokenizer, token ids and checkpoint are kept beside the output folder until the model is finished, so a run
that was killed continues when the same command is given again.
"""

import argparse
import contextlib
import functools
import math
import os
import shutil
import signal
import sys
import sysconfig
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tools.tiny_text import BOS, EOS, prepare, write_atomically

EVAL_WINDOW = 256
console = Console(stderr=True, soft_wrap=True)


class Stopped(Exception):
    """Asked to stop; the checkpoint is written."""


@dataclass(frozen=True, slots=True)
class Options:
    """All that decides the resulting weights, a time budget aside."""

    text: tuple[str, ...]
    hidden: int = 128
    intermediate: int = 384
    blocks: int = 12
    heads: int = 4
    kv_heads: int = 2
    vocab: int = 2048
    seqlen: int = 256
    batch_size: int = 32
    epochs: float = 1.0
    steps: int | None = None
    lr: float = 1e-3
    warmup: int = 100
    seed: int = 0
    val_fraction: float = 0.02

    def __post_init__(self) -> None:
        at_least = dict.fromkeys(("hidden", "intermediate", "blocks", "heads", "kv_heads", "batch_size"), 1)
        at_least |= {"steps": 1, "seqlen": 2, "warmup": 0, "seed": 0, "vocab": 258}  # 256 bytes, bos, eos
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"--{name.replace('_', '-')}: expected {least} or more, found {value}")
        for name in ("epochs", "lr"):
            if not getattr(self, name) > 0:
                raise ValueError(f"--{name}: expected more than 0, found {getattr(self, name)}")
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"--val-fraction: expected 0 to 1, 1 excluded, found {self.val_fraction}")
        if self.hidden % (2 * self.heads):
            raise ValueError(f"--hidden: expected a multiple of 2 * {self.heads} heads, found {self.hidden}")
        if self.heads % self.kv_heads:
            raise ValueError(f"--heads: expected a multiple of {self.kv_heads} KV heads, found {self.heads}")

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.blocks,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            vocab_size=self.vocab,
            max_position_embeddings=max(2048, self.seqlen),
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
        )


@dataclass(frozen=True, slots=True)
class Result:
    losses: list[float]  # nats per token, one for every step that this process made
    perplexity: float | None  # of the weights as saved, on the held-out files


def steps_per_epoch(tokens: int, options: Options) -> int:
    # one window fewer than there are: an epoch's offset may cost one
    return max(1, ((tokens - 1) // options.seqlen - 1) // options.batch_size)


@functools.lru_cache(maxsize=1)
def epoch_windows(epoch: int, tokens: int, options: Options) -> np.ndarray:
    """Where the windows of one epoch start: another cut of the stream and another order each."""
    rng = np.random.default_rng((options.seed, epoch))
    offset = rng.integers(min(options.seqlen, tokens - options.batch_size * options.seqlen))
    return offset + options.seqlen * rng.permutation((tokens - 1 - offset) // options.seqlen)


def batch_at(step: int, ids: np.ndarray, options: Options) -> torch.Tensor:
    """Token ids [batch_size, seqlen + 1] of a step. No state: a resumed run sees what it would have seen."""
    epoch, index = divmod(step, steps_per_epoch(len(ids), options))
    starts = epoch_windows(epoch, len(ids), options)[index * options.batch_size :][: options.batch_size]
    return torch.from_numpy(np.stack([ids[s : s + options.seqlen + 1] for s in starts]).astype(np.int64))


def learning_rate(step: int, steps: int, budget_used: float, options: Options) -> float:
    """Linear warm-up, then a cosine down to a tenth; a time budget that ends first shortens the cosine."""
    if step < options.warmup:
        return options.lr * (step + 1) / options.warmup
    done = max((step - options.warmup) / max(1, steps - options.warmup), budget_used)
    return options.lr * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))


def loss_of(model: torch.nn.Module, batch: torch.Tensor) -> torch.Tensor:
    on_gpu = batch.device.type == "cuda"
    with torch.autocast("cuda", torch.bfloat16) if on_gpu else contextlib.nullcontext():
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def perplexity(model: torch.nn.Module, ids: np.ndarray, limit: int | None = None) -> float | None:
    """exp(mean loss) over windows of EVAL_WINDOW tokens, the first token of each being context only."""
    count = len(ids) // EVAL_WINDOW
    windows = ids[: count * EVAL_WINDOW].reshape(count, EVAL_WINDOW)[:limit]
    if not len(windows):
        return None
    total = 0.0
    for start in range(0, len(windows), 32):
        batch = torch.from_numpy(windows[start : start + 32].astype(np.int64)).to(model.device)
        total += loss_of(model, batch).item() * len(batch)
    return math.exp(total / len(windows))


def make_optimizer(model: torch.nn.Module, options: Options) -> torch.optim.AdamW:
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=model.device.type == "cuda")


def train(
    options: Options,
    output_dir: Path,
    *,
    device: str = "cpu",
    compiled: bool = False,
    budget_minutes: float = math.inf,
    checkpoint_minutes: float = 1.0,
    stop: Callable[[int], bool] = lambda step: False,
) -> Result:
    """Train, or continue, and write the model to `output_dir`; `stop(step)` is asked before every step.

    Raises:
        ValueError: options, text and folders do not fit together; says what to do.
        Stopped: `stop` said so.
        FloatingPointError: the loss is not finite.
    """
    if output_dir.exists():
        raise ValueError(f"{output_dir} exists already; delete it or choose another --output-dir")
    work = output_dir.with_name(f".{output_dir.name}.training")
    train_ids, val_ids = prepare(asdict(options), work, console)
    if (windows := (len(train_ids) - 1) // options.seqlen) < options.batch_size:
        raise ValueError(
            f"--text: expected {options.batch_size} windows of {options.seqlen} tokens, one batch, or more, "
            f"found {windows}; add text or lower --batch-size or --seqlen"
        )
    steps = options.steps or math.ceil(options.epochs * steps_per_epoch(len(train_ids), options))

    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    model = LlamaForCausalLM(options.config()).to(device)
    optimizer = make_optimizer(model, options)
    checkpoint = work / "checkpoint.pt"
    first, spent_before = 0, 0.0
    if checkpoint.exists():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first, spent_before = state["step"], state["seconds"]
        console.print(f"continuing after step {first} of {steps}")
    forward = torch.compile(model) if compiled else model
    begun = saved = shown = time.monotonic()

    def save(step: int) -> None:
        state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
        state["seconds"] = spent_before + time.monotonic() - begun
        write_atomically(checkpoint, lambda path: torch.save(state, path))

    losses: list[torch.Tensor] = []
    columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()]
    with Progress(*columns, TextColumn("{task.fields[note]}"), console=console) as progress:
        bar = progress.add_task("train", total=steps, completed=first, note="")
        for step in range(first, steps):
            budget_used = (spent_before + time.monotonic() - begun) / (60 * budget_minutes)
            if stop(step):
                save(step)
                raise Stopped(f"stopped after step {step} of {steps}; the same command continues")
            if budget_used >= 1:
                console.print(f"time budget used up after step {step} of {steps}")
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, steps, budget_used, options)
            loss = loss_of(forward, batch_at(step, train_ids, options).to(device))
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.detach())
            # Reading the loss waits for the device: once a second, and before anything is saved, will do.
            now = time.monotonic()
            due = now - saved >= 60 * checkpoint_minutes
            if due or now - shown > 1 or step + 1 == steps:
                value = loss.item()
                if not math.isfinite(value):
                    raise FloatingPointError(f"the loss is {value} at step {step}; lower --lr, now {options.lr}")
                shown = time.monotonic()
                rate = len(losses) * options.batch_size * options.seqlen / (shown - begun)
                progress.update(bar, completed=step + 1, note=f"loss {value:.3f}  {rate:,.0f} tokens/s")
            if due:
                save(step + 1)
                saved = time.monotonic()
            if (step + 1) % max(1, steps // 10) == 0 and (found := perplexity(model, val_ids, 256)):
                console.print(f"step {step + 1} of {steps}: held-out perplexity {found:.2f}")

    with torch.no_grad():
        for parameter in model.parameters():  # rounded first: the figure in the card is that of the saved weights
            parameter.copy_(parameter.bfloat16())
    result = Result(torch.stack(losses).tolist() if losses else [], perplexity(model, val_ids))
    seen = (first + len(losses)) * options.batch_size * options.seqlen
    sizes = (seen, len(train_ids), len(val_ids))
    card = make_card(output_dir.name, model.num_parameters(), options, *sizes, result)
    export(model.to(torch.bfloat16), work, card, output_dir)
    return result


CARD = """\
---
library_name: transformers
tags:
  - llama
  - tiny
---

# {name}

A {parameters:.1f}M-parameter Llama: {o.blocks} blocks, hidden {o.hidden}, MLP {o.intermediate},
{o.heads} heads, {o.kv_heads} KV heads, vocabulary {o.vocab}.
Made by `tools/train_tiny.py` as a test bed for quantization; it is of no use for writing text or code.

| | |
|---|---|
| text | {train:.2f}M tokens of local files |
| trained on | {seen:.2f}M tokens in windows of {o.seqlen}, seed {o.seed} |
| held-out perplexity | {quality} |
| weights | bf16 |
"""


def make_card(
    name: str, parameters: int, options: Options, seen: int, trained: int, held_out: int, result: Result
) -> str:
    quality = "not measured: no file was held out"
    if result.perplexity:
        count = held_out // EVAL_WINDOW * EVAL_WINDOW
        quality = f"{result.perplexity:.2f} ({count} tokens of whole files, windows of {EVAL_WINDOW})"
    return CARD.format(
        name=name,
        parameters=parameters / 1e6,
        o=options,
        train=trained / 1e6,
        seen=seen / 1e6,
        quality=quality,
    )


def export(model: LlamaForCausalLM, work: Path, card: str, output_dir: Path) -> None:
    """The folder appears under its name when it is whole."""
    folder = work / "model"
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder)
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS).save_pretrained(folder)
    (folder / "README.md").write_text(card)
    os.rename(folder, output_dir)
    shutil.rmtree(work)


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_tiny",
        description=__doc__.splitlines()[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output-dir", type=Path, required=True, default=argparse.SUPPRESS)
    parser.add_argument(
        "--text",
        nargs="+",
        default=[sysconfig.get_path("stdlib")],
        metavar="PATH",
        help="files, globs, and folders to search for .py and .txt",
    )
    defaults = Options(text=())
    for name in ("hidden", "intermediate", "blocks", "heads", "kv_heads", "vocab", "seqlen", "batch_size"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(defaults, name), metavar="N")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--epochs", type=float, default=defaults.epochs, metavar="X", help="passes over the text")
    length.add_argument("--steps", type=int, metavar="N", help="instead of --epochs")
    parser.add_argument("--lr", type=float, default=defaults.lr, metavar="X", help="peak learning rate")
    parser.add_argument("--warmup", type=int, default=defaults.warmup, metavar="N", help="steps up to the peak")
    parser.add_argument("--seed", type=int, default=defaults.seed, metavar="N", help="of the weights and the order")
    parser.add_argument(
        "--val-fraction",
        type=float,
        default=defaults.val_fraction,
        metavar="X",
        help="part of the text held out",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if there is one")
    parser.add_argument("--compile", action="store_true", help="torch.compile: a slower start, faster steps")
    parser.add_argument(
        "--time-budget-minutes",
        type=float,
        default=math.inf,
        metavar="X",
        help="end by then, schedule included",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    signals: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        signals.append(number)
        signal.signal(number, signal.SIG_DFL)  # a second one does not wait for the step to end

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        has_gpu = torch.cuda.is_available()
        if args.device == "cuda" and not has_gpu:
            raise ValueError("--device: expected a CUDA GPU, found none; give --device cpu")
        if not args.time_budget_minutes > 0:
            raise ValueError(f"--time-budget-minutes: expected more than 0, found {args.time_budget_minutes}")
        values = {name: getattr(args, name) for name in Options.__dataclass_fields__}
        result = train(
            Options(**values | {"text": tuple(args.text)}),
            args.output_dir,
            device=args.device if args.device != "auto" else "cuda" if has_gpu else "cpu",
            compiled=args.compile,
            budget_minutes=args.time_budget_minutes,
            stop=lambda step: bool(signals),
        )
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"train_tiny: {error}", file=sys.stderr)
        return 1 if isinstance(error, FloatingPointError) else 2
    except Stopped as stopped:
        print(f"train_tiny: {stopped}", file=sys.stderr)
        return 128 + signals[0]
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    quality = f"held-out perplexity {result.perplexity:.2f}" if result.perplexity else "no file held out"
    print(f"{args.output_dir}: {quality}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
