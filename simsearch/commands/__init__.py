"""One module a command of the `simsearch` program."""
