"""`python -m understudy`, for where the script is not on the path."""

from understudy.cli.main import main

if __name__ == "__main__":
    main()
