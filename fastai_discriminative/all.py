"Everything meant for `from fastai_discriminative.all import *`, after `from fastai.vision.all import *`"
from .registry import *
from .trace import *
from .backbone import *
from .layers import *
from .groups import *
from .rules import *
from .presets import *
from .families import *
from .optimizer import *
from .freeze import *
from .time_limit import *
from .learner import *
from .group_table import *
from .builder import *
from .prefix import *
from .features import *
from .fast_math import *
from .best import *
from .phases import *
from .rates import *
from .strategies import *
from .auto import *
from .lr_finder import *
from .preflight import *
from .recorder import *
from .report import *
from .html_report import *
from .compare import *
from .explain import explain_rooms as _explain

_explain() # what `help` says of parameters
