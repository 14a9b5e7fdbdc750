"""Owns the demo model's recipe: architecture, optimizer, schedule and what is written; `python -m qtipcli.demo.train` runs it.

    python -m qtipcli.demo.train --out DIR --minutes 53     train, then write the model directory
    python -m qtipcli.demo.train --evaluate DIR             print its held-out figures as JSON

On Linux a CPU run is several times faster with glibc told to keep its memory:
MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=100000000000 MALLOC_TOP_PAD_=1000000000
"""

import argparse
import copy
import json
import math
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers
import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qtipcli.demo.heldout import bits_per_byte, evaluate, heldout_loss
from qtipcli.demo.text import EVALUATION_MODULES, evaluation_text, training_documents
from qtipcli.demo.tokenizer import END_OF_TEXT_ID, VOCABULARY, train_tokenizer


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the trained weights, apart from how many steps the machine makes in the time."""

    minutes: float
    seed: int = 0
    hidden: int = 256
    intermediate: int = 704  # 11 * 64: no power of two, so the demo exercises what real models do
    layers: int = 4
    heads: int = 8
    key_value_heads: int = 4
    context: int = 256
    batch: int = 8
    muon_learning_rate: float = 3e-3
    adam_learning_rate: float = 3e-3
    weight_decay: float = 0.1
    warm_up_steps: int = 60
    gradient_clip: float = 1.0
    report_minutes: float = 6.0


def build_model(recipe: Recipe) -> LlamaForCausalLM:
    """A Llama with grouped-query attention and a tied head, float32, initialised from the recipe's seed."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.key_value_heads,
        max_position_embeddings=recipe.context,
        tie_word_embeddings=True,
        bos_token_id=END_OF_TEXT_ID,
        eos_token_id=END_OF_TEXT_ID,
    )
    model = LlamaForCausalLM(config)
    # Only here: a pad token in the model's own config would freeze that row of the tied head.
    model.generation_config.pad_token_id = END_OF_TEXT_ID
    return model


def build_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al. 2024, scaled as in Liu et al. 2025) for the layers' matrices, AdamW for embedding and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    muon = torch.optim.Muon(
        matrices, lr=recipe.muon_learning_rate, weight_decay=recipe.weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    adam = torch.optim.AdamW(others, lr=recipe.adam_learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["peak"] = group["lr"]
    return [muon, adam]


def schedule(step: int, progress: float, warm_up_steps: int) -> float:
    """The learning rate as a share of its peak: linear warm-up by steps, linear decay to zero by the wall clock.

    progress: the share of the time that has passed, 0 to 1. A slow or busy machine makes fewer steps, and still ends decayed.
    """
    return min((step + 1) / warm_up_steps, 1 - progress)


def token_stream(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """All documents as one int32 [N], each followed by end-of-text."""
    encoded = tokenizer.backend_tokenizer.encode_batch_fast(documents)
    return torch.cat([torch.tensor([*one.ids, END_OF_TEXT_ID], dtype=torch.int32) for one in encoded])


def batches(token_N: torch.Tensor, recipe: Recipe) -> Iterator[torch.Tensor]:
    """Endless int64 [batch, context + 1]: each epoch visits every window once, in a new order and from a new offset."""
    generator = torch.Generator().manual_seed(recipe.seed)
    while True:
        offset = int(torch.randint(recipe.context, (), generator=generator))
        window_WT = token_N[offset:].unfold(0, recipe.context + 1, recipe.context)
        for rows in torch.randperm(len(window_WT), generator=generator).split(recipe.batch):
            yield window_WT[rows].long()


def train_step(model: LlamaForCausalLM, optimizers: list, batch_BT: torch.Tensor, recipe: Recipe, rate: float) -> float:
    """One update at `rate` times the peak learning rate. Returns the batch's mean loss in nats per token."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BTV = model(input_ids=batch_BT[:, :-1], use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits_BTV.float().flatten(0, 1), batch_BT[:, 1:].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.gradient_clip)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        optimizer.step()
        optimizer.zero_grad()
    return loss.item()


def train(recipe: Recipe, out: Path) -> None:
    """Train for the recipe's minutes and write `out`. Each report leaves a loadable model there, for a run that is stopped."""
    documents, heldout_text = training_documents(), evaluation_text()
    tokenizer = train_tokenizer(documents, recipe.context)
    train_N = token_stream(tokenizer, documents)
    heldout_N = torch.tensor(tokenizer(heldout_text, verbose=False)["input_ids"])
    model = build_model(recipe).train()
    optimizers = build_optimizers(model, recipe)
    record = {
        "recipe": asdict(recipe),
        "parameters": sum(p.numel() for p in model.parameters()),
        "training_bytes": sum(len(document.encode()) for document in documents),
        "training_tokens": len(train_N),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "tokenizers": tokenizers.__version__,
        },
        "curve": [],
    }
    print(json.dumps(record), flush=True)
    losses: list[float] = []
    started = time.monotonic()
    budget, next_report, tokens_seen = recipe.minutes * 60, recipe.report_minutes * 60, 0
    for batch_BT in batches(train_N, recipe):
        elapsed = time.monotonic() - started
        finished = elapsed >= budget
        if finished or elapsed >= next_report:
            loss = heldout_loss(model, heldout_N)
            point = {
                "minutes": round(elapsed / 60, 2),
                "steps": len(losses),
                "tokens_seen": tokens_seen,
                "training_loss": round(math.fsum(losses[-100:]) / len(losses[-100:]), 4),
                "bits_per_byte": round(bits_per_byte(loss, len(heldout_N), heldout_text), 4),
            }
            record["curve"].append(point)
            print(json.dumps(point), flush=True)
            write(out, model, tokenizer, record)
            next_report += recipe.report_minutes * 60
        if finished:
            break
        rate = schedule(len(losses), elapsed / budget, recipe.warm_up_steps)
        losses.append(train_step(model, optimizers, batch_BT, recipe, rate))
        tokens_seen += batch_BT[:, 1:].numel()


def record_heldout(out: Path) -> None:
    """Measure the written model and add the figures to its training.json."""
    path = out / "training.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    record["heldout"] = {"evaluation_modules": EVALUATION_MODULES, **evaluate(out)}
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def write(out: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, record: dict) -> None:
    """The model directory: bf16 safetensors, configs, tokenizer, and the record of how it came about."""
    copy.deepcopy(model).to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m qtipcli.demo.train", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="directory to write the trained model to")
    parser.add_argument("--minutes", type=float, default=53.0, help="wall-clock budget of the training run")
    parser.add_argument("--evaluate", type=Path, metavar="DIR", help="print the held-out figures of this model as JSON")
    arguments = parser.parse_args()
    if arguments.out is not None:
        train(Recipe(minutes=arguments.minutes), arguments.out)
        record_heldout(arguments.out)
    if arguments.evaluate is not None:
        print(json.dumps(evaluate(arguments.evaluate), indent=1))
    if arguments.out is None and arguments.evaluate is None:
        parser.error("give --out DIR to train, or --evaluate DIR to measure")


if __name__ == "__main__":
    main()
