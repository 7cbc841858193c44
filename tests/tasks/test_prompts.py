"""Variables of a chat template that are fixed in it."""

import pytest
from tiny import byte_tokenizer

from hrpo_patches.tasks.prompts import fix_template, prompt_as_trained, prompt_ids
from hrpo_thinking.errors import InputError

BODY = "{% for m in messages %}{{ m.content }}{% endfor %}{% if deep is defined and deep %}+{% else %}-{% endif %}"


@pytest.mark.parametrize("start", ["", "\n", "  ", "{# a comment #}\n"], ids=repr)
def test_a_fixed_variable_changes_nothing_else_and_can_be_fixed_again(start):
    tokenizer, messages = byte_tokenizer(), [{"role": "user", "content": "Hi"}]
    tokenizer.chat_template = start + BODY
    plain = tokenizer.decode(prompt_ids(tokenizer, messages))
    for value, sign in ((True, "+"), (False, "-"), (True, "+")):
        fix_template(tokenizer, {"deep": value}, True)
        assert tokenizer.decode(prompt_ids(tokenizer, messages)) == plain.removesuffix("-") + sign
    assert tokenizer.chat_template.count("set deep") == 1


def test_each_of_several_templates_has_it():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": BODY, "tool_use": BODY}
    fix_template(tokenizer, {"deep": "a 'b'"}, True)
    assert all(one.count("set deep") == 1 for one in tokenizer.chat_template.values())


@pytest.mark.parametrize("options", [{"deep": [1]}, {"de ep": 1}, {"deep": float("inf")}, {"wide": 1}], ids=str)
def test_what_no_template_takes_is_refused(options):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = BODY
    with pytest.raises(InputError, match="--chat_template_kwargs"):
        fix_template(tokenizer, options, True)


def test_a_run_that_recorded_no_prompt_is_not_asked_with_its_prompt_flag(tmp_path):
    (tmp_path / "run.json").write_text('{"task": "gsm8k", "prompt": "plain"}')
    assert prompt_as_trained(str(tmp_path), "Why?") is None
    (tmp_path / "run.json").write_text('{"task": "gsm8k", "prompt": "plain", "asked": "Say: {question}"}')
    assert prompt_as_trained(str(tmp_path), "Why?") == "Say: Why?"
