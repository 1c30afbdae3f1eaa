"""`python -m lazarus` is the command `lazarus`."""

from lazarus.cli import main

if __name__ == "__main__":
    main()
