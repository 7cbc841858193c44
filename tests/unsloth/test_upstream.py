"""unsloth's rows of `upstream.TABLE`."""

from importlib.metadata import version

from upstream_rows import complaints


def test_the_installed_unsloth_has_every_name_of_the_table():
    found = complaints("unsloth", version("unsloth"))
    assert not found, "\n".join(found)
