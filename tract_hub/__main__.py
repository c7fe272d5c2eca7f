"""``python -m tract_hub``: the console command."""

from tract_hub.cli import main

if __name__ == "__main__":
    main()
