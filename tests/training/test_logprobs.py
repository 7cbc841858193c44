"""The loss holds no logits of all tokens at once, and has the values and gradients of one that does."""

import pytest
import torch
from runs import small_trainer
from tiny import tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from trl.trainer import utils as trl_utils
from trl.trainer.utils import entropy_from_logits, selective_log_softmax

from hrpo_patches.training import logprobs as module
from hrpo_patches.training.logprobs import scores


class Largest(TorchDispatchMode):
    """Remembers how many elements the largest memory of a tensor has that is made or looked at within."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        made = out if isinstance(out, (tuple, list)) else (out,)
        for one in made:
            if isinstance(one, torch.Tensor):
                self.elements = max(self.elements, one.untyped_storage().nbytes() // one.element_size())
        return out


@pytest.mark.parametrize("logits", [1, 100, 10**6], ids=["token by token", "in pieces", "at once"])
def test_values_and_gradients_are_those_of_all_logits(monkeypatch, logits):
    monkeypatch.setattr(module, "LOGITS", logits)
    torch.manual_seed(0)
    head, states = torch.nn.Linear(8, 30), torch.randn(3, 5, 8, requires_grad=True)
    tokens, wanted = torch.randint(0, 30, (3, 5)), torch.randn(3, 5)
    found = scores(head, states, tokens, 0.7, 30)
    whole = head(states) / 0.7
    expected = selective_log_softmax(whole, tokens), entropy_from_logits(whole)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    wrt = [states, *head.parameters()]
    ours, theirs = (torch.autograd.grad((logps * wanted).sum(), wrt) for logps in (found[0], expected[0]))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_run_in_pieces_has_the_losses_and_gradients_of_one_at_once(tmp_path, monkeypatch):
    found = []
    for logits in (module.LOGITS, 500):  # two tokens of the tiny vocabulary
        monkeypatch.setattr(module, "LOGITS", logits)
        torch.manual_seed(0)
        trainer = small_trainer(tmp_path / str(logits), max_steps=1)
        trainer.train()
        (row,) = [row for row in trainer.state.log_history if "loss" in row]
        found.append([row[name] for name in ("loss", "grad_norm", "kl", "entropy", "projection/grad_norm")])
    torch.testing.assert_close(*map(torch.tensor, found), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("bptt", [0, "exact", "sequential"])
def test_nothing_in_a_loss_and_its_gradient_has_the_size_of_all_tokens_times_the_vocabulary(tmp_path, bptt):
    length, vocabulary = 16, 9000
    model = tiny_model("llama", thinking={}, vocab_size=vocabulary)
    trainer = small_trainer(tmp_path, model=model, max_completion_length=length, bptt=bptt)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "LOGITS", 2 * vocabulary)
        with Largest() as seen:
            trainer.train()
    rows = trainer.args.per_device_train_batch_size
    table = vocabulary * model.config.hidden_size
    assert table <= seen.elements < rows * length * vocabulary / 2, (seen.elements, table)


@pytest.mark.skipif(not hasattr(trl_utils, "_use_triton"), reason="TRL before 1.16 has no fused head without triton")
def test_trls_fused_head_has_the_values_and_gradients_of_the_plain_one_while_thinking(tmp_path, monkeypatch):
    trainer, differences = small_trainer(tmp_path, max_steps=1), []
    plain = trainer._score_plain

    def both(model, ids, mask, width, inputs):
        if torch.is_grad_enabled() and inputs:
            found, weights = [], [p for p in model.parameters() if p.requires_grad]
            for score in (plain, trainer._score_fused):
                logps, entropies = score(model, ids, mask, width, inputs)
                gradients = torch.autograd.grad(logps.square().mean(), weights, allow_unused=True)
                kept = mask[:, -width:].bool()
                found.append([logps[kept], entropies[kept], *(one for one in gradients if one is not None)])
            for one, other in zip(*found, strict=True):
                differences.append(((one - other).abs().max() / one.abs().max().clamp(min=1e-9)).item())
        return plain(model, ids, mask, width, inputs)

    monkeypatch.setattr(trainer, "_score_plain", both)
    trainer.train()
    assert len(differences) > 10 and max(differences) < 1e-4
