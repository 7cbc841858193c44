"""Every private or easily moved name of other libraries that this package leans on; holds strings and does no work.

`patching.declared` compares the rows with a version of a library: tests do so with what is installed, and
`make patch-matrix` with released wheels. What the diffs in `patches/` need is in the diffs.
"""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    """Names that are used in one place of another library for one reason.

    Attributes:
        where: "module:Class" or "module", as the library defines the names; of both their source is read.
        names: each a name, a method with the parameters that we rely on ("..." at the end lets more follow), or
            "one | other" where versions differ.
        use: "override", "call", "replace" (put ours in its place), "read", or "add" (put a new name on its objects,
            which must not have it).
        why: what we need it for.
        drop_when: what upstream must offer instead.
        since: the first version that has the names, where an older one that is supported does not.
    """

    where: str
    names: tuple[str, ...]
    use: str
    why: str
    drop_when: str
    since: str = "0"

    @property
    def package(self) -> str:
        """The package that defines the names."""
        return self.where.partition(":")[0].partition(".")[0]


_TRAINER, _GRPO, _TRL_UTILS = (
    "transformers.trainer:Trainer",
    "trl.trainer.grpo_trainer:GRPOTrainer",
    "trl.trainer.utils",
)
_MODEL = "transformers.modeling_utils:PreTrainedModel"
_BATCHING = "transformers.generation.continuous_batching"
_VLLM = "trl.generation.vllm_generation:VLLMGeneration"

