"""The subcommands of `albert-fast`, a module each; what several of them need is in the modules with an underscore."""
