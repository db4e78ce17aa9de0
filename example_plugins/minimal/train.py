"""Train the demo checkpoint in ``model/``: sums in words, stored in a layout no other engine reads.

``seven plus eight is`` -> `` fifteen<|end|>``, and ``three minus nine is`` -> `` minus six<|end|>``:
operands are 0 to 99, one unordered pair in ten is never trained on, and the run fails unless 99 % of
those held-out sums are answered exactly.

The network is llama's (pre-RMSNorm, half-split rotary embeddings, grouped-query attention, SwiGLU,
tied embeddings), but its config keys and tensor names are its own: ``model_type`` is ``abacus``,
and q, k, v are one tensor, as are gate and up. Nothing here knows infinilm; the plugin beside this
file is what maps one to the other.

    python train.py                 # train, store, reload, evaluate
    python train.py --eval-only     # evaluate what is stored

The seed fixes the initial weights and the order of the data, and torch is held to deterministic
algorithms and two threads; another machine may still add in another order.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import jinja2
import torch
from safetensors.torch import load_file, save
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F

END = "<|end|>"
REQUIRED_RATE = 0.99
NUM_THREADS = 2  # the order of floating-point additions, and so the weights, depends on it
IGNORED = -100  # the label cross_entropy leaves out of the loss

NUMBER_WORDS = """\
zero one two three four five six seven eight nine ten \
eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen
twenty thirty forty fifty sixty seventy eighty ninety"""
UNITS, TENS = (line.split() for line in NUMBER_WORDS.splitlines())

CHAT_TEMPLATE = """\
{#- A conversation is a row of finished sums and one open one. Any other role is left out. -#}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {{- message.content | trim -}}
  {%- elif message.role == 'assistant' -%}
    {{- ' is ' ~ (message.content | trim) ~ eos_token -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- ' is' -}}
{%- endif -%}
"""


@dataclass(frozen=True, slots=True)
class Config:
    """The network's shape: the fields of ``config.json``, less its model type and dtype."""

    vocabulary: int
    end_token: int
    width: int = 128
    depth: int = 6
    heads: int = 4
    kv_heads: int = 2
    ffn_width: int = 384
    context: int = 2048
    rope_base: float = 10000.0
    norm_epsilon: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.width // self.heads


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how fast to train. A step sees ``tokens_per_step`` tokens, in rows of one length."""

    steps: int = 1800
    warmup_steps: int = 100
    tokens_per_step: int = 4096
    row_lengths: tuple[int, ...] = (16, 16, 32, 256, 2048)  # one is drawn for each step; 16 is one sum
    matrix_learning_rate: float = 0.03  # Muon
    learning_rate: float = 3e-3  # AdamW: the embedding and the norms
    weight_decay: float = 0.1  # of the matrices
    newline_share: float = 0.2  # of the rows: sums end in a newline instead of END


# The language


def spell(number: int) -> str:
    """Spell an integer between -999 and 999, e.g. ``minus six``, ``one hundred forty-two``."""
    if number < 0:
        return f"minus {spell(-number)}"
    if number >= 100:
        rest = f" {spell(number % 100)}" if number % 100 else ""
        return f"{UNITS[number // 100]} hundred{rest}"
    if number < 20:
        return UNITS[number]
    return TENS[number // 10 - 2] + (f"-{UNITS[number % 10]}" if number % 10 else "")


@dataclass(frozen=True, slots=True)
class Sum:
    """One addition or subtraction; ``f"{question} is {answer}"`` is the sentence."""

    question: str
    answer: str


def split_sums() -> tuple[list[Sum], list[Sum]]:
    """Return the sums to train on and the held-out ones.

    A pair is held out for both operations and in both orders. The split does not depend on
    ``--seed``: every checkpoint is asked the same questions.
    """
    pairs = [(low, high) for high in range(100) for low in range(high + 1)]
    random.Random(0).shuffle(pairs)
    num_held_out = len(pairs) // 10
    return _sums_of(pairs[num_held_out:]), _sums_of(pairs[:num_held_out])


def _sums_of(pairs: Sequence[tuple[int, int]]) -> list[Sum]:
    ordered = sorted({order for low, high in pairs for order in ((low, high), (high, low))})
    plus = [Sum(f"{spell(a)} plus {spell(b)}", spell(a + b)) for a, b in ordered]
    minus = [Sum(f"{spell(a)} minus {spell(b)}", spell(a - b)) for a, b in ordered]
    return plus + minus


def train_tokenizer(sums: Sequence[Sum]) -> Tokenizer:
    """Train a byte-level BPE in which every word of ``sums`` is one token, with its space."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        special_tokens=[END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((f"{s.question} is {s.answer}" for s in sums), trainer)
    return tokenizer


# The network: parameter names are the stored tensors' names


class Attention(nn.Module):
    """Causal grouped-query attention with rotary embeddings."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        num_rows = (config.heads + 2 * config.kv_heads) * config.head_dim
        self.qkv = nn.Linear(config.width, num_rows, bias=False)  # rows: q, k, v
        self.out = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        heads, kv_heads = self.config.heads, self.config.kv_heads
        projected = self.qkv(x).unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2)
        # (batch, heads or kv_heads, length, head_dim)
        q, k, v = projected.split([heads, kv_heads, kv_heads], dim=1)
        mixed = F.scaled_dot_product_attention(
            rotate(q, rotation), rotate(k, rotation), v, is_causal=True, enable_gqa=True
        )
        return self.out(mixed.transpose(1, 2).flatten(2))  # (batch, length, width)


class SwiGLU(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.gate_up = nn.Linear(config.width, 2 * config.ffn_width, bias=False)  # rows: gate, up
        self.down = nn.Linear(config.ffn_width, config.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)  # each (batch, length, ffn_width)
        return self.down(F.silu(gate) * up)


class Block(nn.Module):
    """One pre-norm transformer layer."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.attn = Attention(config)
        self.mlp_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attn(self.attn_norm(x), rotation)
        return x + self.mlp(self.mlp_norm(x))


class Abacus(nn.Module):
    """Token ids ``(batch, length)``, from position 0, to logits ``(batch, length, vocabulary)``."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.tok = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.final_norm = nn.RMSNorm(config.width, eps=config.norm_epsilon)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        rotation = rotation_of(tokens.shape[1], self.config)
        x = self.tok(tokens)  # (batch, length, width)
        for block in self.blocks:
            x = block(x, rotation)
        return self.final_norm(x) @ self.tok.weight.T


def rotation_of(length: int, config: Config) -> tuple[Tensor, Tensor]:
    """Return the rotary cosines and sines of positions 0 to ``length``, ``(length, head_dim)``."""
    exponents = torch.arange(0, config.head_dim, 2) / config.head_dim
    angles = torch.outer(torch.arange(length).float(), config.rope_base**-exponents)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Rotate ``x`` ``(..., length, head_dim)``; pairs are half a head apart (Hugging Face)."""
    cos, sin = rotation
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


# Training


@dataclass(frozen=True, slots=True)
class Example:
    """A sentence's token ids and, token by token, what the loss asks for there."""

    tokens: list[int]
    labels: list[int]


def encode(tokenizer: Tokenizer, sums: Sequence[Sum], *, last: str = END) -> list[Example]:
    """Encode finished sums ending in ``last``; only the answer and ``END`` are learned.

    With a newline as ``last`` the label there is still ``END``: a text of several lines may go on
    where the model would have stopped.
    """
    (end,), (final,) = tokenizer.encode(END).ids, tokenizer.encode(last).ids
    examples = []
    for item in sums:
        prompt = tokenizer.encode(f"{item.question} is").ids
        answer = tokenizer.encode(f" {item.answer}").ids
        labels = [IGNORED] * len(prompt) + answer + [end]
        examples.append(Example(prompt + answer + [final], labels))
    return examples


def shuffled_forever(num_items: int, rng: random.Random) -> Iterator[int]:
    """Yield the indices 0 to ``num_items``, each once before any comes again."""
    order = list(range(num_items))
    while True:
        rng.shuffle(order)
        yield from order


class Batches:
    """Rows of sums one after another: first a plain prompt, then what the chat template renders."""

    def __init__(self, tokenizer: Tokenizer, sums: Sequence[Sum], recipe: Recipe, rng: random.Random) -> None:
        self.recipe = recipe
        self.rng = rng
        self.ended = encode(tokenizer, sums)
        self.lines = encode(tokenizer, sums, last="\n")
        self.order = shuffled_forever(len(sums), rng)

    def draw(self) -> tuple[Tensor, Tensor]:
        """Return token ids and the labels of the tokens after them, each ``(rows, length)``."""
        length = self.rng.choice(self.recipe.row_lengths)
        rows = [self._row(length + 1) for _ in range(self.recipe.tokens_per_step // length)]
        tokens = torch.tensor([row.tokens[:length] for row in rows])
        labels = torch.tensor([row.labels[1 : length + 1] for row in rows])
        return tokens, labels

    def _row(self, length: int) -> Example:
        row = Example([], [])
        source = self.lines if self.rng.random() < self.recipe.newline_share else self.ended
        while len(row.tokens) < length:
            example = source[next(self.order)]
            row.tokens.extend(example.tokens)
            row.labels.extend(example.labels)
        return row


def optimizers_of(model: Abacus, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Return Muon for the blocks' matrices and AdamW for the rest.

    Muon is what makes this quick: after 700 steps 98 % of the held-out sums, against AdamW's 37 %.
    """
    matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim == 1] + [model.tok.weight]
    return [
        torch.optim.Muon(matrices, lr=recipe.matrix_learning_rate, weight_decay=recipe.weight_decay),
        torch.optim.AdamW(others, lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def train(model: Abacus, batches: Batches, recipe: Recipe, *, seconds: float) -> None:
    """Train ``model`` in place for ``recipe.steps`` steps, or until ``seconds`` have passed.

    The learning rate rises over the warm-up, then falls linearly to zero at the last step.
    """

    def rate(step: int) -> float:
        return min((step + 1) / recipe.warmup_steps, 1 - step / recipe.steps)

    optimizers = optimizers_of(model, recipe)
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    started = time.monotonic()
    for step in range(recipe.steps):
        tokens, labels = batches.draw()
        loss = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(optimizers, schedules, strict=True):
            optimizer.step()
            schedule.step()
        elapsed = time.monotonic() - started
        if step % 100 == 99:
            print(f"step {step + 1}/{recipe.steps}  loss {loss.item():.4f}  {elapsed / 60:.1f} min", flush=True)
        if elapsed > seconds:
            print(f"stopped by --minutes-limit after {step + 1} of {recipe.steps} steps", flush=True)
            return


# The checkpoint folder


def store(folder: Path, model: Abacus, tokenizer: Tokenizer) -> None:
    """Write the checkpoint: weights, config, tokenizer, chat template and generation defaults."""
    folder.mkdir(parents=True, exist_ok=True)
    config = model.config
    (folder / "model.safetensors").write_bytes(save(model.state_dict(), metadata={"format": "pt"}))
    write_json(folder / "config.json", {"model_type": "abacus", **asdict(config), "dtype": "float32"})
    tokenizer.save(str(folder / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "model_max_length": config.context,
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    generation = {"eos_token_id": config.end_token, "do_sample": False, "temperature": 0.0}
    write_json(folder / "generation_config.json", generation)
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


def write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n")


def load(folder: Path) -> tuple[Abacus, Tokenizer]:
    """Read back what ``store`` wrote."""
    stored = json.loads((folder / "config.json").read_text())
    model = Abacus(Config(**{field.name: stored[field.name] for field in fields(Config)}))
    model.load_state_dict(load_file(folder / "model.safetensors"))
    return model, Tokenizer.from_file(str(folder / "tokenizer.json"))


# The examination


def prompts_in_each_form(folder: Path, known: Sequence[Sum], asked: Sequence[Sum]) -> dict[str, list[str]]:
    """Write every asked sum as a plain prompt, and as a chat after no and after one answered sum."""
    template = jinja2.Template((folder / "chat_template.jinja").read_text())
    rng = random.Random(0)

    def chat(earlier: Sequence[Sum], item: Sum) -> str:
        turns = [turn for done in earlier for turn in (("user", done.question), ("assistant", done.answer))]
        messages = [{"role": role, "content": content} for role, content in [*turns, ("user", item.question)]]
        return template.render(messages=messages, add_generation_prompt=True, eos_token=END)

    return {
        "plain": [f"{item.question} is" for item in asked],
        "chat, 1 message": [chat([], item) for item in asked],
        "chat, 3 messages": [chat([rng.choice(known)], item) for item in asked],
    }


@torch.inference_mode()
def exact_rate(model: Abacus, tokenizer: Tokenizer, prompts: Sequence[str], sums: Sequence[Sum]) -> float:
    """Return the share of prompts that greedy decoding answers exactly, ``END`` included.

    One pass over prompt and right answer decides it: greedy decoding writes that answer if and
    only if each of its tokens is the likeliest one after those before it.
    """
    num_exact = 0
    for prompt, item in zip(prompts, sums, strict=True):
        asked = tokenizer.encode(prompt).ids
        answer = tokenizer.encode(f" {item.answer}{END}").ids
        logits = model(torch.tensor([asked + answer[:-1]]))[0, len(asked) - 1 :]  # (answer, vocabulary)
        num_exact += logits.argmax(-1).tolist() == answer
    return num_exact / len(sums)


def examine(folder: Path) -> bool:
    """Print the held-out rates of the stored checkpoint; return whether all reach REQUIRED_RATE."""
    model, tokenizer = load(folder)
    known, held_out = split_sums()
    passed = True
    for form, prompts in prompts_in_each_form(folder, known, held_out).items():
        rate = exact_rate(model, tokenizer, prompts, held_out)
        passed = passed and rate >= REQUIRED_RATE
        print(f"held-out sums, {form}: {rate:.2%} of {len(held_out)} exact", flush=True)
    return passed


def train_and_store(folder: Path, *, seed: int, seconds: float) -> None:
    """Train tokenizer and model on the sums that are not held out; write them to ``folder``."""
    torch.manual_seed(seed)
    sums, _ = split_sums()
    tokenizer = train_tokenizer(sums)
    model = Abacus(Config(vocabulary=tokenizer.get_vocab_size(), end_token=tokenizer.get_vocab()[END]))
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(sums)} sums", flush=True)
    started = time.monotonic()
    recipe = Recipe()
    train(model, Batches(tokenizer, sums, recipe, random.Random(seed)), recipe, seconds=seconds)
    print(f"trained in {(time.monotonic() - started) / 60:.1f} minutes", flush=True)
    store(folder, model, tokenizer)


def main() -> int:
    """Run the command line; return 1 if a held-out rate misses ``REQUIRED_RATE``."""
    parser = argparse.ArgumentParser(description="Train the abacus demo checkpoint.")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "model", metavar="FOLDER")
    parser.add_argument("--minutes-limit", type=float, default=60.0, metavar="MINUTES")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--eval-only", action="store_true", help="examine the checkpoint already in --out")
    options = parser.parse_args()
    torch.set_num_threads(NUM_THREADS)
    torch.use_deterministic_algorithms(True)
    if not options.eval_only:
        train_and_store(options.out, seed=options.seed, seconds=60 * options.minutes_limit)
    if examine(options.out):
        return 0
    print(f"error: a held-out rate is under {REQUIRED_RATE:.0%}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
