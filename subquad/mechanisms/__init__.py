"""All mechanisms, one file each. Importing this package finds and registers every file in its folders."""

from __future__ import annotations

import importlib
import pkgutil

for _found in pkgutil.walk_packages(__path__, prefix=f"{__name__}."):
    importlib.import_module(_found.name)
