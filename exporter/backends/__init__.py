"""Lowering targets: each folder turns a program into the files one runtime executes."""
