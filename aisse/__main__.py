"""`python -m aisse`."""

from aisse.cli import main

if __name__ == "__main__":
    main()
