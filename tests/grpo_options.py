"""Every option of TRL's GRPOConfig: what it does in a run that thinks.

Each option is in exactly one of six tables. A new option of a newer TRL is in none, and
`tests/training/test_options.py` then fails with its name.
"""

import math
import os
from contextlib import redirect_stdout
from io import StringIO
from unittest.mock import patch

import torch
import transformers
from accelerate import ParallelismConfig
from datasets import Dataset
from runs import DEFAULTS, PROMPTS, lengths_differ, lora
from tiny import byte_tokenizer, tiny_model

from hrpo_patches import HRPOConfig, HRPOTrainer

TWO = {"max_steps": 2}
EVAL = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
SAVE = {"save_strategy": "steps", "save_steps": 1, "max_steps": 2}
WORKER = {"dataloader_num_workers": 1}
OFF_POLICY = {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.1}
VESPO = {"loss_type": "vespo", "num_iterations": 2, "max_steps": 2, "learning_rate": 0.01}
CUT = {"loss_type": "grpo"} | OFF_POLICY
ENTROPY = {"use_adaptive_entropy": True, "max_steps": 2}
PRINT = {"log_completions": True}
REENTRANT = {"use_reentrant": True}
BEST = SAVE | EVAL | {"load_best_model_at_end": True, "metric_for_best_model": "reward"}

# Option: its value, and the options of both runs, of which one has it and the other has not. The runs must differ.
EFFECTS = {
    "output_dir": ("elsewhere", SAVE),
    # steps and batches
    "per_device_train_batch_size": (4, {}),
    "num_train_epochs": (0.125, {"max_steps": -1, "num_train_epochs": 0.0625}),
    "max_steps": (2, {}),
    "gradient_accumulation_steps": (2, {}),
    "steps_per_generation": (2, {}),
    "generation_batch_size": (16, {}),
    "num_generations": (2, {}),
    "num_generations_eval": (2, EVAL),
    "num_iterations": (2, TWO),
    "shuffle_dataset": (False, {}),
    "seed": (1, {}),
    # the optimizer
    "learning_rate": (1e-2, {}),
    "lr_scheduler_type": ("constant", TWO),
    "lr_scheduler_kwargs": ({"num_cycles": 2}, {"lr_scheduler_type": "cosine_with_restarts"} | TWO),
    "warmup_steps": (2, TWO),
    "optim": ("adafactor", {}),
    "optim_args": ("momentum=0.9,nesterov=true", {"optim": "sgd"} | TWO),
    "weight_decay": (0.5, {}),
    "adam_beta1": (0.1, TWO),
    "adam_beta2": (0.1, TWO),
    "adam_epsilon": (1.0, {}),
    "max_grad_norm": (1e-3, {"optim": "sgd", "learning_rate": 1.0}),
    # precision and memory
    "bf16": (True, {}),
    "disable_dropout": (True, {"peft": lora(lora_dropout=0.5)}),
    "cast_lm_head_to_fp32": (True, {"dtype": torch.bfloat16}),
    # the log
    "logging_strategy": ("no", {}),
    "logging_steps": (2, TWO),
    "logging_first_step": (True, TWO | {"logging_steps": 2}),
    "report_to": ("tensorboard", {}),
    "include_num_input_tokens_seen": ("all", {}),
    "skip_memory_metrics": (False, {}),
    "log_completions": (True, {}),
    "num_completions_to_print": (1, PRINT),
    # evaluation
    "eval_strategy": ("steps", {"eval_steps": 1}),
    "eval_steps": (2, EVAL | TWO),
    "eval_delay": (2, EVAL | TWO),
    "eval_on_start": (True, {}),
    "per_device_eval_batch_size": (8, EVAL),
    # files
    "save_strategy": ("steps", {"save_steps": 1}),
    "save_steps": (2, SAVE),
    "save_total_limit": (1, SAVE),
    "save_only_model": (True, SAVE),
    "load_best_model_at_end": (True, SAVE | EVAL),
    "metric_for_best_model": ("reward_std", BEST),
    "greater_is_better": (False, BEST),
    # loading of data
    # rollouts
    "max_completion_length": (4, {}),
    "temperature": (0.5, {}),
    "top_p": (0.5, {}),
    "top_k": (3, {}),
    "min_p": (0.5, {}),
    "repetition_penalty": (2.0, {}),
    "generation_kwargs": ({"suppress_tokens": [*range(128)]}, {}),
    "chat_template_kwargs": ({"enable_thinking": False}, {}),
    "use_transformers_continuous_batching": (True, {}),
    # rewards and loss
    "beta": (0.5, {}),
    "epsilon": (1e-3, CUT),
    "epsilon_high": (1e-3, CUT),
    "delta": (1.001, CUT),
    "sapo_temperature_neg": (5.0, {"loss_type": "sapo"} | OFF_POLICY),
    "sapo_temperature_pos": (5.0, {"loss_type": "sapo"} | OFF_POLICY),
    "vespo_k_pos": (1.0, {"loss_type": "vespo"} | OFF_POLICY),
    "vespo_lambda_pos": (1.0, {"loss_type": "vespo"} | OFF_POLICY),
    "vespo_k_neg": (1.0, VESPO),
    "vespo_lambda_neg": (1.0, VESPO),
    "importance_sampling_level": ("sequence", OFF_POLICY),
    "reward_weights": ([1.0, 5.0], {}),
    "multi_objective_aggregation": ("normalize_then_sum", {}),
    "scale_rewards": ("none", {}),
    "loss_type": ("sapo", {}),
    "mask_truncated_completions": (True, {}),
    "top_entropy_quantile": (0.2, {}),
    "entropy_coef": (1.0, {}),
    "use_adaptive_entropy": (True, TWO),
    "entropy_coef_min": (0.5, ENTROPY),
    "entropy_coef_max": (0.1, ENTROPY | {"entropy_coef_delta": 0.5, "entropy_target": 20.0}),
    "entropy_coef_delta": (0.5, ENTROPY | {"entropy_target": 20.0}),
    "entropy_target": (20.0, ENTROPY),
    "off_policy_mask_threshold": (1e-9, CUT),
    "use_bias_correction_kl": (False, OFF_POLICY),
}

