"""``python -m vkd_plugin`` is ``vkd``."""

from .cli import main

raise SystemExit(main())
