"""From what the user names to a `Model`: opening files, choosing the weights among them, finding the settings.

Headers and small JSON files are read, never weights; `load_teacher` and `load_student` are the way in.
"""

from hxaconv.load.checkpoint import open_checkpoint
from hxaconv.load.models import load_model, load_other, load_student, load_teacher

__all__ = ["load_model", "load_other", "load_student", "load_teacher", "open_checkpoint"]