TABLE = (
    # --- transformers ----------------------------------------------------------------------------------------------
    Row(
        _TRAINER,
        ("_save(self, output_dir, state_dict)", "save_model(self, output_dir, _internal_call)"),
        "override",
        "a save holds the thinking record and the card, and whole weights where FSDP2 holds shards",
        "Trainer has a hook that writes files beside the weights, and saves FSDP2 models in one file",
    ),
    Row(
        _TRAINER,
        (
            *("_save_checkpoint(self, model, trial)", "_save_optimizer_and_scheduler(self, output_dir)"),
            *("_load_optimizer_and_scheduler(self, checkpoint)", "_load_rng_state(self, checkpoint)"),
            *("_load_best_model(self)", "_load_from_checkpoint(self, resume_from_checkpoint, model)"),
        ),
        "override",
        "checkpoints are the same with and without shards, and a damaged file is one sentence",
        "a checkpoint of FSDP2 can be resumed with another number of processes",
    ),
    Row(
        _TRAINER,
        ("_push_from_checkpoint(self, checkpoint_folder)",),
        "override",
        "what is pushed during training is what hrpo push pushes: no pickles, no paths",
        "Trainer pushes a list of files that the trainer names",
    ),
    Row(
        _TRAINER,
        ("is_fsdp_enabled",),
        "replace",
        "under FSDP2 the optimizer's state is saved and loaded as that of one process",
        "a checkpoint of FSDP2 can be resumed with another number of processes",
    ),
    Row(
        _TRAINER,
        ("create_accelerator_and_postprocess(self)",),
        "override",
        "sharding is checked, and thinking modules become FSDP2 units in float32",
        "accelerate takes a mixed-precision policy for each module",
    ),
    Row(
        _TRAINER,
        (
            *("compute_loss(self, model, inputs, return_outputs, num_items_in_batch)",),
            *("prediction_step(self, model, inputs, prediction_loss_only, ignore_keys)",),
            *("training_step(self, model, inputs, num_items_in_batch)", "evaluation_loop", "log(self, logs, ...)"),
        ),
        "override",
        "supervised latent training has its own batches, loss and metrics",
        "never; these methods are public",
    ),
    Row(
        _TRAINER,
        ("create_optimizer(self, model)", "get_decay_parameter_names(self, model)"),
        "override",
        "gates, Λ and projection are parameter groups with their own learning rates",
        "Trainer takes parameter groups",
    ),
    Row(
        "transformers.training_args:TrainingArguments",
        ("distributed_state",),
        "read",
        "a model is loaded without a device map where TRL loads it without one",
        "TRL's constructor loads a model with an option of its config",
    ),
    Row(
        _MODEL,
        ("_init_weights(self, module)", "_adjust_missing_and_unexpected_keys(self, loading_info)"),
        "override",
        "thinking modules draw their own values, and a checkpoint that lacks some of them is refused",
        "a module can say how it is initialized, and that it must be in a checkpoint",
    ),
    Row(
        _MODEL,
        ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict", "_keys_to_ignore_on_load_missing"),
        "replace",
        "thinking modules stay float32 in a bfloat16 or quantized model, and fresh ones are not reported",
        "a module can say which dtype it needs",
    ),
    Row(
        _MODEL,
        ("_gradient_checkpointing_func",),
        "read",
        "reentrant checkpointing is refused: it cannot run the adjoint's products",
        "a model says which kind of checkpointing is on",
    ),
    Row(
        "transformers.generation.utils:GenerationMixin",
        ("adjust_generation_fn",),
        "override",
        "a model loaded with thinking=False does not keep its file's thinking=True",
        "a generation config can depend on the model's config",
    ),
    Row(
        "transformers.generation.utils:GenerationMixin",
        ("_batch_tokenizer",),
        "add",
        "a manager of continuous batching reads the marker with the tokenizer of generate_batch",
        "generate_batch takes a tokenizer",
    ),
    Row(
        "transformers.configuration_utils:PreTrainedConfig",
        ("_name_or_path",),
        "read",
        "the card names the base model",
        "never, unless it becomes public",
    ),
    Row(
        "transformers.generation.configuration_utils:GenerationConfig",
        ("_from_model_config",),
        "replace",
        "an adapter's generation config is not read as one that was made of a model's config",
        "save_pretrained clears it",
    ),
    Row(
        "transformers.generation.stopping_criteria:StopStringCriteria",
        (
            "_get_stop_string_matching_mode(tokenizer)",
            "clean_tokenizer_vocab(tokenizer, static_prefix, stop_string_matching_mode)",
        ),
        "call",
        "the marker's table needs the bytes that each token adds to a text",
        "a tokenizer hands out its tokens as bytes",
    ),
    Row(
        "transformers.cache_utils:DynamicLayer",
        ("update(self, key_states, value_states, ...)", "get_seq_length(self)"),
        "override",
        "sequential decoding keeps the columns of a cache as separate tensors, each with its gradient",
        "a cache can be differentiated",
    ),
    Row(
        f"{_BATCHING}.continuous_api:ContinuousBatchingManager",
        ("_create_batch_processor(self)", "add_request", "add_requests", "stop", "destroy"),
        "replace",
        "requests may be plain, and their thoughts end with them",
        "continuous batching has hooks for requests",
    ),
    Row(
        f"{_BATCHING}.continuous_api:ContinuousBatchingManager",
        ("batch_processor", "output_router", "_cached_continuous_batching_manager"),
        "read",
        "the hooks on the model's forward find the batch, and a kept manager is refused",
        "continuous batching hands its batch to a hook",
    ),
    Row(
        f"{_BATCHING}.continuous_api:OutputRouter",
        ("deliver(self, output)", "deliver_batch(self, outputs)"),
        "replace",
        "a finished request's output gains its thoughts",
        "continuous batching has hooks for requests",
    ),
    Row(
        f"{_BATCHING}.continuous_api:ContinuousBatchProcessor",
        ("prepare_next_batch(self)", "cache", "scheduler", "inputs_and_outputs"),
        "replace",
        "requests that are added together enter one batch; the hooks read the batch",
        "continuous batching hands its batch to a hook",
    ),
    Row(
        f"{_BATCHING}.input_outputs:ContinuousBatchingIOs",
        ("requests_in_batch",),
        "read",
        "which packed positions belong to which request",
        "continuous batching hands its batch to a hook",
    ),
    Row(
        f"{_BATCHING}.scheduler:Scheduler",
        ("_requests_to_fork", "clear_cancelled_requests(self)"),
        "replace",
        "forks think as their parent does, and cancelled requests keep no thoughts",
        "continuous batching has hooks for requests",
    ),
    Row(
        f"{_BATCHING}.requests:RequestState",
        ("_true_initial_tokens", "initial_tokens", "generated_tokens", "position_offset", "num_children"),
        "read",
        "where a request's completion begins, also after its tokens were computed again",
        "a request says how long its prompt is",
    ),
    Row(
        f"{_BATCHING}.requests:FutureRequestState",
        ("state", "query_length", "has_new_token"),
        "read",
        "which packed positions belong to which request",
        "continuous batching hands its batch to a hook",
    ),
    Row(
        f"{_BATCHING}.cache:PagedAttentionCache",
        (
            "mark_complete_blocks | mark_shareable_blocks_as_complete",
            "search_prefix_match(self, request_id, prompt_ids)",
        ),
        "replace",
        "requests share cached blocks of prompts alone, because thoughts are not in the tokens that name a block",
        "a request can add a salt to the names of its blocks",
    ),
    Row(
        f"{_BATCHING}.cache:PagedAttentionCache",
        ("_thinks",),
        "add",
        "a cache is guarded once",
        "a request can add a salt to the names of its blocks",
    ),
    Row(
        "transformers.generation.configuration_utils:ContinuousBatchingConfig",
        ("page_size | block_size",),
        "read",
        "the cache is sized for the batch",
        "continuous batching sizes its cache from the batch on a CPU",
    ),
    # --- TRL -------------------------------------------------------------------------------------------------------
    Row(
        _GRPO,
        (
            *("_generate(self, prompts)", "_generate_and_score_completions(self, inputs)"),
            "_generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, has_tool_images)",
        ),
        "override",
        "rollouts think, and their states stay with the batch",
        "GRPOTrainer takes a rollout whose tensors it carries to the loss",
    ),
    Row(
        _GRPO,
        (
            "_compute_loss(self, model, inputs)",
            "_get_per_token_logps_and_entropies(self, model, input_ids, attention_mask, logits_to_keep, batch_size, "
            "compute_entropy, compute_aux_loss, ...)",
        ),
        "override",
        "every log-probability is that of a model that thinks as in the rollout",
        "GRPOTrainer hands tensors of the batch to the model's forward",
    ),
    Row(
        _GRPO,
        ("_get_train_sampler(self, dataset)",),
        "override",
        "a resumed run sees its data in the order of the run that was stopped",
        "a checkpoint holds the sampler's state",
    ),
    Row(
        _GRPO,
        ("_tag_names", "_name"),
        "override",
        "the card and its tags name HRPO",
        "never; a subclass is meant to set them",
    ),
    Row(
        _GRPO,
        ("_tokenizer", "_metrics", "generation_config", "vllm_generation", "continuous_batching_config", "ref_model"),
        "read",
        "rollouts are made with the trainer's own tokenizer and settings, and measured beside its metrics",
        "never, unless they become public",
    ),
    Row(
        "trl.trainer.grpo_trainer",
        ("VLLMGeneration",),
        "replace",
        "the trainer makes an engine that thinks",
        "GRPOTrainer takes an engine",
    ),
    Row(
        _TRL_UTILS,
        ("_ChunkedLogProbFunction",),
        "read",
        "whether the fused LM head can run on a GPU, which takes triton",
        "TRL says whether its fused LM head can run",
    ),
    Row(
        _TRL_UTILS,
        ("_use_triton",),
        "read",
        "whether the fused LM head can run without triton",
        "TRL 1.15 is no longer supported",
        since="1.16",
    ),
    Row(
        f"{_TRL_UTILS}:FusedCausalLMOutput",
        ("log_probs", "entropy"),
        "read",
        "what the fused LM head returns",
        "the log-probabilities of a large vocabulary need no head of their own",
    ),
    Row(
        _TRL_UTILS,
        ("pad", "selective_log_softmax", "entropy_from_logits", "create_model_from_path"),
        "call",
        "batches, scores and models are TRL's to the bit where nothing thinks",
        "never; they only move",
    ),
    Row(
        "trl.models.utils",
        ("unwrap_model_for_generation",),
        "call",
        "a rollout runs on the unwrapped model, under ZeRO-3 on its gathered weights",
        "never; it only moves",
    ),
    Row(
        _VLLM,
        ("_init_vllm(self)", "_iter_named_params(self)", "sync_weights(self)", "generate(self, prompts, images, ...)"),
        "override",
        "the engine thinks, runs on a CPU, and is sent weights without merging the adapter into them",
        "VLLMGeneration takes options of vllm.LLM and of each request",
    ),
    Row(
        _VLLM,
        ("_fix_param_name_to_vllm(self, name, extra_prefixes)", "_dist", "llm"),
        "call",
        "weights are sent by vLLM's names, and TRL's own way is kept for FSDP",
        "VLLMGeneration takes options of vllm.LLM and of each request",
    ),
    Row(
        "trl.generation.vllm_generation",
        ("LLM",),
        "replace",
        "the engine is made with our options beside TRL's",
        "VLLMGeneration takes options of vllm.LLM",
    ),
    # --- PEFT ------------------------------------------------------------------------------------------------------
    Row(
        "peft.utils.other:AuxiliaryTrainingWrapper",
        ("disable_adapters(self)", "active_adapters(self)", "original_module"),
        "read",
        "whether a thinking module is the trained copy or the frozen original",
        "PEFT has a function that returns the module in use",
    ),
    Row(
        "peft.utils.other:ModulesToSaveWrapper",
        ("modules_to_save",),
        "read",
        "the trained copies of thinking modules",
        "PEFT has a function that returns the module in use",
    ),
    Row(
        "peft.tuners.lora.layer:LoraLayer",
        ("lora_A", "lora_B", "lora_embedding_A", "lora_bias", "scaling", "use_dora"),
        "read",
        "what an adapter adds to a weight, for vLLM",
        "PEFT returns merged weights without changing the model",
    ),
    Row(
        "peft.tuners.lora.layer:Linear",
        ("get_delta_weight(self, adapter)",),
        "call",
        "what an adapter adds to a weight, for vLLM",
        "PEFT returns merged weights without changing the model",
    ),
    # --- accelerate ------------------------------------------------------------------------------------------------
    Row(
        "accelerate.utils.modeling",
        ("is_peft_model",),
        "call",
        "whether the model has an adapter, whatever wraps it",
        "never; it only moves",
    ),
    Row(
        "accelerate.utils.operations",
        ("recursively_apply(func, data, ...)",),
        "call",
        "an optimizer's state is taken out of its shards",
        "torch returns a whole optimizer state of FSDP2",
    ),
    Row(
        "accelerate.state:AcceleratorState",
        ("fsdp_plugin | deepspeed_plugins",),
        "read",
        "sharding that cannot train thinking modules is refused",
        "never; they only move",
    ),
    # --- torch -----------------------------------------------------------------------------------------------------
    Row(
        "torch.nn.modules.module:Module",
        ("_apply(self, fn, recurse)",),
        "override",
        "model.to(torch.bfloat16) leaves thinking modules in float32",
        "a module can say which dtype it needs",
    ),
    Row(
        "torch.nn.modules.module:Module",
        ("_gives_back", "_monitor_hook"),
        "add",
        "an FSDP2 unit knows whether it resharded its weights, and a backbone has one monitor",
        "FSDPModule says whether it reshards after forward",
    ),
    Row(
        "torch.distributed.fsdp",
        ("fully_shard",),
        "replace",
        "thinking modules become units in float32",
        "accelerate takes a mixed-precision policy for each module",
    ),
    Row(
        "torch.distributed.fsdp",
        ("register_fsdp_forward_method",),
        "call",
        "generate_batch runs parts of the model, whose root must come first",
        "transformers registers it",
    ),
    Row(
        "torch._subclasses.fake_tensor",
        ("FakeTensorMode",),
        "call",
        "the memory of a run is counted on tensors without data",
        "torch makes it public",
    ),
    Row(
        "torch.utils._python_dispatch",
        ("TorchDispatchMode",),
        "override",
        "the memory of a run is counted at each operation",
        "torch makes it public",
    ),
    Row(
        "torch.storage:_StorageBase",
        ("_cdata",),
        "read",
        "a storage is counted once, whatever object names it",
        "UntypedStorage has a key of its own",
    ),
    # --- vLLM ------------------------------------------------------------------------------------------------------
    Row(
        "vllm.v1.worker.gpu_worker:Worker",
        (
            "load_model",
            "compile_or_warm_up_model",
            "execute_model(self, scheduler_output, ...)",
            "use_v2_model_runner",
        ),
        "override",
        "a worker tells the thoughts which requests come and go",
        "vLLM has a hook before each forward",
    ),
    Row(
        "vllm.v1.worker.cpu_worker",
        ("CPUWorker",),
        "override",
        "a worker tells the thoughts which requests come and go",
        "vLLM has a hook before each forward",
    ),
    Row(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        ("_model_forward(self, input_ids, ...)",),
        "replace",
        "the first model runner prepares the thoughts before each forward",
        "the second model runner is the only one",
    ),
    Row(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner",
        ("input_batch", "get_model", "reload_weights"),
        "call",
        "the requests of a forward by row, and weights from training on a CPU",
        "the second model runner is the only one",
    ),
    Row(
        "vllm.v1.worker.gpu_input_batch:InputBatch",
        ("req_ids", "num_computed_tokens_cpu"),
        "read",
        "the requests of a forward by row",
        "the second model runner is the only one",
    ),
    Row(
        "vllm.v1.worker.gpu.model_states.default:DefaultModelState",
        ("prepare_inputs(self, input_batch, req_states)",),
        "override",
        "the second model runner prepares the thoughts with the inputs of each forward",
        "never; a model is meant to override it",
    ),
    Row(
        "vllm.v1.worker.gpu.input_batch:InputBatch",
        ("req_ids", "query_start_loc_np", "num_computed_tokens_np", "num_scheduled_tokens", "input_ids"),
        "read",
        "the requests of a forward by row",
        "vLLM has a hook before each forward",
    ),
    Row(
        "vllm.v1.core.sched.output:SchedulerOutput",
        (
            *("finished_req_ids", "preempted_req_ids", "scheduled_new_reqs", "scheduled_cached_reqs"),
            "num_scheduled_tokens",
        ),
        "read",
        "which requests a step begins, ends, pauses and brings back",
        "vLLM has hooks for requests",
    ),
    Row(
        "vllm.v1.core.sched.output:NewRequestData",
        ("req_id", "prompt_token_ids", "prefill_token_ids", "sampling_params"),
        "read",
        "which requests a step begins",
        "vLLM has hooks for requests",
    ),
    Row(
        "vllm.v1.core.sched.output:CachedRequestData",
        ("resumed_req_ids", "all_token_ids"),
        "read",
        "which requests a step brings back",
        "vLLM has hooks for requests",
    ),
    Row(
        "vllm.v1.core.sched.scheduler:Scheduler",
        ("add_request(self, request)",),
        "replace",
        "requests share cached blocks with requests of the same prompt only",
        "a model can add a salt to a request's blocks",
    ),
    Row(
        "vllm.v1.request:Request",
        ("cache_salt", "block_hashes", "num_prompt_tokens", "update_block_hashes(self)"),
        "replace",
        "requests share cached blocks with requests of the same prompt only",
        "a model can add a salt to a request's blocks",
    ),
    Row(
        "vllm.v1.engine.input_processor:InputProcessor",
        ("process_inputs", "model_config"),
        "replace",
        "a request that cannot be thought is refused before any work",
        "a model can check a request",
    ),
    Row(
        "vllm.v1.engine.output_processor:OutputProcessor",
        ("request_states",),
        "read",
        "which requests still run when their thoughts are asked for",
        "a completion can carry tensors",
    ),
    Row(
        "vllm.v1.executor.uniproc_executor:UniProcExecutor",
        ("driver_worker",),
        "read",
        "training reaches the model of an engine in its own process",
        "vLLM hands out its model",
    ),
    Row(
        "vllm.model_executor.models.config",
        ("MODELS_CONFIG_MAP",),
        "replace",
        "an engine on a model that thinks takes our worker and our scheduler",
        "a model can choose its worker and its scheduler",
    ),
    Row(
        "vllm.model_executor.models.llama:LlamaForCausalLM",
        ("forward(self, input_ids, positions, intermediate_tensors, inputs_embeds)", "load_weights", "compute_logits"),
        "override",
        "a family blends before its backbone and keeps the states that logits are made of",
        "never; a model is meant to define them",
    ),
    Row(
        "vllm.exceptions",
        ("VLLMValidationError",),
        "override",
        "the server answers a refused request with what is wrong",
        "the server answers a ValueError of a model so",
    ),
    # --- unsloth ---------------------------------------------------------------------------------------------------
    Row(
        "unsloth.models.llama:FastLlamaModel",
        ("get_peft_model", "patch_peft_model", "for_training", "for_inference"),
        "call",
        "models and adapters are made and put into their modes as unsloth's own",
        "never; they only move",
    ),
    Row(
        "unsloth.models.llama:FastLlamaModel",
        ("max_seq_length", "_unsloth_gradient_checkpointing"),
        "read",
        "how long an input may be, and which gradient checkpointing was chosen",
        "never, unless they become public",
    ),
    Row(
        "unsloth.save:patch_saving_functions",
        ("unsloth_model_save_pretrained",),
        "replace",
        "a save_pretrained of this name is not wrapped once more",
        "unsloth's merge writes every parameter of modules_to_save",
    ),
    # --- lm-evaluation-harness -------------------------------------------------------------------------------------
    Row(
        "lm_eval.models.huggingface:HFLM",
        ("_model_generate(self, context, max_length, stop, ...)", "_loglikelihood_tokens", "_model"),
        "override",
        "generation tasks are answered thinking, and others are refused",
        "hf passes options to generate",
    ),
    # --- Python ----------------------------------------------------------------------------------------------------
    Row(
        "argparse:ArgumentDefaultsHelpFormatter",
        ("_get_help_string(self, action)",),
        "override",
        "help says the default of a flag that has one, and nothing of one that has none",
        "argparse leaves out defaults of None",
    ),
    Row(
        "argparse:_ActionsContainer",
        ("_actions", "_action_groups", "_option_string_actions"),
        "read",
        "help, docs/options.md and the nearest flag are made of what the parser knows",
        "argparse lists its actions",
    ),
    Row(
        "argparse:_ArgumentGroup",
        ("_group_actions",),
        "read",
        "docs/options.md has a table for each group of flags",
        "argparse lists its actions",
    ),
)
