"""The subcommands of ``tract-hub``, a module each; ``tract_hub.cli`` lists them.

A command's module has a function of its own name, whose signature typer reads, and imports
nothing heavy before that function runs.
"""
