"""Makes the toy checkpoint: data, tokenizer, Phi-3 model, training, evaluation, in one command.

    python examples/toy/train.py                   # train, then evaluate
    python examples/toy/train.py --evaluate-only   # evaluate what is in the output folder

The model is small, but its config is that of a real Phi-3 long-context checkpoint: grouped-query
attention, an untied head, more vocabulary rows than tokens, and LongRoPE with two factor sets that
differ. It is trained on both sides of ``original_max_position_embeddings``, so an engine that uses
the wrong factors gives wrong answers.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tasks
import torch
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Phi3ForCausalLM,
    PreTrainedTokenizerBase,
)

SPECIAL_TOKENS = ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] + '<|end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
#: More rows than the tokenizer has tokens, as in real Phi-3 checkpoints.
VOCAB_SIZE = 320
HEAD_DIM = 32

#: Sequence lengths of training batches with how often each is drawn. Those up to ORIGINAL_MAX are
#: trained with the short factors. A model is causal, so one length also trains all of its prefixes.
BATCH_LENGTHS = {tasks.ORIGINAL_MAX: 6, 128: 3, 256: 2, tasks.MAX_POSITION: 1}
BATCH_TOKENS = 4096
LEARNING_RATE = 2e-3
CHECK_EVERY = 250


# ---------------------------------------------------------------------------------- checkpoint


def build_tokenizer() -> Tokenizer:
    """A byte-level tokenizer without merges: any text round-trips, and no token is unknown.

    The only longer tokens are the command words, and only where one stands at the start of a line
    (``ignore_merges``), so the letters and digits of a question are always single tokens.
    """
    byte_tokens = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate([*byte_tokens, *tasks.TASKS])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, normalized=False) for t in SPECIAL_TOKENS])
    return tokenizer


def model_config(tokenizer: Tokenizer) -> dict:
    """config.json in the form that published Phi-3 checkpoints have."""
    steps = [i / (HEAD_DIM // 2 - 1) for i in range(HEAD_DIM // 2)]
    eos = tokenizer.token_to_id("<|endoftext|>")
    return {
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": eos,
        "embd_pdrop": 0.0,
        "eos_token_id": eos,
        "hidden_act": "silu",
        "hidden_size": 192,
        "initializer_range": 0.05,
        "intermediate_size": 512,
        "max_position_embeddings": tasks.MAX_POSITION,
        "model_type": "phi3",
        "num_attention_heads": 6,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "original_max_position_embeddings": tasks.ORIGINAL_MAX,
        "pad_token_id": eos,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "long_factor": [round(1.2 * 8.0**step, 4) for step in steps],
            "short_factor": [round(1.0 + 0.3 * step, 4) for step in steps],
            "type": "longrope",
        },
        "rope_theta": 10000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float16",
        "use_cache": True,
        "vocab_size": VOCAB_SIZE,
    }


def write_json(path: Path, value: dict) -> None:
    """Writes one of the checkpoint's JSON files."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_model_files(folder: Path) -> None:
    """Everything of the checkpoint but its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer()
    tokenizer.save(str(folder / "tokenizer.json"))
    config = model_config(tokenizer)
    write_json(folder / "config.json", config)
    write_json(
        folder / "tokenizer_config.json",
        {
            "add_bos_token": False,
            "add_eos_token": False,
            "bos_token": "<|endoftext|>",
            "chat_template": CHAT_TEMPLATE,
            "clean_up_tokenization_spaces": False,
            "eos_token": "<|endoftext|>",
            "model_max_length": tasks.MAX_POSITION,
            "pad_token": "<|endoftext|>",
            "padding_side": "left",
            "tokenizer_class": "PreTrainedTokenizerFast",
        },
    )
    write_json(
        folder / "generation_config.json",
        {
            "bos_token_id": config["bos_token_id"],
            "eos_token_id": [tokenizer.token_to_id("<|end|>"), config["eos_token_id"]],
            "pad_token_id": config["pad_token_id"],
        },
    )


def write_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Writes model.safetensors in float16."""
    half = {name: value.to(torch.float16).contiguous() for name, value in weights.items()}
    (folder / "model.safetensors").write_bytes(save(half, metadata={"format": "pt"}))


# ---------------------------------------------------------------------------------------- data


def training_texts(rng: random.Random, length: int, adapter: str | None = None) -> Iterator[str]:
    """Endless conversations in the chat format, each of at least ``length`` tokens."""
    while True:
        system = tasks.system_prompt(rng)
        text = "" if system is None else f"<|system|>\n{system}<|end|>\n"
        for question, answer in tasks.conversation(rng, length, length + 64, adapter):
            text += f"<|user|>\n{question}<|end|>\n<|assistant|>\n{answer}<|end|>\n"
        yield text