# Option: as above; what differs is what the loader, the model, the accelerator or a callback holds, not the numbers.
HELD = {
    "use_cpu": (False, {}),
    "full_determinism": (True, {}),
    "gradient_checkpointing": (True, {}),
    "gradient_checkpointing_kwargs": (REENTRANT, {"gradient_checkpointing": True, "bptt": "0"}),
    "activation_checkpointing": (True, {"gradient_checkpointing": None}),
    "activation_checkpointing_kwargs": (REENTRANT, {"gradient_checkpointing": True, "bptt": "0"}),
    "log_level": ("error", {}),
    "disable_tqdm": (True, {}),
    "dataloader_drop_last": (True, {}),
    "dataloader_num_workers": (1, {}),
    "dataloader_persistent_workers": (True, WORKER),
    "dataloader_prefetch_factor": (3, WORKER),
    "dataloader_multiprocessing_context": ("spawn", WORKER),
    "dataloader_in_order": (False, WORKER),
    "accelerator_config": ({"even_batches": False}, {}),
}

# Option: a value that is refused in a sentence, the options beside it, and what the sentence says.
REFUSED = {
    "fp16": (True, {}, "fp16=True needs a GPU"),
    "parallelism_config": (ParallelismConfig(tp_size=2), {}, "environment variable RANK expected"),
    "neftune_noise_alpha": (5.0, {}, "neftune_noise_alpha adds noise"),
    "use_transformers_paged": (True, {}, "use_transformers_paged=True cannot think"),
    "sync_ref_model": (True, {}, "sync_ref_model mixes"),
    "vllm_mode": ("server", {"use_vllm": True}, "vllm_mode='server' cannot think"),
    "vllm_model_impl": ("transformers", {"use_vllm": True}, "vllm_model_impl='transformers' cannot think"),
    "vllm_tensor_parallel_size": (2, {"use_vllm": True}, "vllm_tensor_parallel_size=2 cannot think"),
    "vllm_structured_outputs_regex": (
        "[0-9]+",
        {"use_vllm": True},
        "cannot be combined with vLLM's importance",
    ),
    "auto_find_batch_size": (True, {}, "auto_find_batch_size is not supported by GRPO"),
    "log_completions_hub_repo": ("x/y", {}, "but log_completions is False"),
    "router_aux_loss_coef": (0.5, {}, "not a Mixture-of-Experts model"),
}

