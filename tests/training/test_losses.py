"""Every loss of TRL's trains the thinking weights."""

import pytest
from runs import assert_all_thinking_parts_moved, small_trainer

WAYS = [{"loss_type": name} for name in ("grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo", "luspo", "vespo")]
WAYS += [
    {"loss_type": "grpo", "importance_sampling_level": "sequence"},  # GSPO
    {"top_entropy_quantile": 0.5},
    {"mask_truncated_completions": True, "max_completion_length": 24},
    {"scale_rewards": "batch"},
    {"delta": 2.0},
]


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_two_steps_give_every_thinking_weight_a_gradient_and_change_it(tmp_path, options):
    trainer = small_trainer(tmp_path, max_steps=2, temperature=1.0, **options)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    assert_all_thinking_parts_moved(trainer, before)
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert len(rows) == 2 and any(row["projection/grad_norm"] > 0 for row in rows)  # all may be truncated in one
