"""What we rely on in TRL, transformers and PEFT; a version bump fails here by name."""

import inspect

import pytest
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from transformers import PreTrainedModel, StopStringCriteria, Trainer
from transformers.generation import GenerationMixin
from trl import GRPOTrainer
from trl.trainer import utils as trl_utils


@pytest.mark.parametrize(
    ("function", "parameters"),
    [
        (
            GRPOTrainer._generate_single_turn,
            "self prompt_ids images multimodal_fields num_generations has_tool_images",
        ),
        (GRPOTrainer._generate_and_score_completions, "self inputs"),
        (GRPOTrainer._compute_loss, "self model inputs"),
        (GRPOTrainer.training_step, "self model inputs num_items_in_batch"),
        (Trainer.create_optimizer, "self model"),
        (Trainer.get_decay_parameter_names, "self model"),
        (Trainer._save, "self output_dir state_dict"),
        (PreTrainedModel._init_weights, "self module"),
        (PreTrainedModel._adjust_missing_and_unexpected_keys, "self loading_info"),
        (StopStringCriteria._get_stop_string_matching_mode, "tokenizer"),
    ],
)
def test_an_upstream_method_takes_what_we_give(function, parameters):
    assert list(inspect.signature(function).parameters) == parameters.split()


def test_the_log_probabilities_are_asked_for_as_we_answer():
    parameters = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    asked = "self model input_ids attention_mask logits_to_keep batch_size compute_entropy compute_aux_loss"
    assert parameters[:8] == asked.split()


def test_trl_has_the_fused_head_switch_and_the_plain_functions():
    assert hasattr(trl_utils, "_ChunkedLogProbFunction")
    assert "log_probs" in trl_utils.FusedCausalLMOutput.__dataclass_fields__
    assert callable(trl_utils.selective_log_softmax) and callable(trl_utils.entropy_from_logits)


def test_trl_generates_with_the_names_we_use():
    source = inspect.getsource(GRPOTrainer)
    for name in (
        "self.generation_config",
        "self.model_wrapped",
        "self._dist.summon_full_params",
        "self.eos_token_ids",
    ):
        assert name in source
    assert 'if "ref" in model.peft_config else None' in source


def test_peft_marks_copies_as_we_read_them():
    assert isinstance(AuxiliaryTrainingWrapper.disable_adapters, property)
    assert "original_module" in inspect.getsource(AuxiliaryTrainingWrapper.__init__)
    assert "modules_to_save.{adapter_name}" in inspect.getsource(ModulesToSaveWrapper.adapter_state_dict)


def test_sample_is_the_loop_for_greedy_and_sampling():
    from transformers.generation.utils import GENERATION_MODES_MAPPING, GenerationMode

    assert {GENERATION_MODES_MAPPING[mode] for mode in (GenerationMode.SAMPLE, GenerationMode.GREEDY_SEARCH)} == {
        "_sample"
    }
    assert inspect.isfunction(GenerationMixin._sample)


def test_a_callback_sees_the_gradients_before_the_step_and_the_log_line_before_the_reporters():
    step = inspect.getsource(Trainer._run_epoch)
    order = ["_clip_grad_norm(", "on_pre_optimizer_step(", "self.optimizer.step()", "_maybe_log_save_evaluate("]
    assert [step.index(name) for name in order] == sorted(step.index(name) for name in order)
    log = inspect.getsource(Trainer.log)
    assert log.index("log_history.append(output)") < log.index("on_log(self.args, self.state, self.control, logs)")
