"""The completions of the page are what the model does under each control."""

import pytest
from tiny import byte_tokenizer, tiny_model

from hrpo_patches.evaluation.demo import Asking, Run, answer, answers
from hrpo_patches.evaluation.think import think
from hrpo_thinking.errors import InputError


@pytest.fixture(scope="module")
def run():
    felt = {"r_min": 0.1, "r_max": 0.5, "residual_scale": "embedding"}
    return Run("tiny", tiny_model("qwen2", thinking=felt), byte_tokenizer(), True)


def asking(**changed):
    given = {"question": "Hi", "second": "What is 3 + 4?", "conditions": ["live"], "seed": 1, "top": 2}
    return Asking(**given | {"max_new_tokens": 12, "temperature": 0.0} | changed)


def test_with_thinking_off_the_plain_model_answers(run):
    thoughts = answer(run, asking(), "off")
    ids = run.tokenizer("Hi", return_tensors="pt")
    out = run.model.generate(**ids, max_new_tokens=12, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert [one.token for one in thoughts] == [run.tokenizer.decode([token]) for token in out.tolist()]
    assert not any(one.thinks or one.words for one in thoughts) and {one.share for one in thoughts} == {1.0}
    assert thoughts != answer(run, asking(), "live")


def test_zeroed_and_swapped_show_the_residuals_that_were_blended(run):
    zeroed, swapped = (answer(run, asking(), name) for name in ("zeroed", "swapped"))
    assert all(one.thinks and not one.words and one.share < 1 for one in zeroed)
    own, other = (answer(run, asking(question=text), "live")[0].words for text in ("Hi", "What is 3 + 4?"))
    assert [word for word, _ in swapped[0].words] == [word for word, _ in other] != [word for word, _ in own]


def test_a_partner_that_goes_on_adds_no_tokens(run, monkeypatch):
    live = answer(run, asking(), "live")
    ids = run.tokenizer("Hi", return_tensors="pt")
    end = run.model.generate(**ids, max_new_tokens=4, do_sample=False, thinking=True, tokenizer=run.tokenizer)[0, -1]
    monkeypatch.setattr(run.model.generation_config, "eos_token_id", int(end))
    assert len(answer(run, asking(question="What is 3 + 4?"), "live")) > 4
    thoughts = think(run.model, run.tokenizer, "Hi", 12, partner="What is 3 + 4?")
    assert [one.token for one in thoughts] == [one.token for one in live[:4]]
    assert [one.entropy for one in thoughts] == pytest.approx([one.entropy for one in live[:4]], abs=1e-4)


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"question": " "}, "the question is empty"),
        ({"conditions": []}, "choose at least one run"),
        ({"conditions": ["swapped"], "second": "Hi "}, "which must differ from the first"),
        ({"seed": None}, "seed must be numbers"),
        ({"temperature": -1.0}, "temperature must be 0"),
        ({"max_new_tokens": 4096}, "max_new_tokens must be at most 2048 here, not 4096"),
    ],
)
def test_what_cannot_be_asked_is_a_sentence_on_the_page(run, changed, sentence):
    (shown,) = answers([run], asking(**changed))
    assert sentence in shown and 'class="problem"' in shown


def test_the_page_says_from_which_token_on_a_control_differs(run):
    *_, shown = answers([run], asking(conditions=["live", "off"]))
    live, off = (answer(run, asking(), name) for name in ("live", "off"))
    first = next(n for n, (one, other) in enumerate(zip(live, off, strict=True), 1) if one.token != other.token)
    assert f"differs from live from token {first} on" in shown


def test_completions_that_are_shown_stay_when_the_next_one_fails(run, monkeypatch):
    def failing(run, asking, condition):
        if condition == "zeroed":
            raise InputError("no more")
        return answer(run, asking, condition)

    monkeypatch.setattr("hrpo_patches.evaluation.demo.answer", failing)
    first, last = answers([run], asking(conditions=["live", "zeroed"]))
    assert first.count('data-thoughts="live"') == last.count('data-thoughts="live"') == 1 and "no more" in last
