"""The commands of the `simsearch` program, one module each."""
