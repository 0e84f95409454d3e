"""What a recipe may say: one class a section, each default in one place, frozen once built. Imports no torch.

Each field's description is what `understudy schema` shows in an editor. Checks over several fields are in `rules`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from understudy.recipe.adapters import Adapter
from understudy.recipe.objectives import CausalLM, Objective
from understudy.recipe.presets import expand_kind, expand_strategy
from understudy.recipe.quantization import Quantization
from understudy.recipe.section import Count, Decay, Fraction, OpenFraction, Processes, Section

__all__ = [
    "DDP",
    "FSDP",
    "CausalLM",
    "Checkpoint",
    "Cluster",
    "Data",
    "DataSource",
    "DeepSpeed",
    "Evaluation",
    "Logging",
    "Model",
    "Optimizer",
    "Parallel",
    "Quantization",
    "Recipe",
    "Schedule",
    "Strategy",
    "Training",
]


class Model(Section):
    path: str | None = None
    """Hub id or directory of the model to train; may be left out with `init: random`."""
    revision: str | None = None
    """Hub branch, tag or commit."""
    tokenizer: str | None = None
    """Hub id or directory of the tokenizer; the model's own when left out."""
    init: Literal["pretrained", "random", "pruned"] = "pretrained"
    """`random` builds the architecture from `config` and reads no weights; `pruned` cuts a smaller one from `path`."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Overrides of the model's configuration; with `init: random` and no `path` also `model_type` and the sizes."""
    attention: Literal["auto", "sdpa", "flash", "eager"] = "auto"
    """Attention kernel; every one keeps documents apart."""
    trust_remote_code: bool = False
    """Run code that ships with the model. Honoured from the command line only."""
    new_tokens: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)] = ()
    """Special tokens to add to the tokenizer; embeddings grow with it."""
    layers: (
        Annotated[tuple[Annotated[int, Field(ge=0, lt=2**31)], ...], Field(min_length=1, strict=False)]
        | Literal["uniform", "first", "first_and_last", "importance"]
        | None
    ) = None
    """With `init: pruned`, the layers to keep: their numbers from 0, or a rule to choose `keep_layers` of them."""
    keep_layers: Count | None = None
    """With `init: pruned` and a rule in `layers`, how many layers to keep."""
    keep_heads: Count | None = None
    """With `init: pruned`, how many query heads of each layer to keep, by importance, whole key-value groups."""
    intermediate_size: Count | None = None
    """With `init: pruned`, how many feed-forward channels of each layer to keep, by importance."""
    hidden_size: Count | None = None
    """With `init: pruned`, how many dimensions of the hidden states to keep, by importance."""


class DataSource(Section):
    path: str
    """File, directory, glob or Hub id; json, jsonl, parquet, csv, arrow or txt, compressed or not."""
    format: Literal["auto", "alpaca", "sharegpt", "messages", "prompt_completion", "text"] = "auto"
    """How a row is read."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Our field: their column."""
    split: str = "train"
    """Split of a Hub data set, or of a directory whose file names tell splits apart."""
    subset: str | None = None
    """Configuration of a Hub data set, where it has several."""
    max_samples: Count | None = None
    """Use only the first so many rows."""
    weight: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0
    """How often an epoch holds each example: 2.0 twice, 0.5 half of them, another half each epoch."""


