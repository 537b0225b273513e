"""`python -m tcsp_hf` is `tcsp`."""

from .cli.main import run

if __name__ == "__main__":
    run()
