"""`python -m jddim`."""

from jddim.cli import main

raise SystemExit(main())