class Data(Section):
    train: Annotated[tuple[DataSource, ...], Field(min_length=1, strict=False)]
    """Where the training examples come from."""
    eval: Annotated[tuple[DataSource, ...], Field(min_length=1, strict=False)] | None = None
    """Where the evaluation examples come from."""
    eval_fraction: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Take this much of the training data for evaluation instead, the same examples each time."""
    max_length: Annotated[int, Field(ge=2, lt=2**31)] = 2048
    """Longest example, in tokens."""
    overflow: Literal["truncate", "drop", "split"] = "truncate"
    """What happens to a longer one."""
    chat_template: str | None = None
    """A Jinja string, a file, or the name of one of several that the tokenizer has; its own when left out."""
    train_on_prompt: bool = False
    """Supervise every token, not only what the assistant says."""
    num_workers: Processes | Literal["auto"] = "auto"
    """Processes that tokenise."""


class Optimizer(Section):
    kind: Literal["adamw", "adamw_bf16", "adamw_8bit", "adafactor", "lion", "muon", "sgd"] = "adamw"
    """`adamw_bf16` keeps bf16 weights and moments with Kahan summation; `adamw_8bit` keeps 8-bit moments."""
    learning_rate: Annotated[float, Field(gt=0.0)] = 2.0e-5
    """Peak learning rate."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Decoupled weight decay; norms and biases get none."""
    betas: Annotated[tuple[Decay, Decay], Field(strict=False)] = (0.9, 0.95)
    """Decay of the first and second moment (Adam, Lion); the first is the momentum of Muon."""
    eps: Annotated[float, Field(gt=0.0)] = 1.0e-8
    """Added to the denominator (Adam, Muon's AdamW part)."""
    momentum: Fraction = 0.0
    """Momentum of SGD."""
    lora_plus_ratio: Annotated[float, Field(gt=0.0, le=1000.0)] = 1.0
    """Learning rate of LoRA's B matrices over that of all else (LoRA+)."""


class Schedule(Section):
    kind: Literal["cosine", "linear", "constant", "polynomial", "wsd", "step"] = "cosine"
    """`wsd` is warmup, stable, decay; `step` multiplies by `gamma` every `step_epochs` epochs."""
    warmup_ratio: Fraction = 0.03
    """Share of the steps that warm up, linearly from zero."""
    min_ratio: Fraction = 0.1
    """Final learning rate, as a share of the peak."""
    power: Annotated[float, Field(gt=0.0)] = 1.0
    """Exponent of `polynomial`."""
    decay_ratio: Fraction = 0.1
    """Share of the steps in the last phase of `wsd`."""
    gamma: Annotated[float, Field(gt=0.0, le=1.0)] = 0.5
    """Factor of `step`."""
    step_epochs: Count = 1
    """Epochs between two factors of `step`."""


class Training(Section):
    epochs: Annotated[float, Field(gt=0.0, le=100_000.0)] = 3
    """Passes over the training data, where `max_steps` is not given."""
    max_steps: Count | None = None
    """Optimizer steps, over as many epochs as they take."""
    global_batch_size: Count = 32
    """Examples a step, over all devices."""
    micro_batch_tokens: Count | Literal["auto"] = "auto"
    """Most tokens a device holds at once."""
    max_grad_norm: Annotated[float, Field(gt=0.0)] | None = 1.0
    """Clip the global gradient norm to this."""
    precision: Literal["auto", "bf16", "fp16", "fp32", "pure_bf16"] = "auto"
    """bf16 computes in bf16 over fp32 master weights; pure_bf16 keeps weights and moments in bf16 too."""
    activation_checkpointing: Literal["auto", "none", "full", "selective"] = "auto"
    """Recompute activations in the backward pass to save memory."""
    compile: bool = False
    """Compile each decoder layer."""
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 42
    """Order of examples, dropout, and random initial weights."""
    deterministic: bool = False
    """Only kernels whose result is the same on each run."""
    memory_limit: float | str | None = None
    """Most memory that each process takes: a fraction of its device's (0.9) or a size (20GiB)."""
    out_of_memory_retries: Annotated[int, Field(ge=0, le=100)] = 4
    """How often a run that ran out of memory is started again with smaller micro-batches."""


class DDP(Section):
    kind: Literal["ddp"] = "ddp"


class FSDP(Section):
    kind: Literal["fsdp"] = "fsdp"
    sharding: Literal["full_shard", "shard_grad_op", "no_shard", "hybrid_shard"] = "full_shard"
    """`hybrid_shard` shards inside each of `parallel.replicate` groups and replicates over them."""
    offload: bool = False
    """Keep parameters, gradients and optimizer state in host memory."""