class Batches:
    """Draws training batches: token ids, and the targets with all but the answers masked out.

    Every row of a batch is cut to the same length, wherever that falls in a conversation. So no
    batch mixes the two factor sets, and a row that ends inside an answer is what a model sees when
    its answer is about to pass the original length.
    """

    def __init__(self, tokenizer: Tokenizer, seed: int, adapter: str | None = None) -> None:
        self.tokenizer = tokenizer
        self.adapter = adapter
        self.rng = random.Random(f"training/{seed}")
        self.assistant = tokenizer.token_to_id("<|assistant|>")
        self.special = [tokenizer.token_to_id(token) for token in SPECIAL_TOKENS]

    def draw(self, length: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Rows of ``length`` tokens, ``tokens`` in all, as inputs and as next-token targets."""
        texts = training_texts(self.rng, length, self.adapter)
        encoded = self.tokenizer.encode_batch_fast([next(texts) for _ in range(tokens // length)])
        ids = np.array([row.ids[:length] for row in encoded], dtype=np.int64)
        targets = np.where(self.in_answer(ids), ids, -100)
        return torch.from_numpy(ids[:, :-1]), torch.from_numpy(targets[:, 1:])

    def in_answer(self, ids: np.ndarray) -> np.ndarray:
        """Whether each token belongs to an answer or is the ``<|end|>`` of one.

        It does if the last special token before it is ``<|assistant|>``, unless it is the newline
        right after that, which the prompt holds already.
        """
        positions = np.arange(ids.shape[1])
        seen = np.maximum.accumulate(np.where(np.isin(ids, self.special), positions, 0), axis=1)
        before = np.concatenate([np.zeros_like(seen[:, :1]), seen[:, :-1]], axis=1)
        role = np.take_along_axis(ids, before, axis=1)
        return (role == self.assistant) & (positions - before >= 2)


# ------------------------------------------------------------------------------------ training


def build_model(folder: Path) -> Phi3ForCausalLM:
    """A float32 model with fresh weights, from the config.json that was written."""
    config = AutoConfig.from_pretrained(folder)
    model = Phi3ForCausalLM(config).float()
    for layer in model.model.layers:  # the two projections that write to the residual stream
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.weight.data /= math.sqrt(2 * config.num_hidden_layers)
    return model


def build_optimizer(model: Phi3ForCausalLM) -> torch.optim.Optimizer:
    """AdamW, with weight decay on the matrices but not on the embedding and the norms."""
    decayed, other = [], []
    for name, parameter in model.named_parameters():
        matrix = parameter.ndim == 2 and "embed" not in name
        (decayed if matrix else other).append(parameter)
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": other, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.98))


def schedule(progress: float) -> float:
    """Share of the learning rate: rise over the first 2%, hold, fall to zero over the last half."""
    return min(1.0, progress / 0.02, (1.0 - progress) / 0.5)


@torch.no_grad()
def check(model: Phi3ForCausalLM, batches: Batches) -> dict[str, float]:
    """The share of answers that are right as a whole, by task, on fresh training conversations.

    The model reads the true answer while it predicts it; an answer is exact in greedy decoding if
    and only if it is exact here, but for the cut between the two factor sets.
    """
    task_ids = {batches.tokenizer.token_to_id(task): task for task in tasks.TASKS}
    right: dict[str, list[bool]] = defaultdict(list)
    for length in (tasks.ORIGINAL_MAX, tasks.MAX_POSITION):
        ids, targets = batches.draw(length, 4 * BATCH_TOKENS)
        good = (model(input_ids=ids).logits.argmax(-1) == targets) | (targets < 0)
        for row, row_targets, row_good in zip(ids, targets, good, strict=True):
            starts = [i for i, token in enumerate(row.tolist()) if token in task_ids]
            for start, stop in zip(starts, [*starts[1:], len(row)], strict=True):
                if (row_targets[start:stop] >= 0).any():
                    task = task_ids[row[start].item()]
                    right[task].append(bool(row_good[start:stop].all()))
    return {task: sum(right[task]) / len(right[task]) for task in tasks.TASKS}


def train(folder: Path, seed: int, steps: int, minutes: float, resume: bool) -> None:
    """Trains for ``steps``, or for ``minutes`` if that ends first; keeps the best.

    With ``resume``, goes on from the weights in ``folder`` at a quarter of the learning rate.
    """
    torch.manual_seed(seed)
    write_model_files(folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    batches, checks = Batches(tokenizer, seed), Batches(tokenizer, seed + 1)
    if resume:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = build_model(folder)
    peak = LEARNING_RATE / (4 if resume else 1)
    optimizer = build_optimizer(model)
    lengths, weights = list(BATCH_LENGTHS), list(BATCH_LENGTHS.values())
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"training {size:,} parameters for {steps} steps", flush=True)

    start, step, best, losses = time.monotonic(), 0, 0.0, []
    progress = 0.0
    while progress < 1.0:
        for group in optimizer.param_groups:
            group["lr"] = peak * schedule(max(progress, 1 / steps))
        length = batches.rng.choices(lengths, weights=weights)[0]
        ids, targets = batches.draw(length, BATCH_TOKENS)
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        answers = targets >= 0
        loss = functional.cross_entropy(model.lm_head(hidden[answers]), targets[answers])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())

        step += 1
        elapsed = time.monotonic() - start
        progress = max(step / steps, elapsed / 60 / minutes)
        if step % CHECK_EVERY == 0 or progress >= 1.0:
            exact = check(model, checks)
            worst = min(exact.values())
            shares = "  ".join(f"{task} {share:6.1%}" for task, share in exact.items())
            mean = sum(losses) / len(losses)
            print(f"step {step:5}  {elapsed:5.0f} s  loss {mean:.4f}  {shares}", flush=True)
            losses.clear()
            if worst >= best:
                best = worst
                write_weights(folder, model.state_dict())


# ---------------------------------------------------------------------------------- evaluation

PROMPTS: dict[str, Callable[[str, int, int], list[tasks.Prompt]]] = {
    "short": tasks.short_prompts,
    "crossing": tasks.crossing_prompts,
    "long": tasks.long_prompts,
}


@torch.no_grad()
def greedy(model: Phi3ForCausalLM, prompts: list[list[int]]) -> list[list[int]]:
    """What ``generate`` continues each prompt with, by batches of prompts of one length.

    Prompts of one length need no padding, which would make one prompt's factors depend on another's
    length.
    """
    answers: list[list[int]] = [[] for _ in prompts]
    by_length: dict[int, list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompts):
        by_length[len(prompt)].append(index)
    for length, indices in by_length.items():
        ids = torch.tensor([prompts[index] for index in indices])
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=12
        )
        for index, row in zip(indices, output[:, length:].tolist(), strict=True):
            answers[index] = row
    return answers


def exact_answers(
    model: Phi3ForCausalLM, tokenizer: PreTrainedTokenizerBase, prompts: list[tasks.Prompt]
) -> str:
    """How many greedy answers are exact, as a cell of a table."""
    ids = [
        tokenizer.apply_chat_template(
            prompt.messages(), add_generation_prompt=True, return_dict=False
        )
        for prompt in prompts
    ]
    assert [len(row) for row in ids] == [prompt.tokens() for prompt in prompts]
    right = sum(
        tokenizer.decode(row).split("<|end|>")[0] == prompt.answer
        for row, prompt in zip(greedy(model, ids), prompts, strict=True)
    )
    return f"{right / len(prompts):.1%} ({right}/{len(prompts)})"


def evaluate(folder: Path, count: int, seed: int) -> None:
    """Prints the share of exact greedy answers to held-out prompts, by task and prompt length.

    The weights are the float16 ones on disk, computed with in float32.
    """
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    size = (folder / "model.safetensors").stat().st_size
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {size:,} bytes in float16")
    print(f"exact greedy answers, {count} held-out prompts in each cell\n")
    print("| task | " + " | ".join(PROMPTS) + " |\n|---|" + "---|" * len(PROMPTS))
    for task in tasks.TASKS:
        cells = [
            exact_answers(model, tokenizer, make_prompts(task, count, seed))
            for make_prompts in PROMPTS.values()
        ]
        print(f"| {task} | " + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "checkpoint")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the data")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--minutes", type=float, default=math.inf, help="end training by then")
    parser.add_argument("--resume", action="store_true", help="go on from the output folder")
    parser.add_argument(
        "--add-weight", type=int, default=tasks.WEIGHTS["add"], help="how often additions are drawn"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evaluate-only", action="store_true")
    parser.add_argument("--prompts", type=int, default=500, help="in each cell of the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.evaluate_only:
        tasks.WEIGHTS["add"] = arguments.add_weight
        options = (arguments.seed, arguments.steps, arguments.minutes, arguments.resume)
        train(arguments.output, *options)
    evaluate(arguments.output, arguments.prompts, seed=2)


if __name__ == "__main__":
    main()
