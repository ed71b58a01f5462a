"""`python -m citybrain` is the program `citybrain`."""

from citybrain.cli import main

raise SystemExit(main())
