"""What an experiment can name: ``run.py list [KIND] [NAME]``.

Nothing is listed by hand: components come from torchdistill's registries, from torchvision's and torch's modules, and
from this package's tables, arguments from signatures, texts from docstrings.

registries -> collect (components) -> kinds -> find (what the user asks for) -> snippet (YAML) -> show
"""

from .show import print_catalog

__all__ = ["print_catalog"]
