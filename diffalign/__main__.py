"""``python -m diffalign``: the command line, also what torchrun and accelerate start."""

from .cli import main

if __name__ == "__main__":
    main()