class DeepSpeed(Section):
    kind: Literal["deepspeed"] = "deepspeed"
    stage: Literal[0, 1, 2, 3] | None = None
    """ZeRO stage; the config file's when one is given, else 2."""
    offload_optimizer: Literal["none", "cpu", "nvme"] | None = None
    """Where optimizer state lives; the config file's when one is given, else none."""
    offload_parameters: Literal["none", "cpu", "nvme"] | None = None
    """Where ZeRO-3 parameters live; the config file's when one is given, else none."""
    nvme_path: str | None = None
    """Directory on the NVMe disk for `nvme`."""
    config: str | None = None
    """A DeepSpeed JSON file, taken as it is with "auto" filled in."""
    buckets: Literal["auto", "large", "small"] = "auto"
    """How much is sent, fetched ahead and kept at once, where the file does not say: `small` takes less memory."""


Strategy = Annotated[DDP | FSDP | DeepSpeed, Field(discriminator="kind")]


class Parallel(Section):
    replicate: Count = 1
    """Groups that hold a full copy each, for `hybrid_shard`."""


class Evaluation(Section):
    every: Count | OpenFraction | None = None
    """Steps, or a fraction of the run, between evaluations; only at the end when left out."""
    max_batches: Count | None = None
    """Evaluate on at most so many micro-batches a process."""
    samples: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Answer so many evaluation prompts greedily, before training and at each evaluation, and count exact matches."""


class Checkpoint(Section):
    every: Count | OpenFraction | None = None
    """Steps, or a fraction of the run, between checkpoints; only at the end and on request when left out."""
    keep: Count = 2
    """Newest checkpoints to keep."""
    keep_best: bool = False
    """Also keep the one with the lowest evaluation loss: each checkpoint is evaluated first."""
    resume: str = "auto"
    """`auto` goes on from the newest checkpoint in `output_dir`, `never` begins anew; or a checkpoint's path."""
    background: bool = True
    """Write while training goes on, from a copy in host memory of each process's share."""


class Logging(Section):
    every: Count = 1
    """Steps between logged rows."""
    sinks: Annotated[tuple[Literal["console", "jsonl", "tensorboard"], ...], Field(strict=False)] = (
        "console",
        "jsonl",
        "tensorboard",
    )
    """Where they go."""


class Cluster(Section):
    processes: Processes | Literal["auto"] = "auto"
    """Processes to start on each host: one a device, or one on a machine without."""
    nodes: Count = 1
    """Hosts that run it together."""
    min_nodes: Count | None = None
    """Go on with as few hosts when some are lost; with all when left out."""
    max_restarts: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """How often to start again, from the last checkpoint, when a process or a host is lost."""
    hang_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 600.0
    """A run in which no process gets on for so long is ended."""

    @property
    def world_size(self) -> int:
        """Processes of all hosts, of a recipe that is resolved; more than there are where hosts have different
        numbers."""
        assert self.processes != "auto", "the recipe must be resolved first"
        return self.processes * self.nodes


class Recipe(Section):
    """A whole recipe. `name` and `output_dir` are filled in by the loader when left out."""

    name: str
    """Name of the run; the recipe file's stem when left out."""
    output_dir: str
    """The run directory; runs/<name> when left out."""
    model: Model
    data: Data
    objective: Annotated[Objective, BeforeValidator(expand_kind)] = CausalLM()
    """What is minimised."""
    adapter: Annotated[Adapter | None, BeforeValidator(expand_kind)] = None
    """What to train instead of the whole model."""
    quantization: Quantization | None = None
    """Store the frozen weights of an adapted model in fewer bits."""
    optimizer: Annotated[Optimizer, BeforeValidator(expand_kind)] = Optimizer()
    schedule: Annotated[Schedule, BeforeValidator(expand_kind)] = Schedule()
    training: Training = Training()
    strategy: Annotated[Strategy | Literal["auto"], BeforeValidator(expand_strategy)] = "auto"
    parallel: Parallel = Parallel()
    evaluation: Evaluation = Evaluation()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    cluster: Cluster = Cluster()
