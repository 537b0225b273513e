"""The command line `tcsp`: one file a command."""
