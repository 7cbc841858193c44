"""What each backend is asked to compute; knows models and tensors, not which backend they are."""

import torch
from rollouts import completions, ragged, real_tokens, sample

from hrpo_thinking import families
from hrpo_thinking.inputs import ThinkingInputs

__all__ = ["FAMILIES", "plain_results", "replay_inputs", "thinking_gradients", "thinking_results"]
FAMILIES = [kind for kind, family in families.FAMILIES.items() if family.unsloth]
LENGTH = 12


def replay_inputs(model, tokenizer):
    """Left-padded prompts, right-padded completions and made-up states: what a training forward sees."""
    prompts = ragged(tokenizer).to(model.device)
    generator = torch.Generator().manual_seed(0)
    size = (len(prompts["input_ids"]), LENGTH)
    tokens = torch.randint(0, 200, size, generator=generator).to(model.device)
    real = (torch.arange(LENGTH) < torch.tensor([[12], [9], [5], [12]])).to(model.device)
    states = torch.randn(*size, model.config.hidden_size, generator=generator)
    thinks = torch.rand(size, generator=generator) < 0.7
    return {
        "input_ids": torch.cat([prompts["input_ids"], tokens], 1),
        "attention_mask": torch.cat([prompts["attention_mask"], real.long()], 1),
        "thinking_inputs": ThinkingInputs(states.to(model.device), thinks.to(model.device) & real, "projection"),
    }


def thinking_gradients(model, inputs):
    """Gradients of the thinking weights of a fixed linear function of the completions' log-probabilities."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("thinking_" in name and "original_module" not in name)
        parameter.grad = None
    logps = model(**inputs, use_cache=False).logits[:, -LENGTH - 1 : -1].float().log_softmax(-1)
    logps = logps.gather(-1, inputs["input_ids"][:, -LENGTH:, None])[..., 0]
    weights = torch.linspace(-1, 1, logps.numel(), device=logps.device).view_as(logps)
    (logps * weights * inputs["attention_mask"][:, -LENGTH:]).sum().backward()
    return {
        name.partition("model.thinking_")[2].replace(".modules_to_save.default", ""): parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def thinking_results(model, tokenizer):
    """Logits, loss, gradients and greedy rollouts, thinking."""
    inputs = replay_inputs(model, tokenizer)
    results = {}
    for mode in ("eval", "train"):
        getattr(model, mode)()
        with torch.no_grad():
            out = model(**inputs, use_cache=False, output_last_hidden_state=True)
        real = inputs["attention_mask"].unsqueeze(-1)  # what stands at padding is nobody's business
        results |= {f"{mode}.logits": out.logits * real, f"{mode}.state": out.last_hidden_state * real}
    with torch.no_grad():
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        labels[:, :-LENGTH] = -100
        results["train.loss"] = model(**inputs, labels=labels, use_cache=False).loss
    results |= {f"grad.{name}": value for name, value in thinking_gradients(model, inputs).items()}
    model.eval()
    prompts = ragged(tokenizer).to(model.device)
    for batch, rows in (("batch", slice(None)), ("single", slice(1, 2))):
        chosen = {key: value[rows] for key, value in prompts.items()}
        greedy = {"do_sample": False, "temperature": None, "top_k": None, "biased": batch == "batch"}
        out = sample(model, tokenizer, chosen, **greedy)
        real = real_tokens(model, completions(out, chosen).cpu())
        assert out.thinking_residual == "projection" and out.thinking_mask.any()
        results[f"greedy.{batch}.tokens"] = completions(out, chosen)
        results[f"greedy.{batch}.mask"] = out.thinking_mask
        results[f"greedy.{batch}.states"] = out.thinking_states.cpu().float() * real.unsqueeze(-1)
    return results


def plain_results(model, tokenizer):
    """The same kinds of result with thinking not asked for, and every gradient."""
    inputs = {key: value[:2] for key, value in replay_inputs(model, tokenizer).items() if "thinking" not in key}
    results = {}
    model.eval()
    with torch.no_grad():
        out = model(**inputs, use_cache=False)
    results |= {"eval.logits": out.logits, "eval.keys": torch.tensor(list("|".join(out.keys()).encode()))}
    model.train()
    out = model(**inputs, labels=inputs["input_ids"], use_cache=False)
    results |= {"train.loss": out.loss, "train.keys": torch.tensor(list("|".join(out.keys()).encode()))}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("thinking_" not in name)
    logits = model(**inputs, use_cache=False).logits
    logits.square().mean().backward()
    results |= {
        "train.logits": logits,
        **{f"grad.{n}": p.grad for n, p in model.named_parameters() if p.grad is not None},
    }
    model.eval()
    prompts = ragged(tokenizer).to(model.device)
    for name, options in {"greedy": {"do_sample": False}, "sampled": {"do_sample": True, "temperature": 0.7}}.items():
        torch.manual_seed(0)
        out = model.generate(**prompts, max_new_tokens=10, return_dict_in_generate=True, output_logits=True, **options)
        results |= {f"{name}.tokens": out.sequences, f"{name}.logits": torch.stack(out.logits)}
    return results
