"Everything meant for `from fastai_discriminative.all import *`, after `from fastai.vision.all import *`"
from .registry import *
from .trace import *
from .groups import *
from .presets import *
from .families import *
from .optimizer import *
from .learner import *
from .features import *
from .fast_math import *
from .strategies import *
from .report import *
from .compare import *
