"""The keys that may stand under `deepspeed:`, known without importing DeepSpeed, which reads past any other in silence."""

import difflib
import math
from typing import Any

_OFFLOAD = "device nvme_path buffer_count pin_memory"
_MONITOR = "enabled output_path job_name"
_ALL = {  # group: its keys; "" are the keys at the top
    "": """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping scheduler
        steps_per_print wall_clock_breakdown memory_breakdown dump_state log_level disable_allgather disable_python_gc
        communication_data_type prescale_gradients gradient_predivide_factor gradient_allreduce_op
        zero_force_ds_cpu_optimizer zero_allow_untested_optimizer""",
    "zero_optimization": """stage allgather_bucket_size allgather_partitions allgather_sequential compute_grad_norm
        contiguous_gradients cpu_offload_use_pin_memory elastic_checkpoint enable_sanity_checks
        gather_16bit_weights_on_model_save ignore_unused_parameters legacy_stage1 load_from_fp32_weights
        log_trace_cache_warnings max_live_parameters max_reuse_distance memory_efficient_linear model_persistence_threshold
        module_granularity_threshold overlap_comm override_module_apply param_persistence_threshold parameter_alignment
        pipeline_loading_checkpoint prefetch_bucket_size reduce_bucket_size reduce_scatter round_robin_gradients
        stage3_allgather_sequential stage3_gather_16bit_weights_on_model_save stage3_gather_fp16_weights_on_model_save
        stage3_max_live_parameters stage3_max_reuse_distance stage3_model_persistence_threshold
        stage3_module_granularity_threshold stage3_param_persistence_threshold stage3_prefetch_bucket_size
        stage3_use_all_reduce_for_fetch_params sub_group_size use_all_reduce_for_fetch_params
        use_multi_rank_bucket_allreduce zero_hpz_partition_size zero_quantized_gradients
        zero_quantized_nontrainable_weights zero_quantized_weights""",
    "zero_optimization.offload_optimizer": f"{_OFFLOAD} pipeline_read pipeline_write fast_init ratio super_offload "
    "cpuadam_cores_perc",
    "zero_optimization.offload_param": f"{_OFFLOAD} buffer_size max_in_cpu",
    "zero_optimization.leaf_module": "classes names name_suffixes",
    "bf16": """enabled bf16_master_weights_and_grads bf16_optimizer_states check_grad_overflow immediate_grad_update""",
    "fp16": """enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis
        min_loss_scale fp16_master_weights_and_grads""",
    "optimizer": "type legacy_fusion",
    "optimizer.params": """lr betas eps weight_decay bias_correction adam_w_mode torch_adam amsgrad set_grad_none
        fp32_optimizer_states""",
    "data_types": "grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules",
    "comms_logger": "enabled verbose prof_all prof_ops debug",
    "flops_profiler": "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file",
    "aio": "block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds",
    "tensorboard": _MONITOR,
    "csv_monitor": _MONITOR,
    "timers": "",
    "timers.throughput": "enabled synchronized",
}
KEYS = {group: tuple(keys.split()) for group, keys in _ALL.items()}

# what DeepSpeed knows and c4c does not use, and what there is instead
_NOT_HERE = {
    "activation_checkpointing": "set engine.activation_checkpointing",
    "amp": "set engine.precision",
    "torch_autocast": "set engine.precision",
    "checkpoint": "c4c writes its own checkpoints: see checkpoint.*",
    "dataloader_drop_last": "set train.drop_last",
    "data_efficiency": "c4c has its own loader",
    "curriculum_learning": "c4c has its own loader",
    "compile": "set engine.compile",
    "wandb": "set run.wandb",
    "pipeline": "",
    "tensor_parallel": "",
    "expert_parallel": "",
    "hybrid_engine": "",
    "elasticity": "",
    "autotuning": "",
    "compression_training": "",
    "weight_quantization": "",
    "progressive_layer_drop": "",
    "eigenvalue": "",
    "sparse_attention": "",
    "comet": "",
    "nebula": "",
    "zero_optimization.zenflow": "",
}
OPTIMIZERS = ("Adam", "AdamW")


def wrong_key(tree: dict, group: str = "") -> tuple[str, str] | None:
    """(the first key under `deepspeed:` that would be ignored or cannot work, what is wrong with it); None if all are right."""
    for name, value in tree.items():
        path = f"{group}.{name}" if group else str(name)
        if path in _NOT_HERE:
            instead = f": {_NOT_HERE[path]}" if _NOT_HERE[path] else ""
            return path, f"c4c does not use that part of DeepSpeed{instead}"
        if path not in KEYS and name not in KEYS[group]:
            return path, _nearest(path, group)
        if path == "optimizer.type" and str(value).lower() not in [known.lower() for known in OPTIMIZERS]:
            return (
                path,
                f"c4c trains with AdamW alone, which its learning rates, decay and checkpoints are made for; got {value!r}",
            )
        if not all(_finite(part) for part in (value if isinstance(value, list) else [value])):
            return path, "must be a finite number"
        if path in KEYS and isinstance(value, dict) and (problem := wrong_key(value, path)):
            return problem
    return None


def _finite(value: Any) -> bool:
    """Whether it is no number, or a finite one; DeepSpeed takes text for a number, too."""
    try:
        return isinstance(value, dict) or math.isfinite(float(value))
    except (TypeError, ValueError, OverflowError):
        return True


def _nearest(path: str, group: str) -> str:
    """A key of the same group with nearly that name, else one of that name elsewhere, else all that the group has."""
    name = path.rpartition(".")[2]
    below = [g.rpartition(".")[2] for g in KEYS if g and g.rpartition(".")[0] == group]
    here = sorted({*KEYS[group], *below})
    near = difflib.get_close_matches(name, here, 1) or [key for key in here if key.startswith(name)]
    if near:
        return f"did you mean deepspeed.{group and f'{group}.'}{near[0]}?"
    elsewhere = [f"{g}.{name}" for g, keys in KEYS.items() if g and name in keys]
    return f"did you mean deepspeed.{elsewhere[0]}?" if elsewhere else f"known keys are {', '.join(here)}"
