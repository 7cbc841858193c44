"""The model families that can think: their module's name in transformers, and what their classes' names begin with.

A line here, `hrpo refresh` and the tests' parameters are all that a new family of this kind needs;
see docs/add-a-model.md.
"""

FAMILIES = {
    "llama": "Llama",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
}

NAMES = " or ".join(", ".join(FAMILIES.values()).rsplit(", ", 1))