# Option: a value and the options beside it; the run is the same as without it, and why that is as it should be.
NO_EFFECT = {
    "label_smoothing_factor": (0.5, {}, "GRPO has a loss of its own"),
    "label_names": (["nonsense"], {}, "GRPO has a loss of its own"),
    "prediction_loss_only": (True, EVAL, "TRL's prediction_step hands over the loss alone"),
    "eval_do_concat_batches": (False, EVAL, "no predictions are kept"),
    "eval_use_gather_object": (True, EVAL, "one process"),
    "eval_accumulation_steps": (1, EVAL, "no predictions are kept"),
    "include_for_metrics": (["loss"], EVAL, "for compute_metrics, which GRPO has not"),
    "batch_eval_metrics": (True, EVAL, "for compute_metrics, which GRPO has not"),
    "length_column_name": ("nonsense", {}, "for samplers that TRL's replaces"),
    "data_seed": (1, {}, "TRL's sampler takes seed"),
    "train_sampling_strategy": ("sequential", {}, "TRL has a sampler of its own; shuffle_dataset=False for that"),
    "use_cache": (True, {}, "generation always has a cache"),
    "bf16_full_eval": (True, EVAL, "for evaluation outside of training"),
    "fp16_full_eval": (True, EVAL, "for evaluation outside of training"),
    "log_unique_prompts": (True, PRINT, "for tables of trackers that are services"),
    "pad_to_multiple_of": (64, {}, "padding is masked"),
    "cache_implementation": ("static", {}, "a static cache has the values of a dynamic one"),
    "remove_unused_columns": (True, {}, "rewards need all columns; our trainer keeps them"),
    "ref_model_mixup_alpha": (0.1, {}, "for sync_ref_model, which is refused"),
    "ref_model_sync_steps": (1, {}, "for sync_ref_model, which is refused"),
    "max_tool_calling_iterations": (1, {}, "for tools, which completions that think do not call"),
    "log_multimodal": (False, PRINT, "for pictures in prompts"),
    "optim_target_modules": (["q_proj"], {}, "for the optimizers of GaLore and APOLLO, packages that are absent"),
    "average_tokens_across_devices": (False, {}, "one process"),
    "log_on_each_node": (False, {}, "one machine"),
    "log_level_replica": ("debug", {}, "one process"),
    "save_on_each_node": (True, SAVE, "one machine"),
    "local_rank": (0, {}, "one process"),
    "do_train": (True, {}, "for scripts"),
    "do_eval": (True, {}, "for scripts"),
    "do_predict": (True, {}, "for scripts"),
    "debug": ("tpu_metrics_debug", {}, "for TPUs"),
    "run_name": ("x", {}, "for trackers that are services"),
    "project": ("x", {}, "for trackers that are services"),
    "trackio_space_id": ("x", {}, "for trackio"),
    "trackio_bucket_id": ("x", {}, "for trackio"),
    "trackio_static_space_id": ("x", {}, "for trackio"),
    "resume_from_checkpoint": ("x", {}, "for scripts, which give it to train()"),
    "ds3_gather_for_generation": (False, {}, "for ZeRO 3"),
    "vllm_server_base_url": ("http://x", {}, "for vllm_mode='server', which is refused"),
    "vllm_server_host": ("x", {}, "for vllm_mode='server', which is refused"),
    "vllm_server_port": (1, {}, "for vllm_mode='server', which is refused"),
    "vllm_server_timeout": (1.0, {}, "for vllm_mode='server', which is refused"),
    "vllm_group_port": (1, {}, "for vllm_mode='server', which is refused"),
    "ddp_find_unused_parameters": (True, {}, "one process"),
    "ddp_bucket_cap_mb": (1, {}, "one process"),
    "ddp_broadcast_buffers": (True, {}, "one process"),
    "ddp_static_graph": (True, {}, "one process"),
    "ddp_timeout": (1, {}, "one process"),
}

LOADING = "commands/test_train.py::test_options_of_loading_and_of_evaluation_reach_the_model_and_the_trainer"
# Option: the test that shows what it does, or the file of several.
ELSEWHERE = {
    "deepspeed": "training/test_distributed.py",
    "model_init_kwargs": LOADING,
    "trust_remote_code": LOADING,
    "enable_jit_checkpoint": LOADING,
    "use_liger_kernel": "commands/test_every_flag.py::test_a_wrong_value_is_a_sentence_that_names_its_flag",
    "transformers_continuous_batching_config": "training/test_rollouts.py",
    "use_vllm": "with_vllm/test_training.py",
    "vllm_importance_sampling_correction": "training/test_config.py",
    "vllm_importance_sampling_mode": "with_vllm/test_training.py",
    "vllm_importance_sampling_clip_max": "with_vllm/test_training.py",
    "vllm_importance_sampling_clip_min": "with_vllm/test_training.py",
    "vllm_importance_sampling_cap": "with_vllm/test_training.py",
}

