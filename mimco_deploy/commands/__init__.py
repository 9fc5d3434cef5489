"""The commands, one file for each family: parse, call one function, print. cli.py puts them together."""
