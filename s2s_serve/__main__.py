"""`python -m s2s_serve DIR` serves an export over HTTP."""

import sys

from s2s_serve.server.command import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