COMPILED = "takes minutes; tried by hand with eager and inductor, the loss of a thinking step differs by 2e-8 at most"
# Option: why no test shows it.
UNTRIED = {
    "ignore_data_skip": "acts in a run that resumes",
    "restore_callback_states_from_checkpoint": "acts in a run that resumes",
    "logging_nan_inf_filter": "a run stops at a loss that is not finite",
    "liger_kernel_config": "for use_liger_kernel",
    "fsdp": "needs several processes; training/test_distributed.py shards by torch itself",
    "fsdp_config": "for fsdp",
    "dataloader_pin_memory": "needs a GPU",
    "tf32": "needs a GPU",
    "torch_empty_cache_steps": "needs a GPU",
    "vllm_max_model_length": "set in each run of with_vllm/test_training.py",
    **dict.fromkeys(("hub_token", "hub_private_repo", "hub_model_id"), "for push_to_hub"),
    **dict.fromkeys(("hub_strategy", "hub_always_push", "hub_revision"), "for push_to_hub"),
    "push_to_hub": "needs a hub",
    "ddp_backend": "several processes have gloo on a CPU, which accelerate chooses",
    **dict.fromkeys(("torch_compile", "torch_compile_backend", "torch_compile_mode"), COMPILED),
    "vllm_enable_sleep_mode": "needs a GPU",
    "vllm_gpu_memory_utilization": "needs a GPU",
}


def trainer_of(folder, dtype=torch.float32, peft=None, **options):
    """A trainer of a tiny model that thinks, on 32 prompts; evaluation has four of them."""
    torch.manual_seed(0)
    transformers.logging.set_verbosity_warning()
    torch.use_deterministic_algorithms(False)
    options = DEFAULTS | {"temperature": 1.0, "optim": "adamw_torch", "output_dir": str(folder / "run")} | options
    if options["output_dir"] == "elsewhere":
        options["output_dir"] = str(folder / "elsewhere")
    model = tiny_model("llama", thinking={"r_min": 0.5, "r_max": 0.9}).to(dtype)
    prompts = [[{"role": "user", "content": text}] for text in PROMPTS]
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% if enable_thinking is defined %}#{% endif %}{{ messages[0].content }}"
    data = Dataset.from_dict({"prompt": prompts * 8})
    return HRPOTrainer(
        model,
        [lengths_differ, half],
        HRPOConfig(**options),
        data,
        data.select(range(4)),
        processing_class=tokenizer,
        peft_config=peft or lora(),
    )


def half(completions, **_):
    """A second reward, so that weights and aggregation matter."""
    return [float(sum(map(ord, str(text))) % 2) for text in completions]


TIMES = ("runtime", "per_second", "step_time", "mem_")  # their values differ from run to run


def differs(one, other, tolerance=1e-4):
    """Whether two things that were seen differ, numbers by more than rounding."""
    if isinstance(one, float) and isinstance(other, float):
        return not math.isclose(one, other, rel_tol=tolerance, abs_tol=1e-7)
    if type(one) is not type(other):
        return True
    if isinstance(one, dict):
        return one.keys() != other.keys() or any(differs(one[key], other[key], tolerance) for key in one)
    if isinstance(one, list | tuple):
        return len(one) != len(other) or any(map(differs, one, other))
    return one != other


def run(folder, **options):
    """What is seen of a run (log, weights, files, what is printed), and what its objects hold."""
    folder.mkdir()
    printed = StringIO()
    with patch.dict(os.environ), redirect_stdout(printed):
        trainer = trainer_of(folder, **options)
        trainer.train()
    loader = trainer.get_train_dataloader()
    loaded = ("num_workers", "pin_memory", "persistent_workers", "prefetch_factor", "in_order")
    seen = {
        "log": [
            {k: None if any(word in k for word in TIMES) else v for k, v in row.items()}
            for row in trainer.state.log_history
        ],
        "weights": {name: p.detach().float().norm().item() for name, p in trainer.model.named_parameters()},
        "files": sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "tfevents" not in path.name),
        "events": len([*folder.rglob("*tfevents*")]),
        "table": [line for line in printed.getvalue().splitlines() if line.startswith("│")],
        "best": (trainer.state.best_metric, trainer.state.best_global_step),
    }
    held = {
        "loader": {name: getattr(loader.base_dataloader, name) for name in loaded},
        "drop_last": loader.base_dataloader.batch_sampler.drop_last,
        "context": str(loader.base_dataloader.multiprocessing_context),
        "even_batches": trainer.accelerator.even_batches,
        "checkpointed": [
            module._gradient_checkpointing_func.keywords
            for module in trainer.model.modules()
            if getattr(module, "gradient_checkpointing", False)
        ],
        "callbacks": sorted(type(one).__name__ for one in trainer.callback_handler.callbacks),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "verbosity": transformers.logging.get_verbosity(),
    }
    return seen, held
