"""`python -m emocore`."""

from .cli import main

raise SystemExit(main())
