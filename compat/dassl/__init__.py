"""A stand-in for the part of Dassl.pytorch 0.6.3 that CoOp-family code uses.

It serves where no Dassl is installed: the directory above is put last on the path. What it leaves out raises
an error that names the missing thing. It is written from the behaviour of the API; where it differs from
upstream on purpose, the docstring concerned says so.
"""

from ._left_out import refuse_missing_modules

__version__ = "0.6.3+standin"
__homepage__ = "https://github.com/KaiyangZhou/Dassl.pytorch"

refuse_missing_modules(__name__)
