"""DeepSpeed's configuration, derived from ours."""

from c4c.settings import EngineConfig, TrainConfig
from pipelines.pair_order import rank_rows

# DeepSpeed's keys that one of our settings decides
_OWNERS = {
    "train_batch_size": "train.batch_size",
    "gradient_clipping": "engine.clip_grad_norm",
    "zero_optimization.stage": "engine.zero_stage",
    "bf16.enabled": "engine.precision",
    "fp16.enabled": "engine.precision",
    "optimizer.params.lr": "train.lr",
    "optimizer.params.betas": "train.betas",
    "optimizer.params.eps": "train.eps",
    "optimizer.params.weight_decay": "train.weight_decay",
    "optimizer.params.bias_correction": "train.bias_correction",
    "scheduler": "train.schedule",
}

TORCH_ADAM = "optimizer.params.torch_adam"  # of `deepspeed:`; see c4c.zero.adam

# what DeepSpeed's Adam knows and torch's does not
_DEEPSPEEDS_OWN = ("bias_correction", "set_grad_none", "fp32_optimizer_states")


def deepspeed_config(
    engine: EngineConfig, train: TrainConfig, world: int, extra: dict, torchs_adam: bool = False
) -> dict:
    """DeepSpeed's configuration: ours, with `extra` (the yaml's `deepspeed:` block) over it.

    In fp32 and bf16 and without offload, one rank runs as stage 0 where 1 or 2 is asked for: the result is the same, and it is
    faster. torchs_adam: torch's AdamW updates the weights (see c4c.zero.adam). Raises ValueError where `extra` contradicts one
    of our settings, and if the batch cannot be divided evenly.
    """
    rows = rank_rows(train.batch_size, 0, world).stop
    if rows % train.accumulate:
        raise ValueError(f"train.accumulate={train.accumulate} does not divide the {rows} pairs of a rank evenly")
    micro = train.rows_at_once(rows)
    passes = -(-rows // micro)  # to DeepSpeed, the passes of gradient caching are accumulation too
    offload = {"offload_optimizer": {"device": "cpu"}} if engine.offload != "none" else {}
    offload |= {"offload_param": {"device": "cpu"}} if engine.offload == "all" else {}
    # with one rank there is nothing to partition, yet ZeRO would copy every gradient and weight in each step. (In fp16 the two
    # look for the loss scale differently: ZeRO forgives one overflow, fp16.hysteresis, and stage 0 none)
    alone = world == 1 and engine.precision != "fp16" and engine.offload == "none" and "zero_optimization" not in extra
    stage = 0 if alone and engine.zero_stage < 3 else engine.zero_stage
    # DeepSpeed's default under ZeRO 3 exchanges gradients beside the backward pass, which nobody has tried with gradient
    # caching's passes without gradients on a GPU; on a CPU it changes nothing
    overlap = {"overlap_comm": False} if stage == 3 else {}
    derived = {
        "train_batch_size": micro * passes * world,  # our batch size, unless the last micro-batch is not full
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": passes,
        "gradient_clipping": engine.clip_grad_norm,
        "zero_optimization": {"stage": stage} | overlap | offload,
        "bf16": {"enabled": engine.precision == "bf16"},
        "fp16": {"enabled": engine.precision == "fp16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": train.lr,
                "betas": list(train.betas),
                "eps": train.eps,
                "weight_decay": train.weight_decay,
                "bias_correction": train.bias_correction,
            },
        },
    }
    held = "train.accumulate" if train.accumulate > 1 else "train.micro_batch_size"
    owners = _OWNERS | dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps"), held)
    owners |= {f"zero_optimization.{part}.device": "engine.offload" for part in offload}
    _refuse_contradictions(derived, extra, owners)
    # its timer makes the host wait for the device twice a step (pull request 5363), for a number that c4c has itself
    quiet = {"steps_per_print": 10**12, "wall_clock_breakdown": False, "timers": {"throughput": {"enabled": False}}}
    settings = _over(quiet | derived, extra)
    if torchs_adam:
        params = {k: v for k, v in settings["optimizer"]["params"].items() if k not in _DEEPSPEEDS_OWN}
        settings["optimizer"] = settings["optimizer"] | {"params": {"fused": True} | params | {"torch_adam": True}}
    return settings


def require_bias_correction(train: TrainConfig, lacks: str = "") -> None:
    """Raise ValueError where torch's AdamW cannot do what `train` asks for. lacks: what DeepSpeed's needs, '' if torch's was asked for."""
    if not train.bias_correction:
        why = f"DeepSpeed's fused Adam cannot be compiled: {lacks}" if lacks else f"deepspeed.{TORCH_ADAM}=true"
        raise ValueError(
            f"train.bias_correction=false is not possible with torch's AdamW ({why}). Set train.bias_correction=true, or "
            f"{'install the CUDA toolkit' if lacks else f'deepspeed.{TORCH_ADAM}=false'}"
        )


def _refuse_contradictions(derived: dict, extra: dict, owners: dict[str, str]) -> None:
    for key, given in extra.items():
        if isinstance(derived.get(key), dict) and not isinstance(given, dict):
            raise ValueError(
                f"deepspeed.{key}={given}: it is a group of settings, such as deepspeed.{key}.{next(iter(derived[key]))}"
            )
    for path, owner in owners.items():
        given, ours = at(extra, path), at(derived, path)
        if given is not None and given != ours:
            raise ValueError(f"deepspeed.{path}={given} contradicts {owner}, which makes it {ours}: set only {owner}")


def at(tree: dict, path: str):
    """The value under a dotted name in groups of settings; None if it is not set."""
    for key in path.split("."):
        if not isinstance(tree, dict) or key not in tree:
            return None
        tree = tree[key]
    return tree


def _over(base: dict, extra: dict) -> dict:
    out = dict(base)
    for key, value in extra.items():
        out[key] = _over(out[key], value) if isinstance(value, dict) and isinstance(out.get(key), dict) else value
    return out
