"""vLLM's rows of `upstream.TABLE`, and TRL's with what this environment pins."""

from importlib.metadata import version

from upstream_rows import complaints

from hrpo_vllm.names import vllm_version


def test_the_installed_vllm_has_every_name_of_the_table():
    found = complaints("vllm", vllm_version()) + complaints("trl", version("trl"))
    assert not found, "\n".join(found)
