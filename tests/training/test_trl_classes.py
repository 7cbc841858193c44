"""TRL's own classes, also after something has put others in their place."""

import sys

import pytest
from trl import GRPOConfig, GRPOTrainer

from hrpo_patches import HRPOConfig, HRPOTrainer
from hrpo_patches.training.trl_classes import trl_class


def test_without_unsloth_ours_derive_from_the_classes_that_everybody_has():
    assert issubclass(HRPOTrainer, GRPOTrainer) and issubclass(HRPOConfig, GRPOConfig)


@pytest.mark.parametrize("name", ["GRPOConfig", "GRPOTrainer"])
def test_a_class_that_was_replaced_is_found_in_its_file(monkeypatch, name):
    module = "trl.trainer.grpo_config" if name == "GRPOConfig" else "trl.trainer.grpo_trainer"
    original = getattr(sys.modules[module], name)
    replaced = type(name, (original,), {"__module__": module})  # unsloth's config hides like this
    monkeypatch.setattr(sys.modules[module], name, replaced)
    monkeypatch.setitem(sys.modules, "unsloth", None)
    found = trl_class(module, name)
    assert found is not replaced and found.__name__ == name
    assert found.__mro__[1].__name__ == original.__mro__[1].__name__
    assert getattr(sys.modules[module], name) is replaced  # left as it was
    assert trl_class(module, name) is found
