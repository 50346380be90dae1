"""Makes the toy checkpoint's adapters: LoRA weights for tasks that it cannot do without them.

    python examples/toy/train_adapters.py                   # train each, then evaluate
    python examples/toy/train_adapters.py rotate            # that one alone
    python examples/toy/train_adapters.py --evaluate-only   # evaluate what is in adapters/

Each adapter is trained with PEFT and has the files that PEFT saves. They differ where an engine may
go wrong: in their ranks, in the names of their modules, in how their scale follows from the rank,
and in the layers that they change.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import NamedTuple

import tasks
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from split_phi3 import split_projections
from tokenizers import Tokenizer
from torch.nn import functional
from train import BATCH_LENGTHS, PROMPTS, Batches, exact_answers, schedule
from transformers import AutoModelForCausalLM, AutoTokenizer, Phi3ForCausalLM

TOY = Path(__file__).parent
FUSED = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
UNFUSED = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

BATCH_TOKENS = 2048
LEARNING_RATE = 5e-3
REPORT_EVERY = 50


class Adapter(NamedTuple):
    """How the adapter of one task is made."""

    #: Whether it is trained on a model whose fused projections are split, and so has their names.
    split: bool
    config: LoraConfig


ADAPTERS = {
    "rotate": Adapter(
        False, LoraConfig(task_type="CAUSAL_LM", r=16, lora_alpha=32, target_modules=FUSED)
    ),
    "down": Adapter(
        True,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=8,
            lora_alpha=8,
            use_rslora=True,
            rank_pattern={"k_proj": 4},
            target_modules=UNFUSED,
        ),
    ),
    "shout": Adapter(
        False,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=4,
            lora_alpha=16,
            alpha_pattern={"down_proj": 8},
            target_modules=FUSED,
            layers_to_transform=[1, 2],
        ),
    ),
}


def base_model(split: bool) -> Phi3ForCausalLM:
    """The toy checkpoint in float32, with its fused projections split if asked for."""
    model = AutoModelForCausalLM.from_pretrained(TOY / "checkpoint", dtype=torch.float32)
    if split:
        split_projections(model)
    return model


def save_adapter(model: PeftModel, folder: Path) -> None:
    """Writes the adapter's weights in float16, and its config."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.half()
    config = model.peft_config["default"]
    config.base_model_name_or_path = "examples/toy/checkpoint"  # not where it lies on this machine
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink()  # an empty form


def train(task: str, folder: Path, steps: int, seed: int) -> None:
    """Trains the adapter of one task for ``steps`` and saves it in ``folder``."""
    torch.manual_seed(seed)
    split, config = ADAPTERS[task]
    model = base_model(split)
    adapted = get_peft_model(model, config)  # which puts the adapter into `model` itself
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.0)
    batches = Batches(Tokenizer.from_file(str(TOY / "checkpoint" / "tokenizer.json")), seed, task)
    lengths, weights = list(BATCH_LENGTHS), list(BATCH_LENGTHS.values())
    size = sum(parameter.numel() for parameter in parameters)
    print(f"{task}: training {size:,} parameters for {steps} steps", flush=True)

    start, losses = time.monotonic(), []
    for step in range(1, steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * schedule(step / steps)
        length = batches.rng.choices(lengths, weights=weights)[0]
        ids, targets = batches.draw(length, BATCH_TOKENS)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        answers = targets >= 0
        loss = functional.cross_entropy(model.lm_head(hidden[answers]), targets[answers])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if step % REPORT_EVERY == 0 or step == steps:
            mean, seconds = sum(losses) / len(losses), time.monotonic() - start
            print(f"step {step:5}  {seconds:5.0f} s  loss {mean:.4f}", flush=True)
            losses.clear()
    save_adapter(adapted, folder)


def evaluate(chosen: list[str], folder: Path, count: int, seed: int) -> None:
    """Prints the share of exact greedy answers to held-out prompts, without and with the adapter.

    The weights are the float16 ones on disk, computed with in float32.
    """
    tokenizer = AutoTokenizer.from_pretrained(TOY / "checkpoint")
    base = base_model(split=False).eval()
    print("| task | base | " + " | ".join(PROMPTS) + " |\n|---|---|" + "---|" * len(PROMPTS))
    for task in chosen:
        cells = [exact_answers(base, tokenizer, tasks.short_prompts(task, count, seed))]
        model = base_model(ADAPTERS[task].split)
        PeftModel.from_pretrained(model, folder / task).eval()
        for make_prompts in PROMPTS.values():
            cells.append(exact_answers(model, tokenizer, make_prompts(task, count, seed)))
        print(f"| {task} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tasks", nargs="*", default=list(ADAPTERS), help="all, if none is named")
    parser.add_argument("--output", type=Path, default=TOY / "adapters")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the data")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evaluate-only", action="store_true")
    parser.add_argument("--prompts", type=int, default=500, help="in each cell of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.evaluate_only:
        for task in arguments.tasks:
            train(task, arguments.output / task, arguments.steps, arguments.seed)
    evaluate(arguments.tasks, arguments.output, arguments.prompts, seed=2)


if __name__ == "__main__":
    main()
