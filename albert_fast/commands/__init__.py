"""The subcommands of `albert-fast`, one module each; modules with an underscore are shared by several of them."""
