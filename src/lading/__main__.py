"""``python -m lading``."""

from lading.cli import main

if __name__ == "__main__":
    main()
