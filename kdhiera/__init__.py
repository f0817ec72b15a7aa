"""Teacher-guided pre-training of hierarchical video transformers from a cache.

With it timm knows the architectures of exported students, whichever is imported first:
`timm.create_model("local-dir:runs/demo/export", pretrained=True)`.
"""

from kdhiera.when_imported import import_after

__version__ = "0.1.0"

import_after("timm", "kdhiera.student.timm_models")
